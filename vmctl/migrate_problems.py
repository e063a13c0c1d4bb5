"""What keeps a VM from moving from one host to another: all of it, from what both hosts said. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from vmctl.hypervisor.states import MOVING, State, recovery

_SKEW_S = 2.0


class Problem(NamedTuple):
    """One finding: ``what`` is wrong and what mends it; a ``note`` keeps nobody from migrating."""

    what: str
    mend: str = ""
    note: bool = False


@dataclass(frozen=True, slots=True)
class Cpu:
    """Whether the target can give the guest its processor; None: it cannot tell."""

    offered: bool | None
    told: str


@dataclass(frozen=True, slots=True)
class DiskNeed:
    """A disk, or another file the VM needs: whether both hosts see the same one, and what the target has in its place.

    ``space`` bytes are needed to make it there; ``users`` run there now with that very file. ``missing``: the source
    has none, though the VM names it, or with ``later`` will at its next start; ``below``: the disk that is based on it.
    """

    name: str
    path: str
    shared: bool
    copied: bool = False
    cache: str = "default"
    network: bool = False
    space: int = 0
    in_the_way: str = ""
    folder_missing: bool = False
    users: tuple[str, ...] = ()
    missing: bool = False
    later: bool = False
    below: str = ""


class PoolNeed(NamedTuple):
    """A storage pool in which the VM has disks of its own: its folder, and the target's of that name, "" for none."""

    name: str
    path: str
    there: str


@dataclass(frozen=True, slots=True)
class VmFacts:
    """The VM where it is."""

    name: str
    uuid: str
    state: State
    why: str
    persistent: bool
    kind: str
    machine: str
    emulator: str
    memory_mib: int
    nics: tuple[str, ...]
    bridges: tuple[str, ...] = ()
    host_devices: tuple[str, ...] = ()
    shares: tuple[str, ...] = ()
    mounts: Mapping[str, str] = field(default_factory=dict)  # where the guest has shares, as far as it is known
    huge_pages_kib: int = 0
    snapshots: tuple[str, ...] = ()
    checkpoints: tuple[str, ...] = ()
    disk_jobs: tuple[str, ...] = ()
    busy: bool = False
    tpm: bool = False


@dataclass(frozen=True, slots=True)
class HostSide:
    """One of the two hosts. ``networks``: name -> whether it runs; ``nat`` are those whose addresses are their own,
    ``own_network`` is the one that vmctl makes there when it is needed."""

    name: str
    uuid: str
    hostname: str
    libvirt: str
    qemu: str
    kinds: tuple[str, ...]
    machines: frozenset[str]
    emulator: str
    available_mib: int
    networks: Mapping[str, bool]
    nat: frozenset[str] = frozenset()
    own_network: str = ""
    vms: Mapping[str, str] = field(default_factory=dict)  # UUID by name
    huge_pages_free: int = 0
    space: Mapping[str, int] = field(default_factory=dict)  # free bytes by folder
    at: str = ""  # what it is called to vmctl, where that is not its name

    @property
    def called(self) -> str:
        """What it is called to vmctl."""
        return self.at or self.name

    @property
    def command(self) -> str:
        """vmctl on it."""
        return f"vmctl -c {shlex.quote(self.called)}"


@dataclass(frozen=True, slots=True)
class Facts:
    """What both hosts said. ``peer_problem`` and ``back_problem``: why one libvirt does not reach the other, or ""."""

    vm: VmFacts
    source: HostSide
    target: HostSide
    cpu: Cpu
    needs: tuple[DiskNeed, ...]
    pools: tuple[PoolNeed, ...] = ()
    peer_problem: str = ""
    peer_mend: str = ""
    back_problem: str = ""
    unasked: bool = False  # whether the source cannot be asked if it reaches the target
    skew_s: float | None = None
    live: bool = True
    copy: bool = False
    postcopy: bool = False
    certificates: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # that QEMU lacks, by host
    cards: frozenset[str] = frozenset()  # the target's network interfaces; empty: not known
    elsewhere: Mapping[str, str] = field(default_factory=dict)  # what it does on other hosts than the two, by host
    not_asked: tuple[str, ...] = ()  # hosts that do not say so
    userfaults: bool = True  # whether QEMU on the target may wait for pages that are not there yet


