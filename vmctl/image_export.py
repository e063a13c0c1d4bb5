"""Handing an image out as a file: plain disk formats, an .ova, or a Vagrant box for libvirt."""

from __future__ import annotations

import errno
import gzip
import hashlib
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from vmctl import images, ovf, qemu_img, vagrant_box
from vmctl.errors import Conflict, ImageError, SpecError
from vmctl.events import Progress, Reporter, Step, Warned
from vmctl.hosts import Host
from vmctl.hypervisor import storage
from vmctl.images import Image
from vmctl.manifest import Manifest
from vmctl.workspace import workspace

FORMATS = ("qcow2", "raw", "vmdk", "vdi", "vhdx", "ova", "box")
_COMPRESSIBLE = {"qcow2", "vmdk", "ova", "box"}
_SUFFIXES = {"img": "raw", **{name: name for name in FORMATS}}
_STREAMED = "subformat=streamOptimized"
_CHUNK = 1 << 20
# A qcow2 disk hardly shrinks further; higher levels cost several times the time.
_GZIP_LEVEL = 3


@dataclass(frozen=True, slots=True)
class Exported:
    """A file that was written. ``size`` in bytes."""

    image: str
    file: str
    format: str
    size: int
    virtual_size: int


def format_for(file: Path, asked: str = "", *, compress: bool = False) -> str:
    """The format to write. Raises SpecError."""
    chosen = asked or _SUFFIXES.get(file.suffix.lower().removeprefix("."), "")
    if chosen not in FORMATS:
        known = ", ".join(FORMATS)
        raise SpecError(f"cannot export to {file}: its ending tells no format", hint=f"add --format, one of {known}")
    if compress and chosen not in _COMPRESSIBLE:
        raise SpecError(f"cannot export to {file}: {chosen} has no compression", hint="qcow2 or vmdk can, or gzip it")
    return chosen


def export(
    host: Host,
    name: str,
    file: Path,
    report: Reporter,
    *,
    format: str = "",
    compress: bool = False,
    force: bool = False,
) -> Exported:
    """Write image ``name`` to ``file``. Raises NotFound, SpecError, Conflict (the file is there), ImageError."""
    chosen = format_for(file, format, compress=compress)
    image = images.find(host, name)
    file = file.absolute()
    if file.is_dir() or (file.exists() and not force):
        raise Conflict(f"cannot export to {file}: it exists", hint="" if file.is_dir() else "add --force")
    if image.manifest.boots == ("direct",):
        text = f"image {image.manifest.stem} starts by direct kernel boot only, and its kernel is not in the disk"
        report(Warned(text, hint="`vmctl image show` names kernel and command line"))
    try:
        with workspace(file.parent, ".vmctl-export-") as folder:
            with _disk(host, image, folder, report) as handle:
                made = _make(handle, image.manifest, folder, chosen, report, compress=compress)
            _put(made, file, force=force)
    except OSError as error:
        full = error.errno in {errno.ENOSPC, errno.EDQUOT}
        reason = error.strerror or str(error)
        raise ImageError(f"cannot export to {file}: {reason}", hint="make room" if full else "") from error
    report(Step(f"image {image.manifest.stem} is in {file}"))
    return Exported(image.manifest.stem, str(file), chosen, file.stat().st_size, image.manifest.virtual_size)


def _put(made: Path, file: Path, *, force: bool) -> None:
    """Give a finished file its name at once; without ``force``, never that of another file."""
    if force:
        made.replace(file)
        return
    try:
        os.link(made, file)
    except FileExistsError as error:
        raise Conflict(f"cannot export to {file}: it exists", hint="add --force") from error
    except OSError:  # a file system without hard links
        if file.exists():
            raise Conflict(f"cannot export to {file}: it exists", hint="add --force") from None
        made.rename(file)


@contextmanager
def _disk(host: Host, image: Image, folder: Path, report: Reporter) -> Iterator[int]:
    """A descriptor of the image's disk: of the store's own file where it can be read here, else of a copy."""
    path = Path(image.disk)
    if not (host.conn.local and os.access(path, os.R_OK)):
        path = folder / "store.qcow2"
        volume = Path(image.disk).name
        size = storage.volume(host.conn, host.settings.image_pool, volume).capacity
        with path.open("xb") as copy:
            storage.read(
                host.conn,
                host.settings.image_pool,
                volume,
                copy.write,
                lambda done: report(Progress(f"fetching {volume}", done, size)),
            )
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield handle
    finally:
        os.close(handle)


