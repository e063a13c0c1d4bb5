"""Taking a disk image of unknown origin into the store.

In this order: its checksum, if one is given; its header, by our own parser; qemu-img's word on it, which must agree;
the copy; the copy's header. Every step before the last has bounds, and what fails leaves nothing.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from vmctl import archives, checksums, default_users, disk_header, image_inside, images, qcow2_stream, qemu_img
from vmctl.archives import Enclosed
from vmctl.default_users import Inside, Login
from vmctl.disk_header import DiskHeader, Window
from vmctl.durable import written_as_it_grows
from vmctl.errors import ImageError, NoRoom, SpecError, reason
from vmctl.events import Progress, Reporter, Step, Warned, bytes_in_words
from vmctl.hosts import Host
from vmctl.manifest import NAME, Manifest, NewImage
from vmctl.plain_disk import Piece, PlainDisk, TooMuch, raw_pieces
from vmctl.qemu_img_run import Limits, Source, too_large

BOOTS = ("bios", "uefi", "uefi-secure")
_CHECKSUM = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")
_ARCHITECTURE = re.compile(r"[a-z0-9_]{1,20}")
_USER = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
_CHUNK = 1 << 20
_KEPT_FREE = 64 << 20  # of the disk the store is on
_LONGEST_NAME = 48
_UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Wish:
    """A file to import, and what the user says of it. ``name``, ``format`` and ``user`` may be "": found out.

    ``architecture`` is as `uname -m` says it; no disk tells its own, and "" is taken for this machine's.
    ``checked`` is what the file was checked against already; ``source`` where it came from, if from elsewhere;
    ``user_by`` how its user is known.
    """

    file: Path
    name: str = ""
    format: str = ""
    checksum: str = ""
    os_name: str = _UNKNOWN
    os_version: str = ""
    user: str = ""
    user_by: str = "told"
    boots: tuple[str, ...] = ("bios",)
    osinfo: str = ""
    source: str = ""
    checked: str = ""
    architecture: str = ""
    most_bytes: int = disk_header.DEFAULT_MOST_BYTES

    @property
    def title(self) -> str:
        """What the user calls it."""
        return self.source or str(self.file)

    @property
    def short(self) -> str:
        """The same in a word."""
        return self.name if self.source else self.file.name


def name_for(file: Path) -> str:
    """An image name made from a file's; "" when nothing is left of it."""
    stem = file.name.lower()
    for suffix in (".gz", ".tar", *(f".{kind}" for kind in (*disk_header.FORMATS, "img", "ova", "box", "iso"))):
        stem = stem.removesuffix(suffix)
    return re.sub(r"[^a-z0-9.-]+", "-", stem)[:_LONGEST_NAME].strip(".-")


def problems(wish: Wish) -> list[str]:
    """What is wrong with the wish itself, all of it."""
    found = []
    name = wish.name or name_for(wish.file)
    if not re.fullmatch(NAME, name):
        found.append(f"{name!r} is no image name (lower-case letters, digits, inner dots and hyphens; see --name)")
    if wish.format and wish.format not in disk_header.FORMATS:
        found.append(f"format {wish.format!r} is none of {', '.join(disk_header.FORMATS)}")
    if wish.checksum and not _CHECKSUM.fullmatch(wish.checksum.lower()):
        found.append("the checksum is not sha256: with 64 hex digits or sha512: with 128")
    if not wish.boots or set(wish.boots) - set(BOOTS):
        found.append(f"--boots takes {', '.join(BOOTS)}, not {','.join(wish.boots)!r}")
    if wish.architecture and not _ARCHITECTURE.fullmatch(wish.architecture):
        found.append(f"{wish.architecture!r} is no architecture, such as x86_64 or aarch64")
    if wish.user and not _USER.fullmatch(wish.user):
        found.append(f"{wish.user!r} is no user name")
    if wish.most_bytes <= 0:
        found.append("--max-size must be above 0")
    return found


def import_image(host: Host, wish: Wish, report: Reporter) -> Manifest:
    """Import a disk image, an .ova or a Vagrant .box. Raises SpecError, ImageError."""
    if found := problems(wish):
        raise SpecError(f"cannot import {wish.title}", problems=found)
    name = wish.name or name_for(wish.file)
    with _failing_as_import(wish), _opened(wish.file) as handle, images.making(host, name) as folder:
        before = os.fstat(handle)
        _check_sum(handle, wish, before.st_size, report)
        disk = _disk(handle, folder, wish, report)
        with _part(disk, wish.file, handle) as source:
            header, copied = _taken(source, disk, folder, wish, report)
        after = os.fstat(handle)
        if (before.st_size, before.st_mtime_ns, before.st_ctime_ns) != (
            after.st_size,
            after.st_mtime_ns,
            after.st_ctime_ns,
        ):
            raise ImageError(f"cannot import {wish.title}: it was changed while it was read")
        return images.add(host, _new_image(name, wish, disk, header, copied, report), report)


