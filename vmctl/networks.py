"""vmctl's own NAT network, and the address each VM keeps in it."""

from __future__ import annotations

import ipaddress
import re
import uuid
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from vmctl import render
from vmctl.errors import Conflict, HypervisorError, NotFound, VmctlError
from vmctl.events import Reporter, Step
from vmctl.hosts import Host
from vmctl.hypervisor import network
from vmctl.hypervisor.network import NetworkFacts, Reservation

Subnet = ipaddress.IPv4Network
_START_TRIES = 4
_RESERVE_TRIES = 16


def candidate_subnets() -> Iterator[Subnet]:
    """Subnets to try, in order: /22 of 10/8, whose low second octets clash with other tools' defaults."""
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


def pick_address(subnet: Subnet, vm_uuid: str, taken: Collection[str]) -> str:
    """The address of a VM: found from its UUID, so mostly the same again; the next free one when taken.

    The first ten addresses stay free for the gateway and for people.
    """
    first = int(subnet.network_address) + 10
    count = subnet.num_addresses - 11
    start = uuid.UUID(vm_uuid).int % count
    for step in range(count):
        address = str(ipaddress.IPv4Address(first + (start + step) % count))
        if address not in taken:
            return address
    raise Conflict(f"cannot give VM an address: all {count} of {subnet} are taken")


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


def _define(host: Host, name: str, others: Iterable[NetworkFacts]) -> None:
    others = tuple(others)
    used = {*_host_routes(host), *(other.subnet for other in others if other.subnet)}
    subnet = pick_subnet(used)
    bridge = pick_bridge(name, {*_host_links(host), *(other.bridge for other in others)})
    view = render.NetworkView(
        name=name,
        bridge=bridge,
        domain=name.lower().replace("_", "-"),
        gateway=str(subnet[1]),
        prefix=subnet.prefixlen,
        first=str(subnet[10]),
        last=str(subnet[-2]),
    )
    text = render.network(view)
    network.define(host.conn, text, name=name)


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
            others = [other for other in network.all_networks(host.conn) if other.name != name]
            try:
                _define(host, name, others)
            except VmctlError:
                if (facts := network.find(host.conn, name)) is None:  # not another vmctl's doing: ours to report
                    raise
        try:
            network.start(host.conn, name)
        except HypervisorError as error:
            facts = network.find(host.conn, name)
            if attempt == _START_TRIES - 1:
                raise
            report(Step(f"network {name} cannot start ({error.message}); moving it to a free bridge and subnet"))
            continue
        facts = network.find(host.conn, name)
        if facts is not None and facts.active:
            report(Step(f"network {name}: {facts.subnet} on {facts.bridge}"))
            return facts
    raise NotFound(f"cannot use network {name}: it was removed while being made")


def keep_address(host: Host, mac: str, *, name: str, vm_uuid: str, report: Reporter) -> str:
    """Make sure vmctl's network runs and keeps an address for ``mac``; returns that address."""
    net = host.settings.network
    facts = ensure(host, report)
    for _ in range(_RESERVE_TRIES):
        for entry in facts.reservations:
            if entry.mac == mac:
                return entry.address
        if facts.subnet is None:
            raise Conflict(f"cannot give {name} an address: network {net} has no IPv4 subnet")
        address = pick_address(facts.subnet, vm_uuid, {entry.address for entry in facts.reservations})
        names = {entry.name for entry in facts.reservations}
        label = name if name not in names else f"{name}-{vm_uuid[:8]}"
        if network.reserve(host.conn, net, Reservation(mac, address, label)):
            return address
        facts = ensure(host, report)  # another vmctl took that address meanwhile
    raise Conflict(f"cannot give {name} an address in network {net}: others keep taking it")


def give_up_addresses(host: Host, macs: Collection[str]) -> None:
    """Release the reservations of these MACs in vmctl's network."""
    facts = network.find(host.conn, host.settings.network)
    if facts is None:
        return
    for entry in facts.reservations:
        if entry.mac in macs:
            network.release(host.conn, facts.name, entry)


def rename_reservations(host: Host, macs: Collection[str], new: str) -> None:
    """Let the addresses kept for these MACs go by another name."""
    facts = network.find(host.conn, host.settings.network)
    if facts is None:
        return
    for entry in facts.reservations:
        if entry.mac in macs:
            network.release(host.conn, facts.name, entry)
            network.reserve(host.conn, facts.name, Reservation(entry.mac, entry.address, new))
