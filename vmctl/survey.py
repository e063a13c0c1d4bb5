"""Looking at all hosts and their VMs at once, for plans: what is where, what it uses, and what may not move."""

from __future__ import annotations

import time
import xml.etree.ElementTree as ET
from collections.abc import Collection, Mapping, Sequence, Set
from contextlib import ExitStack
from typing import NamedTuple

from vmctl import domain_xml, fleet
from vmctl.census import Census, Cpu, HostSeen, VmSeen
from vmctl.choices import Accel
from vmctl.config import HostEntry
from vmctl.domain_brief import ACCEL_OF_TYPE
from vmctl.errors import VmctlError
from vmctl.fleet import Fleet, called
from vmctl.hosts import Host
from vmctl.hypervisor import network, node, population
from vmctl.hypervisor.population import Guest, Measure
from vmctl.hypervisor.states import State
from vmctl.wait import pause

APART, PRIORITY, PINNED = "anti-affinity", "priority", "pinned"
_INTERVAL_S = 1.0
_TRIES = 3  # each passes over one more guest that hangs
_UNSURE = frozenset({"I/O error", "post-copy", "post-copy failed", "migration"})


class Survey(NamedTuple):
    """What was seen, and what of it could not be made sense of."""

    census: Census
    notes: tuple[str, ...]


class _Part(NamedTuple):
    uuid: str
    host: HostSeen
    vms: tuple[VmSeen, ...]
    notes: tuple[str, ...]


def survey(asked: Fleet, names: Sequence[str] = (), *, avoid: Collection[str] = (), timeout_s: float) -> Survey:
    """Look at all hosts, or those of ``names``; nothing is to be placed on those to ``avoid``. Raises NotFound.

    A host that does not answer is in it, with its problem and without VMs; so is one that is there by another name.
    """
    entries = asked.entries(names)
    asked.entries([*avoid])  # a name that is none is an error
    hosts: list[HostSeen] = []
    vms: list[VmSeen] = []
    notes: list[str] = []
    known: dict[str, str] = {}
    for name, answer in fleet.each(entries, lambda entry: _part(asked, entry), timeout_s):
        problem = answer.message if isinstance(answer, VmctlError) else ""
        if not isinstance(answer, VmctlError) and known.setdefault(answer.uuid, name) != name:
            problem = f"it is the same host as {known[answer.uuid]}"
        if problem or isinstance(answer, VmctlError):
            hosts.append(HostSeen(name, problem=problem))
            notes.append(f"{name}: {problem}")
        else:
            hosts.append(answer.host._replace(draining=name in avoid))
            vms += answer.vms
            notes += answer.notes
    return Survey(Census(tuple(hosts), tuple(vms)), tuple(notes))


def _part(asked: Fleet, entry: HostEntry) -> _Part:
    name = called(entry)
    with ExitStack() as stack:
        host, first = _opened(asked, entry, stack)
        began, before, seen = time.monotonic(), node.load(host.conn), _host(name, host)
        guests, uuid = population.guests(host.conn), host.facts.uuid
        pause(max(0.0, _INTERVAL_S - (time.monotonic() - began)))
        running = {guest.uuid for guest in guests if ET.fromstring(guest.xml).get("id") is not None}
        second, host = _answers(asked, entry, host, running, stack)
        took_s, now = time.monotonic() - began, node.load(host.conn)
    every = now.all_ns - before.all_ns
    vms, notes = [], []
    for guest in guests:
        used = second.get(guest.uuid)
        vm, note = vm_seen(guest, seen, used, _load(first, second, guest.uuid, took_s))
        if vm.running and not used and host.conn.qemu:
            vm = vm._replace(pinned=vm.pinned or "its QEMU does not answer")
        vms.append(vm)
        notes += [note] if note else []
    seen = seen._replace(
        cpus=now.cpus,
        memory_mib=now.memory_mib,
        available_mib=now.available_mib,
        load=now.cpus * (now.busy_ns - before.busy_ns) / every if every > 0 else 0.0,
    )
    return _Part(uuid, seen, tuple(vms), tuple(notes))


def _opened(asked: Fleet, entry: HostEntry, stack: ExitStack) -> tuple[Host, Mapping[str, Measure]]:
    """The host over a connection that no hung guest holds up, and what its VMs have used."""
    for _ in range(_TRIES):
        host = asked.open(entry)
        try:
            if (found := population.measures(host.conn)) is not None:
                return stack.enter_context(host), found
        except VmctlError:
            host.conn.close()
            raise
    return stack.enter_context(asked.open(entry)), {}


