"""Writes a qcow2 file in one pass: data is appended as it comes, from several threads, and the tables follow.

Until the end there is no header, so nothing takes a half-written file for a disk. Source: QEMU's
docs/interop/qcow2.txt. qemu-img would read and write the same, but in a process of its own, to which each byte had to
be sent once more.
"""

from __future__ import annotations

import errno
import io
import os
import struct
import threading
import zlib
from array import array
from collections.abc import Callable
from contextlib import suppress

from vmctl import zstd
from vmctl.choices import Compression

BITS = 16
CLUSTER = 1 << BITS
PER_L2 = CLUSTER // 8
_PER_REFBLOCK = CLUSTER // 2
COPIED, _COMPRESSED, _ZERO = 1 << 63, 1 << 62, 1
_SIZE_SHIFT = 62 - (BITS - 8)
_SECTOR = 512
_FIRST_ROOM, _MORE_ROOM = 1 << 20, 256 << 20
_COMPRESSION_FEATURE = 1 << 3


def _zlib(data: bytes) -> bytes:
    packer = zlib.compressobj(zlib.Z_DEFAULT_COMPRESSION, zlib.DEFLATED, -12, 9)
    return packer.compress(data) + packer.flush()


def put(handle: int, offset: int, data: memoryview) -> None:
    """Write all of ``data``. Raises OSError."""
    while data:
        done = os.pwrite(handle, data, offset)
        data, offset = data[done:], offset + done