def preview(host: Host, wish: Wish, report: Reporter) -> tuple[str, ...]:
    """What importing it would do. Raises as import_image() does, of what shows without unpacking or copying it."""
    if found := problems(wish):
        raise SpecError(f"cannot import {wish.title}", problems=found)
    with _failing_as_import(wish), _opened(wish.file) as handle:
        size = os.fstat(handle).st_size
        _check_sum(handle, wish, size, report)
        with os.fdopen(os.dup(handle), "rb") as file:
            packed = wish.format != "raw" and archives.is_archive(file)
        if packed:
            first = f"unpack {wish.short} and copy the disk that is in it"
        else:
            header = _header(Window(handle, size), wish, wish.format)
            first = f"copy {wish.short}, {header.format} of {bytes_in_words(header.virtual_size)}"
    return first, images.would_add(host, wish.name or name_for(wish.file))


@contextmanager
def _failing_as_import(wish: Wish) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in {errno.ENOSPC, errno.EDQUOT}
        kind = NoRoom if full else ImageError
        hint = "make room" if full else ""
        if error.errno == errno.ENOENT and str(wish.file) == wish.file.name:
            hint = f"an image to be had by that name? vmctl image search {wish.file}"
        raise kind(f"cannot import {wish.title}: {reason(error)}", hint=hint) from error


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    # Non-blocking: a named pipe would wait for a writer before it could be told from a file.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ImageError(f"cannot import {path}: it is not a regular file")
        yield handle
    finally:
        os.close(handle)


def _check_sum(handle: int, wish: Wish, size: int, report: Reporter) -> None:
    if not wish.checksum:
        return
    kind, _, digits = wish.checksum.lower().partition(":")
    summed, done = hashlib.new(kind), 0
    with os.fdopen(os.dup(handle), "rb", buffering=0) as file:
        while data := file.read(_CHUNK):
            summed.update(data)
            done += len(data)
            report(Progress(f"{kind} of {wish.short}", done, size))
    if summed.hexdigest() != digits:
        raise ImageError(
            f"cannot import {wish.title}: its {kind} is {summed.hexdigest()}, not the one given",
            hint="get it again; it is cut short, or not what was published",
        )


def _room(folder: Path) -> int:
    free = shutil.disk_usage(folder).free - _KEPT_FREE
    if free <= 0:
        raise NoRoom(f"cannot import into {folder}: its disk is full", hint="make room")
    return free


def _disk(handle: int, folder: Path, wish: Wish, report: Reporter) -> Enclosed:
    """Where the disk is: the file itself, or inside the archive that the file is."""
    size = os.fstat(handle).st_size
    with os.fdopen(os.dup(handle), "rb") as file:
        if wish.format == "raw" or not archives.is_archive(file):
            return Enclosed("", wish.file, 0, size, wish.format)
        report(Step(f"looking through {wish.short}"))
        found = archives.open_disk(
            file,
            wish.file,
            folder,
            what=f"import {wish.title}",
            most_bytes=min(wish.most_bytes, max(_room(folder), size)),
            moved=lambda done: report(Progress(f"unpacking {wish.short}", done, 0)),
        )
    if wish.format and found.format and wish.format != found.format:
        raise ImageError(f"cannot import {wish.title}: its disk is {found.format}, not {wish.format}")
    return found


@contextmanager
def _part(disk: Enclosed, file: Path, handle: int) -> Iterator[int]:
    """A descriptor of the file that the disk is in."""
    if disk.path == file:
        yield handle
        return
    with _opened(disk.path) as own:
        yield own


class Copied(NamedTuple):
    """A copy as qcow2, its digest if known, and what its files say of the system."""

    path: Path
    digest: str
    inside: Inside | None


def _taken(handle: int, disk: Enclosed, folder: Path, wish: Wish, report: Reporter) -> tuple[DiskHeader, Copied]:
    """The disk's header, and its copy. Nothing but a sound header lets qemu-img see it."""
    what = f"import {wish.title}"
    asked = wish.format or disk.format
    header = _header(Window(handle, disk.size, disk.start), wish, asked)
    whole = not disk.start and disk.size == os.fstat(handle).st_size
    source = Source(handle, header.format, disk.start, 0 if whole else disk.size)
    if not _known_plain(source, header):  # no byte of a raw disk says anything, and qemu-img does not come to see it
        _agreed(source, header, what)
    report(Step(f"{wish.short} is {header.format}, {bytes_in_words(header.virtual_size)}"))
    copied = _copied(source, header, folder, wish, _limits(folder, disk.size), report)
    with _opened(copied.path) as written:
        window = Window(written, os.fstat(written).st_size)
        result = disk_header.check(window, what=what, asked="qcow2", most_bytes=wish.most_bytes)
    if result.virtual_size != header.virtual_size:
        raise ImageError(f"cannot {what}: its copy came out {result.virtual_size} bytes large")
    return header, copied


