"""VDI, version 1.1. Source: the header as VirtualBox and QEMU's block/vdi.c describe it."""

from __future__ import annotations

from vmctl.disk_header.window import DiskHeader, Unreadable, Window

SIGNATURE = b"\x7f\x10\xda\xbe"
SIGNATURE_AT = 0x40
_VERSION = 0x00010001
_TYPES = {1: "dynamic", 2: "static", 3: "undo", 4: "differencing"}
_BLOCK = 1 << 20
_MOST_BLOCKS = 0x1FFFFFFF  # QEMU's
_SECTOR = 512


def read(window: Window) -> DiskHeader:
    """Read a VDI header. Raises Unreadable."""
    version, _header_size, kind = window.unpack("<III", 0x44)
    map_at, data_at = window.unpack("<II", 0x154)
    (sector,) = window.unpack("<I", 0x168)
    size, block, _extra, blocks, allocated = window.unpack("<QIIII", 0x170)
    link, parent = window.read(0x1A8, 16), window.read(0x1B8, 16)
    if version != _VERSION:
        raise Unreadable(f"it is VDI of version {version >> 16}.{version & 0xFFFF}, which vmctl does not know")
    if kind not in {1, 2}:
        raise Unreadable(f"it is of type {_TYPES.get(kind, kind)}, and needs another disk below it")
    problems = []
    if any(link) or any(parent):
        problems.append("it has a parent disk")
    if sector != _SECTOR or block != _BLOCK:
        problems.append(f"its sectors are {sector} bytes and its blocks {block} bytes long")
    if blocks > _MOST_BLOCKS or -(-size // _BLOCK) > blocks:
        problems.append("its block map does not fit its size")
    elif allocated > blocks:
        problems.append("it has more blocks in use than blocks")
    if map_at % _SECTOR or data_at % _SECTOR or map_at < 0x200 or map_at + 4 * blocks > window.size:
        problems.append("its block map lies beyond the file")
    elif data_at < map_at + 4 * blocks or data_at + allocated * _BLOCK > window.size:
        problems.append("its data lies beyond the file: it is cut short")
    return DiskHeader("vdi", size, tuple(problems), _TYPES[kind])
