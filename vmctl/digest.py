"""Digests of disks, of images and in backups: BLAKE3. The only place that imports blake3.

SHA-256 would take longer than the disk's whole copy does. One thread is through before the disk has written all, and
several wait for each other at every block where processors are busy. `b3sum FILE` prints the same digits. A bare
digest, as older stores have, is a SHA-256.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Protocol

_PREFIX = "blake3:"
_BLOCK = 1 << 20  # a processor's cache holds it


class Summing(Protocol):
    """A digest in the making."""

    def update(self, data: bytes | memoryview, /) -> object:
        """Take more."""

    def hexdigest(self) -> str:
        """The digits so far."""


def leaf(data: bytes | memoryview) -> bytes:
    """The 32 bytes of the digest of one piece of many. Other threads go on meanwhile."""
    found: bytes = _blake3()(data).digest()
    return found


@cache
def _blake3() -> Callable[..., Any]:
    from blake3 import blake3  # late: most commands hash nothing

    return blake3


class Digest:
    """A digest of the kind that ``like``, another one, is of; of the best kind without one."""

    def __init__(self, like: str = _PREFIX) -> None:
        self._prefix = _PREFIX if like.startswith(_PREFIX) else ""
        if self._prefix:
            self._summing: Summing = _blake3()()
        else:
            self._summing = hashlib.sha256()

    def update(self, data: bytes | memoryview) -> None:
        """Take more of the content."""
        self._summing.update(data)

    def __str__(self) -> str:
        """The digits, with their kind before them."""
        return f"{self._prefix}{self._summing.hexdigest()}"


def of_file(path: Path, like: str = _PREFIX, moved: Callable[[int], None] = lambda _n: None) -> str:
    """The digest of a file; ``moved`` hears how many bytes are done. Raises OSError.

    It is read, not mapped: of a bad sector the one is told, and the other killed.
    """
    found, done = Digest(like), 0
    buffer = bytearray(_BLOCK)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            found.update(memoryview(buffer)[:count])
            done += count
            moved(done)
    return str(found)
