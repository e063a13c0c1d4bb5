"""Tar archives of unknown origin, plain or gzipped, member by member, with every bound and rule kept here.

tarfile is not used: it reads a member's long-name or pax record into memory whatever its size, and the filters that
refuse bad members are missing from Debian 12's. Source of the format: POSIX pax, and GNU tar's manual on sparse files.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO

BLOCK = 512
CHUNK = 1 << 20
GZIP = b"\x1f\x8b"
_MOST_MEMBERS = 64
_MOST_RECORD = 64 << 10  # of a long name or a pax record
FREE_OF_RATIO = 256 << 20  # up to here anything may be as dense as it likes
HIGHEST_RATIO = 100
_MOST_SPARSE_BLOCKS = 4096  # 21 pieces each
_REGULAR = {b"0", b"\0", b"7", b"S"}
_REFUSED = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a named pipe",
}


class Malformed(Exception):
    """The archive breaks a rule; the text says which."""


class NoTar(Malformed):
    """It does not even look like one."""


class _Plain:
    """The file itself; what is not wanted is sought over."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._size = file.seek(0, 2)
        file.seek(0)
        self.offset = 0

    def read(self, count: int) -> bytes:
        data = self._file.read(count)
        self.offset += len(data)
        return data

    def skip(self, count: int) -> int:
        count = min(count, self._size - self.offset)
        self.offset += count
        self._file.seek(self.offset)
        return count


class _Gzipped:
    """What a gzip file holds, with a bomb ended early."""

    def __init__(self, file: IO[bytes], most_bytes: int) -> None:
        self._file = file
        self._most = most_bytes
        self._unpacker = zlib.decompressobj(31)
        self._taken = 0
        self._ready = b""
        self.offset = 0

    def read(self, count: int) -> bytes:
        parts = []
        while count:
            if not self._ready and not self._fill():
                break
            parts.append(self._ready[:count])
            self._ready = self._ready[count:]
            count -= len(parts[-1])
            self.offset += len(parts[-1])
        return b"".join(parts)

    def _fill(self) -> bool:
        while not self._ready:
            source = self._unpacker.unconsumed_tail
            if self._unpacker.eof:
                source = self._unpacker.unused_data
                self._unpacker = zlib.decompressobj(31)
            if not source:
                source = self._file.read(CHUNK)
                self._taken += len(source)
                if not source:
                    return False
            try:
                self._ready = self._unpacker.decompress(source, CHUNK)
            except zlib.error as error:
                raise Malformed(f"it cannot be unpacked ({error})") from error
        total = self.offset + len(self._ready)
        if total > self._most:
            raise Malformed(f"it unpacks to more than {self._most >> 20} MiB")
        if total > FREE_OF_RATIO and total > HIGHEST_RATIO * self._taken:
            raise Malformed(f"it unpacks to more than {HIGHEST_RATIO} times its size")
        return True

    def skip(self, count: int) -> int:
        done = 0
        while done < count and (data := self.read(min(CHUNK, count - done))):
            done += len(data)
        return done


@dataclass(slots=True)
class Member:
    """A regular file in an archive. ``pieces`` says where in the file each stored run of bytes belongs.

    ``start`` is where its content begins in the archive, or -1 when that is packed or in pieces.
    """

    name: str
    size: int
    pieces: tuple[tuple[int, int], ...]
    start: int
    _source: _Plain | _Gzipped
    _padding: int
    _left: int

    def read(self, count: int) -> bytes:
        """The next bytes stored of it. Raises Malformed."""
        data = self._source.read(min(count, self._left))
        if len(data) < min(count, self._left):
            raise Malformed("it is cut short")
        self._left -= len(data)
        return data

    def content(self, limit: int) -> bytes:
        """All of a small file. Raises Malformed."""
        if self.size > limit or self._left != self.size:
            raise Malformed(f"its {self.name} is not a small plain file")
        return self.read(self.size)

    def write_to(self, target: IO[bytes], moved: Callable[[int], None] = lambda _n: None) -> None:
        """Write it into an empty file, with holes where it has them. Raises Malformed, OSError."""
        for offset, length in self.pieces:
            target.seek(offset)
            while length:
                data = self.read(min(CHUNK, length))
                target.write(data)
                length -= len(data)
                moved(target.tell())
        target.truncate(self.size)

    def finish(self) -> None:
        """Go to the member after this. Raises Malformed."""
        if self._source.skip(self._left) < self._left:
            raise Malformed("it is cut short")
        self._left = 0
        self._source.skip(self._padding)


