"""The one disk inside an .ova or a Vagrant .box of unknown origin."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from vmctl import ovf
from vmctl.errors import ImageError
from vmctl.tar_reader import BLOCK, FREE_OF_RATIO, GZIP, HIGHEST_RATIO, Malformed, Member, NoTar, members

__all__ = ["FREE_OF_RATIO", "HIGHEST_RATIO", "Enclosed", "is_archive", "open_disk"]

_MOST_TEXT = 1 << 20
_BOX_SEED = "seed.img"  # of boxes vmctl made: for the first boot, no part of the image
_BOX_DISKS = ("box.img", "box_0.img")
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Enclosed:
    """The disk of an archive: ``size`` bytes of ``path`` from ``start`` on. ``format`` "": whatever it shows itself.

    ``checked`` says that the archive's own checksum was there and fits.
    """

    kind: str
    path: Path
    start: int
    size: int
    format: str = ""
    name: str = ""
    checked: bool = False


@dataclass(frozen=True, slots=True)
class _Wanted:
    """Which member is the disk, and what the archive says of it."""

    kind: str
    disk: str
    format: str = ""
    name: str = ""
    sum: tuple[str, str] | None = None


def is_archive(file: IO[bytes]) -> bool:
    """Whether an open file is a tar, or gzipped, by what it begins with."""
    file.seek(0)
    head = file.read(BLOCK)
    file.seek(0)
    return head.startswith(GZIP) or head[257:262] == b"ustar"


def open_disk(
    file: IO[bytes],
    path: Path,
    folder: Path,
    *,
    what: str,
    most_bytes: int,
    moved: Callable[[int], None] = lambda _n: None,
) -> Enclosed:
    """Find the disk of the archive ``file`` (open, at ``path``), writing it into ``folder`` unless it lies plain there.

    Raises ImageError ``cannot WHAT: REASON``.
    """
    try:
        wanted = _wanted(file, most_bytes)
        return _take(file, path, folder, wanted, most_bytes, moved)
    except (Malformed, ovf.BadDescriptor) as error:
        file.seek(0)
        packed = isinstance(error, NoTar) and file.read(len(GZIP)) == GZIP
        hint = "if it is a disk image, unpack it first: gzip -d" if packed else ""
        raise ImageError(f"cannot {what}: {error}", hint=hint) from error


def _wanted(file: IO[bytes], most_bytes: int) -> _Wanted:
    """Read on until it is known what the archive is; whether all of it keeps the rules shows when the disk is taken."""
    texts: dict[str, bytes] = {}
    names = []
    for member in members(file, most_bytes=most_bytes):
        names.append(member.name)
        if member.name == "metadata.json":
            return _box(member.content(_MOST_TEXT), names)
        if PurePosixPath(member.name).suffix in {".ovf", ".mf"}:
            texts[member.name] = member.content(_MOST_TEXT)
    return _ova(texts, names)


def _ova(texts: dict[str, bytes], names: list[str]) -> _Wanted:
    descriptors = [name for name in texts if name.endswith(".ovf")]
    if len(descriptors) != 1:
        raise Malformed("it is neither an .ova (one .ovf inside) nor a Vagrant box (metadata.json inside)")
    described = ovf.read(texts[descriptors[0]])
    sums: dict[str, tuple[str, str]] = {}
    manifests = [name for name in texts if name.endswith(".mf")]
    for name in manifests:
        sums |= ovf.read_checksums(texts[name])
    if manifests:
        for name in (descriptors[0], described.disk_file):
            if name not in sums:
                raise Malformed(f"its checksum manifest does not name {name}")
        kind, digits = sums[descriptors[0]]
        if hashlib.new(kind, texts[descriptors[0]]).hexdigest() != digits:
            raise Malformed(f"the checksum of {descriptors[0]} is not the one its manifest gives")
    if described.disk_file not in names:
        raise Malformed(f"its disk {described.disk_file} is not in it")
    return _Wanted("ova", described.disk_file, "", described.machine, sums.get(described.disk_file))


def _box(text: bytes, _names: list[str]) -> _Wanted:
    try:
        values: Any = json.loads(text)
        provider = str(values.get("provider"))
        disks = values.get("disks") or []
        disk = str(disks[0].get("path", "")) if disks else ""
        form = str((disks[0] if disks else values).get("format", ""))
        disks = [one for one in disks if one.get("path") != _BOX_SEED]
    except (ValueError, AttributeError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise Malformed("its metadata.json is not a Vagrant box's") from error
    if provider not in {"libvirt", "qemu", "kvm"}:
        raise Malformed(f"it is a Vagrant box for {provider}, not for libvirt")
    if len(disks) > 1:
        raise Malformed(f"it has {len(disks)} disks, and vmctl takes images of exactly one")
    if form not in {"", "qcow2", "raw", "vmdk", "vdi", "vhdx"}:
        raise Malformed(f"its disk is of unknown format {form!r}")
    return _Wanted("box", str(PurePosixPath(disk)) if disk else "", form)


def _is_disk(member: Member, wanted: _Wanted) -> bool:
    return member.name == wanted.disk if wanted.disk else member.name in _BOX_DISKS


def _take(
    file: IO[bytes], path: Path, folder: Path, wanted: _Wanted, most_bytes: int, moved: Callable[[int], None]
) -> Enclosed:
    found: Enclosed | None = None
    file.seek(0)
    for member in members(file, most_bytes=most_bytes):
        if not _is_disk(member, wanted):
            continue
        if found is not None:
            raise Malformed("it has both a box.img and a box_0.img")
        where, start = path, member.start
        if start < 0:
            where, start = folder / "enclosed", 0
            with where.open("xb") as target:
                member.write_to(target, moved)
        found = Enclosed(wanted.kind, where, start, member.size, wanted.format, wanted.name, wanted.sum is not None)
        moved(member.size)
    if found is None:
        raise Malformed(f"its disk {wanted.disk or 'box.img'} is not in it")
    if wanted.sum is not None:
        _check(found, wanted)
    return found


def _check(disk: Enclosed, wanted: _Wanted) -> None:
    kind, digits = wanted.sum or ("", "")
    summed, left = hashlib.new(kind), disk.size
    with disk.path.open("rb") as source:
        source.seek(disk.start)
        while left and (data := source.read(min(_CHUNK, left))):
            summed.update(data)
            left -= len(data)
    if summed.hexdigest() != digits:
        raise Malformed(f"the checksum of {wanted.disk} is not the one its manifest gives")