def problems(facts: Facts) -> tuple[Problem, ...]:
    """All of them, notes last."""
    found = [
        one
        for part in (_state, _identity, _machine, _devices, _memory, _networks, _pools, _storage, _postcopy, _way)
        for one in part(facts)
    ]
    return tuple(sorted(found, key=lambda one: one.note))


def fatal(found: tuple[Problem, ...]) -> tuple[Problem, ...]:
    """Those that keep it from migrating."""
    return tuple(one for one in found if not one.note)


def version(text: str) -> tuple[int, ...]:
    """A dotted version as numbers."""
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def _state(facts: Facts) -> Iterator[Problem]:
    vm = facts.vm
    here = facts.source.command
    recover = recovery(vm.name, facts.source.called, facts.target.called)
    if vm.state is State.SAVED:
        yield Problem(f"{vm.name} is saved, and its memory lies on {facts.source.name}", f"{here} start {vm.name}")
    elif vm.state is State.CRASHED and not facts.live:
        pass  # its QEMU is gone: it is off
    elif vm.state in {State.CRASHED, State.CREATING, State.STOPPING, State.SUSPENDED}:
        yield Problem(
            f"{vm.name} is {vm.state}{f' ({vm.why})' if vm.why else ''}", f"{here} reset {vm.name}, or delete"
        )
    elif vm.state is State.PAUSED and vm.why in {"I/O error", *MOVING}:
        ends = f"{recover}, if {facts.target.called} is where it was to go"
        yield Problem(f"{vm.name} is paused ({vm.why})", ends if vm.why in MOVING else "mend that first")
    if facts.live and vm.busy:
        what = f"another job of {vm.name} is under way"
        yield Problem(
            what, f"wait for it, or cancel it; of a migration to {facts.target.called}, {recover} sees the end"
        )
    for target in vm.disk_jobs:
        yield Problem(f"a job on disk {target} of {vm.name} is under way", "wait for it, or cancel it")
    if not facts.live and not vm.persistent:
        yield Problem(f"{vm.name} is transient, and does not run", "start it")


def one_host(here: str, there: str, uuid: str) -> Problem:
    """Source and target are one to libvirt: nothing can go from one to the other."""
    if here == there:
        return Problem(f"{there} is the host it is on", "--to another host")
    what = f"{here} and {there} are one host to libvirt: both have host UUID {uuid}"
    mend = "--to another host; if they are two: give one another host_uuid in /etc/libvirt/libvirtd.conf"
    return Problem(what, mend)


def _identity(facts: Facts) -> Iterator[Problem]:
    vm, there = facts.vm, facts.target
    if facts.source.uuid == there.uuid:
        yield one_host(facts.source.name, there.name, there.uuid)
        return
    if facts.source.hostname == there.hostname:
        yield Problem(f"both hosts are called {there.hostname}", "give one another host name")
    if there.vms.get(vm.name, vm.uuid) != vm.uuid:
        yield Problem(f"{there.name} has another VM called {vm.name}", f"{there.command} rename {vm.name} NEW")
    for name, how in facts.elsewhere.items():
        what = f"{vm.name} {how} on {name}, where it went once: what {facts.source.name} has is only what stayed of it"
        yield Problem(what, f"vmctl -c {name} migrate {vm.name} --to {shlex.quote(there.called)}")
    if facts.not_asked:
        what = f"not asked whether {vm.name}, which went to another host once, runs there: {', '.join(facts.not_asked)}"
        yield Problem(what, "make sure that it does not", note=True)
    for name, uuid in there.vms.items():
        if uuid == vm.uuid:
            what = f"{there.name} has a VM of the same UUID already: {name}"
            again = recovery(vm.name, facts.source.called, there.called)
            yield Problem(what, f"{again} looks at both and ends what was cut off")


