"""A folder of backups: one folder for each VM in it, in that one for each backup, named by its time. Reads and locks.

A backup is made under another name and gets its own when all of it is on the disk. What bears no such name is
half-made, and goes when the next one is made.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vmctl import backup_index, backup_manifest
from vmctl.backup_index import Index
from vmctl.backup_manifest import Manifest, StoredDisk
from vmctl.errors import Conflict, ImageError, NotFound, SpecError, VmctlError, close_to
from vmctl.order import natural
from vmctl.workspace import clear_leftovers, is_leftover, workspace

MAKING = ".making-"
_MOST_MANIFEST = 4 << 20


@dataclass(frozen=True, slots=True)
class Shelf:
    """The backups of one VM: those whose manifest can be read, by id in the order of time, and why others cannot."""

    folder: Path
    points: Mapping[str, Manifest]
    damaged: Mapping[str, str]

    @property
    def last(self) -> Manifest | None:
        """The newest."""
        return self.points[max(self.points)] if self.points else None

    def point(self, wanted: str) -> Manifest:
        """The backup that ``wanted`` names: its id, the beginning of one, or "latest". Raises NotFound, ImageError.

        The one before a damaged one is not the latest: restored for it, the VM would lose more than was asked about.
        """
        newest = max([*self.points, *self.damaged], default="")
        if wanted == "latest" and newest in self.damaged:
            raise ImageError(
                f"cannot use backup {newest}, the latest: {self.damaged[newest]}",
                hint=f"the one before it that can be read is {self.last.id}; name it" if self.last else "",
            )
        if wanted in self.damaged:
            raise ImageError(f"cannot use backup {wanted}: {self.damaged[wanted]}")
        if wanted == "latest" and self.last is not None:
            return self.last
        found = [one for one in self.points if one == wanted or (wanted and one.startswith(wanted))]
        if len(found) == 1 or wanted in found:
            return self.points[wanted if wanted in found else found[0]]
        known = ", ".join([*self.points, *self.damaged]) or "none"
        problem = "several are called so" if found else f"there are {known}"
        mistyped = "" if self.folder.is_dir() else vm_meant(self.folder)
        meant = "" if found else mistyped or close_to(wanted, self.points)
        raise NotFound(f"cannot find backup {wanted} in {self.folder}: {problem}", meant=meant)


@contextmanager
def telling_os_errors(doing: str) -> Iterator[None]:
    """What the system says of files becomes an ImageError ``cannot DOING: REASON``."""
    try:
        yield
    except OSError as error:
        full = error.errno in {errno.ENOSPC, errno.EDQUOT}
        where = f"{error.filename}: " if error.filename else ""
        raise ImageError(
            f"cannot {doing}: {where}{error.strerror or error}",
            hint="the backups before it are as they were; make room" if full else "",
        ) from error


def vm_folder(root: Path, vm: str) -> Path:
    """Where the backups of a VM are. Raises SpecError for a name that is no plain one."""
    if not vm or "/" in vm or vm.startswith("."):
        raise SpecError(f"cannot use backups of {vm!r}: that is no name of a VM")
    return Path(os.path.realpath(root)) / vm


def vm_meant(folder: Path) -> str:
    """The VM that has backups beside a folder that is not there, if the folder's name is nearly its."""
    return close_to(folder.name, vms(folder.parent))


def vms(root: Path) -> tuple[str, ...]:
    """Names of the VMs that have backups in a folder."""
    with telling_os_errors(f"read backups in {root}"):
        if not root.exists():
            return ()
        found = (one.name for one in root.iterdir() if one.is_dir() and not one.name.startswith("."))
        return tuple(sorted(found, key=natural))


def shelf(folder: Path) -> Shelf:
    """What backups a VM's folder holds; none where there is no folder."""
    points: dict[str, Manifest] = {}
    damaged: dict[str, str] = {}
    with telling_os_errors(f"read backups in {folder}"):
        names = sorted(one.name for one in folder.iterdir()) if folder.is_dir() else []
    for name in names:
        if not backup_manifest.is_id(name):
            continue
        path = folder / name / backup_manifest.NAME
        try:
            with telling_os_errors(f"read {path}"):
                text = read_whole(path, _MOST_MANIFEST).decode()
            found = backup_manifest.parse(text, what=str(path))
            if found.id != name:
                raise ImageError(f"cannot trust {path}: it is of backup {found.id}")
            points[name] = found
        except VmctlError as error:
            damaged[name] = error.message
        except UnicodeDecodeError:
            damaged[name] = f"cannot read {path}: it is no text"
    return Shelf(folder, points, damaged)


