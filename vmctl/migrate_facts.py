"""Reading both hosts of a migration: what migrate_problems.py judges."""

from __future__ import annotations

import threading
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NamedTuple

from vmctl import disk_xml, elsewhere, homes, host_check, host_ssh, identity, layer_check, migrate_files
from vmctl.at_once import beside
from vmctl.config import HostEntry
from vmctl.errors import NotFound, VmctlError
from vmctl.fleet import Fleet, called
from vmctl.host_check import SeenFrom
from vmctl.hosts import Host
from vmctl.hypervisor import capabilities, connection, domain, migration, network, node
from vmctl.hypervisor.domain import Domain
from vmctl.hypervisor.migration import Copying, Standing, Way
from vmctl.hypervisor.states import recovery
from vmctl.migrate_files import File, Look
from vmctl.migrate_problems import Cpu, DiskNeed, Facts, HostSide, Problem, VmFacts, problems


@dataclass(frozen=True, slots=True)
class Found:
    """Both hosts as they were looked at, and the VM's files."""

    facts: Facts
    vm: Domain
    files: tuple[File, ...]
    look: Look


def gather(
    source: Host,
    target: Host,
    name: str,
    asking: Asking,
    *,
    way: Way,
    copying: Copying,
    postcopy: bool,
    tls: bool = False,
    held: bool = False,
) -> Found:
    """Ask both, at once. Raises NotFound for a VM that is not there, HostUnreachable.

    Only a look, unless the VM's name is ``held``: then its definition comes to name what it is known to be in.
    """
    if postcopy or tls:
        asking.back()  # whether it may, and can

    def there() -> tuple[HostSide, dict[str, tuple[str, ...]], dict[str, str]]:
        return side(target), migrate_files.in_use(target), migrate_files.own_pools(target)

    with beside(there) as answered:
        vm = _found(source, target, name, held=held)
        live = vm.active
        files = migrate_files.files(source, vm)
        standing = migration.standing(vm)
        facts, here = vm_facts(source, vm, standing), side(source)
        theirs, in_use, own = answered()
    if here.uuid == theirs.uuid:  # and there is nothing else to look for
        one = Facts(facts, here, theirs, Cpu(None, ""), (), live=live)
        return Found(one, vm, files, Look((), (), True, {}))
    look = migrate_files.look(source, target, files, in_use, {*own.values()}, live=live, copying=copying)
    free = migration.free_huge_pages(target.conn, facts.huge_pages_kib) if facts.huge_pages_kib else 0
    theirs = replace(theirs, huge_pages_free=free, space=dict(look.space))
    cpu = _cpu(target, vm, standing.cpu)
    beyond = None
    if not live and identity.went(source, vm):
        beyond = elsewhere.look_for(source, vm.uuid, target, noted=homes.others(source, vm))
    if live and facts.bridges:
        asking.back()  # whether it has them
    ways = asking.answer(way) if live else Ways()
    return Found(
        Facts(
            vm=facts,
            source=here,
            target=theirs,
            cpu=cpu,
            needs=look.needs,
            pools=migrate_files.pools(source, target, vm, files, own),
            peer_problem=ways.there,
            peer_mend=host_check.peer_mend(target.entry, ways.there),
            back_problem=ways.back,
            skew_s=ways.skew_s,
            live=live,
            copy=copying is not Copying.NONE,
            postcopy=postcopy,
            certificates=ways.certificates if tls else {},
            cards=frozenset(ways.cards),
            unasked=ways.unasked,
            elsewhere={one: "runs" if found.active else "is saved" for one, found in beyond.in_use.items()}
            if beyond
            else {},
            not_asked=tuple(beyond.unasked) if beyond else (),
            userfaults=ways.userfaults is not False or target.facts.qemu_user in {None, "0"},
        ),
        vm,
        files,
        look,
    )


