"""Whether a file holds all that its tables point to.

What lies beyond the end of a file QEMU reads as zeros, and says nothing: a qcow2 or VMDK cut short on its way would
be taken for whole. VDI tells in its header how much data it has; of VHDX and of streamed VMDK QEMU itself finds it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from vmctl.disk_header.window import SECTOR, DiskHeader, Unreadable, Window

_OFFSET = 0x00FFFFFFFFFFFE00
_COMPRESSED = 1 << 62
_ZERO = 1
_IN_USE = 0xFFFFFFFF
_WIDE_L2 = 1 << 4


def require_whole(window: Window, found: DiskHeader) -> None:
    """Raise Unreadable when content is missing at the end of a file whose header, ``found``, is sound."""
    tables = Window(window.handle, window.size, window.start, window.size)  # each is read once
    parts = _qcow2(tables) if found.format == "qcow2" else _vmdk(tables) if found.format == "vmdk" else ()
    for start, end in parts:
        # The last cluster may be there in part, as QEMU has it too; it writes whole sectors.
        if start >= window.size or (end > window.size and window.size % SECTOR):
            raise Unreadable(f"it is cut short: it has content at byte {start}, and {window.size} bytes are there")


def _qcow2(window: Window) -> Iterator[tuple[int, int]]:
    """Where the tables are, and the last of what each points to: first byte, and the byte after."""
    version, bits, l1_size, l1_at = window.unpack(">I12xI12xIQ", 4)
    cluster, packed_bits = 1 << bits, 70 - bits
    wide = version == 3 and window.unpack(">Q", 72)[0] & _WIDE_L2
    for at in sorted({entry & _OFFSET for entry in _numbers(window, l1_at, l1_size, ">Q")} - {0}):
        yield at, at + cluster
        entries = _numbers(window, at, cluster // 8, ">Q")
        # Beside a wide entry stands which parts of it are in use; of a narrow one that reads as zeros, nothing is.
        used = entries[1::2] if wide else [~e & _ZERO for e in entries]
        entries = entries[:: 2 if wide else 1]
        plain = [e & _OFFSET for e, u in zip(entries, used, strict=True) if not e & _COMPRESSED and u & _IN_USE]
        last = max(plain, default=0)
        yield last, last + cluster
        # Counted in sectors, of which the last need not be there to its end.
        yield max((_last_sector(e, packed_bits) for e in entries if e & _COMPRESSED), default=0) * SECTOR, 0


def _last_sector(entry: int, bits: int) -> int:
    place, length = entry & ((1 << bits) - 1), (entry & (_COMPRESSED - 1)) >> bits
    return place // SECTOR + length


def _vmdk(window: Window) -> Iterator[tuple[int, int]]:
    capacity, grain, entries, directory, packed = window.unpack("<QQ16xI8xQ13xH", 12)
    if not 0 < entries <= 512 or directory * SECTOR >= window.size:
        return  # nothing QEMU would take; or its directory is named at its end, which is there
    tables = _numbers(window, directory * SECTOR, -(-capacity // (grain * entries)), "<I")
    for at in sorted({*tables} - {0}):
        yield at * SECTOR, at * SECTOR + 4 * entries
        last = max(_numbers(window, at * SECTOR, entries, "<I"))
        yield last * SECTOR, 0 if packed else (last + grain) * SECTOR


def _numbers(window: Window, at: int, count: int, kind: str) -> tuple[int, ...]:
    return struct.unpack(f"{kind[0]}{count}{kind[1]}", window.read(at, count * struct.calcsize(kind)))