class PastTheCache:
    """A file open as ``handle``, written at once to the disk where that can be: its content need not fill the cache."""

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._room = 0
        self._direct: io.FileIO | None = None
        with suppress(OSError):  # not on every file system
            again = os.open(f"/proc/self/fd/{handle}", os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
            self._direct = io.FileIO(again, "w")

    def reach(self, end: int) -> None:
        """Have room up to there: what is written beyond a file's end, its writers wait for one another to write.

        As much again each time, so that a file of some clusters is not given room for thousands.
        """
        while self._direct is not None and self._room < end:
            step = min(max(self._room, _FIRST_ROOM), _MORE_ROOM)
            with suppress(OSError):  # no room for as much may be room enough
                os.posix_fallocate(self._handle, self._room, step)
            self._room += step

    def put(self, offset: int, data: memoryview) -> None:
        """Write whole pages of memory, at a page's begin. From any thread. Raises OSError."""
        if self._direct is not None:
            try:
                done = os.pwrite(self._direct.fileno(), data, offset)
            except OSError as error:
                if error.errno != errno.EINVAL:  # which says that the memory does not lie as this disk wants it
                    raise
                done = 0
            offset, data = offset + done, data[done:]
        put(self._handle, offset, data)

    def close(self) -> None:
        """Close what was opened beside ``handle``."""
        if self._direct is not None:
            self._direct.close()


class Qcow2Writer:
    """A file open as ``handle`` that becomes a qcow2 of ``size`` bytes. Each cluster is given at most once."""

    def __init__(self, handle: int, size: int, compression: Compression = Compression.NONE) -> None:
        self._handle, self._size = handle, size
        self._kind = compression
        packers: dict[Compression, Callable[[bytes], bytes]] = {
            Compression.ZLIB: _zlib,
            Compression.ZSTD: zstd.compress,
        }
        self._pack = packers.get(compression)
        self._lock = threading.Lock()
        self._end = CLUSTER  # the first one is the header's
        self._l2: dict[int, array[int]] = {}
        self._shared: dict[int, int] = {}  # by host cluster: how many compressed ones touch it
        self._direct = PastTheCache(handle)

    def write(self, first: int, data: memoryview) -> None:
        """The content of the clusters from number ``first`` on; ``data`` is whole clusters."""
        if self._pack is not None:
            for at in range(0, len(data), CLUSTER):
                self._write_packed(first + at // CLUSTER, bytes(data[at : at + CLUSTER]))
            return
        with self._lock:
            offset = -(-self._end // CLUSTER) * CLUSTER
            self._end = offset + len(data)
            self._direct.reach(self._end)
        self._direct.put(offset, data)
        with self._lock:
            for number in range(len(data) // CLUSTER):
                self._set(first + number, (offset + number * CLUSTER) | COPIED)

    def _write_packed(self, number: int, data: bytes) -> None:
        assert self._pack is not None
        packed = self._pack(data)
        if len(packed) >= CLUSTER - _SECTOR:
            with self._lock:
                offset = -(-self._end // CLUSTER) * CLUSTER
                self._end = offset + CLUSTER
                self._set(number, offset | COPIED)
            self._put(offset, memoryview(data))
            return
        with self._lock:
            offset = self._end
            self._end += len(packed)
            begin = offset // _SECTOR
            sectors = -(-(offset + len(packed)) // _SECTOR) - begin
            self._set(number, _COMPRESSED | ((sectors - 1) << _SIZE_SHIFT) | offset)
            last = (begin + sectors) * _SECTOR - 1
            for cluster in range(offset // CLUSTER, last // CLUSTER + 1):
                self._shared[cluster] = self._shared.get(cluster, 0) + 1
        self._put(offset, memoryview(packed))

    def zero(self, number: int) -> None:
        """This cluster reads as zeros, whatever a file below has there."""
        with self._lock:
            self._set(number, _ZERO)

    def _set(self, number: int, entry: int) -> None:
        table = self._l2.get(number // PER_L2)
        if table is None:
            table = self._l2[number // PER_L2] = array("Q", bytes(CLUSTER))
        table[number % PER_L2] = entry

    def _put(self, offset: int, data: memoryview) -> None:
        put(self._handle, offset, data)

    def finish(self) -> int:
        """Write the tables and last the header; returns the file's size. Nothing is synced."""
        self._direct.close()
        at = -(-self._end // CLUSTER) * CLUSTER
        entries = max(1, -(-self._size // (CLUSTER * PER_L2)))
        l1 = array("Q", bytes(8 * entries))
        for index, table in sorted(self._l2.items()):
            l1[index] = at | COPIED
            self._put(at, memoryview(big_endian(table)))
            at += CLUSTER
        l1_at = at
        self._put(at, memoryview(big_endian(l1)))
        at += -(-8 * entries // CLUSTER) * CLUSTER
        table_at, table_clusters, at = self._refcounts(at)
        os.ftruncate(self._handle, at)
        self._put(0, memoryview(header(self._size, (entries, l1_at), (table_at, table_clusters), self._kind)))
        return at

    def _refcounts(self, at: int) -> tuple[int, int, int]:
        """Write the refcounts of all clusters, their own too; offset and length of their table, and the file's end."""
        used = at // CLUSTER
        blocks, tables = refcounts_of(used)
        counts = ones(used + blocks + tables, blocks)
        for cluster, count in self._shared.items():
            counts[cluster] = count
        places = array("Q", [at + number * CLUSTER for number in range(blocks)])
        self._put(at, memoryview(big_endian(counts)))
        table_at = at + blocks * CLUSTER
        self._put(table_at, memoryview(big_endian(places)))
        return table_at, tables, table_at + tables * CLUSTER


def header(size: int, l1: tuple[int, int], refcounts: tuple[int, int], kind: Compression = Compression.NONE) -> bytes:
    """The header of a disk of ``size`` bytes; ``l1``: its entries and where, ``refcounts``: table's place, clusters."""
    features, length = (_COMPRESSION_FEATURE, 112) if kind is Compression.ZSTD else (0, 104)
    head = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", 3, 0, 0, BITS, size, 0, *l1, *refcounts, 0, 0)
    head += struct.pack(">QQQII", features, 0, 0, 4, length) + (b"\1" + bytes(7) if length > 104 else b"")
    return head + bytes(8)  # no extensions


def refcounts_of(used: int) -> tuple[int, int]:
    """How many clusters of refcounts, and of the table of those, stand for ``used`` clusters and for themselves."""
    blocks, tables = 0, 1
    while blocks * _PER_REFBLOCK < used + blocks + tables:
        blocks = -(-(used + blocks + tables) // _PER_REFBLOCK)
        tables = max(1, -(-blocks * 8 // CLUSTER))
    return blocks, tables


def ones(total: int, blocks: int) -> array[int]:
    """Refcounts in ``blocks`` clusters: the first ``total`` are in use, once each."""
    counts = array("H", struct.pack("=H", 1) * total)
    counts.extend([0] * (blocks * _PER_REFBLOCK - total))
    return counts


def big_endian(values: array[int]) -> bytes:
    """The numbers as they are written."""
    if struct.pack("=H", 1) == b"\1\0":
        values = values[:]
        values.byteswap()
    return values.tobytes()
