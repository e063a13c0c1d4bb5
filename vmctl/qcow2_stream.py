"""Writes a disk's content as a qcow2 in one pass, from its first byte to its last, and makes its digest on the way.

What holds anything is known before, so all tables can stand before the data. One thread reads, one digests, some
write: to read the file again for its digest would take half as long as to write it.
"""

from __future__ import annotations

import mmap
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple, Protocol

from vmctl.digest import Digest
from vmctl.qcow2_writer import CLUSTER, COPIED, PER_L2, PastTheCache, big_endian, header, ones, put, refcounts_of
from vmctl.wait import Worker

_BATCH = 16  # clusters
_WRITERS = 3
_BUFFERS = _WRITERS + 2  # few: while they are at work, a processor's cache has them


class Content(Protocol):
    """What is written: a disk of ``size`` bytes."""

    size: int

    def read_into(self, view: memoryview, at: int) -> None:
        """Fill ``view`` with what the disk holds from ``at`` on."""


class Layout(NamedTuple):
    """Where everything is in the file, in clusters; the header is in the first, the data from ``data`` on."""

    l1: int
    l1_entries: int
    table: int
    table_clusters: int
    refcounts: int
    refcount_clusters: int
    l2: int
    data: int
    end: int


class _Piece(NamedTuple):
    buffer: mmap.mmap
    length: int
    offset: int


