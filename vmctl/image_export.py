"""Handing an image out as a file: plain disk formats, an .ova, or a Vagrant box for libvirt."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vmctl import images, qemu_img
from vmctl.durable import written_as_it_grows, written_out
from vmctl.errors import Conflict, ImageError, NotFound, SpecError, reason
from vmctl.events import Progress, Reporter, Step, Warned
from vmctl.hosts import Host
from vmctl.hypervisor import storage
from vmctl.images import Image
from vmctl.manifest import Manifest
from vmctl.qemu_img_run import Source
from vmctl.workspace import workspace

FORMATS = ("qcow2", "raw", "vmdk", "vdi", "vhdx", "ova", "box")
_COMPRESSIBLE = {"qcow2", "vmdk", "ova", "box"}
_SUFFIXES = {"img": "raw", **{name: name for name in FORMATS}}
_STREAMED = "subformat=streamOptimized"


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
        why = f"{asked!r} is no format" if asked else "its ending tells no format"
        raise SpecError(f"cannot export to {file}: {why}", hint=f"add --format, one of {known}")
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
    if file.exists() and not file.is_file():
        raise Conflict(f"cannot export to {file}: it exists, and is no regular file")
    if file.exists() and not force:
        raise Conflict(f"cannot export to {file}: it exists", hint="add --force")
    if not file.parent.is_dir():
        raise NotFound(f"cannot export to {file}: there is no folder {file.parent}", hint=f"mkdir -p {file.parent}")
    if image.manifest.boots == ("direct",):
        text = f"image {image.manifest.stem} starts by direct kernel boot only, and its kernel is not in the disk"
        report(Warned(text, hint="`vmctl image show` names kernel and command line"))
    try:
        with workspace(file.parent, ".vmctl-export-") as folder:
            with _disk(host, image, folder, report) as handle:
                made = _make(handle, image.manifest, folder, chosen, report, compress=compress)
            with written_out([made]):
                pass
            _put(made, file, force=force)
    except OSError as error:
        full = error.errno in {errno.ENOSPC, errno.EDQUOT}
        raise ImageError(f"cannot export to {file}: {reason(error)}", hint="make room" if full else "") from error
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
    if format in {"ova", "box"}:
        from vmctl import packing  # late: a plain disk needs none of it

        if format == "ova":
            disk = _converted(handle, manifest, folder, "vmdk", report, options=_STREAMED)
            return packing.ova(disk, manifest, folder, report)
        return packing.box(_converted(handle, manifest, folder, "qcow2", report), manifest, folder, report)
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
    with written_as_it_grows(target):
        qemu_img.copy(
            Source(handle, manifest.format),
            target,
            format,
            what=f"export image {manifest.stem}",
            options=options,
            compress=compress,
            offload=format in {"qcow2", "raw"},  # others know of none
            moved=lambda share: report(Progress(f"writing {format}", int(share * size), size)),
        )
    return target