def _make(handle: int, manifest: Manifest, folder: Path, format: str, report: Reporter, *, compress: bool) -> Path:
    """The finished file, in ``folder``."""
    if format == "ova":
        disk = _converted(handle, manifest, folder, "vmdk", report, options=_STREAMED)
        return _ova(disk, manifest, folder, report)
    if format == "box":
        return _box(_converted(handle, manifest, folder, "qcow2", report), manifest, folder, report)
    streamed = _STREAMED if format == "vmdk" and compress else ""
    packed = format == "qcow2" and compress
    return _converted(handle, manifest, folder, format, report, options=streamed, compress=packed)


def _converted(
    handle: int,
    manifest: Manifest,
    folder: Path,
    format: str,
    report: Reporter,
    *,
    options: str = "",
    compress: bool = False,
) -> Path:
    target, size = folder / f"disk.{format}", manifest.virtual_size
    qemu_img.copy(
        qemu_img.Source(handle, manifest.format),
        target,
        format,
        what=f"export image {manifest.stem}",
        options=options,
        compress=compress,
        moved=lambda share: report(Progress(f"writing {format}", int(share * size), size)),
    )
    return target


def _text(target: IO[bytes], name: str, data: bytes) -> None:
    """Write a small member of a tar."""
    target.write(_member(name, len(data)) + data + bytes(-len(data) % tarfile.BLOCKSIZE))


def _member(name: str, size: int) -> bytes:
    """What stands before a member in a tar."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    return member.tobuf(tarfile.GNU_FORMAT)


def _disk_member(target: IO[bytes], name: str, disk: Path, report: Reporter) -> str:
    """Write the disk as the last member of a tar, read once; its sha256."""
    size, done, summed = disk.stat().st_size, 0, hashlib.sha256()
    target.write(_member(name, size))
    with disk.open("rb", buffering=0) as file:
        while data := file.read(_CHUNK):
            target.write(data)
            summed.update(data)
            done += len(data)
            report(Progress(f"packing {name}", done, size))
    target.write(bytes(-size % tarfile.BLOCKSIZE) + bytes(2 * tarfile.BLOCKSIZE))
    return summed.hexdigest()


def _ova(disk: Path, manifest: Manifest, folder: Path, report: Reporter) -> Path:
    """A tar of descriptor, sums and disk, in the order the standard asks for."""
    stem, size = manifest.stem, disk.stat().st_size
    disk_name = f"{stem}-disk1.vmdk"
    descriptor = ovf.write(manifest.name, disk_name, virtual_size=manifest.virtual_size, file_size=size)
    sums = {f"{stem}.ovf": hashlib.sha256(descriptor).hexdigest(), disk_name: "0" * 64}
    target = folder / "archive.ova"
    with target.open("xb") as file:
        _text(file, f"{stem}.ovf", descriptor)
        # The disk's sum is known when it has been written, and is as long as any.
        place = file.tell()
        _text(file, f"{stem}.mf", ovf.write_checksums(sums))
        sums[disk_name] = _disk_member(file, disk_name, disk, report)
        file.seek(place)
        _text(file, f"{stem}.mf", ovf.write_checksums(sums))
    return target


def _box(disk: Path, manifest: Manifest, folder: Path, report: Reporter) -> Path:
    """A Vagrant box for the libvirt provider."""
    target = folder / "archive.box"
    with target.open("xb") as file, gzip.GzipFile("", "wb", _GZIP_LEVEL, file, mtime=0) as packed:
        stream = cast(IO[bytes], packed)
        _text(stream, "metadata.json", vagrant_box.metadata(manifest))
        _text(stream, "Vagrantfile", vagrant_box.vagrantfile(manifest))
        if vagrant_box.seeded(manifest):
            iso, seed = folder / "seed.iso", folder / vagrant_box.SEED_NAME
            iso.write_bytes(vagrant_box.seed_iso())
            qemu_img.convert(iso, "raw", seed, "qcow2")
            _text(stream, vagrant_box.SEED_NAME, seed.read_bytes())
        _disk_member(stream, "box.img", disk, report)
    return target
