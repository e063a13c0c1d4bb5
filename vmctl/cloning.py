"""Cloning a stopped VM: its disks become a base that nobody writes to any more, and each VM has a layer on it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from vmctl import (
    copies,
    disk_find,
    disk_guard,
    disk_replace,
    disk_xml,
    forgotten,
    identity,
    layer_check,
    qemu_img,
    render,
)
from vmctl.at_once import at_once
from vmctl.copies import Layer, Newcomer
from vmctl.disk_find import Located
from vmctl.errors import Conflict, WrongState, quietly
from vmctl.events import Reporter, Step, Warned
from vmctl.hosts import Host
from vmctl.hypervisor import disks, domain, storage
from vmctl.hypervisor.domain import Domain, State
from vmctl.record import Owned

_STOPPED = frozenset({State.STOPPED, State.CRASHED})


@dataclass(frozen=True, slots=True)
class Plan:
    """A cloning worked out; nothing done yet. ``layers`` are the disks to share, ``copied`` those to copy."""

    vm: Domain
    layers: tuple[Layer, ...]
    copied: tuple[Located, ...]
    new: tuple[Newcomer, ...]

    @property
    def lines(self) -> list[str]:
        """What it would touch."""
        found = []
        for layer in self.layers:
            if layer.above:
                found.append(f"disk {layer.target} of {self.vm.name}: {layer.base.path} is written to no more")
                found.append(f"disk {layer.target} of {self.vm.name}: goes on in new volume {layer.above.volume}")
        for one in self.new:
            found.append(f"new VM {one.name} ({one.uuid})")
            bases = {layer.target: f" on {layer.base.path}" for layer in self.layers}
            copied = {disk.target: f", a copy of {disk.path}" for disk in self.copied}
            for target, volume in one.disks.items():
                found.append(f"new volume {volume.volume}{bases.get(target, '')}{copied.get(target, '')}")
            found += [f"new volume {v.volume}" for v in one.own if v not in one.disks.values()]
            found += [f"new file {one.nvram}"] if one.nvram else []
        return found


def plan(host: Host, name: str, names: Sequence[str], *, full: bool, held: bool = False) -> Plan:
    """Work a cloning out. Raises WrongState for a VM that runs, Conflict, Unsupported.

    Only a look, unless the VM's name is ``held``: then its definition comes to name what it is known to be in.
    """
    copies.require_local(host, name, "clone")
    vm = domain.find(host.conn, name)
    hint = f"vmctl fork {name} makes running VMs of a running one; to clone it: vmctl stop {name}"
    if vm.state is State.SAVED:
        hint = f"vmctl start {name}, then stop it; or vmctl stop {name} --force, which drops its saved memory"
    domain.require(vm, _STOPPED, "clone", hint)
    forgotten.require_none(host, vm.name, vm.uuid, f"clone VM {name}")
    layer_check.require_none_newer(host, vm, f"clone VM {name}", noting=held)
    if vm.facts.record is not None and vm.facts.record.creating:
        raise WrongState(f"cannot clone VM {name}: its creation was cut off", hint=f"vmctl delete {name}")
    copies.require_free(host, vm.name, names, "clone")
    shared: tuple[Layer, ...] = ()
    copied: tuple[Located, ...] = ()
    if full:
        found = copies.writable(disks.disks(host.conn, vm.name, inactive=True))
        copied = tuple(disk_find.locate(host, f"{vm.name}:{disk.target}") for disk in found)
        identity.require_no_twin(host, vm, [disk.path for disk in copied], f"clone VM {name}", reading=True)
        for disk in copied:
            disk_find.chain(host, disk, "clone")
    else:
        shared = copies.layers(host, vm, "clone")
    below = [volume for layer in shared for volume in layer.below]
    targets = [disk.target for disk in copied] or [layer.target for layer in shared]
    seeded = vm.facts.record is not None and vm.facts.record.ssh is not None
    return Plan(vm, shared, copied, copies.newcomers(host, vm, names, targets, below, seeded=seeded))


def clone(host: Host, name: str, names: Sequence[str], report: Reporter, *, full: bool = False) -> tuple[Newcomer, ...]:
    """Make new VMs, not started, with the disks of a stopped one and identities of their own.

    Linked ones share what is on its disks: those are frozen, and it goes on in a new layer, too. With ``full`` all is
    copied. Undone when it fails; cut off, the VM is as usable as before, and what is incomplete is marked so.
    """
    copies.require_local(host, name, "clone")
    with copies.held_names(host, domain.find(host.conn, name).name, names, "clone"), ExitStack() as undo:
        planned = plan(host, name, names, full=full, held=True)
        vm = planned.vm
        if vm.facts.record is None or vm.facts.record.ssh is None:
            report(Warned(f"{vm.name} was not created by vmctl: inside, its clones are told nothing of who they are"))
        with disk_guard.claimed(host, vm.name, disks.disks(host.conn, vm.name, inactive=True), f"clone VM {vm.name}"):
            freeze(host, vm, planned.layers, report)
            if full:
                return _make(host, planned, undo, report)
        return _make(host, planned, undo, report)


def freeze(host: Host, vm: Domain, layers: Sequence[Layer], report: Reporter) -> None:
    """Let a stopped VM go on in new layers, its disks as they are becoming bases. Its disks are claimed.

    The VM's record knows the new volumes before they are there: cut off, they go with the VM, and it is as it was.
    """
    new = [layer for layer in layers if layer.above is not None]
    if not new:
        return
    above = [layer.above for layer in new if layer.above]
    with ExitStack() as undo:
        undo.callback(quietly, lambda: take_back(host, vm.name, above))
        own(host, vm.name, above)
        text = domain.xml(host.conn, vm.name, inactive=True)
        for layer in new:
            assert layer.above is not None
            copies.make_overlay(host, layer.above, layer.base, layer.size)
            text = disk_xml.with_source(text, layer.target, copies.path_of(host, layer.above), "qcow2")
        if domain.state(host.conn, vm.name)[0] in domain.ACTIVE:
            raise Conflict(f"cannot clone VM {vm.name}: it has just been started")
        domain.define(host.conn, text, name=vm.name)
        undo.pop_all()
    report(Step(f"{vm.name} goes on in a layer of its own; what it has written so far is shared"))


def take_back(host: Host, name: str, volumes: Sequence[Owned]) -> None:
    """Delete the layers that a VM does not go on in after all."""
    used = {disk.source for now in (True, False) for disk in disks.disks(host.conn, name, inactive=now)}
    used |= forgotten.opened(host)
    unused = [one for one in volumes if copies.path_of(host, one) not in used]
    for volume in unused:
        storage.delete_volume(host.conn, volume.pool, volume.volume)
    record = domain.find(host.conn, name).facts.record
    if record is not None and unused:
        kept = tuple(one for one in record.owned if one not in unused)
        domain.set_record(host.conn, name, render.metadata(replace(record, owned=kept)))


def own(host: Host, name: str, volumes: Sequence[Owned]) -> None:
    """Note in a VM's record that volumes are its own."""
    record = domain.find(host.conn, name).facts.record
    if record is not None and (missing := [one for one in volumes if one not in record.owned]):
        domain.set_record(host.conn, name, render.metadata(replace(record, owned=(*record.owned, *missing))))


