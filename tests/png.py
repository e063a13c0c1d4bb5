"""Reads PNG pictures of eight bits a colour without an alpha channel, to see what a program wrote."""

from __future__ import annotations

import struct
import zlib
from collections import defaultdict


def decode(data: bytes) -> tuple[int, int, bytes]:
    """Width, height and RGB pixels; every checksum must be right."""
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    at, chunks = 8, defaultdict(bytes)
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert zlib.crc32(kind + body) == struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0]
        chunks[kind] += body
        at += 12 + length
    width, height, depth, colour, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert (depth, colour, rest) == (8, 2, [0, 0, 0])
    raw, step = zlib.decompress(chunks[b"IDAT"]), 3 * width + 1
    assert len(raw) == step * height
    pixels, above = b"", bytes(3 * width)
    for start in range(0, len(raw), step):
        above = _unfiltered(raw[start], bytearray(raw[start + 1 : start + step]), above)
        pixels += above
    return width, height, pixels


def _unfiltered(kind: int, line: bytearray, above: bytes) -> bytes:
    for i in range(len(line) if kind else 0):
        left, up, corner = (line[i - 3], above[i], above[i - 3]) if i > 2 else (0, above[i], 0)
        guess = left + up - corner
        paeth = min((left, up, corner), key=lambda value: abs(guess - value))
        line[i] = (line[i] + (left, up, (left + up) // 2, paeth)[kind - 1]) & 255
    return bytes(line)
