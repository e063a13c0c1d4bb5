"""Deleting a VM with all that is its own, and what a killed create or delete left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from vmctl import disk_journal, forgotten, identity, image_users, snapshot_layers, snapshot_settle, spec
from vmctl.events import Reporter, Warned, silent
from vmctl.guest import known_hosts
from vmctl.hosts import Host, holding
from vmctl.hypervisor import domain, snapshots, storage
from vmctl.hypervisor.domain import Domain
from vmctl.lifecycle import power_off
from vmctl.locks import held
from vmctl.record import Owned

_SHARED_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Doomed:
    """What a delete destroys: the VM, the volumes that are its own, its ``snapshots`` and the ``files`` of those.

    ``vm`` None: only left-overs are there.
    """

    name: str
    vm: Domain | None
    volumes: tuple[Owned, ...]
    files: tuple[str, ...] = ()
    snapshots: tuple[str, ...] = ()

    @property
    def lines(self) -> list[str]:
        """What to show before asking."""
        what = [f"VM {self.name} ({self.vm.state})"] if self.vm else [f"left-overs of VM {self.name}"]
        files = [f"file {path}" for path in self.files]
        if self.vm is not None and self.vm.facts.nvram:
            files.append(f"file {self.vm.facts.nvram}")
        what += [f"snapshot {self.name}.{one}" for one in self.snapshots]
        return [*what, *(f"volume {owned.volume}" for owned in self.volumes), *files]


def doomed(host: Host, name: str, before: Sequence[Doomed] = ()) -> Doomed:
    """What deleting ``name`` would destroy, ``before`` it these. Raises NotFound when there is nothing."""
    vm = domain.find_or_none(host.conn, name)
    if vm is not None:
        files = _of_snapshots(host, vm)
        named = tuple(one.name for one in snapshots.snapshots(host.conn, vm.name))
        volumes = _deletable(host, vm, files, silent, before)[0]
        there = {one: set(storage.volume_names(host.conn, one)) for one in {owned.pool for owned in volumes}}
        volumes = tuple(one for one in volumes if one.volume in there[one.pool])
        return Doomed(vm.name, vm, volumes, files, named)
    volumes = _leftovers(host, name)
    if not volumes:
        raise domain.absent(host.conn, name)
    return Doomed(name, None, volumes)


def _leftovers(host: Host, name: str) -> tuple[Owned, ...]:
    """Volumes that a killed creation of ``name`` left."""
    pool = host.settings.pool
    if not storage.pool_exists(host.conn, pool) or spec.name_problems(name):
        return ()
    storage.refresh(host.conn, pool)  # a killed restore wrote its disk's file itself
    return tuple(Owned(pool, one) for one in identity.left_of_creation(host, name))


def _of_snapshots(host: Host, vm: Domain) -> tuple[str, ...]:
    """The files that snapshots made and only this VM needs; they outlive a snapshot where others need what is below."""
    return snapshot_layers.only_of(host, vm) if host.conn.local else ()


def _deletable(
    host: Host, vm: Domain, files: tuple[str, ...], report: Reporter, before: Sequence[Doomed] = ()
) -> tuple[tuple[Owned, ...], dict[Owned, str]]:
    """The VM's own volumes that nobody else uses, once ``files`` and those VMs are gone that go ``before`` it.

    And those that other hosts need, and who.
    """
    record = vm.facts.record
    if record is None or not record.owned:
        return (), {}
    storage.refresh(host.conn, host.settings.pool)  # the log daemon rotates the console log by itself
    log = record.console_log
    owned = list(record.owned)
    if log is not None:
        owned += [o for v in identity.volumes_of(host, log.volume) if (o := Owned(log.pool, v)) not in owned]
        rotated = {o.volume for o in owned}
        owned += [
            Owned(log.pool, v)
            for v in storage.volume_names(host.conn, log.pool)
            if v.startswith(f"{log.volume}.") and v not in rotated
        ]
    gone = {vm.name, *(one.name for one in before)}
    others = [other for other in domain.all_facts(host.conn) if other.name not in gone]
    going = {*owned, *(one for other in before for one in other.volumes)}
    places = {pool: storage.pool_path(host.conn, pool) for pool in _there(host, {one.pool for one in going})}
    paths = {one: f"{places[one.pool]}/{one.volume}" for one in going if one.pool in places}
    gone |= {*files, *(path for one in before for path in one.files), *paths.values()}
    used = {path for other in others for path in (other.serial_log, *(disk.source for disk in other.disks))}
    needed = image_users.needed(host)  # through overlays too, in a pool or outside of any
    free: dict[Owned, str] = {}
    for one in owned:
        path = paths.get(one, "")
        if not path:
            continue  # no such pool: it keeps nobody from deleting the VM; remove() tells of it
        if path not in used and f"{one.pool}/{one.volume}" not in used and not needed.by(path, but=gone):
            free[one] = path
    theirs = identity.needed_elsewhere(host, list(free.values()), report)
    kept = {one: theirs[path] for one, path in free.items() if path in theirs}
    return tuple(one for one in free if one not in kept), kept


def _there(host: Host, names: set[str]) -> Iterator[str]:
    return (pool for pool in names if storage.pool_exists(host.conn, pool))


def delete(host: Host, name: str, report: Reporter) -> None:
    """Delete a VM with its own disks, seed, NVRAM, saved state and snapshot metadata; nobody else's, no base image.

    Works on what a killed create or delete left, too. Raises Conflict while another vmctl works on that name.
    """
    with holding(host, name):
        _delete(host, name, report)


def clear(host: Host, name: str, report: Reporter) -> bool:
    """Delete a VM whose creation was cut off. False: its creator was at it, and has made it whole. Raises as delete."""
    with holding(host, name):
        vm = domain.find_or_none(host.conn, name)
        if vm is None or vm.facts.record is None or not vm.facts.record.creating:
            return False
        _delete(host, name, report)
        return True


def _delete(host: Host, name: str, report: Reporter) -> None:
    # Once the VM is gone nobody can tell whose the files were.
    disk_journal.settle(host, name, report, deciding=True)
    snapshot_settle.settle(host, name, report, deciding=True)
    what = doomed(host, name)
    if what.vm is not None:
        if not what.vm.active:
            forgotten.require_none(host, name, what.vm.uuid, f"delete VM {name}")
        remove(host, what.vm, report)
        snapshot_layers.settle(host, name, report)  # what was left to be merged is gone with it
        return
    for owned in what.volumes:
        storage.delete_volume(host.conn, owned.pool, owned.volume)


def remove(host: Host, vm: Domain, report: Reporter) -> None:
    """Take a VM apart, its definition last: whatever interrupts this, a second delete finds the rest.

    Disks it shares with clones and forks go with the last of them. Of several deleted at once one must be the last, so
    they take turns from the look at who needs what until they are gone.
    """
    files, went = _of_snapshots(host, vm), identity.went(host, vm)
    if vm.active:
        power_off(host, vm.name)
    known_hosts(host, vm.name).unlink(missing_ok=True)
    owned = set(vm.facts.record.owned) if vm.facts.record else set()
    with ExitStack() as turn:
        if owned & _owned_by_others(host, vm):
            what = f"shared disks on {host.lock_scope}"
            turn.enter_context(held(host.folders.runtime, what, timeout_s=_SHARED_TIMEOUT_S))
        for path in files:
            disk_journal.remove_file(host, path)
        volumes, theirs = _deletable(host, vm, files, report)
        for one in volumes:
            storage.delete_volume(host.conn, one.pool, one.volume)
        for one in sorted(owned - set(volumes) - _owned_by_others(host, vm), key=lambda o: o.volume):
            there = storage.pool_exists(host.conn, one.pool)
            why = "another VM uses it, or a disk is based on it" if there else f"no storage pool {one.pool} runs here"
            why = f"{theirs[one]} needs it, on storage that both hosts see" if one in theirs else why
            report(Warned(f"kept volume {one.volume}: {why}"))
        if vm.persistent:
            domain.undefine(host.conn, vm.name)
    if not went:
        identity.forget_moving(host, vm.uuid)
    for prefix in identity.prefixes(vm) if owned and not theirs else ():
        identity.unmark_moved(host, prefix)


def _owned_by_others(host: Host, vm: Domain) -> set[Owned]:
    others = [other for other in domain.all_facts(host.conn) if other.uuid != vm.uuid]
    return {owned for other in others if other.record for owned in other.record.owned}
