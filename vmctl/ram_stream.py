"""QEMU's migration stream: which of it a machine needs whose memory is nothing but zeros yet. Pure.

A stream tells of each page that is all zeros, in nine bytes, and QEMU reads the page then, to see that it is so. The
kernel may give it memory for that: to a guest of 1 GiB of which a quarter is in use, the other three quarters too.

What is known here of the stream (QEMU's migration/savevm.c and ram.c; all numbers big-endian):

    "QEVM" …                                        up to the first section
    01 u32 "\\3ram" u32 0, u32 4                     the memory's section begins; the u32 is its number from then on
    02 u32, 03 u32                                  it goes on, its last part
    u64 address | flags                             a record; addresses are multiples of 4096
        04: sizes of the blocks follow              each u8 length, name, u64 size; the address is their sum
        02: a page of one byte's value, 08: a page  u8 length and name of its block, without 20; then 1, or 4096 bytes
        10: the part ends
    7e u32                                          end of a section

Anything else, or a page that comes a second time, ends the reading: all from there on is needed.
"""

from __future__ import annotations

import re
import struct
from operator import lt

MAIN = b"pc.ram"
_PAGE = 4096
_BEGINS = re.compile(rb"\x01(.{4})\x03ram\x00\x00\x00\x00\x00\x00\x00\x04", re.DOTALL)
_BEGINS_WITHIN = 4 << 10
_FILL, _WHOLE, _SIZES, _END, _SAME_BLOCK = 0x02, 0x08, 0x04, 0x10, 0x20
# Many records of one kind at once, of the block of the one before: no loop of ours for each of a quarter million pages.
_NO_MORE_FLAGS = b"[" + b"".join(b"\\x%02x" % (high << 4) for high in range(16)) + b"]"
_ZEROS = re.compile(b"(?:.{6}" + _NO_MORE_FLAGS + b"\\x22\\x00){1,8192}", re.DOTALL)
_PAGES = re.compile(b"(?:.{6}" + _NO_MORE_FLAGS + b"\\x28.{4096}){1,2048}", re.DOTALL)
_RECORD = struct.Struct(">Q")


class RamStream:
    """Reads a stream piece by piece. ``at``: how far it has been read, from its first byte."""

    def __init__(self) -> None:
        self.at = 0
        self._over = False
        self._section: bytes | None = None
        self._inside = False
        self._block, self._last, self._blocks = b"", -1, set[bytes]()

    def read(self, data: bytes, *, last: bool = False) -> list[tuple[int, int]]:
        """The needed ranges of what comes at ``at``; that moves to what must be there in whole to be told of.

        ``last``: nothing comes behind ``data``.
        """
        needed: list[tuple[int, int]] = []
        begin, at = self.at, 0
        while not self._over:
            step = self._step(data, at)
            if step is None:
                break
            length, is_needed = step
            if is_needed:
                _add(needed, begin + at, begin + at + length)
            at += length
        if self._over or last:
            _add(needed, begin + at, begin + len(data))
            at = len(data)
        self.at = begin + at
        return needed

    def _step(self, data: bytes, at: int) -> tuple[int, bool] | None:
        """Length of what comes next, and whether it is needed; None where more must be there to tell."""
        if self._section is None:
            return self._to_section(data, at)
        if not self._inside:
            return self._between(data, at)
        if run := _ZEROS.match(data, at):
            return self._run(data, at, run.end(), 9, needed=self._block != MAIN)
        if run := _PAGES.match(data, at):
            return self._run(data, at, run.end(), 8 + _PAGE, needed=True)
        return self._record(data, at)

    def _to_section(self, data: bytes, at: int) -> tuple[int, bool] | None:
        found = _BEGINS.search(data, at)
        if found is None:
            return self._unknown() if len(data) - at > _BEGINS_WITHIN else None
        self._section, self._inside = found[1], True
        return found.end() - at, True

    def _between(self, data: bytes, at: int) -> tuple[int, bool] | None:
        if len(data) < at + 5:
            return None
        kind = data[at]
        if data[at + 1 : at + 5] != self._section or kind not in {0x02, 0x03, 0x7E}:
            return self._unknown()
        self._inside = kind != 0x7E
        return 5, True

    def _run(self, data: bytes, at: int, end: int, size: int, *, needed: bool) -> tuple[int, bool] | None:
        """Records of one size from ``at`` to ``end``."""
        layout = struct.Struct(f">Q{size - 8}x")
        words = [word for (word,) in layout.iter_unpack(memoryview(data)[at:end])]
        first, last = words[0] // _PAGE, words[-1] // _PAGE
        if not self._block or first <= self._last or not all(map(lt, words, words[1:])):
            return self._unknown()
        self._last = last
        return end - at, needed

    def _record(self, data: bytes, at: int) -> tuple[int, bool] | None:
        if len(data) < at + 8:
            return None
        (word,) = _RECORD.unpack_from(data, at)
        address, flags = word // _PAGE, word % _PAGE
        if flags == _END:
            self._inside = False
            return 8, True
        if flags == _SIZES:
            return self._sizes(data, at + 8, address * _PAGE)
        if flags in {_FILL | _SAME_BLOCK, _WHOLE | _SAME_BLOCK}:  # filled with another value, or not there in whole
            return self._one(address, 9) if flags & _FILL and len(data) > at + 8 else None
        if flags not in {_FILL, _WHOLE}:
            return self._unknown()
        length = data[at + 8] if len(data) > at + 8 else 0
        size = 9 + length + (1 if flags == _FILL else _PAGE)
        if not length or len(data) < at + size:
            return None
        name = data[at + 9 : at + 9 + length]
        if name in self._blocks:
            return self._unknown()
        self._blocks.add(name)
        self._block, self._last = name, -1
        return self._one(address, size)

    def _one(self, page: int, size: int) -> tuple[int, bool] | None:
        """A single record, which is needed."""
        if page <= self._last:
            return self._unknown()
        self._last = page
        return size, True

    def _sizes(self, data: bytes, begin: int, total: int) -> tuple[int, bool] | None:
        at = begin
        while total > 0:
            if len(data) < at + 1 or len(data) < at + 9 + data[at]:
                return None
            at += 9 + data[at]
            total -= _RECORD.unpack_from(data, at - 8)[0]
        if total < 0:
            return self._unknown()
        return at - begin + 8, True

    def _unknown(self) -> tuple[int, bool] | None:
        self._over = True
        return None


def _add(ranges: list[tuple[int, int]], begin: int, end: int) -> None:
    """Append a range, or lengthen the last by it."""
    if begin == end:
        return
    if ranges and ranges[-1][1] == begin:
        ranges[-1] = ranges[-1][0], end
    else:
        ranges.append((begin, end))
