"""Disks rewritten with the same content: moved, converted, compacted, flattened, rebased, checked and repaired."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from vmctl import disk_chain, disk_replace, pull_journal, pull_settle, qemu_img
from vmctl.choices import DiskFormat
from vmctl.disk_chain import Chain
from vmctl.disk_find import (
    Located,
    chain,
    folders,
    locate,
    require_alone,
    require_file,
    require_idle,
    require_no_overlays,
    require_not_elsewhere,
    working_on,
)
from vmctl.disk_replace import share_reporter
from vmctl.disks import pool_folder
from vmctl.errors import Conflict, ImageError, Interrupted, SpecError, Unsupported, WrongState, quietly
from vmctl.events import Reporter, Step
from vmctl.hosts import Host
from vmctl.hypervisor import disks, storage
from vmctl.qemu_img import CheckResult


@dataclass(frozen=True, slots=True)
class Rewritten:
    """A disk before and after, or with a dry run as it would be. ``touches`` names every file that is made or gone."""

    disk: str
    path: str
    format: str
    size_before: int
    size_after: int
    touches: tuple[str, ...]
    how: str


def _allocated(path: str) -> int:
    return Path(path).stat().st_blocks * 512


def _refuse_snapshots(disk: Located, doing: str) -> None:
    if disk.format == DiskFormat.QCOW2 and qemu_img.info(Path(disk.path), disk.format).snapshots:
        raise Conflict(f"cannot {doing} {disk.ref}: its file holds snapshots, which would be lost")


def _ready(host: Host, disk: Located, doing: str, report: Reporter, *, same_place: bool, keep: bool = False) -> Chain:
    """The chain of a disk that may be rewritten now.

    ``same_place``: its file keeps name and format; ``keep``: it stays as it is, beside a new one.
    """
    require_file(host, disk, doing)
    if disk.disk is not None and disk.disk.readonly:
        raise WrongState(f"cannot {doing} {disk.ref}: VM {disk.owner} has it read-only")
    found = chain(host, disk, doing)
    if disk.live:
        if disks.job(host.conn, disk.owner, disk.target) is not None:
            raise WrongState(f"cannot {doing} {disk.ref}: another job works on it")
    else:
        require_idle(host, disk, doing)
    if not same_place:
        require_alone(host, disk, doing)
    if not keep and not (disk.live and same_place):
        require_not_elsewhere(host, disk, doing, report)
    return found


def _free_name(folder: Path, stem: str, form: str) -> Path:
    """A path for a new file, of a name nobody has."""
    names = [f"{stem}.{form}", *(f"{stem}-{n}.{form}" for n in range(2, 1000))]
    return next(folder / name for name in names if not (folder / name).exists())


def _told(
    disk: Located, new: str, form: str, before: int, touches: tuple[str, ...], how: str, *, dry: bool
) -> Rewritten:
    after = before if dry else _allocated(new)
    return Rewritten(disk.ref, new, form, before, after, touches, how)


def move(host: Host, text: str, pool: str, report: Reporter, *, keep: bool, dry: bool, bandwidth: int = 0) -> Rewritten:
    """Bring a disk into another pool, while its VM runs or not; it stays based on what it is based on.

    ``bandwidth``: most bytes copied a second while the VM runs, 0 for all there is.
    """
    with working_on(host, text, report) as disk:
        doing = "move"
        layers = _ready(host, disk, doing, report, same_place=False, keep=keep)
        folder = Path(pool_folder(host, pool))
        new = folder / Path(disk.path).name
        if os.path.realpath(folder) == os.path.realpath(Path(disk.path).parent):
            raise SpecError(f"cannot move {text}: it is in pool {pool} already")
        if new.exists():
            raise Conflict(f"cannot move {text}: pool {pool} has a {new.name} already")
        touches = (f"make {new}", *(() if keep else (f"delete {disk.path}",)))
        touches += (f"change VM {disk.owner}",) if disk.vm else ()
        how, before = "live" if disk.live else "stopped", _allocated(disk.path)
        if not dry:
            what = f"move {disk.ref} to pool {pool}"
            base = (layers.base.path, layers.base.format) if layers.base else None
            if disk.live:
                size = layers.top.virtual_size
                disk_replace.live(
                    host, disk, new, disk.format, size, base, report, doing=what, keep=keep, bandwidth=bandwidth
                )
            else:
                _move_file(host, disk, new, base, report, what=what, keep=keep)
            storage.refresh(host.conn, pool)
        return _told(disk, str(new), disk.format, before, touches, how, dry=dry)


def _move_file(
    host: Host, disk: Located, new: Path, base: tuple[str, str] | None, report: Reporter, *, what: str, keep: bool
) -> None:
    old = Path(disk.path)
    moved = share_reporter(report, what, old.stat().st_size)
    relative = base is not None and not qemu_img.info(old, disk.format).backing_file.startswith("/")

    def make(path: Path) -> None:
        if relative and base is not None:
            _refuse_snapshots(disk, "move")  # its base is named by a way from here, which a plain copy would lose
            _copied(disk, path, disk.format, base, what, moved)
            qemu_img.require_equal(old, disk.format, path, disk.format, what=what)
        else:
            disk_replace.copy_bytes(old, path, moved)
            qemu_img.require_equal(old, "raw", path, "raw", what=what)

    disk_replace.to_new_file(host, disk, new, disk.format, make, report, doing=what, keep=keep)


def _copied(
    disk: Located,
    target: Path,
    form: str,
    base: tuple[str, str] | None,
    what: str,
    moved: object,
    *,
    compress: bool = False,
) -> None:
    qemu_img.copy_known(
        Path(disk.path),
        disk.format,
        target,
        form,
        what=what,
        backing=Path(base[0]) if base else None,
        backing_format=base[1] if base else "",
        compress=compress,
        moved=moved,  # type: ignore[arg-type]
    )


def convert(
    host: Host, text: str, form: DiskFormat, report: Reporter, *, keep: bool, dry: bool, bandwidth: int = 0
) -> Rewritten:
    """Give a disk another format, while its VM runs or not. The new file is based on no other. Else as ``move``."""
    with working_on(host, text, report) as disk:
        if disk.format == form:
            raise SpecError(
                f"cannot convert {text}: it is {form} already", hint=f"vmctl disk flatten {text}, or compact"
            )
        layers = _ready(host, disk, "convert", report, same_place=False, keep=keep)
        old = Path(disk.path)
        stem = old.stem if old.suffix in {".qcow2", ".raw", ".img"} else old.name
        new, before = _free_name(old.parent, stem, form), _allocated(disk.path)
        touches = (f"make {new}", *(() if keep else (f"delete {old}",)))
        touches += (f"change VM {disk.owner}",) if disk.vm else ()
        if not disk.live:
            _refuse_snapshots(disk, "convert")
        if not dry:
            what, size = f"convert {disk.ref} to {form}", layers.top.virtual_size
            if disk.live:
                disk_replace.live(host, disk, new, form, size, None, report, doing=what, keep=keep, bandwidth=bandwidth)
            else:

                def make(path: Path) -> None:
                    _copied(disk, path, form, None, what, share_reporter(report, what, size))
                    qemu_img.require_equal(old, disk.format, path, form, what=what)

                disk_replace.to_new_file(host, disk, new, form, make, report, doing=what, keep=keep)
            if disk.pool:
                storage.refresh(host.conn, disk.pool)
        return _told(disk, str(new), form, before, touches, "live" if disk.live else "stopped", dry=dry)


def compact(host: Host, text: str, report: Reporter, *, compress: bool, dry: bool) -> Rewritten:
    """Give the host back what a disk takes without need: zeros, and what its guest has trimmed. Its VM must not run."""
    with working_on(host, text, report) as disk:
        if disk.live:
            raise WrongState(
                f"cannot compact {text}: VM {disk.owner} is running",
                hint=f"vmctl trim {disk.owner} gives back what its file systems do not use, while it runs",
            )
        if compress and disk.format != DiskFormat.QCOW2:
            raise SpecError(f"cannot compress {text}: it is {disk.format}, and only qcow2 can be")
        layers = _ready(host, disk, "compact", report, same_place=True)
        _refuse_snapshots(disk, "compact")
        base = (layers.base.path, layers.base.format) if layers.base else None
        before = _allocated(disk.path)
        if not dry:
            what = f"compact {disk.ref}"
            moved = share_reporter(report, what, layers.top.virtual_size)
            disk_replace.in_place(
                host,
                disk,
                lambda path: _copied(disk, path, disk.format, base, what, moved, compress=compress),
                doing=what,
            )
        return _told(disk, disk.path, disk.format, before, (f"rewrite {disk.path}",), "stopped", dry=dry)


def flatten(host: Host, text: str, report: Reporter, *, dry: bool) -> Rewritten:
    """Bring all that a disk has from the files below into its own, while its VM runs or not."""
    with working_on(host, text, report) as disk:
        layers = _ready(host, disk, "flatten", report, same_place=True)
        before, how = _allocated(disk.path), "live" if disk.live else "stopped"
        if layers.base is None:
            return _told(disk, disk.path, disk.format, before, (), "flat already", dry=True)
        touches = (f"rewrite {disk.path}, which is based on {layers.base.path} no longer",)
        if not disk.live:
            _refuse_snapshots(disk, "flatten")
        if not dry:
            what = f"flatten {disk.ref}"
            if disk.live:
                _pull(host, disk, layers, "", report, what)
            else:
                moved = share_reporter(report, what, layers.top.virtual_size)
                disk_replace.in_place(
                    host, disk, lambda path: _copied(disk, path, disk.format, None, what, moved), doing=what
                )
        return _told(disk, disk.path, disk.format, before, touches, how, dry=dry)


def _pull(host: Host, disk: Located, layers: Chain, base: str, report: Reporter, what: str) -> None:
    """Pull what is above ``base`` into a running VM's disk, with a note of what it is based on till all is flushed."""
    if disk.vm is None:
        return
    try:
        note = pull_settle.begin(host, disk.vm, disk.target, layers, what)
        disks.pull(host.conn, disk.owner, disk.target, base, disk_replace.job_reporter(report, what))
        pull_journal.end(note)
    except BaseException:
        _settled(host, disk.owner, report)
        raise