def members(file: IO[bytes], *, most_bytes: int) -> Iterator[Member]:
    """The regular files of a tar, plain or gzipped, each to be read before the next is asked for. Raises Malformed.

    Folders are passed over. Links, devices, names that leave the folder, names met twice, too many members and more
    than ``most_bytes`` of content end it.
    """
    source = _Gzipped(file, most_bytes) if file.read(2) == GZIP else _Plain(file)
    file.seek(0)
    seen: set[str] = set()
    long_name, long_size, count, total = "", -1, 0, 0
    while (header := source.read(BLOCK)) and header.count(0) != BLOCK:
        kind, size = _header(header)
        count += 1
        if count > _MOST_MEMBERS:
            raise Malformed(f"it has more than {_MOST_MEMBERS} members")
        if kind in {b"L", b"x", b"g", b"K"}:
            record = _record(source, size)
            if kind == b"L":
                long_name = record.partition(b"\0")[0].decode(errors="replace")
            elif kind == b"K":
                raise Malformed("it has a link of a long name")
            else:
                pax_name, long_size = _pax(record)
                long_name = pax_name or long_name
            continue
        name = _safe_name(long_name or _short_name(header), folder=kind == b"5")
        size, long_size = (long_size if long_size >= 0 else size), -1
        long_name = ""
        if kind == b"5":
            continue
        if kind not in _REGULAR:
            raise Malformed(f"its member {name} is {_REFUSED.get(kind, f'of unknown type {kind!r}')}")
        if name in seen:
            raise Malformed(f"it has two members called {name}")
        seen.add(name)
        pieces, real = _sparse(header, source) if kind == b"S" else (((0, size),), size)
        if sum(length for _, length in pieces) != size:
            raise Malformed(f"the pieces of its member {name} do not add up")
        total += real
        if total > most_bytes:
            raise Malformed(f"it holds more than {most_bytes >> 20} MiB")
        start = source.offset if kind != b"S" and isinstance(source, _Plain) else -1
        member = Member(name, real, pieces, start, source, -size % BLOCK, size)
        yield member
        member.finish()
    if not count:
        raise Malformed("it is empty")


def _record(source: _Plain | _Gzipped, size: int) -> bytes:
    if size > _MOST_RECORD:
        raise Malformed("it has an absurdly long name or record")
    data = source.read(size)
    source.skip(-size % BLOCK)
    if len(data) < size:
        raise Malformed("it is cut short")
    return data


def _number(field: bytes) -> int:
    """An octal number, or a binary one as GNU tar writes where octal is too short."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    text = field.strip(b" \0")
    try:
        return int(text or b"0", 8)
    except ValueError as error:
        raise NoTar("it is no tar archive, or a broken one") from error


def _header(block: bytes) -> tuple[bytes, int]:
    """Type and stored size of a member."""
    if len(block) < BLOCK:
        raise Malformed("it is cut short")
    told = _number(block[148:156])
    if told != sum(block[:148]) + 8 * 32 + sum(block[156:]):
        raise NoTar("it is no tar archive, or a broken one")
    kind = block[156:157]
    size = _number(block[124:136])
    if size < 0 or size >= 1 << 62:
        raise Malformed("a member of it is absurdly large")
    return kind, size if kind in _REGULAR | {b"L", b"x", b"g", b"K"} else 0


def _short_name(block: bytes) -> str:
    name = block[:100].partition(b"\0")[0]
    prefix = block[345:500].partition(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode(errors="replace")


def _pax(record: bytes) -> tuple[str, int]:
    """Name (or "") and size (or -1) that a pax record gives. Whatever else would change what data means is refused."""
    name, size = "", -1
    while record:
        length = record.partition(b" ")[0]
        if not length.isdigit() or not len(length) + 1 < int(length) <= len(record):
            raise Malformed("it has a broken pax record")
        key, _, value = record[len(length) + 1 : int(length) - 1].partition(b"=")
        if key == b"size" and value.isdigit():
            size = int(value)
        elif key in {b"size", b"linkpath"} or key.startswith(b"GNU.sparse"):
            raise Malformed(f"it has a pax record of {key.decode()}, which vmctl does not read")
        elif key == b"path":
            name = value.decode(errors="replace")
        record = record[int(length) :]
    return name, size


def _safe_name(name: str, *, folder: bool) -> str:
    """The name without ``./``. Raises Malformed for one that could mean anything outside its folder."""
    path = PurePosixPath(name)
    if name.startswith("/") or ".." in path.parts or "\\" in name or not name.isprintable():
        raise Malformed(f"its member {name!r} lies outside its folder")
    if not path.parts and not folder:
        raise Malformed("a member of it has no name")
    return str(path)


def _sparse(header: bytes, source: _Plain | _Gzipped) -> tuple[tuple[tuple[int, int], ...], int]:
    """The map of a sparse member in GNU tar's old form, and the member's real size."""
    real = _number(header[483:495])
    pieces, fields, more = [], header[386:482], header[482]
    for _ in range(_MOST_SPARSE_BLOCKS):
        for at in range(0, len(fields), 24):
            if not fields[at + 12 : at + 24].strip(b" \0"):
                break
            pieces.append((_number(fields[at : at + 12]), _number(fields[at + 12 : at + 24])))
        if not more:
            break
        block = source.read(BLOCK)
        if len(block) < BLOCK:
            raise Malformed("it is cut short")
        fields, more = block[:504], block[504]
    else:
        raise Malformed("a sparse member of it is in too many pieces")
    end = 0
    for offset, length in pieces:
        if offset < end or offset + length > real:
            raise Malformed("the pieces of a sparse member of it lie beyond its end")
        end = offset + length
    return tuple(pieces), real
