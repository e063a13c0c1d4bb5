"""Putting files on the disk for good while something else is done with them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_AGAIN_S = 0.1


@contextmanager
def _beside(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """Do ``work`` in a thread beside the block, whose end it is told; raises the OSError it met."""
    failures: list[OSError] = []
    over = threading.Event()

    def guarded() -> None:
        try:
            work(over)
        except OSError as error:
            failures.append(error)

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
    thread.join()
    if failures:
        raise failures[0]


@contextmanager
def written_out(paths: Iterable[Path]) -> Iterator[None]:
    """Write files out beside the block, which may read them meanwhile: at its end they are on the disk.

    Raises OSError: what the disk says only now, it says to the one who waits for it.
    """

    def write_out(_over: threading.Event) -> None:
        for path in paths:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    with _beside(write_out):
        yield


@contextmanager
def written_as_it_grows(path: Path) -> Iterator[None]:
    """Write a file out while the block makes it, so that the disk is not idle meanwhile and little is left at the end.

    What is left then is for ``written_out``. Raises OSError.
    """

    def write_out(over: threading.Event) -> None:
        # By one descriptor: the kernel tells of an error once, and not to those who come later.
        handle = -1
        try:
            while not over.wait(_AGAIN_S):
                if handle < 0:
                    try:
                        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                    except FileNotFoundError:
                        continue  # not begun yet
                os.fdatasync(handle)
        finally:
            if handle >= 0:
                os.close(handle)

    with _beside(write_out):
        yield