def seen_wanting(shelf: Shelf, manifest: Manifest) -> str:
    """What names and sizes show to be wrong with a backup or with what it is laid over; "" for nothing.

    Costs a look at each file. What is in them is not read: that is for verify.
    """
    try:
        for disk in manifest.disks:
            for layer, stored in backup_manifest.chain(shelf.points, manifest.id, disk.target):
                folder = shelf.folder / layer.id
                _require_size(folder / stored.file, stored.file_size)
                _require_size(folder / stored.index, backup_index.packed_size(stored.clusters))
        for one in manifest.files:
            _require_size(shelf.folder / manifest.id / one.file, one.size)
    except ImageError as error:
        return error.message
    return ""


def _require_size(path: Path, size: int) -> None:
    with telling_os_errors(f"read {path}"):
        about = path.lstat()
    if not stat.S_ISREG(about.st_mode):
        raise ImageError(f"cannot read {path}: it is no plain file")
    if about.st_size != size:
        raise ImageError(f"cannot trust {path}: it has {about.st_size} bytes, and {size} were backed up")


def open_plain(path: Path) -> int:
    """A descriptor of a plain file, no link followed in its place. Raises OSError, ImageError."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ImageError(f"cannot read {path}: it is no plain file")
    return handle


def read_whole(path: Path, most: int) -> bytes:
    """A small file. Raises OSError, ImageError."""
    handle = open_plain(path)
    with os.fdopen(handle, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ImageError(f"cannot read {path}: it is larger than {most} bytes")
    return data


def proved(path: Path, size: int, sha256: str) -> bytes:
    """A file whose size and digest are known. Raises ImageError for any other content."""
    with telling_os_errors(f"read {path}"):
        data = read_whole(path, size)
    if len(data) != size or hashlib.sha256(data).hexdigest() != sha256:
        raise ImageError(
            f"cannot trust {path}: it is not what was backed up",
            hint="it was changed or damaged after the backup was made",
        )
    return data


def index(folder: Path, manifest: Manifest, disk: StoredDisk) -> Index:
    """The digests of what a disk's file in a backup holds. Raises ImageError."""
    path = folder / manifest.id / disk.index
    if disk.clusters > backup_index.clusters(disk.size):
        raise ImageError(f"cannot trust {path}: it would be longer than its disk")
    data = proved(path, backup_index.packed_size(disk.clusters), disk.index_sha256)
    return backup_index.unpack(data, disk.size, what=str(path))


@contextmanager
def locked(folder: Path, *, shared: bool) -> Iterator[None]:
    """Hold a VM's backups: alone, or, to read, beside others. Raises Conflict while another vmctl has them."""
    with telling_os_errors(f"use backups in {folder}"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(
                f"cannot use backups in {folder}: another vmctl is at them", hint="wait for it to end"
            ) from None
        yield
    finally:
        os.close(handle)


@contextmanager
def making(folder: Path) -> Iterator[Path]:
    """A new folder for a backup's files, which goes unless it is published; what killed ones left goes before."""
    with workspace(folder, MAKING) as made:
        yield made


def publish(made: Path, folder: Path, name: str) -> None:
    """Put a backup on the disk for good, and only then in its place."""
    for path in made.iterdir():
        sync(path)
    sync(made)
    made.rename(folder / name)
    sync(folder)


def sync(path: Path) -> None:
    """Put a file, or the names in a folder, on the disk for good."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def half_made(folder: Path) -> tuple[Path, ...]:
    """What killed backups left."""
    return tuple(sorted(one for one in folder.glob(f"{MAKING}*") if is_leftover(one)))


def clear_half_made(folder: Path) -> None:
    """Remove what killed backups left."""
    clear_leftovers(folder, MAKING)


def remove(folder: Path, name: str) -> None:
    """Delete a backup: its manifest first, so that a half-deleted one is none any more."""
    import shutil

    gone = folder / f"{MAKING}{name}"
    with telling_os_errors(f"delete backup {name}"):
        (folder / name).rename(gone)
        shutil.rmtree(gone)


def write(path: Path, data: bytes) -> None:
    """Write a new file."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(data)


def tidy(folder: Path) -> None:
    """Remove what a merge cut off in its middle, or ended, left of files that no manifest names."""
    known = shelf(folder)
    for name, manifest in known.points.items():
        named = {backup_manifest.NAME, *(f.file for f in manifest.files)}
        named |= {one for disk in manifest.disks for one in (disk.file, disk.index)}
        for path in (folder / name).iterdir():
            if path.name not in named and path.suffix in {".qcow2", ".digests"}:
                path.unlink()


def size(folder: Path, seen: set[int]) -> int:
    """Bytes that a backup's files take beside those whose inodes are in ``seen``, which gets its own."""
    found = 0
    for path in folder.iterdir():
        about = path.lstat()
        if about.st_ino not in seen:
            seen.add(about.st_ino)
            found += about.st_size
    return found
