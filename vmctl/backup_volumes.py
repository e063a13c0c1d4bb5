"""Files of a restored VM: written in place where the pool is this machine's, else made here and sent by libvirt."""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

from vmctl import backup_index, backup_read, render
from vmctl.backup_index import CLUSTER
from vmctl.backup_manifest import StoredDisk
from vmctl.backup_read import Layer
from vmctl.errors import Conflict, ImageError, quietly
from vmctl.events import Progress, Reporter
from vmctl.hosts import Host
from vmctl.hypervisor import storage
from vmctl.qcow2_writer import Qcow2Writer


class _Raw:
    """A raw file of ``size`` bytes, with holes where there are zeros."""

    def __init__(self, handle: int, size: int) -> None:
        self._handle, self._size = handle, size
        os.ftruncate(handle, size)

    def write(self, first: int, data: memoryview) -> None:
        """The clusters from number ``first`` on."""
        offset = first * CLUSTER
        data = data[: self._size - offset]
        while data:
            done = os.pwrite(self._handle, data, offset)
            data, offset = data[done:], offset + done

    def zero(self, number: int) -> None:
        """They are zeros already."""


def disk(
    host: Host,
    folder: Path,
    pool: str,
    volume: str,
    path: str,
    stored: StoredDisk,
    parts: tuple[Layer, ...],
    report: Reporter,
) -> None:
    """Make the volume of a disk from the backups in ``folder``."""
    where = Path(path).parent
    if host.conn.local and os.access(where, os.W_OK):
        Path(path).unlink(missing_ok=True)
        _written(Path(path), folder, stored, parts, report)
        storage.refresh(host.conn, pool)
        return
    with tempfile.TemporaryDirectory(prefix="vmctl-restore-", dir=os.environ.get("TMPDIR", "/var/tmp")) as place:
        made = Path(place) / "disk"
        _written(made, folder, stored, parts, report)
        _make(host, pool, render.VolumeView(volume, stored.size, stored.format))
        size = made.stat().st_size
        with made.open("rb") as source:
            storage.upload(
                host.conn, pool, volume, source, size, lambda n: report(Progress(f"send disk {stored.target}", n, size))
            )
        storage.refresh(host.conn, pool)


def _written(path: Path, folder: Path, stored: StoredDisk, parts: tuple[Layer, ...], report: Reporter) -> None:
    total, done = backup_read.amount(parts), 0

    def moved(count: int) -> None:
        nonlocal done
        done += count
        report(Progress(f"restore disk {stored.target}", min(done, total), total))

    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        sink = _Raw(handle, stored.size) if stored.format == "raw" else Qcow2Writer(handle, stored.size)
        index = backup_read.pour(folder, parts, sink, moved)
        if isinstance(sink, Qcow2Writer):
            sink.finish()
        os.fsync(handle)
    finally:
        os.close(handle)
    if backup_index.digest(index, stored.size) != stored.digest:
        raise ImageError(f"cannot restore disk {stored.target}: it would not be what was backed up")


def file(host: Host, pool: str, volume: str, data: bytes, *, undo: ExitStack | None = None) -> None:
    """Make a volume of these bytes."""
    if undo is not None:
        undo.callback(quietly, lambda: storage.delete_volume(host.conn, pool, volume))
    _make(host, pool, render.VolumeView(volume, len(data), "raw"))
    if data:
        storage.upload_bytes(host.conn, pool, volume, data)


def _make(host: Host, pool: str, view: render.VolumeView) -> None:
    try:
        storage.create_volume(host.conn, pool, render.volume(view), name=view.name)
    except Conflict:  # left by a restore that was killed: no VM names it
        storage.delete_volume(host.conn, pool, view.name)
        storage.create_volume(host.conn, pool, render.volume(view), name=view.name)
