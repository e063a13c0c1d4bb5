"""Putting files on the disk for good: a few values at once, or what is large while something else is done with it."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from vmctl.wait import Worker

_AGAIN_S = 0.1
_BEGIN = 2  # SYNC_FILE_RANGE_WRITE


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

    thread = Worker(guarded, "write out")
    thread.start()
    try:
        yield
    finally:
        over.set()
    thread.join()
    if failures:
        raise failures[0]


def sync(file: IO[str]) -> None:
    """Put what was written to a file on the disk for good."""
    file.flush()
    os.fsync(file.fileno())


def write(path: Path, values: Mapping[str, object]) -> None:
    """Put values into a file, whole or not at all, on the disk for good."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    making = path.with_suffix(".making")
    with making.open("w") as file:
        json.dump(values, file)
        sync(file)
    making.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk for good."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
    """Begin to write a file out while the block makes it, so that little is left for ``written_out`` at the end.

    No fdatasync: each has the file system commit its journal, and waits for what others have in there.
    """
    import ctypes  # late: only copies of disks need it, and os has no such call

    write_range = ctypes.CDLL(None, use_errno=True).sync_file_range
    write_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)

    def write_out(over: threading.Event) -> None:
        handle = -1
        try:
            while not over.wait(_AGAIN_S):
                if handle < 0:
                    try:
                        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                    except FileNotFoundError:
                        continue  # not begun yet
                if write_range(handle, 0, 0, _BEGIN):
                    return  # not on every file system; whether all is well is for written_out to tell
        finally:
            if handle >= 0:
                os.close(handle)

    with _beside(write_out):
        yield
