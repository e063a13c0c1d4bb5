"""The rows of `list`, which its JSON is too, and the names that a glob means."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vmctl.errors import NotFound
from vmctl.hypervisor import inventory
from vmctl.hypervisor.inventory import Entry
from vmctl.hypervisor.states import State

if TYPE_CHECKING:
    from vmctl.agent import Glance
    from vmctl.domain_brief import Brief
    from vmctl.hosts import Host
    from vmctl.record import Record


_ARP, _COMPLETE = Path("/proc/net/arp"), 0x2


class Row(NamedTuple):
    """One VM in a list. Memory in MiB, uptime in seconds (None: not running, or not known from here)."""

    name: str
    state: State
    accel: str
    vcpus: int
    memory_mib: int
    address: str
    host: str
    image: str
    uptime_s: float | None
    labels: Mapping[str, str]
    uuid: str
    problem: str = ""


def no_answer(host: str, why: str) -> Row:
    """What stands for the VMs of a host that cannot be asked: never nothing, which would look like no VMs."""
    return Row("", State.UNREACHABLE, "", 0, 0, "", host, "", None, {}, "", why)


def rows(
    host: Host, *, states: Collection[State] = (), labels: Mapping[str, str | None] | None = None
) -> tuple[Row, ...]:
    """All VMs, or those in one of ``states`` and with all of ``labels`` (value None: any value)."""
    entries = inventory.list_domains(host.conn)
    addresses = addresses_of(host, entries)
    name = host.name
    found = (_row(entry, addresses, name) for entry in entries)
    return tuple(row for row in found if (not states or row.state in states) and _labelled(row.labels, labels or {}))


def _labelled(have: Mapping[str, str], wanted: Mapping[str, str | None]) -> bool:
    return all(key in have and (value is None or have[key] == value) for key, value in wanted.items())


def shown_state(state: State, record: Record | None) -> State:
    """The state to show: a VM whose creation did not come to its end has no other yet, whatever QEMU does."""
    return State.CREATING if record is not None and record.creating else state


def _row(entry: Entry, addresses: Callable[[Entry], str], host: str) -> Row:
    facts = entry.facts
    record = facts.record if facts else None
    return Row(
        name=entry.name,
        state=shown_state(entry.state, record),
        accel=facts.accel or "" if facts else "",
        vcpus=entry.vcpus,
        memory_mib=entry.memory_mib,
        address=addresses(entry),
        host=host,
        image=record.image if record else "",
        uptime_s=entry.uptime_s,
        labels=dict(record.labels) if record else {},
        uuid=entry.uuid,
    )


def addresses_of(
    host: Host, entries: Iterable[Entry], glance: Callable[[str], Glance] | None = None
) -> Callable[[Entry], str]:
    """A look-up of addresses: reservations and leases of the networks in use, read once each.

    On a network to which libvirt gives no addresses, a bridged one, what this machine has lately heard of its
    neighbours is all that a list may ask; ``glance`` is what the guest's agent said, for who has asked it.
    """
    used: dict[str, set[str]] = {}
    for entry in entries:
        for mac, source in entry.facts.nics if entry.facts and not _fixed(entry.facts) else ():
            used.setdefault(source, set()).add(mac)
    known: dict[str, str] = {}
    given: set[str] = set()
    if used and host.conn.qemu and not host.conn.session:
        from vmctl.hypervisor import network  # late: without a card there is nothing to look up

        # Of one VM or a few its own networks are asked for, of a list all at once.
        nets = network.named(host.conn, used) if glance else network.all_networks(host.conn)
        for net in nets:
            if net.gateway:
                given.add(net.name)
            if net.name in used:
                kept = {entry.mac: entry.address for entry in net.reservations}
                # A card whose MAC the user chose has none on vmctl's network either.
                if net.gateway and used[net.name] - kept.keys():
                    known |= {lease.mac: lease.address for lease in network.leases(host.conn, net.name)}
                known |= kept
        if used.keys() - given and host.conn.local:
            known = neighbours(_ARP) | known

    def look_up(entry: Entry) -> str:
        facts = entry.facts
        if facts is None:
            return ""
        if fixed := _fixed(facts):
            return fixed
        if found := next((known[mac] for mac, _ in facts.nics if mac in known), ""):
            return found
        bridged = {mac.lower() for mac, source in facts.nics if source not in given}
        return glance(entry.name).reachable(bridged)[0] if glance and bridged else ""

    return look_up


def _fixed(facts: Brief) -> str:
    """The address that a VM's record tells, which nobody needs to be asked for; "" for none."""
    ssh = facts.record.ssh if facts.record else None
    if ssh and ssh.forward_port:
        return f"127.0.0.1:{ssh.forward_port}"
    return (ssh and ssh.address) or ""


def neighbours(table: Path) -> dict[str, str]:
    """Addresses by MAC, of what the kernel has heard of (proc(5), /proc/net/arp)."""
    try:
        rows = [line.split() for line in table.read_text().splitlines()[1:]]
    except OSError:
        return {}
    return {row[3].lower(): row[0] for row in rows if len(row) > 3 and int(row[2], 16) & _COMPLETE}


def is_glob(pattern: str) -> bool:
    """Whether it may mean several names."""
    return any(letter in pattern for letter in "*?[")


def matching(host: Host, patterns: Sequence[str]) -> tuple[str, ...]:
    """Names for what a user typed: a plain name as it is, a glob as all it matches, none twice.

    Raises NotFound for a glob that matches nothing.
    """
    found: dict[str, None] = {}
    names: tuple[str, ...] | None = None
    for pattern in patterns:
        if not is_glob(pattern):
            found[pattern] = None
            continue
        names = inventory.names(host.conn) if names is None else names
        matched = fnmatch.filter(names, pattern)
        if not matched:
            raise NotFound(f"cannot find VMs: none matches {pattern!r}", missing="VM", hint="see `vmctl list`")
        found |= dict.fromkeys(matched)
    return tuple(found)
