"""Disks made larger, while their VMs run or not, with what is on them; and smaller, where nothing can be lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vmctl import disk_guest, disk_inside, disk_replace, qemu_img
from vmctl.disk_chain import Chain
from vmctl.disk_find import Located, chain, require_alone, require_file, require_idle, require_not_elsewhere, working_on
from vmctl.disk_replace import share_reporter
from vmctl.disk_spec import exact, new_size
from vmctl.errors import Conflict, SpecError, Unsupported, VmctlError, WrongState
from vmctl.events import Reporter, Step
from vmctl.hosts import Host
from vmctl.hypervisor import agent, disks, storage
from vmctl.hypervisor.domain import State


@dataclass(frozen=True, slots=True)
class Resized:
    """A disk before and after, in bytes, or with a dry run as it would be.

    ``grown``: the file system that was grown on it, "" for none. ``touches``: what is changed.
    """

    disk: str
    before: int
    after: int
    grown: str
    touches: tuple[str, ...]


def resize(host: Host, text: str, size: str, report: Reporter, *, grow_fs: bool, shrink: bool, dry: bool) -> Resized:
    """Give a disk another size. Growing is for running VMs too; shrinking needs ``shrink`` and a stopped one.

    Raises SpecError for a size that would cut something off without that, WrongState, ImageError.
    """
    with working_on(host, text, report) as disk:
        if disk.disk is not None and disk.disk.readonly:
            raise WrongState(f"cannot resize {text}: VM {disk.owner} has it read-only")
        before = _size_now(host, disk)
        after = new_size(size, before)
        if after < before and not shrink:
            raise SpecError(
                f"cannot resize {text} to {after} bytes: it has {before}, and what lies beyond would be lost",
                hint="--shrink looks at what is on it first, and cuts off only what nothing uses",
            )
        serial = disk.disk.serial if disk.disk else ""
        if grow_fs:
            _require_growable(host, disk, after < before)
            with _hinting("the disk is as it was; make a file system on it in the guest, or leave out --grow-fs"):
                disk_guest.require_growable(host, disk.owner, serial)
        if after < before:
            layers = _require_shrinkable(host, disk)
            require_not_elsewhere(host, disk, "shrink", report)
            alone = ", which is based on no other then" if layers.base else ""
            fits = ", once a copy has shown that what is on it fits"
            touches: tuple[str, ...] = (f"rewrite {disk.path}{alone}{fits}",)
            if not dry:
                _shrink(host, disk, after, layers.top.virtual_size, report)
                if disk.pool:
                    storage.refresh(host.conn, disk.pool)
        elif after > before:
            if not disk.live:
                _require_growable_file(host, disk)
                require_not_elsewhere(host, disk, "resize", report)
            touches = (f"grow {disk.path or disk.ref}",)
            if not dry:
                _grow(host, disk, after, report)
        else:
            touches = ()
        grown = ""
        if grow_fs:
            touches += (f"grow what is on it in VM {disk.owner}",)
            # By its whole size: what was said, +1G say, would make it larger once more.
            again = f"vmctl disk resize {disk.ref} {exact(after)} --grow-fs"
            with _hinting(f"the disk itself has grown; mend this in the guest, then go on: {again}"):
                grown = "" if dry else disk_guest.grow(host, disk.owner, serial, after)
        return Resized(disk.ref, before, after, grown, touches)


@contextmanager
def _hinting(hint: str) -> Iterator[None]:
    try:
        yield
    except VmctlError as error:
        error.hint = "; ".join(one for one in (error.hint, hint) if one)
        raise


def _size_now(host: Host, disk: Located) -> int:
    if disk.live:
        return disks.sizes(host.conn, disk.owner, disk.target).capacity
    if disk.volume:
        storage.refresh(host.conn, disk.pool)
        return storage.volume(host.conn, disk.pool, disk.volume).capacity
    require_file(host, disk, "resize")
    return qemu_img.info(Path(disk.path), disk.format).virtual_size


def _require_growable(host: Host, disk: Located, shrinks: bool) -> None:
    if shrinks:
        raise SpecError(f"cannot resize {disk.ref}: --grow-fs and a smaller size exclude each other")
    if disk.vm is None or disk.vm.state is not State.RUNNING:
        raise WrongState(
            f"cannot grow what is on {disk.ref}: no running VM has it",
            hint="without --grow-fs the disk grows; cloud images grow their root file system at the next boot",
        )
    if disk.disk is None or not disk.disk.serial:
        raise Unsupported(f"cannot grow what is on {disk.ref}: it has no serial to tell it by in the guest")
    agent.require(host.conn, disk.owner, f"grow what is on {disk.ref} in")


def _grow(host: Host, disk: Located, size: int, report: Reporter) -> None:
    if disk.live:
        disks.resize(host.conn, disk.owner, disk.target, size)
    elif host.conn.local and Path(disk.path).is_file():
        for name, good in qemu_img.bitmaps(Path(disk.path), disk.format).items():
            if not good:  # QEMU was killed: it can be used for nothing any more, and it keeps the disk from growing
                qemu_img.remove_bitmap(Path(disk.path), name)
                report(Step(f"{name} in {disk.path} is broken, and removed: the next backup takes all of the disk"))
        qemu_img.resize(Path(disk.path), disk.format, size)
        if disk.pool:
            storage.refresh(host.conn, disk.pool)
    else:
        storage.resize_volume(host.conn, disk.pool, disk.volume, size)


def _require_growable_file(host: Host, disk: Located) -> None:
    """Raise unless the disk can grow while no VM runs with it."""
    require_idle(host, disk, "resize")
    require_alone(host, disk, "resize")
    if not disk.path:
        raise WrongState(f"cannot resize {disk.ref}: it is on a network, and no running VM has it open")
    if host.conn.local and Path(disk.path).is_file():
        chain(host, disk, "resize")


def _require_shrinkable(host: Host, disk: Located) -> Chain:
    """The chain of a disk that can be cut. Raises unless it is."""
    require_file(host, disk, "shrink")
    require_idle(host, disk, "shrink")
    require_alone(host, disk, "shrink")
    layers = chain(host, disk, "shrink")
    if disk.format == "qcow2" and qemu_img.info(Path(disk.path), disk.format).snapshots:
        raise Conflict(f"cannot shrink {disk.ref}: its file holds snapshots, which would be lost")
    return layers


def _shrink(host: Host, disk: Located, size: int, before: int, report: Reporter) -> None:
    """By a whole copy: looked at, cut, looked at again, and only then put in the disk's place, based on no other."""
    old, what = Path(disk.path), f"shrink {disk.ref}"
    moved = share_reporter(report, what, before)

    def make(path: Path) -> None:
        raw = path.with_suffix(".raw")
        qemu_img.copy_known(old, disk.format, raw, "raw", what=what, moved=moved)
        disk_inside.cut(raw, disk_inside.look(raw, what=what), size, what=what)
        if disk.format == "raw":
            raw.rename(path)
        else:
            qemu_img.copy_known(raw, "raw", path, disk.format, what=what)
            qemu_img.require_equal(raw, "raw", path, disk.format, what=what)

    disk_replace.in_place(host, disk, make, doing=what, equal=False)
