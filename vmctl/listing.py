"""VMs as users see them: the rows of `list`, and everything about one for `show`. The JSON is these same objects."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmctl.errors import NotFound
from vmctl.hypervisor import inventory
from vmctl.hypervisor.inventory import Entry
from vmctl.hypervisor.states import State

if TYPE_CHECKING:
    from vmctl.accel import Decision
    from vmctl.domain_xml import Brief, DiskFacts, NicFacts
    from vmctl.hosts import Host


@dataclass(frozen=True, slots=True)
class Row:
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


def rows(
    host: Host, *, states: Collection[State] = (), labels: Mapping[str, str | None] | None = None
) -> tuple[Row, ...]:
    """All VMs, or those in one of ``states`` and with all of ``labels`` (value None: any value)."""
    entries = inventory.list_domains(host.conn)
    addresses = _addresses(host, entries)
    name = host.conn.host
    found = (_row(entry, addresses, name) for entry in entries)
    return tuple(row for row in found if (not states or row.state in states) and _labelled(row.labels, labels or {}))


def _labelled(have: Mapping[str, str], wanted: Mapping[str, str | None]) -> bool:
    return all(key in have and (value is None or have[key] == value) for key, value in wanted.items())


def _row(entry: Entry, addresses: Callable[[Brief | None], str], host: str) -> Row:
    facts = entry.facts
    record = facts.record if facts else None
    return Row(
        name=entry.name,
        state=entry.state,
        accel=facts.accel or "" if facts else "",
        vcpus=entry.vcpus,
        memory_mib=entry.memory_mib,
        address=addresses(facts),
        host=host,
        image=record.image if record else "",
        uptime_s=entry.uptime_s,
        labels=dict(record.labels) if record else {},
        uuid=entry.uuid,
    )


def _addresses(host: Host, entries: Iterable[Entry]) -> Callable[[Brief | None], str]:
    """A look-up of addresses: reservations and leases of the networks in use, read once each."""
    used = {source for entry in entries if entry.facts for _, source in entry.facts.nics}
    known: dict[str, str] = {}
    if used and host.conn.qemu and not host.conn.session:
        from vmctl.hypervisor import network  # late: without a card there is nothing to look up

        for net in network.all_networks(host.conn):
            if net.name in used:
                leases = () if net.name == host.settings.network else network.leases(host.conn, net.name)
                known |= {lease.mac: lease.address for lease in leases}
                known |= {entry.mac: entry.address for entry in net.reservations}

    def look_up(facts: Brief | None) -> str:
        if facts is None:
            return ""
        if facts.record and facts.record.ssh and facts.record.ssh.forward_port:
            return f"127.0.0.1:{facts.record.ssh.forward_port}"
        return next((known[mac] for mac, _ in facts.nics if mac in known), "")

    return look_up


@dataclass(frozen=True, slots=True)
class Detail:
    """Everything about one VM."""

    name: str
    uuid: str
    state: State
    why: str
    uptime_s: float | None
    description: str
    labels: Mapping[str, str]
    accel: Mapping[str, object]
    vcpus: int
    memory_mib: int
    cpu: str
    machine: str
    firmware: str
    image: str
    image_digest: str
    address: str
    ssh_user: str
    ssh_host_key: str
    disks: tuple[DiskFacts, ...]
    nics: tuple[NicFacts, ...]
    graphics: str
    agent: bool
    console_log: str
    autostart: bool
    persistent: bool
    spec_digest: str
    host: str


def detail(host: Host, name: str, decision: Callable[[], Decision]) -> Detail:
    """One VM in full; ``decision`` gives the host's accelerator decision, to set beside what the VM uses."""
    from vmctl.domain_xml import Brief
    from vmctl.hypervisor import domain

    vm = domain.find(host.conn, name)
    facts, record = vm.facts, vm.facts.record
    pairs = tuple((nic.mac, nic.source) for nic in facts.nics)
    short = Brief(vm.uuid, facts.accel, facts.vcpus, facts.memory_mib, pairs, record)
    entry = Entry(vm.name, vm.uuid, vm.state, facts.vcpus, facts.memory_mib, None, short)
    here = decision()
    accel: dict[str, object] = {
        "chosen": facts.accel or "",
        "requested": record.accel_requested if record else "",
        "reason": record.accel_reason if record else "defined outside vmctl",
        "host": here.to_json(),
    }
    ssh = record.ssh if record else None
    return Detail(
        name=vm.name,
        uuid=vm.uuid,
        state=vm.state,
        why=vm.why,
        uptime_s=inventory.uptime_s(host.conn, vm.name) if vm.active else None,
        description=facts.description,
        labels=dict(record.labels) if record else {},
        accel=accel,
        vcpus=facts.vcpus,
        memory_mib=facts.memory_mib,
        cpu=facts.cpu,
        machine=facts.machine,
        firmware=facts.firmware,
        image=record.image if record else "",
        image_digest=record.image_digest if record else "",
        address=_addresses(host, [entry])(short),
        ssh_user=ssh.user if ssh else "",
        ssh_host_key=ssh.host_key if ssh else "",
        disks=facts.disks,
        nics=facts.nics,
        graphics=facts.graphics,
        agent=facts.agent,
        console_log=facts.serial_log,
        autostart=vm.autostart,
        persistent=vm.persistent,
        spec_digest=record.spec_digest if record else "",
        host=host.conn.host,
    )


def matching(host: Host, patterns: Sequence[str]) -> tuple[str, ...]:
    """Names for what a user typed: a plain name as it is, a glob as all it matches, none twice.

    Raises NotFound for a glob that matches nothing.
    """
    found: dict[str, None] = {}
    names: tuple[str, ...] | None = None
    for pattern in patterns:
        if not any(letter in pattern for letter in "*?["):
            found[pattern] = None
            continue
        names = inventory.names(host.conn) if names is None else names
        matched = fnmatch.filter(names, pattern)
        if not matched:
            raise NotFound(f"cannot find VMs: none matches {pattern!r}", hint="see `vmctl list`")
        found |= dict.fromkeys(matched)
    return tuple(found)
