"""vmctl's own NAT network, and the address each VM keeps in it.

The network's definition pairs its addresses with MACs from the start. A VM that is created picks a
free MAC and so has its address for life, with nothing to be written into the network: each such change would make
libvirt take the network's firewall rules down and set them up again (0.45 s, and a gap for every other guest).
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
import uuid
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from vmctl import render
from vmctl.errors import Conflict, HypervisorError, NotFound, VmctlError
from vmctl.events import Reporter, Step
from vmctl.hosts import Host
from vmctl.hypervisor import inventory, network
from vmctl.hypervisor.network import NetworkFacts
from vmctl.reservation import Reservation

Subnet = ipaddress.IPv4Network
_START_TRIES = 4
ADDRESSES = 490
_FOR_PEOPLE = 10  # the first addresses stay free for the gateway and for what is configured by hand


def candidate_subnets() -> Iterator[Subnet]:
    """Subnets to try, in order: /22 of 10/8, from second octets that other tools' defaults leave alone.

    Half of each is for VMs that are made here, half, by DHCP alone, for those that have come from another host.
    """
    for second in range(77, 255):
        yield ipaddress.IPv4Network(f"10.{second}.0.0/22")


def pick_subnet(used: Collection[Subnet]) -> Subnet:
    """The first candidate that overlaps nothing in ``used``. Raises Conflict."""
    for candidate in candidate_subnets():
        if not any(candidate.overlaps(other) for other in used):
            return candidate
    raise Conflict("cannot make a network: every candidate subnet of 10.0.0.0/8 is in use")


def pick_bridge(name: str, used: Collection[str]) -> str:
    """A bridge name of at most 15 letters, the kernel's limit, that is not in ``used``."""
    stem = "vb-" + re.sub(r"[^A-Za-z0-9]", "", name)[:9]
    for candidate in [stem, *(f"{stem}{number}" for number in range(1, 100))]:
        if candidate not in used:
            return candidate
    raise Conflict(f"cannot make network {name}: a hundred bridges of its name exist")


def parse_routes(table: str) -> tuple[Subnet, ...]:
    """Subnets in the text of /proc/net/route, the default route left out."""
    found = []
    for line in table.splitlines()[1:]:
        columns = line.split()
        if len(columns) >= 8:
            address, mask = (int.from_bytes(bytes.fromhex(columns[i]), "little") for i in (1, 7))
            if mask:
                found.append(ipaddress.IPv4Network((address, bin(mask).count("1")), strict=False))
    return tuple(found)


def macs(host: str, net: str) -> tuple[str, ...]:
    """The MACs that network ``net`` of ``host`` keeps addresses for.

    They do not depend on the subnet, so a network that has to move to another one keeps its VMs' addresses apart.
    """
    prefix = hashlib.sha256(f"{host}/{net}".encode()).digest()
    return tuple(f"52:54:{prefix[0]:02x}:{prefix[1]:02x}:{n >> 8:02x}:{n & 255:02x}" for n in range(ADDRESSES))


def reservations(subnet: Subnet, host: str, net: str) -> tuple[Reservation, ...]:
    """Each of those MACs with its address in ``subnet``."""
    addresses = list(subnet.hosts())[_FOR_PEOPLE:]
    return tuple(Reservation(mac, str(ip)) for mac, ip in zip(macs(host, net), addresses, strict=False))


def pick_mac(known: Sequence[str], vm_uuid: str, taken: Collection[str], away: Collection[str] = ()) -> str:
    """One of the ``known`` MACs that is not in ``taken``: found from the VM's UUID, so mostly the same again.

    One in ``away`` only where no other is left: nobody is sure to need it. Raises Conflict when all are taken.
    """
    for held in ({*taken, *away}, taken):
        for step in range(len(known)):
            mac = known[(uuid.UUID(vm_uuid).int + step) % len(known)]
            if mac not in held:
                return mac
    raise Conflict(f"cannot give the VM an address: all {len(known)} of the network are taken")


def macs_in_use(host: Host) -> dict[str, set[str]]:
    """Every MAC of every domain, with the UUIDs of those that have it."""
    found: dict[str, set[str]] = {}
    for entry in inventory.list_domains(host.conn):
        for mac, _ in entry.facts.nics if entry.facts else ():
            found.setdefault(mac.lower(), set()).add(entry.uuid)
    return found


def _host_routes(host: Host) -> tuple[Subnet, ...]:
    if not host.conn.local:
        return ()
    try:
        return parse_routes(Path("/proc/net/route").read_text())
    except OSError:
        return ()


def _host_links(host: Host) -> set[str]:
    folder = Path("/sys/class/net")
    return {link.name for link in folder.iterdir()} if host.conn.local and folder.is_dir() else set()


def _define(host: Host, name: str) -> None:
    others = [other for other in network.all_networks(host.conn) if other.name != name]
    subnet = pick_subnet({*_host_routes(host), *(other.subnet for other in others if other.subnet)})
    bridge = pick_bridge(name, {*_host_links(host), *(other.bridge for other in others)})
    view = render.NetworkView(
        name=name,
        bridge=bridge,
        domain=name.lower().replace("_", "-"),
        gateway=str(subnet[1]),
        prefix=subnet.prefixlen,
        first=str(subnet[_FOR_PEOPLE]),
        last=str(subnet[-2]),
        reservations=reservations(subnet, host.conn.host, name),
    )
    network.define(host.conn, render.network(view), name=name)


def ensure(host: Host, report: Reporter) -> NetworkFacts:
    """vmctl's network, made on first use and running.

    A bridge or dnsmasq that a crashed daemon left behind may hold what the definition names: then the network
    moves to a free bridge and subnet, for a network that is down has no guests to disturb.
    """
    name = host.settings.network
    facts = network.find(host.conn, name)
    if facts is not None and facts.active:
        return facts
    for attempt in range(_START_TRIES):
        if facts is None or attempt:
            if facts is not None:
                network.remove(host.conn, name)
            try:
                _define(host, name)
            except VmctlError:
                if network.find(host.conn, name) is None:  # not another vmctl's doing: ours to report
                    raise
        try:
            network.start(host.conn, name)
        except HypervisorError as error:
            if attempt == _START_TRIES - 1:
                raise
            report(Step(f"network {name} cannot start ({error.message}); moving it to a free bridge and subnet"))
            facts = network.find(host.conn, name)
            continue
        facts = network.find(host.conn, name)
        if facts is not None and facts.active:
            report(Step(f"network {name}: {facts.subnet} on {facts.bridge}"))
            return facts
    raise NotFound(f"cannot use network {name}: it was removed while being made")
