"""Backups made, listed, shown and pruned. Taking the disks is in backup_take.py, proving and restoring beside it."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Collection, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from vmctl import (
    __version__,
    backup_index,
    backup_manifest,
    backup_marks,
    backup_plan,
    backup_store,
    backup_take,
    disk_find,
    disk_journal,
    domain_files,
    domain_job,
    identity,
    layer_check,
    qemu_img,
    zstd,
)
from vmctl.backup_index import Index
from vmctl.backup_manifest import Manifest, StoredFile
from vmctl.backup_plan import DiskNow, DiskPlan, Pruning, Wanted
from vmctl.backup_store import Shelf
from vmctl.backup_take import Order
from vmctl.choices import Compression
from vmctl.disk_xml import DiskDevice
from vmctl.errors import ImageError, NotFound, SpecError, Unsupported, VmctlError, WrongState
from vmctl.events import Reporter, Step, Warned
from vmctl.hosts import Host, holding
from vmctl.hypervisor import backup, disks, domain, pools
from vmctl.hypervisor.domain import Domain, State

_ID = "%Y%m%dT%H%M%SZ"
_AS_THEY_WERE = "the backups before it are as they were"
_LARGEST_FILE = 1 << 30


@dataclass(frozen=True, slots=True)
class Wish:
    """How a backup shall be made. ``keep`` and ``older_than``: what is pruned after it, None for nothing."""

    folder: Path
    wanted: Wanted = Wanted.AUTO
    freeze: bool = False
    compression: Compression = Compression.NONE
    keep: int | None = None
    older_than: timedelta | None = None


@dataclass(frozen=True, slots=True)
class Made:
    """A backup that was made, or with a dry run would be. ``touches``: what is changed, a line for each."""

    vm: str
    id: str
    folder: str
    kind: str
    size: int
    consistency: str
    disks: tuple[DiskPlan, ...]
    touches: tuple[str, ...]
    pruned: tuple[str, ...] = ()
    took_s: float = 0.0


def create(host: Host, name: str, wish: Wish, report: Reporter, *, dry: bool) -> Made:
    """Back up a VM, running or stopped. Failing or interrupted, it leaves VM and backups as they were.

    Raises Conflict while another vmctl works on the VM or its backups.
    """
    began = time.monotonic()
    if not host.conn.local:
        raise Unsupported(f"cannot back up VM {name}: it is on another machine", hint="run vmctl there")
    if wish.compression is Compression.ZSTD:
        zstd.require()
    folder = backup_store.vm_folder(wish.folder, name)
    with holding(host, name), ExitStack() as stack:
        vm = domain.find(host.conn, name)
        stack.enter_context(domain_job.telling_end(host, vm, f"back up VM {name}", _AS_THEY_WERE))
        _require_able(vm, wish)
        layer_check.require_known(host, vm, f"back up VM {name}", noting=not dry)
        if dry:
            shelf = backup_store.shelf(folder)
            return _planned(host, vm, wish, shelf, folder, _usable_last(shelf), dry=True)
        with backup_store.telling_os_errors(f"back up VM {name}"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with backup_store.locked(folder, shared=False), backup_store.telling_os_errors(f"back up VM {name}"):
            backup_store.clear_half_made(folder)
            disk_journal.settle(host, vm.name, report)
            layer_check.follow(host, vm)  # the definition is in the backup, with what it names
            backup_marks.settle(host, vm, report)
            shelf = backup_store.shelf(folder)
            newest = _usable_last(shelf)
            made = _planned(host, vm, wish, shelf, folder, newest)
            seen: set[int] = set()
            if shelf.last is not None:
                backup_store.size(folder / shelf.last.id, seen)
            manifest = _make(host, vm, wish, shelf, made, newest.below, report, began)
            size = backup_store.size(folder / manifest.id, seen)
            pruned = _prune_now(backup_store.shelf(folder), wish.keep, wish.older_than, report)
            _tell_broken(pruned, report)
        return replace(made, size=size, kind=manifest.kind, pruned=pruned.delete, took_s=time.monotonic() - began)


def _require_able(vm: Domain, wish: Wish) -> None:
    domain.require_persistent(vm, "back up")
    if vm.state is State.SAVED:
        raise WrongState(
            f"cannot back up VM {vm.name}: its memory is saved, and its disks are of no use without it",
            hint=f"vmctl start {vm.name}",
        )
    if vm.facts.record is not None and vm.facts.record.creating:
        raise WrongState(f"cannot back up VM {vm.name}: its creation is not over")
    if wish.freeze and not vm.active:
        raise WrongState(f"cannot freeze VM {vm.name}: it is {vm.state}", hint="a stopped VM needs no --freeze")


def _planned(
    host: Host, vm: Domain, wish: Wish, shelf: Shelf, folder: Path, newest: _Last, *, dry: bool = False
) -> Made:
    now = _disks_now(host, vm)
    if not now:
        raise NotFound(f"cannot back up VM {vm.name}: it has no disk that is written to")
    last = newest.manifest
    dirty = _dirty(host, vm, now, last) if last is not None and wish.wanted is not Wanted.FULL else None
    plans = backup_plan.plan(now, last, dirty, wish.wanted, vm=vm.name, uuid=vm.uuid)
    if newest.why and wish.wanted is not Wanted.FULL:
        plans = tuple(replace(one, why=newest.why) for one in plans)
    name = _next_id(shelf)
    touches = [f"make {folder}/{name}" + (", or with the time at which it begins" if dry else "")]
    for plan in plans:
        what = (
            f"what changed since {plan.parent}" if plan.parent else "all of it" + (f": {plan.why}" if plan.why else "")
        )
        touches.append(f"read disk {plan.disk.target} ({plan.disk.source}), {what}")
    marked = [plan.disk.source for plan in plans if plan.disk.marks]
    touches += [f"mark in {path} from where the next backup of VM {vm.name} counts" for path in marked]
    if wish.freeze:
        touches.append(f"freeze the file systems of {vm.name} for a moment")
    if shelf.points and (wish.keep is not None or wish.older_than is not None):
        spare = _pruning(shelf, wish.keep, wish.older_than, _coming(shelf, name, plans))
        touches += [f"delete {folder}/{one}" for one in spare.delete]
        touches += [f"merge into {folder}/{one} what it needs of them" for one in spare.merge]
    consistency = "stopped" if not vm.active else "frozen" if wish.freeze else "crash"
    kinds = {bool(plan.parent) for plan in plans}
    kind = "mixed" if len(kinds) == 2 else "incremental" if True in kinds else "full"
    return Made(vm.name, name, str(folder), kind, 0, consistency, plans, tuple(touches))


def _next_id(shelf: Shelf) -> str:
    """The time, or a moment after the newest backup where a clock went back."""
    now = datetime.now(UTC)
    names = [*shelf.points, *shelf.damaged]
    if names and now.strftime(_ID) <= max(names):
        now = datetime.strptime(max(names)[:16], _ID) + timedelta(seconds=1)
    return now.strftime(_ID)


def _disks_now(host: Host, vm: Domain) -> tuple[DiskNow, ...]:
    found = [disk for disk in disks.disks(host.conn, vm.name, inactive=not vm.active) if _taken(disk)]
    if not vm.active:
        identity.require_no_twin(host, vm, [disk.source for disk in found], f"back up VM {vm.name}", reading=True)
    return tuple(_now(host, vm, disk) for disk in found)


def _taken(disk: DiskDevice) -> bool:
    return disk.device == "disk" and not disk.readonly and bool(disk.source)


def _now(host: Host, vm: Domain, disk: DiskDevice) -> DiskNow:
    if vm.active:
        size = disks.sizes(host.conn, vm.name, disk.target).capacity
        return DiskNow(disk.target, disk.serial, disk.source, disk.format, size, disk.format == "qcow2")
    located = disk_find.locate(host, f"{vm.name}:{disk.target}")
    disk_find.require_idle(host, located, "back up")
    layers = disk_find.chain(host, located, "back up")
    size = layers.top.virtual_size
    return DiskNow(disk.target, disk.serial, layers.top.path, disk.format, size, disk.format == "qcow2")


@dataclass(frozen=True, slots=True)
class _Last:
    """The newest backup, if an increment can be laid over it, with the digests of its disks; else ``why`` not."""

    manifest: Manifest | None
    below: Mapping[str, Index]
    why: str


def _usable_last(shelf: Shelf) -> _Last:
    last = shelf.last
    newest = max([*shelf.points, *shelf.damaged], default="")
    if last is None or newest != last.id:
        return _Last(None, {}, f"backup {newest} is damaged" if newest else "")
    below = {}
    try:
        for disk in last.disks:
            layers = backup_manifest.chain(shelf.points, last.id, disk.target)
            for manifest, stored in layers:
                path = shelf.folder / manifest.id / stored.file
                if not path.is_file() or path.stat().st_size != stored.file_size:
                    return _Last(None, {}, f"{path} is missing or not whole")
            lists = [backup_store.index(shelf.folder, manifest, stored) for manifest, stored in layers]
            below[disk.target] = backup_index.laid_over(lists)
    except VmctlError as error:
        return _Last(None, {}, error.message)
    return _Last(last, below, "")


def _dirty(host: Host, vm: Domain, now: Collection[DiskNow], last: Manifest) -> dict[str, int] | None:
    """The disks whose bitmaps of what changed since a backup are there and good; None without its checkpoint."""
    known = backup.checkpoints(host.conn, vm.name)
    mine = next((one for one in known if one.name == last.checkpoint), None)
    if mine is None:
        return None
    if vm.active:
        return {
            target: count
            for target, count in backup.dirty(host.conn, vm.name, mine.name).items()
            if target in mine.bitmaps
        }
    if any(one.parent == mine.name for one in known):
        return None  # what changed lies in several bitmaps, which only a running QEMU puts together
    good = {}
    for disk in now:
        mark = mine.bitmaps.get(disk.target, "")
        if qemu_img.bitmaps(Path(disk.source), disk.format).get(mark) and not _marked_below(host, vm, disk, mark):
            good[disk.target] = 0
    return good


def _marked_below(host: Host, vm: Domain, disk: DiskNow, mark: str) -> bool:
    """Whether a file that a stopped VM's disk is based on has that bitmap too.

    A snapshot of the running VM was taken since: what changed before it, that file tells alone, and only a running QEMU
    puts the two together.
    """
    layers = disk_find.chain(host, disk_find.locate(host, f"{vm.name}:{disk.target}"), "back up").layers
    return any(mark in qemu_img.bitmaps(Path(one.path), one.format) for one in layers[1:])


def _make(
    host: Host,
    vm: Domain,
    wish: Wish,
    shelf: Shelf,
    planned: Made,
    below: Mapping[str, Index],
    report: Reporter,
    began: float,
) -> Manifest:
    for plan in planned.disks:
        if plan.why:
            report(Warned(f"disk {plan.disk.target} is backed up whole: {plan.why}"))
    with backup_store.making(shelf.folder) as made:
        order = Order(vm, planned.disks, shelf, made, planned.id, wish.compression, wish.freeze, below)
        files, left_out = _small_files(host, vm, made, shelf.last, shelf.folder)
        for one in left_out:
            report(Warned(f"not in the backup: {one}"))
        stored = backup_take.take(host, order, report)
        manifest = Manifest(
            id=planned.id,
            vm=vm.name,
            uuid=vm.uuid,
            host=host.conn.host,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            consistency=planned.consistency,
            compression=wish.compression,
            checkpoint=order.checkpoint,
            disks=stored,
            files=files,
            vmctl=__version__,
            left_out=left_out,
            took_s=round(time.monotonic() - began, 3),
        )
        try:
            backup_store.write(made / backup_manifest.NAME, backup_manifest.dump(manifest).encode())
            backup_store.publish(made, shelf.folder, planned.id)
        except BaseException:
            if not (shelf.folder / planned.id).exists() and order.checkpoint:
                backup_marks.drop(host, vm, order.checkpoint)
            raise
    report(Step(f"backup {planned.id} of {vm.name} is made"))
    for name in backup_marks.needless(host, vm.name):
        backup_marks.drop(host, vm, name)
    return manifest


def _small_files(
    host: Host, vm: Domain, made: Path, last: Manifest | None, folder: Path
) -> tuple[tuple[StoredFile, ...], tuple[str, ...]]:
    """The definition, the UEFI variables, and what else of files the VM needs; and what of it is left out."""
    text = domain.xml(host.conn, vm.name, inactive=True, secure=True)
    backup_store.write(made / "domain.xml", text.encode())
    digest = hashlib.sha256(text.encode()).hexdigest()
    found = [StoredFile("domain", "domain.xml", len(text.encode()), digest)]
    left_out = ["the state of its TPM"] if "<tpm" in text else []
    wanted = [("nvram", vm.facts.nvram), ("boot", vm.facts.kernel), ("boot", vm.facts.initrd)]
    written = {disk.source for disk in vm.facts.disks if not disk.readonly and disk.device == "disk"}
    named = domain_files.above(text)  # what a disk is based on is in its own file
    for owned in vm.facts.record.owned if vm.facts.record else ():
        path = f"{pools.pool(host.conn, owned.pool).path}/{owned.volume}"
        if path not in written and path != vm.facts.serial_log and path in named:
            wanted.append(("volume", path))
    left_out += [
        f"{disk.device} {disk.target} ({disk.source}), which is read-only and not its own"
        for disk in vm.facts.disks
        if disk.source and disk.source not in written and ("volume", disk.source) not in wanted
    ]
    for role, path in dict.fromkeys((role, path) for role, path in wanted if path):
        source = Path(path)
        if not source.is_file() or source.stat().st_size > _LARGEST_FILE:
            left_out.append(f"{path}, which is no file of at most 1 GiB")
            continue
        found.append(_stored(role, source, made, f"{role}-{len(found)}", last, folder))
    return tuple(found), tuple(left_out)


def _stored(role: str, source: Path, made: Path, name: str, last: Manifest | None, folder: Path) -> StoredFile:
    """Copy a file; what the backup before holds already is linked."""
    size, changed = source.stat().st_size, source.stat().st_mtime_ns
    for same in last.files if last else ():
        # As rsync does it: a kernel of 50 MiB would else be read for each increment.
        if last is not None and (same.source, same.size, same.changed_ns) == (str(source), size, changed):
            with suppress(OSError):  # it is gone, or the file system has no links
                os.link(folder / last.id / same.file, made / name, follow_symlinks=False)
                return replace(same, role=role, file=name)
    data = source.read_bytes()
    backup_store.write(made / name, data)
    return StoredFile(role, name, len(data), hashlib.sha256(data).hexdigest(), str(source), changed)


def _coming(shelf: Shelf, name: str, plans: Collection[DiskPlan]) -> Manifest:
    """One that is not made yet, for its place among those that are: by its name, and by what it is laid over."""
    like = shelf.points[max(shelf.points)]
    parents = {plan.parent for plan in plans if plan.parent}
    disks = tuple(replace(like.disks[0], parent=parent) for parent in sorted(parents))
    return replace(like, id=name, created=datetime.now(UTC).isoformat(timespec="seconds"), disks=disks)


def _pruning(shelf: Shelf, keep: int | None, older_than: timedelta | None, coming: Manifest | None = None) -> Pruning:
    if keep is not None and keep < 1:
        raise SpecError("cannot prune backups: at least one must be kept")
    points = [*shelf.points.values(), *([coming] if coming else [])]
    looked = {name: backup_store.seen_wanting(shelf, one) for name, one in shelf.points.items()}
    broken = {name: why for name, why in looked.items() if why}
    if broken and len(broken) == len(points):
        raise ImageError(
            f"cannot prune backups in {shelf.folder}: none that could be kept is whole: {broken[max(broken)]}",
            hint=f"vmctl backup verify {shelf.folder.name} tells what of each is left",
        )
    return backup_plan.prune(points, keep=keep, older_than=older_than, now=datetime.now(UTC), broken=broken)


def prune(folder: Path, keep: int | None, older_than: timedelta | None, report: Reporter, *, dry: bool) -> Pruning:
    """Delete the backups of a VM that are neither among the newest ``keep`` nor younger than ``older_than``.

    One that is kept takes over first what it needs of those that go. One of which a file is missing or not as long as
    it was is not counted as kept. Raises SpecError without a rule, Conflict, and ImageError where none is whole.
    """
    if keep is None and older_than is None:
        raise SpecError("cannot prune backups: nothing says which", hint="--keep 7, --older-than 30d, or both")
    if not folder.is_dir():
        meant = backup_store.vm_meant(folder)
        raise NotFound(f"cannot prune backups: there is no {folder}", meant=meant)
    if dry:
        found = _pruning(backup_store.shelf(folder), keep, older_than)
        _tell_broken(found, report)
        if found.delete:
            looked = "the files of what is kept are there and as long as they were"
            report(Step(f"{looked}; vmctl backup verify {folder.name} reads them"))
        return found
    with backup_store.locked(folder, shared=False), backup_store.telling_os_errors(f"prune backups in {folder}"):
        backup_store.clear_half_made(folder)
        return _prune_now(backup_store.shelf(folder), keep, older_than, report)


def _tell_broken(found: Pruning, report: Reporter) -> None:
    for name, why in found.broken.items():
        report(Warned(f"backup {name} is not counted as one that is kept: {why}"))


def _prune_now(shelf: Shelf, keep: int | None, older_than: timedelta | None, report: Reporter) -> Pruning:
    found = (
        Pruning((), (), tuple(shelf.points))
        if keep is None and older_than is None
        else _pruning(shelf, keep, older_than)
    )
    if found.merge:
        from vmctl import backup_merge  # late: few backups prune

    for name in found.merge:
        backup_merge.merge(backup_store.shelf(shelf.folder), name, frozenset(found.delete), report)
    for name in reversed(found.delete):
        backup_store.remove(shelf.folder, name)
    return found