def _machine(facts: Facts) -> Iterator[Problem]:
    vm, here, there = facts.vm, facts.source, facts.target
    if vm.kind not in there.kinds:
        accel = {"kvm": "KVM", "qemu": "TCG"}.get(vm.kind, vm.kind)
        yield Problem(f"{vm.name} runs on {accel}, which {there.name} does not offer", "vmctl host info there says why")
    if vm.machine and there.machines and vm.machine not in there.machines:
        yield Problem(
            f"{there.name} has no machine type {vm.machine}", "its QEMU is older, or built without: update it"
        )
    if vm.emulator and there.emulator and vm.emulator != there.emulator:
        yield Problem(f"{vm.name} runs by {vm.emulator}; on {there.name} QEMU is {there.emulator}", "install it there")
    if not facts.live:
        return
    if version(there.qemu) < version(here.qemu):
        what = f"QEMU {there.qemu} on {there.name} is older than {here.qemu} on {here.name}"
        yield Problem(what, f"update it, or stop {vm.name} first")
    if version(there.libvirt) < version(here.libvirt):
        yield Problem(f"libvirt {there.libvirt} on {there.name} is older than {here.libvirt}", "update it", note=True)
    if facts.cpu.offered is False:
        what = f"{there.name} cannot give {vm.name} its processor ({facts.cpu.told})"
        yield Problem(what, f"stop {vm.name} first, or give it a model both have: `virsh hypervisor-cpu-baseline`")


def _devices(facts: Facts) -> Iterator[Problem]:
    vm, there = facts.vm, facts.target.name
    for device in vm.host_devices:
        what, mend = f"{vm.name} has a device of its host: {device}", "detach it, or stop the VM first"
        yield Problem(what, mend) if facts.live else Problem(f"{what}; on {there} it must be there, too", note=True)
    for share in vm.shares:
        what, mend = (
            f"{vm.name} has a folder of its host mounted: {share}",
            f"{facts.source.command} unshare {vm.name} {vm.mounts.get(share, 'GUEST')}, or stop it first",
        )
        yield Problem(what, mend) if facts.live else Problem(f"{what}; on {there} it is that one's folder", note=True)
    if vm.snapshots:
        named = " ".join(f"{vm.name}.{one}" for one in vm.snapshots)
        mend = f"{facts.source.command} snapshot delete {named}, which loses what they hold"
        yield Problem(f"{vm.name} has snapshots, which libvirt does not move: {', '.join(vm.snapshots)}", mend)
    if vm.checkpoints:
        what = (
            f"{vm.name} has checkpoints of backups ({', '.join(vm.checkpoints)}): the next backup there is a full one"
        )
        yield Problem(what, note=True)
    if vm.tpm and not facts.live:
        yield Problem(f"the state of {vm.name}'s TPM lies on {facts.source.name}", "start it, and migrate it live")


