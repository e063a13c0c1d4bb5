"""Giving a disk another file, whole or not at all: made aside, synced, read again, then put in place by one rename.

What is half-made lies in a locked folder beside it (workspace.py), which the next such change clears when its maker is
dead; where the VM's definition has to name another file, the journal (disk_journal.py) ends what was begun.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from vmctl import disk_journal, disk_xml, forgotten, qemu_img, render
from vmctl.disk_find import Located
from vmctl.disk_guard import Watch
from vmctl.disk_journal import Entry
from vmctl.durable import sync_folder
from vmctl.errors import Conflict, ImageError, Interrupted, reason
from vmctl.events import Progress, Reporter
from vmctl.hosts import Host
from vmctl.hypervisor import disks, domain, storage
from vmctl.hypervisor.disks import Job
from vmctl.workspace import clear_leftovers, is_leftover, workspace

PREFIX = ".vmctl-disk-"
_CHUNK = 16 << 20


@contextmanager
def _telling_os_errors(doing: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in {errno.ENOSPC, errno.EDQUOT}
        hint = "the disk is as it was; make room, or choose another pool" if full else "the disk is as it was"
        raise ImageError(f"cannot {doing}: {reason(error)}", hint=hint) from error


def in_place(host: Host, disk: Located, make: Callable[[Path], None], *, doing: str, equal: bool = True) -> None:
    """Put what ``make`` makes at a path in the place of the disk's file, of the same format.

    ``equal``: it must read the same, which is looked at before. The disk must be idle.
    """
    old = Path(disk.path)
    with _telling_os_errors(doing), workspace(old.parent, PREFIX) as folder:
        watch = Watch(host, disk.path)
        new = folder / "disk"
        make(new)
        if equal:
            qemu_img.require_equal(old, disk.format, new, disk.format, what=doing)
        _alike(old, new)
        watch.require_idle(doing)
        new.replace(old)
        sync_folder(old.parent)


@contextmanager
def made_aside(new: Path, doing: str) -> Iterator[Path]:
    """A path to make a file at that is ``new`` once the block has ended well. Not for one that is there already."""
    with _telling_os_errors(doing), workspace(new.parent, PREFIX) as folder:
        made = folder / "disk"
        yield made
        made.replace(new)
        sync_folder(new.parent)


def _alike(old: Path, new: Path) -> None:
    was = old.stat()
    new.chmod(was.st_mode & 0o7777)
    if (was.st_uid, was.st_gid) != (new.stat().st_uid, new.stat().st_gid):
        os.chown(new, was.st_uid, was.st_gid)
    handle = os.open(new, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def copy_bytes(source: Path, target: Path, moved: Callable[[float], None]) -> None:
    """Copy a file with its holes. Raises OSError."""
    with source.open("rb") as reading, target.open("xb") as writing:
        size = os.fstat(reading.fileno()).st_size
        os.ftruncate(writing.fileno(), size)
        at = 0
        while at < size:
            try:
                at = os.lseek(reading.fileno(), at, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                break  # a hole to the end
            end = os.lseek(reading.fileno(), at, os.SEEK_HOLE)
            while at < end:
                reading.seek(at)
                data = reading.read(min(_CHUNK, end - at))
                if not data:
                    raise OSError(errno.EIO, "the file became shorter while it was read")
                at += os.pwrite(writing.fileno(), data, at)  # less than asked for on a disk almost full
                moved(at / size)
        writing.flush()
        os.fsync(writing.fileno())


def to_new_file(
    host: Host,
    disk: Located,
    new: Path,
    form: str,
    make: Callable[[Path], None],
    report: Reporter,
    *,
    doing: str,
    keep: bool,
) -> None:
    """Make a disk's content a file of another place or format, for its VM if it has one. The disk must be idle."""
    with _telling_os_errors(doing), workspace(new.parent, PREFIX) as folder:
        watch = Watch(host, disk.path)
        made = folder / "disk"
        make(made)
        _alike(Path(disk.path), made)
        try:
            entry = _begun(host, disk, new, form, keep=keep)
            watch.require_idle(doing)
            os.link(made, new)  # as a rename, but for a file that came there meanwhile
            sync_folder(new.parent)
            if entry is not None:
                text = domain.xml(host.conn, disk.owner, inactive=True)
                text = disk_xml.with_source(text, disk.target, str(new), form)
                domain.define(host.conn, text, name=disk.owner)
        finally:
            _settled(host, disk, report)
        if entry is None and not keep:
            disk_journal.remove_file(host, disk.path)


def _settled(host: Host, disk: Located, report: Reporter) -> None:
    """Settle; a Ctrl-C that comes in the middle of it waits for its end."""
    try:
        disk_journal.settle(host, disk.owner, report)
    except (KeyboardInterrupt, Interrupted):
        disk_journal.settle(host, disk.owner, report)
        raise


def _begun(host: Host, disk: Located, new: Path, form: str, *, keep: bool) -> Entry | None:
    if new.exists():
        raise Conflict(f"cannot make {new}: it exists already")
    if disk.vm is None:
        return None
    entry = Entry(host.conn.uri, disk.owner, disk.target, disk.path, str(new), form, keep)
    disk_journal.begin(host, entry)
    return entry


def live(
    host: Host,
    disk: Located,
    new: Path,
    form: str,
    size: int,
    backing: tuple[str, str] | None,
    report: Reporter,
    *,
    doing: str,
    keep: bool,
    bandwidth: int,
) -> None:
    """The same for a disk that a running VM writes to all the while. ``backing``: file and format it stays based on."""
    base = Path(backing[0]) if backing else None
    try:
        entry = _begun(host, disk, new, form, keep=keep)
        qemu_img.create(new, form, size, backing=base, backing_format=backing[1] if backing else "")
        new.chmod(0o600)
        moved = job_reporter(report, doing)
        xml = render.mirror(str(new), form)
        asked = None if entry is None else replace(entry, unsure=True)

        def switching() -> None:  # libvirt may die, and forget it, before it or its definition says so
            nonlocal asked
            if entry is not None and asked is not None:
                asked = replace(asked, process=forgotten.mark(host, disk.owner))
                disk_journal.note(host, entry, asked)

        disks.copy_and_switch(
            host.conn, disk.owner, disk.target, xml, moved, switching, shallow=backing is not None, bandwidth=bandwidth
        )
        if asked is not None:
            disk_journal.note(host, asked, replace(asked, switched=True))
    finally:
        _settled(host, disk, report)


def leftovers(host: Host, prefix: str, *, clear: bool) -> list[str]:
    """The folders under ``prefix`` of processes that were killed, in the pools of this machine; ``clear``: removed."""
    if not host.conn.local:
        return []
    found = []
    for parent in map(Path, storage.folders(host.conn)):
        before = set(parent.glob(f"{prefix}*"))
        if clear:
            clear_leftovers(parent, prefix)
            before -= set(parent.glob(f"{prefix}*"))
        found += sorted(str(one) for one in before if clear or is_leftover(one))
    return found


def job_reporter(report: Reporter, name: str) -> Callable[[Job], None]:
    """Reports a block job as progress."""
    return lambda job: report(Progress(name, job.done, job.total))


def share_reporter(report: Reporter, name: str, size: int) -> Callable[[float], None]:
    """Reports a share of ``size`` bytes as progress."""
    return lambda share: report(Progress(name, int(share * size), size))
