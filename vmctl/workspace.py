"""Folders to make something in, which do not outlive the process by much: the next one clears a killed one's away."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MEASURING = ".measuring-"  # where disks are measured, maybe in a pool


@contextmanager
def workspace(parent: Path, prefix: str) -> Iterator[Path]:
    """An empty folder of this process alone in ``parent``, named after ``prefix``; gone afterwards. Raises OSError.

    It is locked while its process lives, and the kernel drops the lock with the process, however that ends: what
    stands there under the prefix without a lock was left by one that was killed, and is removed first.
    """
    clear_leftovers(parent, prefix)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if not _locked(handle) or not _same(folder, handle):
                continue  # another process, clearing up, was faster than our lock
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return
        finally:
            os.close(handle)


def clear_leftovers(parent: Path, prefix: str) -> None:
    """Remove the folders under ``prefix`` whose processes are gone; what cannot be removed stays."""
    for folder in parent.glob(f"{prefix}*"):
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue  # no folder, or not ours
        try:
            if os.fstat(handle).st_uid == os.geteuid() and _locked(handle):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(handle)


def is_leftover(folder: Path) -> bool:
    """Whether the process that made the folder is gone."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return _locked(handle)
    finally:
        os.close(handle)


def _locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _same(folder: Path, handle: int) -> bool:
    try:
        return os.path.samestat(folder.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False
