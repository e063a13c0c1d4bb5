"""Proving backups without their VM: each file is read whole, and each chain must give what was recorded."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from vmctl import backup_read, backup_store
from vmctl.backup_index import CLUSTER
from vmctl.backup_manifest import Manifest
from vmctl.backup_store import Shelf
from vmctl.errors import NotFound, VmctlError
from vmctl.events import Progress, Reporter


@dataclass(frozen=True, slots=True)
class Verified:
    """What was found of one backup: ``problems`` is empty where it can be restored as it was."""

    vm: str
    id: str
    disks: tuple[str, ...]
    digests: tuple[str, ...]
    read: int
    problems: tuple[str, ...]


def verify(folder: Path, wanted: Collection[str], report: Reporter) -> tuple[Verified, ...]:
    """Prove the backups of a VM that ``wanted`` names (none: all), and all they are laid over. Needs no libvirt.

    Each file is read once, however many backups need it.
    """
    if not folder.is_dir():
        raise NotFound(
            f"cannot verify backups: there is no {folder}",
            meant=backup_store.vm_meant(folder),
            hint="--folder names another place",
        )
    with backup_store.locked(folder, shared=True):
        shelf = backup_store.shelf(folder)
        if wanted:
            names = [name if name in shelf.damaged else shelf.point(name).id for name in wanted]
        else:
            names = sorted([*shelf.points, *shelf.damaged])
        if not names:
            raise NotFound(f"cannot verify backups: there are none in {folder}")
        known: dict[tuple[str, str], str] = {}
        good: set[tuple[int, int, str]] = set()
        return tuple(_one(shelf, name, known, good, report) for name in names)


def _one(
    shelf: Shelf, name: str, known: dict[tuple[str, str], str], good: set[tuple[int, int, str]], report: Reporter
) -> Verified:
    if name in shelf.damaged:
        return Verified(shelf.folder.name, name, (), (), 0, (shelf.damaged[name],))
    manifest = shelf.points[name]
    problems: list[str] = []
    read = 0
    for disk in manifest.disks:
        try:
            parts = backup_read.layers(shelf, name, disk.target)
            backup_read.require_recorded(parts, disk, name)
            for part in parts:
                read += _file(shelf, part, known, report)
                if problem := known[part.manifest.id, part.disk.target]:
                    problems.append(problem)
        except VmctlError as error:
            problems.append(error.message)
    problems += _files(shelf, manifest, good)
    targets = tuple(disk.target for disk in manifest.disks)
    digests = tuple(disk.digest for disk in manifest.disks)
    return Verified(manifest.vm, name, targets, digests, read, tuple(dict.fromkeys(problems)))


def _file(shelf: Shelf, part: backup_read.Layer, known: dict[tuple[str, str], str], report: Reporter) -> int:
    key = (part.manifest.id, part.disk.target)
    if key in known:
        return 0
    total, done = len(part.index) * CLUSTER, 0

    def moved(count: int) -> None:
        nonlocal done
        done += count
        report(Progress(f"verify {part.manifest.id} {part.disk.target}", min(done, total), total))

    try:
        backup_read.prove(shelf.folder, part.manifest, part.disk, part.index, moved)
        known[key] = ""
    except VmctlError as error:
        known[key] = error.message
    return total


def _files(shelf: Shelf, manifest: Manifest, good: set[tuple[int, int, str]]) -> list[str]:
    """What is wrong with the other files. ``good``: those read already; backups share what did not change, by links."""
    problems = []
    for one in manifest.files:
        path = shelf.folder / manifest.id / one.file
        try:
            with backup_store.telling_os_errors(f"read {path}"):
                about = path.lstat()
            key = (about.st_dev, about.st_ino, one.sha256)
            if key not in good or about.st_size != one.size:
                backup_store.proved(path, one.size, one.sha256)
                good.add(key)
        except VmctlError as error:
            problems.append(error.message)
    return problems
