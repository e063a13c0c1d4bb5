"""Writing gzip with all processors, as one member that every reader takes.

As pigz does it: pieces are deflated side by side, each knowing the 32 KiB before it and ending on a whole byte
(Z_SYNC_FLUSH), so that together they are one deflate stream (RFC 1951, 1952). Equal input gives equal output.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import IO

_PIECE = 1 << 20
_WINDOW = 32 << 10
_RAW = -15
_HEADER = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"  # deflate; no name, no time, no system
_NOTHING_MORE = zlib.compressobj(1, zlib.DEFLATED, _RAW).flush()


def _deflated(data: bytes, before: bytes, level: int) -> bytes:
    packer = zlib.compressobj(level, zlib.DEFLATED, _RAW, zdict=before)
    return packer.compress(data) + packer.flush(zlib.Z_SYNC_FLUSH)


class GzipStream(io.RawIOBase):
    """A file to write to, as a context manager; what is written arrives in ``target`` as gzip, which stays open."""

    def __init__(self, target: IO[bytes], level: int, workers: int = 0) -> None:
        self._target, self._level = target, level
        self._workers = workers or len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(self._workers)
        self._waiting: deque[Future[bytes]] = deque()
        self._held, self._before = bytearray(), b""
        self._crc = self._size = 0
        target.write(_HEADER)

    def writable(self) -> bool:
        """It is nothing else."""
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]  # of bytes alone
        """Take all of it. Raises OSError when ``target`` does."""
        self._crc = zlib.crc32(data, self._crc)
        self._size += len(data)
        self._held += data
        while len(self._held) >= _PIECE:
            self._hand_on(bytes(self._held[:_PIECE]))
            del self._held[:_PIECE]
        return len(data)

    def _hand_on(self, piece: bytes) -> None:
        self._waiting.append(self._pool.submit(_deflated, piece, self._before, self._level))
        self._before = piece[-_WINDOW:]
        while len(self._waiting) > 2 * self._workers:  # memory stays bounded, and all processors busy
            self._target.write(self._waiting.popleft().result())

    def __enter__(self) -> GzipStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, _error: object, _trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._pool.shutdown(cancel_futures=True)
            super().close()

    def _finish(self) -> None:
        if self._held:
            self._hand_on(bytes(self._held))
        while self._waiting:
            self._target.write(self._waiting.popleft().result())
        self._target.write(_NOTHING_MORE + struct.pack("<II", self._crc, self._size & 0xFFFFFFFF))