def _header(window: Window, wish: Wish, asked: str) -> DiskHeader:
    """What our own parser says of a disk. Raises ImageError unless it is sound, and all of it there."""
    what = f"import {wish.title}"
    header = disk_header.check(window, what=what, asked=asked, most_bytes=wish.most_bytes)
    disk_header.check_whole(window, header, what=what)
    return header


def _known_plain(source: Source, header: DiskHeader) -> bool:
    return header.format == "raw" and not source.size


def _agreed(source: Source, header: DiskHeader, what: str) -> None:
    """Raise ImageError unless qemu-img sees what our own parser has seen."""
    seen = qemu_img.inspect(source, what=what)
    if (seen.format, seen.virtual_size, seen.backing_file) != (header.format, header.virtual_size, ""):
        raise ImageError(
            f"cannot {what}: qemu-img sees {seen.format} of {seen.virtual_size} bytes where its header says"
            f" {header.format} of {header.virtual_size}"
        )


def _copied(source: Source, header: DiskHeader, folder: Path, wish: Wish, limits: Limits, report: Reporter) -> Copied:
    what, target = f"import {wish.title}", folder / "disk.qcow2"
    deadline = time.monotonic() + limits.wall_s

    def moved(done: int, of: int) -> None:
        if time.monotonic() > deadline:
            raise ImageError(f"cannot {what}: the copy did not end in {limits.wall_s:.0f} s")
        report(Progress(f"copying {wish.short}", done, of))

    if (plain := _plain(source, header, what)) is not None:
        try:
            runs = plain.runs(limits.file_size)
        except TooMuch as error:
            raise too_large(what, limits) from error
        if (size := qcow2_stream.file_size(header.virtual_size, runs)) > limits.file_size:
            raise too_large(what, limits)
        found = qcow2_stream.write(plain, runs, target, lambda done: moved(done, size))
        return Copied(target, found, image_inside.look_by(plain.read))
    size = header.virtual_size
    with written_as_it_grows(target):
        qemu_img.copy(
            source, target, "qcow2", what=what, limits=limits, moved=lambda share: moved(int(share * size), size)
        )
    return Copied(target, "", image_inside.look(target))


def _plain(source: Source, header: DiskHeader, what: str) -> PlainDisk | None:
    """The disk, where all it holds lies as it is in the file; of others, qemu-img makes the copy."""
    if _known_plain(source, header):
        pieces = raw_pieces(source.handle, header.virtual_size)
    elif (extents := qemu_img.plain_extents(source, what=what)) is not None:
        pieces = [Piece(e.start, e.length, e.offset) for e in extents if e.offset is not None]
    else:
        return None
    return PlainDisk(source.handle, header.virtual_size, pieces)


def _limits(folder: Path, size: int) -> Limits:
    """What a copy of ``size`` bytes may grow to: compressed clusters can be bombs, as archives can."""
    free, dense = _room(folder), max(archives.FREE_OF_RATIO, archives.HIGHEST_RATIO * size)
    if dense < free:
        return Limits(file_size=dense, allowed=f"allowed to a file of {size >> 10} KiB")
    return Limits(file_size=free)


def _login(wish: Wish, disk: Enclosed, inside: Inside | None) -> Login:
    """Whom the image lets in."""
    if wish.user:
        return Login(wish.user, wish.user_by, "")
    if disk.kind == "box":
        return Login("vagrant", "box", "it is a Vagrant box")
    file = checksums.file_name(wish.source) if wish.source else wish.file.name
    return default_users.guess(inside, system=wish.os_name, osinfo=wish.osinfo, file=file, name=wish.name)


def _tell_login(short: str, login: Login, report: Reporter) -> None:
    if login.by in {"name", "nothing"}:
        report(Warned(f"{short} is assumed to let in {login.user}: {login.why}", "another one: --user NAME"))
    elif login.why:
        report(Step(f"{short} lets in {login.user}: {login.why}"))


def _new_image(name: str, wish: Wish, disk: Enclosed, header: DiskHeader, copied: Copied, report: Reporter) -> NewImage:
    form = f" ({header.format} disk inside the {disk.kind})" if disk.kind else f" ({header.format})"
    os_told = wish.os_name != _UNKNOWN
    inside = copied.inside
    login = _login(wish, disk, inside)
    _tell_login(wish.short, login, report)
    system = inside if inside and not os_told else Inside(wish.os_name)
    return NewImage(
        name=name,
        disk=copied.path,
        disk_digest=copied.digest,
        virtual_size=header.virtual_size,
        os_name=system.system,
        os_version=wish.os_version or system.version,
        architecture=wish.architecture or os.uname().machine,
        default_user=login.user,
        default_user_by=login.by,
        source=wish.source or f"{wish.file.resolve()}{form}",
        boots=wish.boots,
        osinfo=wish.osinfo,
        software=inside.software if inside else {},
        checksum=wish.checked or wish.checksum.lower(),
        verified=bool(wish.checked or wish.checksum),
    )
