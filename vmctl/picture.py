"""A screen's picture as PNG (W3C recommendation, third edition). Pure."""

from __future__ import annotations

import re
import struct
import zlib

from vmctl.errors import VmctlError

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEADER = re.compile(rb"P6\s+(?:#[^\n]*\n\s*)*(\d{1,5})\s+(\d{1,5})\s+255\s")


def png(kind: str, data: bytes) -> bytes:
    """The picture as PNG: PNG as it is, a binary PPM written anew. Raises VmctlError for anything else."""
    if kind == "image/png" and data.startswith(_SIGNATURE):
        return data
    header = _HEADER.match(data)
    if header is None:
        raise VmctlError(f"cannot read the screen's picture: {kind} is neither PNG nor PPM")
    width, height = int(header[1]), int(header[2])
    pixels = memoryview(data)[header.end() :]
    if width * height == 0 or len(pixels) < 3 * width * height:
        raise VmctlError("cannot read the screen's picture: it is cut short")
    row = 3 * width
    lines = b"".join(b"\0" + pixels[start : start + row].tobytes() for start in range(0, row * height, row))
    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # eight bits each of RGB
    return _SIGNATURE + _chunk(b"IHDR", size) + _chunk(b"IDAT", zlib.compress(lines, 9)) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