def _found(source: Host, target: Host, name: str, *, held: bool) -> Domain:
    try:
        vm = domain.find(source.conn, name)
        layer_check.require_known(source, vm, f"migrate VM {name}", noting=held)
        layer_check.require_followed(source, vm, f"migrate VM {name}")
        return vm
    except NotFound as error:
        if domain.find_or_none(target.conn, name) is None:
            raise
        here, there = (called(one.entry) if one.entry else one.name for one in (source, target))
        again = recovery(name, here, there)
        raise NotFound(error.message, hint=f"{target.name} has it; {again} clears up what a move left here") from error


def notes_of(ways: Ways, facts: Facts) -> tuple[Problem, ...]:
    """What the answers say that keeps nobody from migrating."""
    late = replace(facts, peer_problem="", back_problem=ways.back, skew_s=ways.skew_s)
    return tuple(one for one in problems(late) if one.note and one not in problems(facts))


def found_after(vm: Domain, needs: tuple[DiskNeed, ...], files: tuple[File, ...], look: Look) -> Found:
    """What there is to know of a VM that has moved already: its files, and which of them both hosts see."""
    nobody = HostSide("", "", "", "", "", (), frozenset(), "", 0, {})
    brief = VmFacts(vm.name, vm.uuid, vm.state, vm.why, vm.persistent, "", "", "", 0, ())
    return Found(Facts(brief, nobody, nobody, Cpu(None, ""), needs), vm, files, look)


def vm_facts(host: Host, vm: Domain, standing: Standing) -> VmFacts:
    """The VM where it is."""
    root = ET.fromstring(vm.xml)
    pages = root.find("memoryBacking/hugepages")
    page = None if pages is None else pages.find("page")
    devices = list(root.iterfind("devices/hostdev"))
    devices += [one for one in root.iterfind("devices/interface") if one.get("type") == "hostdev"]
    return VmFacts(
        name=vm.name,
        uuid=vm.uuid,
        state=vm.state,
        why=vm.why,
        persistent=vm.persistent,
        kind=root.get("type", ""),
        machine=vm.facts.machine,
        emulator=(root.findtext("devices/emulator") or "").strip(),
        memory_mib=vm.facts.memory_mib,
        nics=tuple(one.get("network", "") for one in root.iterfind("devices/interface/source") if one.get("network")),
        bridges=tuple(one.get("bridge", "") for one in root.iterfind("devices/interface[@type='bridge']/source")),
        host_devices=tuple(_device(one) for one in devices),
        shares=tuple(_share(one) for one in root.iterfind("devices/filesystem")),
        mounts=_mounts(vm, root),
        huge_pages_kib=0 if pages is None else int("2048" if page is None else page.get("size", "2048")),
        snapshots=_snapshots(host, vm.name) if standing.snapshots else (),
        checkpoints=standing.checkpoints,
        disk_jobs=tuple(one.target for one in disk_xml.read(vm.xml) if one.mirror),
        busy=standing.busy,
        tpm=root.find("devices/tpm/backend[@type='emulator']") is not None,
    )


def _snapshots(host: Host, name: str) -> tuple[str, ...]:
    from vmctl.hypervisor import snapshots

    return tuple(one.name for one in snapshots.snapshots(host.conn, name))


def _device(one: ET.Element) -> str:
    address = one.find("source/address")
    where = "" if address is None else " ".join(f"{key}={value}" for key, value in address.attrib.items())
    return f"{one.get('type', 'device')} {where}".strip()


def _share(one: ET.Element) -> str:
    source = one.find("source")
    return "" if source is None else source.get("dir", "")


def _mounts(vm: Domain, root: ET.Element) -> dict[str, str]:
    """Where the guest has each folder of its host, by its record."""
    known = vm.facts.record.mounts if vm.facts.record else {}
    tags = ((_share(one), one.find("target")) for one in root.iterfind("devices/filesystem"))
    return {folder: known[tag] for folder, one in tags if one is not None and (tag := one.get("dir", "")) in known}


