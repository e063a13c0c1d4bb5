"""Small files of an ext2, 3 or 4 file system of unknown origin, read without mounting it. Every look is bounded.

Source: the kernel's Documentation/filesystems/ext4. What is rare (meta_bg, encrypted or inline files) is not read.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

_SUPERBLOCK_AT = 1024
_MAGIC = 0xEF53
_EXTENT_MAGIC = 0xF30A
_BIT64, _META_BG = 0x80, 0x10
_EXTENTS, _INLINE, _ENCRYPTED = 0x80000, 0x10000000, 0x800
_FOLDER, _FILE, _LINK = 0x4000, 0x8000, 0xA000
_ROOT = 2
_MOST_READ = 16 << 20
_MOST_READS = 4096
_MOST_FOLDER = 4 << 20
_MOST_LINKS = 8
_DEEPEST = 5
_FAST_LINK = 60


class Unreadable(Exception):
    """It is no such file system, a damaged one, or one of a kind not read here."""


@dataclass(slots=True)
class _Inode:
    mode: int
    size: int
    flags: int
    blocks: bytes


@dataclass(slots=True)
class Ext:
    """A file system at ``start`` of what ``source`` reads: (offset, count) to exactly that many bytes."""

    source: Callable[[int, int], bytes]
    start: int = 0
    _reads: int = field(default=0, init=False)
    _bytes: int = field(default=0, init=False)
    _block: int = field(default=1024, init=False)
    _per_group: int = field(default=1, init=False)
    _inode_size: int = field(default=128, init=False)
    _inodes: int = field(default=0, init=False)
    _table: int = field(default=0, init=False)
    _entry: int = field(default=32, init=False)

    def __post_init__(self) -> None:
        """Read the superblock. Raises Unreadable."""
        block = self._read(_SUPERBLOCK_AT, 1024)
        (magic,) = struct.unpack_from("<H", block, 56)
        if magic != _MAGIC:
            raise Unreadable("it has no ext file system")
        first, log = struct.unpack_from("<II", block, 20)
        (self._inodes,) = struct.unpack_from("<I", block, 0)
        (self._per_group,) = struct.unpack_from("<I", block, 40)
        (revision,) = struct.unpack_from("<I", block, 76)
        (features,) = struct.unpack_from("<I", block, 96)
        if log > 6 or not self._per_group or features & _META_BG:
            raise Unreadable("its superblock is damaged, or of a kind not read")
        self._block = 1024 << log
        if revision:
            (self._inode_size,) = struct.unpack_from("<H", block, 88)
        if features & _BIT64:
            (self._entry,) = struct.unpack_from("<H", block, 254)
        if not 128 <= self._inode_size <= self._block or not 32 <= self._entry <= 1024:
            raise Unreadable("its superblock is damaged")
        self._table = (first + 1) * self._block

    def content(self, path: str, most_bytes: int = 256 << 10) -> bytes | None:
        """A file's content, links followed inside the file system; None where there is none. Raises Unreadable."""
        names, at, links = [name for name in reversed(path.split("/")) if name], [_ROOT], 0
        while names:
            name = names.pop()
            if name == "..":
                at = at[:-1] or [_ROOT]
                continue
            number = next((n for found, n in self._entries(at[-1]) if found == name.encode()), 0)
            if not number:
                return None
            inode = self._inode(number)
            if inode.mode & 0xF000 != _LINK:
                at.append(number)
                continue
            links += 1
            target = self._link(inode)
            if links > _MOST_LINKS:
                raise Unreadable("its links go in a circle")
            names += [part for part in reversed(target.split("/")) if part and part != "."]
            at = [_ROOT] if target.startswith("/") else at
        inode = self._inode(at[-1])
        return self._data(inode, most_bytes) if inode.mode & 0xF000 == _FILE else None

    def _read(self, offset: int, count: int) -> bytes:
        self._reads += 1
        self._bytes += count
        if self._reads > _MOST_READS or self._bytes > _MOST_READ:
            raise Unreadable("to read it takes absurdly much")
        return self.source(self.start + offset, count)

    def _inode(self, number: int) -> _Inode:
        if not 0 < number <= self._inodes:
            raise Unreadable("it names a file that cannot be")
        group, index = divmod(number - 1, self._per_group)
        entry = self._read(self._table + group * self._entry, self._entry)
        table = struct.unpack_from("<I", entry, 8)[0]
        if self._entry >= 64:
            table |= struct.unpack_from("<I", entry, 40)[0] << 32
        raw = self._read(table * self._block + index * self._inode_size, 128)
        mode, low, flags, high = (
            struct.unpack_from(form, raw, at)[0] for form, at in (("<H", 0), ("<I", 4), ("<I", 32), ("<I", 108))
        )
        if flags & (_INLINE | _ENCRYPTED):
            raise Unreadable("it keeps files in a way not read")
        size = low | high << 32 if mode & 0xF000 == _FILE else low
        return _Inode(mode, size, flags, raw[40:100])

    def _link(self, inode: _Inode) -> str:
        data = inode.blocks[: inode.size] if inode.size < _FAST_LINK else self._data(inode, self._block)
        return data.decode("utf-8", "surrogateescape")

    def _entries(self, number: int) -> Iterator[tuple[bytes, int]]:
        inode = self._inode(number)
        if inode.mode & 0xF000 != _FOLDER:
            return
        data, at = self._data(inode, _MOST_FOLDER), 0
        while at + 8 <= len(data):
            child, length, size = struct.unpack_from("<IHB", data, at)
            if length < 8:
                raise Unreadable("a folder of it is damaged")
            if child:
                yield data[at + 8 : at + 8 + size], child
            at += length

    def _data(self, inode: _Inode, most_bytes: int) -> bytes:
        if inode.size > most_bytes:
            raise Unreadable("a file of it is absurdly long")
        count = -(-inode.size // self._block)
        data = bytearray(count * self._block)
        spans = self._extents(inode.blocks, _DEEPEST) if inode.flags & _EXTENTS else self._mapped(inode.blocks, count)
        for first, where, length in spans:
            length = min(length, count - first)
            if length > 0:
                at = first * self._block
                data[at : at + length * self._block] = self._read(where * self._block, length * self._block)
        return bytes(data[: inode.size])

    def _extents(self, node: bytes, deepest: int) -> Iterator[tuple[int, int, int]]:
        """First block of the file, where it is, and how many."""
        magic, entries, _, depth = struct.unpack_from("<HHHH", node, 0)
        if magic != _EXTENT_MAGIC or depth > deepest or 12 + entries * 12 > len(node):
            raise Unreadable("a file's extents are damaged")
        for at in range(12, 12 + entries * 12, 12):
            if depth:
                low, high = struct.unpack_from("<IH", node, at + 4)
                yield from self._extents(self._read((low | high << 32) * self._block, self._block), depth - 1)
            else:
                first, length, high, low = struct.unpack_from("<IHHI", node, at)
                if length <= 1 << 15:  # beyond: reserved, and read as zeros
                    yield first, low | high << 32, length

    def _mapped(self, blocks: bytes, count: int) -> Iterator[tuple[int, int, int]]:
        """The same of ext2 and 3, as far as one indirect block reaches."""
        numbers = list(struct.unpack_from("<12I", blocks, 0))
        if count > len(numbers):
            node = self._read(struct.unpack_from("<I", blocks, 48)[0] * self._block, self._block)
            numbers += struct.unpack(f"<{self._block // 4}I", node)
        if count > len(numbers):
            raise Unreadable("a file of it is absurdly long")
        for first, where in enumerate(numbers[:count]):
            if where:
                yield first, where, 1
