"""Merging: a backup takes over what it needs of older ones that shall go. Its own manifest names the new files last."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path

from vmctl import backup_index, backup_manifest, backup_read, backup_store
from vmctl.backup_index import ZEROS
from vmctl.backup_manifest import StoredDisk
from vmctl.backup_store import Shelf
from vmctl.choices import Compression
from vmctl.errors import ImageError
from vmctl.events import Progress, Reporter, Step
from vmctl.qcow2_writer import Qcow2Writer


def merge(shelf: Shelf, name: str, doomed: frozenset[str], report: Reporter) -> None:
    """Make backup ``name`` need none of ``doomed``. Whatever ends this, it can be restored as before."""
    manifest = shelf.points[name]
    folder = shelf.folder / name
    with backup_store.making(shelf.folder) as made:
        merged = tuple(
            _disk(shelf, name, disk, doomed, made, Compression(manifest.compression), report)
            if disk.parent in doomed
            else disk
            for disk in manifest.disks
        )
        for path in made.iterdir():
            backup_store.sync(path)
            path.rename(folder / path.name)
        backup_store.sync(folder)
        text = backup_manifest.dump(replace(manifest, disks=merged))
        backup_store.write(made / backup_manifest.NAME, text.encode())
        backup_store.sync(made / backup_manifest.NAME)
        (made / backup_manifest.NAME).rename(folder / backup_manifest.NAME)
        backup_store.sync(folder)
    backup_store.tidy(shelf.folder)
    report(Step(f"backup {name} needs {', '.join(sorted(doomed))} no longer"))


def _disk(
    shelf: Shelf,
    name: str,
    disk: StoredDisk,
    doomed: frozenset[str],
    made: Path,
    compression: Compression,
    report: Reporter,
) -> StoredDisk:
    backup_read.require_recorded(backup_read.layers(shelf, name, disk.target), disk, name)
    parts = backup_read.layers(shelf, name, disk.target, down_to=doomed)
    parent = parts[-1].disk.parent
    total, done = backup_read.amount(parts), 0

    def moved(count: int) -> None:
        nonlocal done
        done += count
        report(Progress(f"merge into backup {name}", min(done, total), total))

    stem = f"{disk.target}.merged-{parts[-1].manifest.id}"
    handle = os.open(made / f"{stem}.qcow2", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        writer = Qcow2Writer(handle, disk.size, compression)
        index = backup_read.pour(shelf.folder, parts, writer, moved)
        if parent:
            for number in (one for one, digest in index.items() if digest == ZEROS):
                writer.zero(number)
        else:
            index = {number: digest for number, digest in index.items() if digest != ZEROS}
        file_size = writer.finish()
    finally:
        os.close(handle)
    below = [one.index for one in backup_read.layers(shelf, parent, disk.target)] if parent else []
    if backup_index.digest(backup_index.laid_over([index, *below]), disk.size) != disk.digest:
        raise ImageError(f"cannot merge into backup {name}: disk {disk.target} would not be what it was")
    packed = backup_index.pack(index)
    backup_store.write(made / f"{stem}.digests", packed)
    return replace(
        disk,
        file=f"{stem}.qcow2",
        file_size=file_size,
        index=f"{stem}.digests",
        index_sha256=hashlib.sha256(packed).hexdigest(),
        clusters=len(index),
        parent=parent,
        why="",
    )