def _memory(facts: Facts) -> Iterator[Problem]:
    vm, there = facts.vm, facts.target
    if not facts.live:
        return
    if vm.huge_pages_kib:
        needed = -(-vm.memory_mib * 1024 // vm.huge_pages_kib)
        if there.huge_pages_free < needed:
            what = f"{there.name} has {there.huge_pages_free} free huge pages of {vm.huge_pages_kib} KiB, not {needed}"
            yield Problem(what, f"on it: echo {needed} >/proc/sys/vm/nr_hugepages")
    elif there.available_mib < vm.memory_mib:
        what = f"{there.name} has {there.available_mib} MiB of memory to spare, and {vm.name} has {vm.memory_mib} MiB"
        yield Problem(what, "stop or move something there")


def _networks(facts: Facts) -> Iterator[Problem]:
    vm, there = facts.vm, facts.target
    for name in dict.fromkeys(vm.nics):
        if name == there.own_network:
            if name not in there.networks:
                yield Problem(f"network {name} is made on {there.name}", note=True)
        elif name not in there.networks:
            as_here = (
                f"on {facts.source.called}: virsh net-dumpxml {name} >net.xml; on {there.called}, with that file: "
            )
            mend = f"{as_here}virsh net-define net.xml && virsh net-start {name}"
            yield Problem(f"{there.name} has no network {name}", mend)
        elif not there.networks[name] and facts.live:
            yield Problem(f"network {name} on {there.name} is down", f"on it: virsh net-start {name}")
        if name in facts.source.nat or name in there.nat:
            what = f"network {name} is behind NAT on each host: {vm.name} gets another address there, by its next DHCP"
            yield Problem(what, "a bridged network keeps addresses", note=True)
    for name in dict.fromkeys(vm.bridges):
        if facts.live and facts.cards and name not in facts.cards:
            yield Problem(f"{there.name} has no bridge {name}", f"make it there as it is on {facts.source.name}")


def _pools(facts: Facts) -> Iterator[Problem]:
    """What a VM owns is known by pool and name: where the pool is not the same, nobody would find it."""
    vm, here, there = facts.vm, facts.source, facts.target
    for pool in facts.pools:
        what = f"{vm.name} has disks of its own in storage pool {pool.name} ({pool.path})"
        if not pool.there:
            mend = f"{there.command} disk pool create {pool.name} --path {shlex.quote(pool.path)}"
            yield Problem(f"{what}, and {there.name} has no such pool", mend)
        elif pool.there != pool.path:
            mend = f"vmctl disk move, on {here.name}, into a pool that is in the same folder on both"
            yield Problem(f"{what}, which on {there.name} is in {pool.there}", mend)


def _storage(facts: Facts) -> Iterator[Problem]:
    vm, here, there = facts.vm, facts.source, facts.target
    space: dict[str, int] = {}
    told = {pool.path for pool in facts.pools if pool.there != pool.path}
    for need in facts.needs:
        what = f"{need.name} ({need.path})"
        if need.network:
            continue
        if need.missing:
            gone = f"{what} is not there on {here.name}, though {vm.name} {'will need' if need.later else 'needs'} it"
            yield Problem(gone, _mend_of_missing(facts, need), note=need.later)
            continue
        if need.shared:
            if need.cache == "unsafe" and facts.live:
                yield Problem(
                    f"{what} has cache mode unsafe: not all of it may be on the disk", "cache=none, or stop it"
                )
            for user in need.users if here.uuid != there.uuid else ():
                yield Problem(f"{what} is in use on {there.name}, by running VM {user}", "stop that one")
            continue
        if not facts.copy:
            yield Problem(
                f"{what} is on {here.name} only: {there.name} does not see the same file", "--copy-storage overlay"
            )
            continue
        if need.folder_missing:
            folder = need.path.rpartition("/")[0]
            if folder not in told:
                yield Problem(f"{there.name} has no folder {folder} for {need.name}", f"on it: mkdir -p {folder}")
        elif need.in_the_way:
            aside = f"on it, once you know whose it is: mv -n {need.path} {need.path}.aside"
            yield Problem(f"{need.name} would be {need.path} on {there.name}, where {need.in_the_way}", aside)
        folder = need.path.rpartition("/")[0]
        space[folder] = space.get(folder, 0) + need.space
    for folder, needed in space.items():
        free = there.space.get(folder)
        if free is not None and free < needed:
            what = f"{folder} on {there.name} has {free >> 20} MiB free, and {vm.name} needs up to {needed >> 20} MiB"
            yield Problem(what, "make room there")


def _mend_of_missing(facts: Facts, need: DiskNeed) -> str:
    if not need.below:
        return "put it back, or detach the disk" if "disk" in need.name else "put it back"
    if facts.live and not need.later:  # what was deleted or renamed, its QEMU has open
        pull = f"virsh blockpull {facts.vm.name} {need.below} --wait"
        return (
            f"put it back; or let disk {need.below} take over what QEMU still has of it: on {facts.source.name}, {pull}"
        )
    return f"put it back: without it nobody can read disk {need.below}"


def _postcopy(facts: Facts) -> Iterator[Problem]:
    if facts.live and facts.postcopy and not facts.userfaults:
        what = f"QEMU's user on {facts.target.name} may not handle page faults, which post-copy is made of"
        yield Problem(what, "on it: sysctl -w vm.unprivileged_userfaultfd=1")


def _way(facts: Facts) -> Iterator[Problem]:
    here, there = facts.source, facts.target
    if facts.peer_problem:
        what = f"libvirt on {here.name} does not reach {there.name}: {facts.peer_problem}"
        yield Problem(what, facts.peer_mend)
    if facts.unasked:
        what = f"whether libvirt on {here.name} reaches {there.name} cannot be asked: {here.name} is not reached by SSH"
        yield Problem(what, "--direct needs no such way", note=True)
    for name, lacking in facts.certificates.items():
        if lacking and facts.live:
            what = f"QEMU on {name} has no {', '.join(lacking)}, by which --tls encrypts"
            yield Problem(what, "vmctl host setup USER@MACHINE --tls gives it some")
    if facts.back_problem:
        yield Problem(f"the way back, {there.name} to {here.name}, is closed: {facts.back_problem}", note=True)
    if facts.skew_s is not None and abs(facts.skew_s) > _SKEW_S:
        what = f"the clocks of {here.name} and {there.name} are {abs(facts.skew_s):.1f} s apart"
        yield Problem(what, "run NTP on both", note=True)
