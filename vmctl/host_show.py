"""Everything `vmctl host show` tells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from vmctl import config, host_ssh
from vmctl.fleet import Fleet, called
from vmctl.hypervisor import capabilities, connection, network, node, storage


class PoolBrief(NamedTuple):
    """A storage pool; bytes."""

    name: str
    state: str
    path: str
    capacity: int
    available: int


@dataclass(frozen=True, slots=True)
class HostDetail:
    """A host as the config file and as libvirt there have it. Memory in MiB."""

    name: str
    uri: str
    peer: str
    address: str
    fingerprint: str
    hostname: str
    uuid: str
    arch: str
    cpu_model: str
    cpus: int
    memory_mib: int
    available_mib: int
    libvirt: str
    qemu: str
    domain_types: tuple[str, ...]
    vms: int
    running: int
    vcpus: int
    given_mib: int
    pools: tuple[PoolBrief, ...]
    networks: tuple[str, ...]


def show(fleet: Fleet, name: str) -> HostDetail:
    """Ask one host. Raises NotFound, HostUnreachable."""
    entry = config.entry(name, fleet.settings)
    with fleet.open(entry) as host:
        facts, versions, load = host.facts, connection.versions(host.conn), node.load(host.conn)
        hostname = capabilities.hostname(host.conn)
        pools = tuple(PoolBrief(*one) for one in storage.pools(host.conn))
        networks = tuple(sorted(net.name for net in network.all_networks(host.conn)))
    return HostDetail(
        name=called(entry),
        uri=entry.uri,
        peer=host_ssh.elsewhere(entry),
        address=host_ssh.address(entry),
        fingerprint=host_ssh.fingerprint(entry.host_key) if entry.host_key else "",
        hostname=hostname,
        uuid=facts.uuid,
        arch=facts.arch,
        cpu_model=facts.cpu_model,
        cpus=facts.cpus,
        memory_mib=facts.memory_mib,
        available_mib=load.available_mib,
        libvirt=versions.libvirt,
        qemu=versions.hypervisor,
        domain_types=facts.domain_types,
        vms=load.vms,
        running=load.running,
        vcpus=load.vcpus,
        given_mib=load.given_mib,
        pools=pools,
        networks=networks,
    )
