"""Tar archives as a stream, read and written: ustar with GNU's long names. Pure.

A reader of our own, because what it reads comes from a guest: the standard library's takes headers of any length into
memory, and does far more than files and folders. POSIX.1-2017 pax, section "ustar Interchange Format"; GNU tar manual,
"Basic Tar Format".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

BLOCK = 512
END = bytes(2 * BLOCK)
_LONG = 64 * 1024  # more than any path the kernel takes


class Kind(Enum):
    """What a member is, as far as a copy goes."""

    FILE = b"0"
    LINK = b"1"
    FOLDER = b"5"
    OTHER = b"?"


@dataclass(frozen=True, slots=True)
class Member:
    """One member. ``name`` and ``link`` are bytes as the archive has them."""

    name: bytes
    kind: Kind
    mode: int
    size: int
    link: bytes = b""


class Malformed(ValueError):
    """It is no archive, is cut short, or asks for too much."""


def padding(size: int) -> bytes:
    """What follows ``size`` bytes of content."""
    return bytes(-size % BLOCK)


def _number(value: int, width: int) -> bytes:
    if value < 8 ** (width - 1):
        return b"%0*o\0" % (width - 1, value)
    return b"\x80" + value.to_bytes(width - 1, "big")  # GNU's form, for what eight gigabytes do not hold


def _block(name: bytes, kind: bytes, mode: int, size: int) -> bytes:
    head = name[:100].ljust(100, b"\0") + _number(mode, 8) + _number(0, 8) * 2 + _number(size, 12) + _number(0, 12)
    tail = kind + bytes(100) + b"ustar  \0" + bytes(BLOCK - 265)
    total = sum(head) + 8 * ord(" ") + sum(tail)
    return head + b"%06o\0 " % total + tail


def header(name: bytes, kind: Kind, mode: int, size: int) -> bytes:
    """The blocks before a member's content."""
    long = b""
    if len(name) > 100:
        text = name + b"\0"
        long = _block(b"././@LongLink", b"L", 0o644, len(text)) + text + padding(len(text))
    return long + _block(name, kind.value, mode, size)


def members(read: Callable[[int], bytes]) -> Iterator[Member]:
    """The members, one after the other; the caller takes a member's content and padding before the next.

    ``read(n)`` gives n bytes, fewer only at the end. Raises Malformed.
    """
    name = link = b""
    size: int | None = None
    while True:
        block = read(BLOCK)
        if block == bytes(BLOCK):
            return
        if len(block) != BLOCK or sum(block[:148]) + 256 + sum(block[156:]) != _octal(block[148:156]):
            raise Malformed("it is cut short or no tar archive")
        kind, length = block[156:157], _octal(block[124:136])
        if kind in b"LKxg" and kind:
            text = _text(read, length)
            if kind == b"L":
                name = text.rstrip(b"\0")
            elif kind == b"K":
                link = text.rstrip(b"\0")
            elif kind == b"x":
                values = _pax(text)
                name, link = values.get(b"path", name), values.get(b"linkpath", link)
                size = int(values[b"size"]) if values.get(b"size", b"").isdigit() else size
            continue
        yield _member(block, kind, name, link, length if size is None else size)
        name, link, size = b"", b"", None


def _member(block: bytes, kind: bytes, name: bytes, link: bytes, size: int) -> Member:
    prefix = block[345:500].split(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    short = block[:100].split(b"\0")[0]
    whole = name or (prefix + b"/" + short if prefix else short)
    known = {b"0": Kind.FILE, b"\0": Kind.FILE, b"7": Kind.FILE, b"1": Kind.LINK, b"5": Kind.FOLDER}
    found = known.get(kind, Kind.OTHER)
    if found is not Kind.FILE:
        size = 0
    return Member(whole, found, _octal(block[100:108]) & 0o7777, size, link or block[157:257].split(b"\0")[0])


def _octal(field: bytes) -> int:
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    text = field.strip(b"\0 ")
    if text.strip(b"01234567"):
        raise Malformed("a number in it is none")
    return int(text or b"0", 8)


def _text(read: Callable[[int], bytes], length: int) -> bytes:
    if length > _LONG:
        raise Malformed(f"a name in it has {length} bytes")
    whole = length + len(padding(length))
    text = read(whole)
    if len(text) != whole:
        raise Malformed("it is cut short")
    return text[:length]


def _pax(text: bytes) -> dict[bytes, bytes]:
    values = {}
    while text:
        count, space, _ = text.partition(b" ")
        if not space or not count.isdigit() or not len(count) + 2 < int(count) <= len(text):
            raise Malformed("an extended header in it is broken")
        key, _, value = text[len(count) + 1 : int(count) - 1].partition(b"=")
        values[key] = value
        text = text[int(count) :]
    return values
