"""Forking a running VM: new ones go on from its memory and its disks, each told who it is before it has a network.

The memory is written once. Each new VM reads it through a pipe behind a head of its own (memory_pipe.py), so that it
lies on the disk once, and only until all have read it. They begin to read while it is written.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from vmctl import (
    agent,
    copies,
    domain_copy,
    domain_job,
    hosts,
    images,
    layer_check,
    memory_pipe,
    readiness,
    renewal,
    renewing,
    saved_memory,
)
from vmctl.at_once import at_once, beside
from vmctl.cloning import own, take_back
from vmctl.copies import Layer, Newcomer
from vmctl.disk_replace import PREFIX
from vmctl.errors import Unsupported, VmctlError, WaitTimeout, quietly
from vmctl.events import Reporter, Step, silent
from vmctl.hosts import Host
from vmctl.hypervisor import agent as hypervisor_agent
from vmctl.hypervisor import disks, domain, network, saved, storage
from vmctl.hypervisor.domain import Domain, State
from vmctl.memory_pipe import SavedMemory
from vmctl.seed_disk import WENT_ON, first_boot_is_over
from vmctl.spec import Accel
from vmctl.wait import wait_until
from vmctl.workspace import workspace


@dataclass(frozen=True, slots=True)
class Plan:
    """A fork worked out; nothing done yet."""

    vm: Domain
    layers: tuple[Layer, ...]
    left: tuple[str, ...]
    new: tuple[Newcomer, ...]

    @property
    def lines(self) -> list[str]:
        """What it would touch."""
        found = [f"VM {self.vm.name}: runs on, held for the moment in which its state is taken"]
        for layer in self.layers:
            assert layer.above is not None
            found.append(f"disk {layer.target} of {self.vm.name}: {layer.base.path} is written to no more")
            found.append(f"disk {layer.target} of {self.vm.name}: goes on in new volume {layer.above.volume}")
        for one in self.new:
            found.append(f"new running VM {one.name} ({one.uuid})")
            bases = {layer.target: layer.base.path for layer in self.layers}
            found += [f"new volume {volume.volume} on {bases[target]}" for target, volume in one.disks.items()]
            found += [f"new volume {v.volume}" for v in one.own if v not in one.disks.values()]
            found += [f"new file {one.nvram}"] if one.nvram else []
        return found


@dataclass(frozen=True, slots=True)
class Forked:
    """A VM that came to be by a fork. ``address`` "" where none is known."""

    name: str
    uuid: str
    address: str


def plan(host: Host, name: str, names: Sequence[str], *, held: bool = False) -> Plan:
    """Work a fork out. Raises WrongState, Conflict, Unsupported with all that is in its way.

    ``held``: the VM's name is, so that what is in doubt no more may be noted.
    """
    copies.require_local(host, name, "fork")
    vm = domain.find(host.conn, name)
    hint = f"vmctl clone {name} makes VMs of a stopped one" if not vm.active else f"vmctl resume {name}"
    domain.require(vm, frozenset({State.RUNNING}), "fork", hint)
    domain.require_persistent(vm, "fork")
    copies.require_free(host, vm.name, names, "fork")
    text = domain.xml(host.conn, vm.name)
    if found := domain_copy.obstacles(text):
        raise Unsupported(f"cannot fork VM {name}: {'; '.join(found)}", hint="vmctl clone makes VMs of a stopped one")
    if vm.facts.record is None or vm.facts.record.ssh is None:
        raise Unsupported(f"cannot fork VM {name}: vmctl did not create it, and knows no host key to renew")
    if vm.facts.record.ssh.address:
        raise Unsupported(
            f"cannot fork VM {name}: it has the static address {vm.facts.record.ssh.address}, and so would its forks",
            hint="forks need a network that gives addresses",
        )
    layer_check.require_known(host, vm, f"fork VM {name}", noting=held)
    hypervisor_agent.require(host.conn, vm.name, "fork")  # by it a fork is told who it is
    layers = copies.layers(host, vm, "fork")
    shared = {layer.target for layer in layers}
    live = disks.disks(host.conn, vm.name, inactive=False)
    disks.require_no_job(host.conn, vm.name, live, f"fork VM {name}")
    left = tuple(d.target for d in live if d.target not in shared)
    below = [volume for layer in layers for volume in layer.below]
    targets = [layer.target for layer in layers]
    seeded = bool(copies.seed_target(vm))
    return Plan(vm, layers, left, copies.newcomers(host, vm, names, targets, below, seeded=seeded))


def fork(host: Host, name: str, names: Sequence[str], report: Reporter) -> tuple[Forked, ...]:
    """Make new running VMs from the state of a running one, which runs on.

    Undone when it fails: the VM then runs as before, be it in a layer of its own.
    """
    copies.require_local(host, name, "fork")
    with copies.held_names(host, domain.find(host.conn, name).name, names, "fork"), ExitStack() as undo:
        _settled(host, name, report)
        planned = plan(host, name, names, held=True)
        vm = planned.vm
        text = domain.xml(host.conn, vm.name, inactive=True)
        for one in planned.new:
            undo.callback(quietly, lambda one=one: copies.discard(host, one))  # type: ignore[misc]
        with _memory_folder(host) as folder:
            memory = SavedMemory(folder / "memory", whole=False)
            with hosts.another(host) as own, beside(lambda: _bring(own, planned, text, memory, report)) as brought:
                good = False
                try:
                    _make_layers(host, planned, undo)
                    _take_state(host, planned, memory.path, report)
                    good = True
                finally:
                    memory.end(good=good)
                with beside(lambda: quietly(lambda: _correct_clock(host, vm.name))):
                    made = _wake(host, vm, brought(), report)
        undo.pop_all()
    return made


def _correct_clock(host: Host, name: str) -> None:
    with hosts.another(host) as own:
        renewing.correct_clock(own, name)


def _settled(host: Host, name: str, report: Reporter) -> None:
    """Wait for the first boot to be over: what still sets the guest up would make its forks the first one again."""
    vm = domain.find(host.conn, name)
    record = vm.facts.record
    if vm.state is not State.RUNNING or record is None or record.console_log is None or not copies.seed_target(vm):
        return
    if not first_boot_is_over(host, vm):
        report(Step(f"waiting for the first boot of {vm.name} to end"))
        wait_until(
            lambda: first_boot_is_over(host, vm),
            what=f"cannot fork VM {vm.name}: its first boot is not over",
            timeout_s=readiness.default_timeout_s(vm),
            interval_s=0.1,
            hint=f"vmctl wait {vm.name} --for cloud-init; or stop and start it",
        )


def _make_layers(host: Host, planned: Plan, undo: ExitStack) -> None:
    """The layers that the VM goes on in. Its record knows them before they are there."""
    above = [layer.above for layer in planned.layers if layer.above]
    undo.callback(quietly, lambda: take_back(host, planned.vm.name, above))
    own(host, planned.vm.name, above)
    for layer in planned.layers:
        assert layer.above is not None
        copies.make_overlay(host, layer.above, layer.base, layer.size)


def _fill(host: Host, planned: Plan, new: Sequence[Newcomer]) -> None:
    """The volumes of the new VMs."""
    size = storage.volume(host.conn, *_seed_of(planned.vm)).capacity if new[0].seed else 0

    def fill(one: Newcomer) -> None:
        def small() -> None:
            copies.make_log(host, one, WENT_ON)
            copies.make_seed(host, planned.vm, one, size=size)

        with beside(small) as made:
            for layer in planned.layers:
                copies.make_overlay(host, one.disks[layer.target], layer.base, layer.size)
            made()

    at_once([lambda one=one: fill(one) for one in new])  # type: ignore[misc]


def _seed_of(vm: Domain) -> tuple[str, str]:
    record = vm.facts.record
    assert record is not None
    return next((one.pool, one.volume) for one in record.owned if one.volume.endswith("-seed.iso"))


@contextmanager
def _memory_folder(host: Host) -> Iterator[Path]:
    parent = Path(images.pool_path(host, host.settings.pool))
    try:
        with workspace(parent, PREFIX) as folder:
            yield folder
    except PermissionError as error:
        raise VmctlError(f"cannot write to {parent}: {error.strerror}", hint="as root: sudo vmctl …") from error


def _take_state(host: Host, planned: Plan, memory: Path, report: Reporter) -> None:
    vm = planned.vm
    above = {layer.target: copies.path_of(host, layer.above) for layer in planned.layers if layer.above}
    began = time.monotonic()
    # Emulated, what QEMU 7.2 wrote of a busy guest while it ran was not of one moment: a fork's kernel found its lists
    # of free pages broken.
    live = vm.facts.accel is Accel.KVM
    with domain_job.running_on(host, vm.name):
        saved.save_and_go_on(host.conn, vm.name, str(memory), above, planned.left, live=live)
    report(
        Step(f"the state of {vm.name} is taken, {memory.stat().st_size >> 20} MiB in {time.monotonic() - began:.2f} s")
    )


def _bring(host: Host, planned: Plan, text: str, memory: SavedMemory, report: Reporter) -> tuple[Newcomer, ...]:
    """Define the new VMs, make their volumes, and bring them to the memory, which is still being written."""
    new = copies.define(host, planned.vm, text, planned.new, report)
    _fill(host, planned, new)
    if planned.vm.facts.nvram:
        memory.wait()
        copies.copy_nvram(planned.vm, new)
    _restore(host, planned.vm, new, memory)
    return new


def go_on(host: Host, vm: Domain, new: Sequence[Newcomer], memory: SavedMemory, report: Reporter) -> tuple[Forked, ...]:
    """Let defined VMs with disks go on from a memory, renew who they are, connect them, and see them answer by SSH."""
    _restore(host, vm, new, memory)
    return _wake(host, vm, new, report)


def _restore(host: Host, vm: Domain, new: Sequence[Newcomer], memory: SavedMemory) -> None:
    """Bring them to where the memory is, their processors held and their cables pulled."""
    head = memory.head()

    def restore(one: Newcomer) -> None:
        own_head = saved_memory.head(memory_pipe.adapted(copies.xml_of(host, vm, head.xml, one)), head.cookie)
        with hosts.another(host) as own, memory.piped(head.size, own_head) as pipe:
            saved.restore_paused(own.conn, str(pipe), name=one.name)
            saved.set_links(own.conn, one.name, up=False)

    at_once([lambda one=one: restore(one) for one in new])  # type: ignore[misc]


def _wake(host: Host, vm: Domain, new: Sequence[Newcomer], report: Reporter) -> tuple[Forked, ...]:
    made: dict[str, Forked] = {}

    def wake(one: Newcomer) -> None:
        with hosts.another(host) as own:
            made[one.name] = _wake_one(own, vm, one, report)

    at_once([lambda one=one: wake(one) for one in new])  # type: ignore[misc]
    return tuple(made[one.name] for one in new)


def _wake_one(host: Host, vm: Domain, one: Newcomer, report: Reporter) -> Forked:
    began = time.monotonic()
    domain.resume(host.conn, one.name)
    exact = _renew(host, vm, one)
    saved.set_links(host.conn, one.name, up=True)
    renewed = time.monotonic()
    there = domain.find(host.conn, one.name)
    budget = readiness.default_timeout_s(there)
    try:
        where = readiness.reach(host, there, timeout_s=budget, report=silent)
    except WaitTimeout as error:
        error.hint = f"VM {one.name} is deleted again; is there a DHCP client in the guest, and an SSH server?"
        raise
    ended = time.monotonic()
    if not exact:
        quietly(lambda: agent.sync_time(host, one.name))  # what it was told on the way grew older on the way
    copies.complete(host, one)
    report(Step(f"{one.name} runs: renewed {renewed - began:.2f} s, ssh {ended - renewed:.2f} s"))
    return Forked(one.name, one.uuid, where.host if where else "")


def _renew(host: Host, vm: Domain, one: Newcomer) -> bool:
    """Tell it who it is. Whether its clock is right then."""
    # A card on user networking keeps its MAC until the next boot: QEMU forwards to the address that this MAC has got.
    plugged = {nic.mac.lower() for nic in vm.facts.nics}
    new = renewal.Renewal(
        hostname=one.name,
        machine_id=copies.machine_id(one),
        host_key_private=one.key.private,
        host_key_public=one.key.public,
        entropy=secrets.token_bytes(64),
        now=0.0,
        macs={old: new for old, new in (one.card_macs or {}).items() if old in plugged},
        addresses=_addresses(host, one),
    )
    return renewing.renew(host, one.name, new)


def _addresses(host: Host, one: Newcomer) -> dict[str, tuple[str, str]]:
    """What the network will give each card, so that nobody need ask for it first."""
    own_macs = set((one.card_macs or {}).values())
    found = {}
    for net in network.all_networks(host.conn):
        for entry in net.reservations:
            if entry.mac in own_macs and net.subnet is not None:
                found[entry.mac] = (f"{entry.address}/{net.subnet.prefixlen}", net.gateway)
    return found
