"""Reading backups back: each file alone, its header read by our own eyes first, each cluster against its digest.

No file names another one, so nothing is followed: which file holds a cluster is told by the lists of digests.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vmctl import backup_copy, backup_index, backup_manifest, backup_store, disk_header, qemu_nbd
from vmctl.backup_copy import Copy, Sink
from vmctl.backup_index import CLUSTER, ZEROS, Index
from vmctl.backup_manifest import Manifest, StoredDisk
from vmctl.backup_store import Shelf
from vmctl.disk_header import Window
from vmctl.errors import ImageError
from vmctl.nbd import DEPTH, Export
from vmctl.qemu_img_run import Source

_MOST_DISK = 1 << 50


@dataclass(frozen=True, slots=True)
class Layer:
    """A file that a disk's content comes from: all it holds, and which clusters of it no newer one hides."""

    manifest: Manifest
    disk: StoredDisk
    index: Index
    visible: frozenset[int]


def layers(shelf: Shelf, point: str, target: str, *, down_to: frozenset[str] | None = None) -> tuple[Layer, ...]:
    """The files of a disk at a point, the newest first; with ``down_to``, of these backups and the point's own only.

    Raises ImageError where one is missing, or its list of digests is not what was written.
    """
    found: list[Layer] = []
    hidden: set[int] = set()
    for manifest, disk in backup_manifest.chain(shelf.points, point, target):
        if down_to is not None and manifest.id != point and manifest.id not in down_to:
            break
        index = backup_store.index(shelf.folder, manifest, disk)
        found.append(Layer(manifest, disk, index, frozenset(index.keys() - hidden)))
        hidden |= index.keys()
    return tuple(found)


def require_recorded(parts: tuple[Layer, ...], disk: StoredDisk, point: str) -> None:
    """Raise ImageError unless a disk's lists of digests give the digest that was recorded for the whole."""
    whole = backup_index.laid_over(one.index for one in parts)
    if backup_index.digest(whole, disk.size) != disk.digest:
        raise ImageError(
            f"cannot trust backup {point}: its chain does not give disk {disk.target} as it was recorded",
            hint="its files do not belong together: one was changed or exchanged",
        )


@contextmanager
def opened(folder: Path, manifest: Manifest, disk: StoredDisk) -> Iterator[tuple[Path, str]]:
    """A file of a backup, served alone, once it is what the manifest says. Raises ImageError that names it."""
    path = folder / manifest.id / disk.file
    with backup_store.telling_os_errors(f"read {path}"):
        handle = backup_store.open_plain(path)
    try:
        size = os.fstat(handle).st_size
        what = f"read {path}"
        found = disk_header.check(Window(handle, size), what=what, asked="qcow2", most_bytes=_MOST_DISK)
        if found.virtual_size != disk.size or size != disk.file_size:
            raise ImageError(
                f"cannot trust {path}: it is not what was backed up",
                hint="it was changed, cut short or damaged after the backup was made",
            )
        tree = Source(handle, "qcow2").options()
        with qemu_nbd.served(tree, what=what, handles=(handle,), depth=True) as place:
            yield place
    finally:
        os.close(handle)


def prove(folder: Path, manifest: Manifest, disk: StoredDisk, index: Index, moved: Callable[[int], None]) -> None:
    """Read a file whole: it must hold what was backed up, and nothing else. Raises ImageError that names it."""
    path = folder / manifest.id / disk.file
    with opened(folder, manifest, disk) as (socket, export):
        with Export(socket, export, [DEPTH]) as asked:
            spans = [span for span in asked.status(DEPTH) if span.flags]
        held = {n for s in spans for n in range(s.start // CLUSTER, -(-(s.start + s.length) // CLUSTER))}
        if held != index.keys():
            odd = min(held ^ index.keys())
            problem = "holds more than was backed up" if odd in held else "lacks what was backed up"
            raise ImageError(f"cannot trust {path}: it {problem}, at {odd * CLUSTER}")
        runs = backup_copy.runs_of(sorted(index))
        copy = Copy(socket, export, disk.size, runs, backup_copy.Nowhere(), str(path), expected=index)
        backup_copy.run(copy, moved)


def pour(folder: Path, parts: tuple[Layer, ...], sink: Sink, moved: Callable[[int], None]) -> Index:
    """Hand a disk's content to ``sink``, each cluster proved on the way; returns the digests."""
    found: Index = {}
    for part in parts:
        numbers = sorted(number for number in part.visible if part.index[number] != ZEROS)
        found |= {number: ZEROS for number in part.visible if part.index[number] == ZEROS}
        if not numbers:
            continue
        path = folder / part.manifest.id / part.disk.file
        with opened(folder, part.manifest, part.disk) as (socket, export):
            runs = backup_copy.runs_of(numbers)
            copy = Copy(socket, export, part.disk.size, runs, sink, str(path), expected=part.index)
            found |= backup_copy.run(copy, moved)
    return found


def amount(parts: tuple[Layer, ...]) -> int:
    """Bytes that are read to pour a disk."""
    return CLUSTER * sum(1 for part in parts for number in part.visible if part.index[number] != ZEROS)