def _answers(
    asked: Fleet, entry: HostEntry, host: Host, running: Set[str], stack: ExitStack
) -> tuple[Mapping[str, Measure], Host]:
    """What VMs have used by now, and a connection that still answers.

    A VM that somebody else asks at this moment, the same host by another name for one, is passed over: its turn is
    waited for, and only one that never answers has a QEMU that hangs.
    """
    found: Mapping[str, Measure] | None = population.measures(host.conn)
    if found is None:
        host, found = _opened(asked, entry, stack)
    if not host.conn.qemu or not (missing := running - found.keys()):
        return found, host
    waited: Mapping[str, Measure] | None = population.measures(host.conn, missing)
    if waited is None:
        host, waited = _opened(asked, entry, stack)
    return {**found, **waited}, host


def _load(first: Mapping[str, Measure], second: Mapping[str, Measure], uuid: str, took_s: float) -> float:
    """How many processors it kept busy between the two."""
    if uuid not in first or uuid not in second:
        return 0.0
    return max(0.0, (second[uuid].cpu_ns - first[uuid].cpu_ns) / 1e9 / took_s)


def _host(name: str, host: Host) -> HostSeen:
    facts = host.facts
    accels = frozenset(ACCEL_OF_TYPE[kind] for kind in facts.domain_types if kind in ACCEL_OF_TYPE)
    return HostSeen(
        name,
        arch=facts.arch,
        accels=accels,
        cpu_model=facts.cpu_model,
        cpu_flags=population.cpu_flags(host.conn),
        cpu_models=population.kvm_cpu_models(host.conn, facts.arch) if Accel.KVM in accels else frozenset(),
        machines=facts.machines,
        networks=_networks(host),
    )


def _networks(host: Host) -> frozenset[str]:
    if not host.conn.qemu or host.conn.session:
        return frozenset()
    own = host.settings.network  # which is made when it is needed
    return frozenset({own, *(net.name for net in network.all_networks(host.conn))})


# --- pure ------------------------------------------------------------------------------------------------------


def vm_seen(guest: Guest, host: HostSeen, used: Measure | None, load: float) -> tuple[VmSeen, str]:
    """The VM as a value, and what is wrong with its labels or ""."""
    root = ET.fromstring(guest.xml)
    facts = domain_xml.read(root)
    labels = facts.record.labels if facts.record else {}
    priority, note = 0, ""
    try:
        priority = int(labels.get(PRIORITY, "0"))
    except ValueError:
        note = f"{host.name}: label {PRIORITY}={labels[PRIORITY]} of {guest.name} is no whole number: taken for 0"
    running = guest.state in {State.RUNNING, State.PAUSED, State.STOPPING, State.SUSPENDED, State.CRASHED} and (
        root.get("id") is not None
    )
    kind = root.find("os/type")
    vm = VmSeen(
        guest.name,
        host.name,
        vcpus=facts.vcpus,
        memory_mib=facts.memory_mib,
        resident_mib=used.resident_mib if used else 0,
        load=load,
        running=running,
        priority=priority,
        apart=labels.get(APART, ""),
        pinned=_pinned(guest, root, labels, running=running),
        arch="" if kind is None else kind.get("arch", ""),
        accel=facts.accel,
        machine=facts.machine,
        networks=frozenset(one.get("network", "") for one in root.iterfind("devices/interface/source[@network]")),
        cpu=_cpu(root, host) if facts.accel is Accel.KVM else Cpu(),
    )
    return vm, note


def _pinned(guest: Guest, root: ET.Element, labels: Mapping[str, str], *, running: bool) -> str:
    """Why it stays where it is, whatever room there is elsewhere; "" when it can move."""
    if PINNED in labels:
        return f"it is labelled {PINNED}" + (f": {labels[PINNED]}" if labels[PINNED] else "")
    if guest.state is State.SAVED:
        return "its saved memory lies there"
    off = guest.state is State.STOPPED or (guest.state is State.CRASHED and not running)  # its QEMU is gone
    if not off and guest.state not in {State.RUNNING, State.PAUSED} or guest.why in _UNSURE:
        return f"it is {guest.state}" + (f" ({guest.why})" if guest.why else "")
    if guest.snapshots:
        return f"it has snapshots, which libvirt does not move: vmctl snapshot list {guest.name}"
    devices = [*root.iterfind("devices/hostdev"), *root.iterfind("devices/interface[@type='hostdev']")]
    if devices:  # also of one that is off: what has that address on another host is another device
        return "it has a device of its host"
    if running and root.find("devices/filesystem") is not None:
        return "it has a folder of its host mounted"
    return ""


def _cpu(root: ET.Element, host: HostSeen) -> Cpu:
    """What a KVM guest needs. One that is off and takes the host's model takes the next host's just as well."""
    cpu = root.find("cpu")
    if cpu is None:
        return Cpu()
    if cpu.get("mode") in {"host-passthrough", "maximum"}:
        return Cpu(host.cpu_model, host.cpu_flags, exact=True)
    return Cpu((cpu.findtext("model") or "").strip())