def side(host: Host) -> HostSide:
    """One of the hosts."""
    versions = connection.versions(host.conn)
    nets = network.all_networks(host.conn)
    return HostSide(
        name=host.name,
        uuid=host.facts.uuid,
        hostname=capabilities.hostname(host.conn),
        libvirt=versions.libvirt,
        qemu=versions.hypervisor,
        kinds=host.facts.domain_types,
        machines=host.facts.machines,
        emulator=str(host.facts.emulator),
        available_mib=node.available_mib(host.conn),
        networks={net.name: net.active for net in nets},
        nat=frozenset(net.name for net in nets if net.gateway),
        own_network="" if host.conn.session else host.settings.network,
        vms=dict(domain.identities(host.conn)),
        at=called(host.entry) if host.entry else "",
    )


def _cpu(target: Host, vm: Domain, text: str) -> Cpu:
    if not text:
        return Cpu(None, "")
    kind = "kvm" if vm.facts.accel and vm.facts.accel.value == "kvm" else "qemu"
    offered = migration.offers_cpu(target.conn, text, arch=target.facts.arch, machine=vm.facts.machine, kind=kind)
    return Cpu(offered, vm.facts.cpu)


class Ways(NamedTuple):
    """Why the source's libvirt does not reach the target's, why not the other way round, and how far their clocks are
    apart; None where nobody can tell."""

    there: str = ""
    back: str = ""
    skew_s: float | None = None
    userfaults: bool | None = None
    certificates: Mapping[str, tuple[str, ...]] = MappingProxyType({})  # which each host lacks for --tls
    cards: tuple[str, ...] = ()  # of the target
    unasked: bool = False  # the source is not reached by SSH: nobody knows whether it reaches the target


class Asking:
    """Asks hosts, over SSH, whether their libvirts reach each other: each answer takes two log-ins, one from there.

    Both are asked at once, beside all else. For what the target says, which most migrations do not need, nobody waits
    before it is wanted.
    """

    def __init__(self, fleet: Fleet, source: HostEntry, target: HostEntry) -> None:
        self._entries = [source, target]
        self._fleet = fleet
        self._found: dict[int, SeenFrom | VmctlError] = {}
        asked = [at for at in (0, 1) if host_ssh.by_ssh(self._entries[at].uri)]
        self._threads = {at: threading.Thread(target=self._ask, args=(at,), daemon=True) for at in asked}
        self._wanted = {0}
        for thread in self._threads.values():
            thread.start()

    def back(self) -> None:
        """Want the target's answer too."""
        self._wanted.add(1)

    def _ask(self, at: int) -> None:
        other = host_ssh.elsewhere(self._entries[1 - at])
        try:
            self._found[at] = host_check.seen_from(self._fleet, self._entries[at], other)
        except VmctlError as error:
            self._found[at] = error

    def answer(self, way: Way) -> Ways:
        """Once all whose answer is wanted have answered."""
        for at, thread in self._threads.items():
            if at in self._wanted:
                thread.join()
        told = [self._found.get(at) if at in self._wanted else None for at in (0, 1)]
        why = [one.message if isinstance(one, VmctlError) else one.problem if one is not None else "" for one in told]
        skews = [one.skew_s for one in told if isinstance(one, SeenFrom)]
        skew = skews[0] - skews[1] if len(skews) == 2 else None
        there = told[1]
        faults = there.userfaults if isinstance(there, SeenFrom) else None
        lacking = {
            called(self._entries[at]): tuple(name for name in one.certificates if at or name.startswith("ca-"))
            for at, one in enumerate(told)
            if isinstance(one, SeenFrom)
        }
        unasked = way is not Way.DIRECT and 0 not in self._threads
        cards = there.cards if isinstance(there, SeenFrom) else ()
        return Ways("" if way is Way.DIRECT else why[0], why[1], skew, faults, lacking, cards, unasked)