def layout(size: int, runs: Sequence[tuple[int, int]]) -> Layout:
    """The file of a disk of ``size`` bytes that holds something in the clusters ``runs``: (first, count), in order."""
    entries = max(1, -(-size // (CLUSTER * PER_L2)))
    l2_tables = len(_needed(runs))
    table = 1 + -(-8 * entries // CLUSTER)
    held = sum(many for _, many in runs)
    blocks, tables = refcounts_of(table + l2_tables + held)
    refcounts = table + tables
    l2 = refcounts + blocks
    data = l2 + l2_tables
    return Layout(1, entries, table, tables, refcounts, blocks, l2, data, data + held)


def file_size(size: int, runs: Sequence[tuple[int, int]]) -> int:
    """Bytes of the file that ``write`` makes."""
    return layout(size, runs).end * CLUSTER


def _needed(runs: Sequence[tuple[int, int]]) -> list[int]:
    """The numbers, in the first table, of those that say where data is."""
    return sorted({n for first, many in runs for n in range(first // PER_L2, (first + many - 1) // PER_L2 + 1)})


def _l2_tables(runs: Sequence[tuple[int, int]], data: int) -> Iterator[array[int]]:
    """The tables that say where data is, in order; ``data``: where it begins."""
    current, table = -1, array("Q")
    at = data * CLUSTER
    for first, many in runs:
        while many:
            index, slot = divmod(first, PER_L2)
            if index != current:
                if table:
                    yield table
                current, table = index, array("Q", bytes(CLUSTER))
            count = min(many, PER_L2 - slot)
            places = range(at | COPIED, (at | COPIED) + count * CLUSTER, CLUSTER)
            table[slot : slot + count] = array("Q", places)
            first, many, at = first + count, many - count, at + count * CLUSTER
    if table:
        yield table


def _head(size: int, runs: Sequence[tuple[int, int]], plan: Layout) -> Iterator[bytes]:
    """All that stands before the data, cluster after cluster."""
    l1_at, table_at = plan.l1 * CLUSTER, plan.table * CLUSTER
    yield header(size, (plan.l1_entries, l1_at), (table_at, plan.table_clusters)).ljust(CLUSTER, b"\0")
    l1 = array("Q", bytes((plan.table - plan.l1) * CLUSTER))
    for number, index in enumerate(_needed(runs)):
        l1[index] = (plan.l2 + number) * CLUSTER | COPIED
    yield big_endian(l1)
    places = array("Q", range(plan.refcounts * CLUSTER, plan.l2 * CLUSTER, CLUSTER))
    yield big_endian(places).ljust(plan.table_clusters * CLUSTER, b"\0")
    yield big_endian(ones(plan.end, plan.refcount_clusters))
    for table in _l2_tables(runs, plan.data):
        yield big_endian(table)


def _batches(runs: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """The runs, in lists of at most so many clusters as one buffer holds."""
    batch: list[tuple[int, int]] = []
    room = _BATCH
    for first, many in runs:
        while many:
            count = min(many, room)
            batch.append((first, count))
            first, many, room = first + count, many - count, room - count
            if not room:
                yield batch
                batch, room = [], _BATCH
    if batch:
        yield batch


class _Line:
    """Buffers that go from who reads to who digests, to those who write, and back. The first failure is kept."""

    def __init__(self, handle: int, summing: Digest) -> None:
        self.free: SimpleQueue[mmap.mmap] = SimpleQueue()
        self.read: SimpleQueue[_Piece | None] = SimpleQueue()
        self._digested: SimpleQueue[_Piece | None] = SimpleQueue()
        self.failures: list[BaseException] = []
        self._summing = summing
        self._file = PastTheCache(handle)
        for _ in range(_BUFFERS):
            self.free.put(mmap.mmap(-1, _BATCH * CLUSTER, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        works = [self._digest, *([self._write] * _WRITERS)]
        self._threads = [Worker(work, "copy") for work in works]
        for thread in self._threads:
            thread.start()

    def _digest(self) -> None:
        while (piece := self.read.get()) is not None:
            self._try(lambda one: self._summing.update(memoryview(one.buffer)[: one.length]), piece)
            self._digested.put(piece)
        for _ in range(_WRITERS):
            self._digested.put(None)

    def _write(self) -> None:
        while (piece := self._digested.get()) is not None:
            self._try(lambda one: self._file.put(one.offset, memoryview(one.buffer)[: one.length]), piece)
            self.free.put(piece.buffer)

    def _try(self, work: Callable[[_Piece], None], piece: _Piece) -> None:
        if self.failures:
            return
        try:
            work(piece)
        except BaseException as error:  # noqa: BLE001  raised by who reads
            self.failures.append(error)

    def end(self) -> None:
        """Wait for all to be written."""
        self.read.put(None)
        for thread in self._threads:
            thread.join()
        self._file.close()

    def check(self) -> None:
        """Raise what has gone wrong."""
        if self.failures:
            raise self.failures[0]


def write(
    content: Content,
    runs: Sequence[tuple[int, int]],
    target: Path,
    moved: Callable[[int], None] = lambda _n: None,
) -> str:
    """Make ``target`` a qcow2 of the clusters ``runs``, all others zeros; returns its digest. Nothing is synced.

    ``moved`` hears how many bytes are done. Raises OSError, and leaves a file without a header then.
    """
    plan, summing = layout(content.size, runs), Digest()
    handle = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        # Blocks that are the file's already can be written side by side; and a full disk says so now.
        os.posix_fallocate(handle, 0, plan.end * CLUSTER)
        first, at = b"", 0
        for part in _head(content.size, runs, plan):
            summing.update(part)
            if at:
                put(handle, at, memoryview(part))
            first, at = first or part, at + len(part)
        line = _Line(handle, summing)
        try:
            _pour(content, runs, line, at, moved)
        except BaseException as error:
            line.failures.append(error)  # what is not yet written need not be
            raise
        finally:
            line.end()
        line.check()
        put(handle, 0, memoryview(first))
    finally:
        os.close(handle)
    return str(summing)


def _pour(
    content: Content, runs: Sequence[tuple[int, int]], line: _Line, at: int, moved: Callable[[int], None]
) -> None:
    done = 0
    for batch in _batches(runs):
        buffer = line.free.get()
        line.check()
        view, filled = memoryview(buffer), 0
        for first, many in batch:
            length = many * CLUSTER
            content.read_into(view[filled : filled + length], first * CLUSTER)
            filled += length
        line.read.put(_Piece(buffer, filled, at))
        at, done = at + filled, done + filled
        moved(done)