def _settled(host: Host, vm: str, report: Reporter) -> None:
    """Settle, if it can be done now: why it was ended is told. A Ctrl-C that comes meanwhile waits for its end."""
    try:
        quietly(lambda: pull_settle.settle(host, vm, report))
    except (KeyboardInterrupt, Interrupted):
        quietly(lambda: pull_settle.settle(host, vm, report))


def rebase(host: Host, text: str, onto: str, report: Reporter, *, dry: bool) -> Rewritten:
    """Base a disk on another file, its content the same: what that does not have comes into its own.

    While its VM runs only on one that is below it already.
    """
    with working_on(host, text, report) as disk:
        layers = _ready(host, disk, "rebase", report, same_place=True)
        if disk.format != DiskFormat.QCOW2:
            raise SpecError(f"cannot rebase {text}: it is {disk.format}, and only qcow2 is based on other files")
        below = locate(host, onto)
        base = chain(host, below, "rebase onto")
        if not disk_chain.inside(below.path, folders(host)()):
            raise ImageError(f"cannot rebase {text} onto {onto}: it lies in no storage pool")
        if disk.path in {layer.path for layer in base.layers}:
            raise SpecError(f"cannot rebase {text} onto {onto}: that is based on it")
        if below.vm is not None and below.disk is not None and not below.disk.readonly:
            raise Conflict(f"cannot rebase {text} onto {onto}: VM {below.owner} writes to it")
        before, how = _allocated(disk.path), "live" if disk.live else "stopped"
        if disk.live and below.path not in {layer.path for layer in layers.layers[1:]}:
            raise WrongState(
                f"cannot rebase {text} onto {onto}: VM {disk.owner} is running, and {onto} is not below it now",
                hint=f"vmctl stop {disk.owner}",
            )
        if not disk.live:
            _refuse_snapshots(disk, "rebase")
        if not dry:
            _rebase(host, disk, layers, base, report)
        return _told(
            disk, disk.path, disk.format, before, (f"rewrite {disk.path}, based on {below.path}",), how, dry=dry
        )


