"""A disk for BIOS and UEFI: GPT with a BIOS boot partition, an ESP and the root, put together in a file."""

from __future__ import annotations

import os
import struct
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vmctl.builder.tools import HUNG_S, run
from vmctl.errors import ImageError

SECTOR = 512
_MIB_SECTORS = (1 << 20) // SECTOR
_BIOS_BOOT = "21686148-6449-6E6F-744E-656564454649"
_ESP = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
_ROOT_X86_64 = "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709"
_NAMESPACE = uuid.UUID("3b0ab1bb-7c57-5d2a-9a59-2d9b2f6c7a10")
# Offsets in boot.img and diskboot.img, the first sectors of GRUB (include/grub/i386/pc/boot.h in its source).
_KERNEL_SECTOR = 0x5C
_DRIVE_CHECK = 0x66
_CODE_END = 0x1B8
_BLOCK_LIST = 0x200 - 12
_KERNEL_SEGMENT = 0x820


@dataclass(frozen=True, slots=True)
class Partition:
    """A partition; sizes in MiB. The numbers are those of Debian's cloud images."""

    number: int
    start_mib: int
    size_mib: int
    type: str


@dataclass(frozen=True, slots=True)
class Layout:
    """The partitions of a disk. The root is last, so that it can grow."""

    size_mib: int

    @property
    def bios(self) -> Partition:
        """Where GRUB's core is, for BIOS."""
        return Partition(14, 1, 1, _BIOS_BOOT)

    @property
    def esp(self) -> Partition:
        """The EFI system partition."""
        return Partition(15, 2, 62, _ESP)

    @property
    def root(self) -> Partition:
        """The root, up to the backup of the table in the disk's last 34 sectors."""
        return Partition(1, 64, self.size_mib - 65, _ROOT_X86_64)

    def table(self, name: str) -> str:
        """The script for sfdisk."""
        lines = ["label: gpt", f"label-id: {_identity(name, 'disk')}", "unit: sectors"]
        for part in (self.bios, self.esp, self.root):
            start, size = part.start_mib * _MIB_SECTORS, part.size_mib * _MIB_SECTORS
            own = _identity(name, str(part.number))
            lines.append(f"disk{part.number} : start={start}, size={size}, type={part.type}, uuid={own}")
        return "\n".join(lines) + "\n"


def _identity(name: str, part: str) -> str:
    return str(uuid.uuid5(_NAMESPACE, f"{name}/{part}")).upper()


def fat_serial(name: str) -> int:
    """The serial number of the ESP's file system."""
    return uuid.uuid5(_NAMESPACE, f"{name}/fat").int >> 96


def fat_uuid(name: str) -> str:
    """The same as /etc/fstab writes it."""
    text = f"{fat_serial(name):08X}"
    return f"{text[:4]}-{text[4:]}"


def make_esp(files: Mapping[str, bytes], image: Path, *, name: str, size_mib: int, epoch: int) -> None:
    """Write a FAT file system with these files. Raises ImageError."""
    with image.open("wb") as file:
        file.truncate(size_mib << 20)
    env = {"SOURCE_DATE_EPOCH": str(epoch), "TZ": "UTC", "MTOOLS_SKIP_CHECK": "1", "MTOOLSRC": "/dev/null"}
    what = "make the EFI system partition"
    mformat: list[str | Path] = ["mformat", "-i", image, "-N", f"{fat_serial(name):08x}", "-v", "EFI", "::"]
    run(mformat, what=what, timeout_s=HUNG_S, env=env)
    folders = sorted({str(parent) for path in files for parent in PurePosixPath(path).parents if str(parent) != "."})
    run(["mmd", "-i", image, *(f"::{folder}" for folder in folders)], what=what, timeout_s=HUNG_S, env=env)
    for path in sorted(files):
        source = image.with_suffix(".part")
        source.write_bytes(files[path])
        os.utime(source, (epoch, epoch))
        run(["mcopy", "-m", "-i", image, source, f"::{path}"], what=what, timeout_s=HUNG_S, env=env)
        source.unlink()


def grub_sectors(boot: bytes, core: bytes, start: int) -> tuple[bytes, bytes]:
    """GRUB's boot.img and core.img, told where the core is on the disk: what grub-bios-setup writes. Pure.

    ``start`` is the sector of the BIOS boot partition.
    """
    if len(boot) != SECTOR or boot[-2:] != b"\x55\xaa" or len(core) < 2 * SECTOR:
        raise ImageError("cannot install GRUB: boot.img or core.img is not what it should be")
    first = bytearray(boot)
    struct.pack_into("<Q", first, _KERNEL_SECTOR, start)
    first[_DRIVE_CHECK : _DRIVE_CHECK + 2] = b"\x90\x90"  # trust the BIOS's drive number, as grub-install does
    rest = bytearray(core + bytes(-len(core) % SECTOR))
    struct.pack_into("<QHH", rest, _BLOCK_LIST, start + 1, len(rest) // SECTOR - 1, _KERNEL_SEGMENT)
    return bytes(first), bytes(rest)


def assemble(
    image: Path, layout: Layout, *, name: str, root: Path, esp: Path, boot: bytes, core: bytes, epoch: int
) -> None:
    """Write the raw disk ``image`` from its parts. Raises ImageError."""
    with image.open("wb") as file:
        file.truncate(layout.size_mib << 20)
    table = layout.table(name).encode()
    run(["sfdisk", "-q", "--no-reread", "--no-tell-kernel", image], what="partition the disk", timeout_s=HUNG_S,
        stdin=table, env={"SOURCE_DATE_EPOCH": str(epoch)})  # fmt: skip
    first, rest = grub_sectors(boot, core, layout.bios.start_mib * _MIB_SECTORS)
    if len(rest) > layout.bios.size_mib << 20:
        raise ImageError(f"cannot install GRUB: its core has {len(rest)} bytes, more than the BIOS boot partition")
    with image.open("r+b") as file:
        file.write(first[:_CODE_END])  # behind it are the disk's signature and the protective partition table
        file.seek(layout.bios.start_mib << 20)
        file.write(rest)
        for source, part in ((esp, layout.esp), (root, layout.root)):
            _copy_data(source, file.fileno(), part.start_mib << 20)


def _copy_data(source: Path, target: int, offset: int) -> None:
    """Copy a sparse file's data, not its holes, to an offset of a file."""
    with source.open("rb") as file:
        number, size, at = file.fileno(), source.stat().st_size, 0
        while at < size:
            try:
                begin = os.lseek(number, at, os.SEEK_DATA)
            except OSError:  # ENXIO: nothing but a hole is left
                return
            end = os.lseek(number, begin, os.SEEK_HOLE)
            os.lseek(target, offset + begin, os.SEEK_SET)
            os.lseek(number, begin, os.SEEK_SET)
            while begin < end:
                begin += os.sendfile(target, number, None, min(end - begin, 1 << 24))
            at = end
