"""Putting files on the disk for good while something else is done with them."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_out(paths: Iterable[Path]) -> Iterator[None]:
    """Write files out beside the block, which may read them meanwhile: at its end they are on the disk.

    Raises OSError: what the disk says only now, it says to the one who waits for it.
    """
    failures: list[OSError] = []

    def write_out() -> None:
        for path in paths:
            try:
                handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.fsync(handle)
                finally:
                    os.close(handle)
            except OSError as error:
                failures.append(error)

    thread = threading.Thread(target=write_out, daemon=True)
    thread.start()
    yield
    thread.join()
    if failures:
        raise failures[0]


@contextmanager
def flushing(handle: int, *, every_s: float = 0.2) -> Iterator[None]:
    """Have the disk write a file all the while the block writes it, so that little is left to wait for at its end."""
    over = threading.Event()

    def flush() -> None:
        while not over.wait(every_s):
            try:
                os.fdatasync(handle)
            except OSError:
                return  # who syncs at the end is told

    thread = threading.Thread(target=flush, name="flush", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