def _rebase(host: Host, disk: Located, layers: Chain, base: Chain, report: Reporter) -> None:
    what = f"rebase {disk.ref}"
    if disk.live:
        if layers.base is not None and layers.base.path != base.top.path:
            _pull(host, disk, layers, base.top.path, report, what)
        return
    old = (layers.base.path, layers.base.format) if layers.base else None
    size = layers.top.virtual_size

    def make(path: Path) -> None:
        _copied(disk, path, disk.format, old, what, share_reporter(report, what, size))
        qemu_img.rebase(path, disk.format, Path(base.top.path), base.top.format, what=what)

    disk_replace.in_place(host, disk, make, doing=what)


@dataclass(frozen=True, slots=True)
class Checked:
    """What a check found in one file of a chain; ``note``: why one was not looked at, or what would be done."""

    path: str
    result: CheckResult | None
    note: str = ""


def check(host: Host, text: str, report: Reporter, *, repair: bool, dry: bool) -> tuple[Checked, ...]:
    """Look for damage in the files of a disk that nobody writes to; ``repair`` mends its own file, in a copy."""
    with working_on(host, text, report) as disk:
        require_file(host, disk, "check")
        require_idle(host, disk, "check")
        if disk.format == DiskFormat.RAW and Path(disk.path).suffix == ".qcow2":
            # Nothing else tells what a disk is that no VM has: a broken header would pass for good raw content.
            raise ImageError(
                f"cannot check {text}: {disk.path} is called qcow2 and has no header of one",
                hint="its header is destroyed: restore it from a backup; or it is raw, and has the wrong name",
            )
        layers = chain(host, disk, "check")
        if repair and disk.format == DiskFormat.QCOW2:
            require_no_overlays(host, disk, "repair")
            require_not_elsewhere(host, disk, "repair", report)
            if not dry:
                _repair(host, disk, report)
        found = []
        for layer in layers.layers:
            if layer.format == DiskFormat.RAW:
                found.append(Checked(layer.path, None, "raw has nothing to check"))
            else:
                result = qemu_img.check(Path(layer.path), layer.format)
                mends = repair and dry and layer.path == layers.top.path and not result.clean
                found.append(Checked(layer.path, result, "a copy that is mended would take its place" * mends))
        return tuple(found)


def _repair(host: Host, disk: Located, report: Reporter) -> None:
    before = qemu_img.check(Path(disk.path), disk.format)
    if before.clean:
        return
    what = f"repair {disk.ref}"

    def make(path: Path) -> None:
        disk_replace.copy_bytes(Path(disk.path), path, share_reporter(report, what, Path(disk.path).stat().st_size))
        if qemu_img.info(path, disk.format).backing_file[:1] not in {"", "/"}:
            raise Unsupported(f"cannot {what}: it names its base by a way from its folder")
        qemu_img.check(path, disk.format, repair="all")
        if not qemu_img.check(path, disk.format).clean:
            raise ImageError(f"cannot {what}: qemu-img cannot mend all of it", hint="the disk is as it was")

    disk_replace.in_place(host, disk, make, doing=what, equal=not before.corruptions)
    report(Step(f"{disk.ref} is mended: {before.corruptions} corruptions, {before.leaks} lost clusters"))