def _make(host: Host, planned: Plan, undo: ExitStack, report: Reporter) -> tuple[Newcomer, ...]:
    vm = planned.vm
    text = domain.xml(host.conn, vm.name, inactive=True)
    for one in planned.new:
        undo.callback(quietly, lambda one=one: copies.discard(host, one))  # type: ignore[misc]
    made = copies.define(host, vm, text, planned.new, report)
    copies.copy_nvram(vm, made)

    def fill(one: Newcomer) -> None:
        for layer in planned.layers:
            copies.make_overlay(host, one.disks[layer.target], layer.base, layer.size)
        for disk in planned.copied:
            _copy(host, disk, one.disks[disk.target], report)
        copies.make_log(host, one)
        copies.make_seed(host, vm, one)
        copies.complete(host, one)

    at_once([lambda one=one: fill(one) for one in made])  # type: ignore[misc]
    undo.pop_all()
    for one in made:
        report(Step(f"{one.name} is defined"))
    return made


def _copy(host: Host, disk: Located, volume: Owned, report: Reporter) -> None:
    target = Path(copies.path_of(host, volume))
    chain = disk_find.chain(host, disk, "clone")
    moved = disk_replace.share_reporter(report, volume.volume, chain.top.virtual_size)
    storage.delete_volume(host.conn, volume.pool, volume.volume)
    with disk_replace.made_aside(target, f"clone disk {disk.ref}") as aside:
        qemu_img.copy_known(Path(disk.path), disk.format, aside, "qcow2", what=f"clone disk {disk.ref}", moved=moved)
        aside.chmod(0o600)
    storage.refresh(host.conn, volume.pool)
