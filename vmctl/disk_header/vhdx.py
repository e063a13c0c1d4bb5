"""VHDX, version 1. Source: Microsoft's MS-VHDX."""

from __future__ import annotations

import struct
import uuid
from functools import cache

from vmctl.disk_header.window import DiskHeader, Unreadable, Window

MAGIC = b"vhdxfile"
_KIB = 1024
_HEADERS_AT = (64 * _KIB, 128 * _KIB)
_REGIONS_AT = (192 * _KIB, 256 * _KIB)
_HEADER_LENGTH = 4 * _KIB
_REGIONS_LENGTH = 64 * _KIB
_BAT = uuid.UUID("2dc27766-f623-4200-9d64-115e9bfd4a08")
_METADATA = uuid.UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e")
_FILE_PARAMETERS = uuid.UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b")
_VIRTUAL_SIZE = uuid.UUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8")
_PARENT_LOCATOR = uuid.UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c")
_HAS_PARENT = 2
_MOST_REGIONS = 2047
_MOST_ITEMS = 2047


@cache
def _crc_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


def crc32c(data: bytes) -> int:
    """The Castagnoli CRC, which no library of Python's has."""
    table, value = _crc_table(), 0xFFFFFFFF
    for byte in data:
        value = value >> 8 ^ table[(value ^ byte) & 0xFF]
    return value ^ 0xFFFFFFFF


def _valid(block: bytes, signature: bytes) -> bool:
    """Whether a block has the signature and the sum, which counts its own four bytes as nought."""
    (told,) = struct.unpack_from("<I", block, 4)
    return block[:4] == signature and crc32c(block[:4] + bytes(4) + block[8:]) == told


def read(window: Window) -> DiskHeader:
    """Read VHDX headers. Raises Unreadable."""
    headers = [window.read(at, _HEADER_LENGTH) for at in _HEADERS_AT]
    valid = [header for header in headers if _valid(header, b"head")]
    if not valid:
        raise Unreadable("neither of its headers is whole")
    current = max(valid, key=lambda header: int(struct.unpack_from("<Q", header, 8)[0]))
    log_version, version = struct.unpack_from("<HH", current, 64)
    if version != 1 or log_version:
        raise Unreadable(f"it is VHDX of version {version}, log version {log_version}, which vmctl does not know")
    problems = []
    if any(current[48:64]):
        problems.append("its log has writes that were never done: it was not closed")
    regions = _regions(window)
    if _BAT not in regions or _METADATA not in regions:
        raise Unreadable("it has no block table or no metadata")
    if regions.keys() - {_BAT, _METADATA}:
        problems.append("it has regions that vmctl does not know")
    for at, length in regions.values():
        if at < 1 << 20 or at + length > window.size:
            problems.append("a region of it lies beyond the file: it is cut short")
    size, found = _metadata(window, regions[_METADATA][0])
    return DiskHeader("vhdx", size, (*problems, *found))


def _regions(window: Window) -> dict[uuid.UUID, tuple[int, int]]:
    """Place and length of each region, by the first table that is whole."""
    for at in _REGIONS_AT:
        table = window.read(at, _REGIONS_LENGTH)
        if _valid(table, b"regi"):
            break
    else:
        raise Unreadable("neither of its region tables is whole")
    (count,) = struct.unpack_from("<I", table, 8)
    if count > _MOST_REGIONS:
        raise Unreadable("it has an absurd number of regions")
    found = {}
    for index in range(count):
        kind, offset, length, _required = struct.unpack_from("<16sQII", table, 16 + 32 * index)
        found[uuid.UUID(bytes_le=kind)] = (offset, length)
    if len(found) != count:
        raise Unreadable("it names a region twice")
    return found


def _metadata(window: Window, start: int) -> tuple[int, list[str]]:
    """Virtual size, and what is wrong with the metadata."""
    signature, _reserved, count = window.unpack("<8sHH", start)
    if signature != b"metadata" or count > _MOST_ITEMS:
        raise Unreadable("its metadata table is not one")
    items = {}
    table = window.read(start + 32, 32 * count)
    for index in range(count):
        kind, offset, _length, _flags = struct.unpack_from("<16sIII", table, 32 * index)
        items[uuid.UUID(bytes_le=kind)] = offset
    if len(items) != count:
        raise Unreadable("it names a piece of metadata twice")
    if _FILE_PARAMETERS not in items or _VIRTUAL_SIZE not in items:
        raise Unreadable("its metadata gives no size")
    block, flags = window.unpack("<II", start + items[_FILE_PARAMETERS])
    (size,) = window.unpack("<Q", start + items[_VIRTUAL_SIZE])
    problems = []
    if flags & _HAS_PARENT or _PARENT_LOCATOR in items:
        problems.append("it is a differencing disk: it has a parent")
    if block & (block - 1) or not 1 << 20 <= block <= 256 << 20:
        problems.append(f"its blocks are {block} bytes long")
    return int(size), problems
