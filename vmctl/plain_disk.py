"""A disk whose content lies as it is in a file, wherever in there: where that is has been told. Nothing is mapped.

A mapped file that another one cuts short kills who reads it.
"""

from __future__ import annotations

import errno
import os
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from vmctl.ext_files import Unreadable
from vmctl.qcow2_writer import CLUSTER

_LOOK = 64
_NOTHING, _ZEROS = bytes(_LOOK), bytes(CLUSTER)


class Piece(NamedTuple):
    """``length`` bytes of the disk from ``start`` on are at ``offset`` of the file."""

    start: int
    length: int
    offset: int


class TooMuch(Exception):
    """It holds more than was allowed."""


class PlainDisk:
    """``size`` bytes of a disk, in the file open as ``handle``; what is in none of ``pieces``, in order, is zeros.

    Of a file that has grown meanwhile, what is beyond the disk's end is left.
    """

    def __init__(self, handle: int, size: int, pieces: Sequence[Piece]) -> None:
        self.size = size
        self._handle = handle
        self._pieces = [Piece(p.start, min(p.length, size - p.start), p.offset) for p in pieces if p.start < size]
        self._starts = [piece.start for piece in self._pieces]

    def runs(self, most_bytes: int) -> list[tuple[int, int]]:
        """The clusters that hold anything but zeros, as (first, count) in order. Raises OSError, TooMuch."""
        found: list[tuple[int, int]] = []
        following, left = 0, most_bytes // CLUSTER
        for start, length, offset in self._pieces:
            at, end = start, start + length
            while at < end:
                cluster = at // CLUSTER
                stop = min(end, (cluster + 1) * CLUSTER)
                # One that two pieces share may be in already.
                if cluster >= following and self._holds(offset + at - start, stop - at):
                    if found and cluster == following:
                        found[-1] = (found[-1][0], found[-1][1] + 1)
                    else:
                        found.append((cluster, 1))
                    following, left = cluster + 1, left - 1
                    if left < 0:
                        raise TooMuch
                at = stop
        return found

    def _holds(self, offset: int, count: int) -> bool:
        """Whether anything but zeros is there; most of what holds something shows it at its begin."""
        data = os.pread(self._handle, min(count, _LOOK), offset)
        if data != _NOTHING[: len(data)]:
            return True
        data = os.pread(self._handle, count, offset)
        return data != _ZEROS[: len(data)]

    def read_into(self, view: memoryview, at: int) -> None:
        """Fill ``view`` with what the disk holds from ``at`` on. Raises OSError."""
        end, done = at + len(view), at
        for index in range(max(0, bisect_right(self._starts, at) - 1), len(self._pieces)):
            start, length, offset = self._pieces[index]
            if start >= end:
                break
            low, high = max(start, done), min(start + length, end)
            if low < high:
                view[done - at : low - at] = bytes(low - done)
                self._fill(view[low - at : high - at], offset + low - start)
                done = high
        view[done - at :] = bytes(end - done)

    def _fill(self, view: memoryview, offset: int) -> None:
        while view:
            count = os.preadv(self._handle, [view], offset)
            if not count:  # as QEMU reads what is beyond a file's end
                view[:] = bytes(len(view))
                return
            view, offset = view[count:], offset + count

    def read(self, offset: int, count: int) -> bytes:
        """Some bytes. Raises Unreadable."""
        if offset < 0 or offset + count > self.size:
            raise Unreadable("it ends before that")
        data = bytearray(count)
        try:
            self.read_into(memoryview(data), offset)
        except OSError as error:
            raise Unreadable(f"it cannot be read: {error.strerror}") from error
        return bytes(data)


def raw_pieces(handle: int, size: int) -> list[Piece]:
    """Where a raw disk holds anything, as far as its file system knows; not all can tell. Raises OSError."""
    found: list[Piece] = []
    at = 0
    while at < size:
        try:
            begin = os.lseek(handle, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole
                break
            if error.errno not in {errno.EINVAL, errno.EOPNOTSUPP}:
                raise
            return [Piece(0, size, 0)]
        at = min(size, os.lseek(handle, begin, os.SEEK_HOLE))
        if begin < at:
            found.append(Piece(begin, at - begin, begin))
    return found
