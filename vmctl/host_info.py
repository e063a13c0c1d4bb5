"""What a host is: everything `vmctl host info` tells."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vmctl.accel import Decision
from vmctl.choices import AccelChoice
from vmctl.hosts import Host, decide_accel
from vmctl.hypervisor import connection


@dataclass(frozen=True, slots=True)
class HostInfo:
    """Everything `vmctl host info` tells."""

    name: str
    uri: str
    arch: str
    cpu_model: str
    cpus: int
    memory_mib: int
    libvirt: str
    qemu: str
    emulator: Path
    network: str  # "" where guests have user networking
    pool: str
    image_pool: str
    accel: Decision


def info(host: Host, *, refresh: bool = False) -> HostInfo:
    """Gather what the host is."""
    facts, versions = host.facts, connection.versions(host.conn)
    return HostInfo(
        name=host.name,
        uri=host.conn.uri,
        arch=facts.arch,
        cpu_model=facts.cpu_model,
        cpus=facts.cpus,
        memory_mib=facts.memory_mib,
        libvirt=versions.libvirt,
        qemu=versions.hypervisor,
        emulator=facts.emulator,
        network="" if host.conn.session else host.settings.network,
        pool=host.settings.pool,
        image_pool=host.settings.image_pool,
        accel=decide_accel(host, AccelChoice.AUTO, refresh=refresh),
    )
