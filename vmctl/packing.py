"""An image's disk with what belongs to it in one file: an .ova, or a Vagrant box for libvirt."""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path
from typing import IO, cast

from vmctl import ovf, qemu_img, vagrant_box
from vmctl.events import Progress, Reporter
from vmctl.gzip_stream import GzipStream
from vmctl.manifest import Manifest

_CHUNK = 1 << 20
# Level 3 takes a third more time for a Debian disk, and leaves 3 % less.
_GZIP_LEVEL = 1


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


def ova(disk: Path, manifest: Manifest, folder: Path, report: Reporter) -> Path:
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


def box(disk: Path, manifest: Manifest, folder: Path, report: Reporter) -> Path:
    """A Vagrant box for the libvirt provider."""
    target = folder / "archive.box"
    with target.open("xb") as file, GzipStream(file, _GZIP_LEVEL) as packed:
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
