"""What a disk image of unknown origin is, from a bounded look at its header. Pure but for reading the open file.

qemu-img follows what a header names: a backing file, a data file or an extent may be any file of the host's, and
giving the format does not keep it from that. So the header is read here, before qemu-img may touch the file.
"""

from __future__ import annotations

import struct

from vmctl.disk_header import qcow2, vdi, vhdx, vmdk
from vmctl.disk_header.reach import require_whole
from vmctl.disk_header.window import SECTOR, DiskHeader, Unreadable, Window
from vmctl.errors import ImageError

__all__ = ["FORMATS", "DiskHeader", "Window", "check", "check_whole", "examine", "largest_file"]

FORMATS = ("qcow2", "raw", "vmdk", "vdi", "vhdx")
DEFAULT_MOST_BYTES = 2 << 40
_HEAD = 64 << 10
# The tables of an image come to less than this, beside its disk.
_TABLES_SHARE, _TABLES = 4, 64 << 20
# What we would not convert, by what the file begins with.
_OTHERS = {
    b"QED\0": "a QED disk image",
    b"conectix": "a VHD (VPC) disk image",
    b"WithoutFreeSpace": "a Parallels disk image",
    b"WithouFreSpacExt": "a Parallels disk image",
    b"LUKS\xba\xbe": "encrypted (LUKS)",
    b"Bochs Virtual HD Image": "a Bochs disk image",
    vmdk.OLD_MAGIC: "a VMFS sparse extent, a part of another VMDK",
    b"\x1f\x8b": "compressed with gzip",
    b"\xfd7zXZ\0": "compressed with xz",
    b"BZh": "compressed with bzip2",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"PK\x03\x04": "a zip archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"\x7fELF": "a program",
}
# Signatures of what a raw disk begins with: offset, bytes.
_RAW_SIGNS = (
    (510, b"\x55\xaa"),
    (SECTOR, b"EFI PART"),
    (SECTOR, b"LABELONE"),
    (1024 + 56, b"\x53\xef"),
    (0, b"XFSB"),
    (0, b"hsqs"),
    (32769, b"CD001"),
)
_BTRFS = (0x10040, b"_BHRfS_M")


def examine(window: Window, asked: str = "") -> DiskHeader:
    """What the file is; ``asked`` is the format it should be, "" for whatever it shows itself to be.

    Raises Unreadable where not even that can be told.
    """
    if asked == "raw":
        return _raw(window)
    if not window.size:
        raise Unreadable("it is empty")
    head = window.up_to(0, min(_HEAD, 2 * SECTOR))
    try:
        found = _by_magic(window, head)
    except struct.error as error:
        raise Unreadable("it is cut short") from error
    if asked and found.format != asked:
        raise Unreadable(f"it is {found.format}, not {asked}")
    return found


def _by_magic(window: Window, head: bytes) -> DiskHeader:
    if head.startswith(qcow2.MAGIC):
        return qcow2.read(window)
    if head.startswith(vmdk.MAGIC):
        return vmdk.read(window)
    if head.startswith(vhdx.MAGIC):
        return vhdx.read(window)
    if head[vdi.SIGNATURE_AT :].startswith(vdi.SIGNATURE):
        return vdi.read(window)
    for magic, what in _OTHERS.items():
        if head.startswith(magic):
            packed = what.startswith("compressed with ")
            raise Unreadable(f"it is {what}", f"unpack it first: {what.rpartition(' ')[2]} -d" if packed else "")
    if vmdk.is_text(head):
        return vmdk.read_text(window)
    if window.size >= SECTOR and window.read(window.size - SECTOR, 8) == b"conectix":
        raise Unreadable("it is a VHD (VPC) disk image")
    if not _looks_raw(window):
        raise Unreadable(
            "it is no disk image that vmctl knows, and shows no partition table or file system",
            "if it is a plain copy of a disk: --format raw",
        )
    return _raw(window)


def _looks_raw(window: Window) -> bool:
    return any(window.up_to(at, len(sign)) == sign for at, sign in (*_RAW_SIGNS, _BTRFS) if at < window.size)


def _raw(window: Window) -> DiskHeader:
    return DiskHeader("raw", -(-window.size // SECTOR) * SECTOR)


def check(window: Window, *, what: str, asked: str = "", most_bytes: int = DEFAULT_MOST_BYTES) -> DiskHeader:
    """A header with which nothing is wrong. Raises ImageError ``cannot WHAT: REASON`` with all reasons there are."""
    try:
        found = examine(window, asked)
    except Unreadable as error:
        raise ImageError(f"cannot {what}: {error}", hint=error.hint) from error
    problems = list(dict.fromkeys(found.problems))
    if found.virtual_size <= 0 and not problems:
        problems.append("it is empty")
    if found.virtual_size > most_bytes:
        unit, shift = ("GiB", 30) if most_bytes >= 1 << 30 else ("MiB", 20)
        large, most = -(-found.virtual_size >> shift), most_bytes >> shift
        problems.append(f"its disk is {large} {unit} large, above the limit of {most} {unit}")
    if problems:
        hint = ""
        if any("backing file" in p or "parent" in p or "other files" in p for p in problems):
            hint = "make it whole where it came from: qemu-img convert -O qcow2 IT NEW"
        raise ImageError(f"cannot {what}: {'; '.join(problems)}", hint=hint)
    return found


def largest_file(window: Window) -> int | None:
    """How large an image's file can be, by its header; 0: that does not tell; None: there is no whole header, yet."""
    try:
        header = examine(window)
    except Unreadable:
        return None
    if header.format == "raw" or header.snapshots or header.virtual_size <= 0:
        return 0  # of a raw disk, it is the file that tells; and each snapshot may hold a disk of its own
    return header.virtual_size + header.virtual_size // _TABLES_SHARE + _TABLES


def check_whole(window: Window, found: DiskHeader, *, what: str) -> None:
    """Raise ImageError when content that the tables of a checked image point to is not in the file."""
    try:
        require_whole(window, found)
    except Unreadable as error:
        raise ImageError(f"cannot {what}: {error}", hint="get it again; it ended too early") from error
