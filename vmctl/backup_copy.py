"""Copies what an NBD export holds, by several connections, and makes the digest of each cluster on the way."""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from vmctl import digest
from vmctl.backup_index import CLUSTER, ZEROS, Index
from vmctl.errors import ImageError, VmctlError
from vmctl.nbd import Export
from vmctl.wait import Worker

PIECE = 16 * CLUSTER
_THREADS = 8  # while some wait for the disk, others empty what the server has sent
_NOTHING = bytes(CLUSTER)
_LOOK_S = 0.1


class Sink(Protocol):
    """What takes the content: whole clusters, from several threads, each cluster once."""

    def write(self, first: int, data: memoryview) -> None:
        """The clusters from number ``first`` on."""

    def zero(self, number: int) -> None:
        """A cluster of zeros."""


class Nowhere:
    """A sink for content that is only looked at."""

    def write(self, first: int, data: memoryview) -> None:
        """Drop it."""

    def zero(self, number: int) -> None:
        """Drop it."""


@dataclass(slots=True)
class Copy:
    """One disk on its way. ``runs``: what to read, as (first cluster, count). ``keep_zeros``: zeros are told too.

    ``expected``: the digests that must come; another one is an error, which names ``label``.
    """

    socket: Path
    export: str
    size: int
    runs: tuple[tuple[int, int], ...]
    sink: Sink
    label: str
    keep_zeros: bool = False
    expected: Index | None = None
    index: Index = field(default_factory=dict)


def pieces(runs: Iterable[tuple[int, int]], most: int = PIECE // CLUSTER) -> Iterator[tuple[int, int]]:
    """The runs in pieces of at most ``most`` clusters."""
    for first, count in runs:
        for at in range(first, first + count, most):
            yield at, min(most, first + count - at)


def runs_of(numbers: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Numbers in ascending order as runs of (first, count)."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][0] + found[-1][1] == number:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((number, 1))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class _Asked:
    """A piece that was asked for: the read's number, its clusters, and how much of them the disk has."""

    number: int
    first: int
    count: int
    length: int


class _Work:
    """The pieces of one copy, handed out to threads; the first failure ends it for all."""

    def __init__(self, copy: Copy, moved: Callable[[int], None]) -> None:
        self.copy = copy
        self._pieces = pieces(copy.runs)
        self._lock = threading.Lock()
        self._moved = moved
        self.failure: BaseException | None = None
        self.stop = threading.Event()
        self.exports: list[Export] = []

    def next(self) -> tuple[int, int] | None:
        """The next piece; None at the end."""
        with self._lock:
            return None if self.stop.is_set() else next(self._pieces, None)

    def done(self, found: Index, amount: int) -> None:
        """Take the digests of a piece."""
        with self._lock:
            self.copy.index.update(found)
        self._moved(amount)

    def run(self) -> None:
        """One thread's share."""
        try:
            with Export(self.copy.socket, self.copy.export) as export:
                self.exports.append(export)
                # Two pieces in turn: the server reads the next one while this one is digested and written.
                buffers = (_pages(), _pages())
                asked = self._ask(export, buffers[0])
                while asked is not None:
                    buffers = (buffers[1], buffers[0])
                    following = self._ask(export, buffers[0])
                    export.finish(asked.number)
                    self._take(buffers[1], asked)
                    asked = following
        except (VmctlError, OSError, MemoryError) as error:
            with self._lock:
                self.failure = self.failure or error
            self.end()

    def end(self) -> None:
        """Make all threads end soon."""
        self.stop.set()
        for export in self.exports:
            export.close()

    def _ask(self, export: Export, buffer: mmap.mmap) -> _Asked | None:
        """Ask for the next piece; None at the end."""
        if (piece := self.next()) is None:
            return None
        first, count = piece
        length = min(count * CLUSTER, self.copy.size - first * CLUSTER)
        view = memoryview(buffer)[: count * CLUSTER]
        view[length:] = bytes(len(view) - length)  # the disk ends in this cluster
        return _Asked(export.start(first * CLUSTER, view[:length]), first, count, length)

    def _take(self, buffer: mmap.mmap, asked: _Asked) -> None:
        """Digest a piece that has come, and hand it on."""
        copy, first, count = self.copy, asked.first, asked.count
        view = memoryview(buffer)[: count * CLUSTER]
        found, zeros = _digests(buffer, view, first, count)
        if copy.expected is not None:
            _compare(copy, found, first, count)  # before anything of it is handed on
        for start, many in runs_of(found):
            copy.sink.write(start, view[(start - first) * CLUSTER : (start - first + many) * CLUSTER])
        if copy.keep_zeros:
            for number in zeros:
                found[number] = ZEROS
                copy.sink.zero(number)
        self.done(found, asked.length)


def _pages() -> mmap.mmap:
    """Memory for a piece that begins at a page's begin, as writing past the cache wants it."""
    return mmap.mmap(-1, PIECE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _digests(buffer: mmap.mmap, view: memoryview, first: int, count: int) -> tuple[Index, list[int]]:
    """The digests of the clusters of a piece, and which of them are zeros."""
    found: Index = {}
    zeros = []
    for number in range(count):
        at = number * CLUSTER
        if buffer[at : at + 64] == _NOTHING[:64] and buffer[at : at + CLUSTER] == _NOTHING:
            zeros.append(first + number)
        else:
            found[first + number] = digest.leaf(view[at : at + CLUSTER])
    return found, zeros


def _compare(copy: Copy, found: Index, first: int, count: int) -> None:
    expected = copy.expected or {}
    for number in range(first, first + count):
        if expected.get(number, ZEROS) != found.get(number, ZEROS):
            raise _differs(copy.label, number)


def _differs(label: str, number: int) -> ImageError:
    return ImageError(
        f"cannot trust {label}: what it holds at {number * CLUSTER} is not what was backed up",
        hint="it was changed or damaged after the backup was made",
    )


def run(copy: Copy, moved: Callable[[int], None] = lambda _count: None) -> Index:
    """Copy, and return the digests. ``moved`` hears how many bytes have been read since it heard last.

    Interrupted or failed, all threads have ended before this raises.
    """
    lock, total, told = threading.Lock(), [0], 0

    def count(amount: int) -> None:
        with lock:
            total[0] += amount

    work = _Work(copy, count)
    threads = [Worker(work.run, "backup") for _ in range(_THREADS)]
    began = time.monotonic()
    try:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            threads[0].join(_LOOK_S if time.monotonic() - began > _LOOK_S else 0.01)
            if not threads[0].is_alive():
                for thread in threads:
                    thread.join(_LOOK_S)
            if total[0] > told:
                told, since = total[0], total[0] - told
                moved(since)
    finally:
        work.end()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    if work.failure is not None:
        raise work.failure
    return copy.index
