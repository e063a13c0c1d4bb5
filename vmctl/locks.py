"""Locks between vmctl processes of one user. The kernel drops them with the process, however it dies."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from vmctl.errors import Conflict, VmctlError, WaitTimeout, reason
from vmctl.wait import wait_until


@contextmanager
def held(folder: Path, what: str, *, timeout_s: float = 0.0) -> Iterator[None]:
    """Hold the lock called ``what``. Raises Conflict when another process still has it after ``timeout_s``."""
    with _opened(folder, what) as handle:
        _take(handle, fcntl.LOCK_EX, what, timeout_s)
        yield


@contextmanager
def shared(folder: Path, what: str, *, timeout_s: float) -> Iterator[Callable[[], bool]]:
    """Hold the lock called ``what`` beside others who share it.

    The function that the block gets tells whether it is the last of them; then the lock is the block's alone, to the
    end of it. It is asked once, and when what was shared is not needed any more. Raises Conflict as ``held`` does.
    """
    with _opened(folder, what) as handle:
        _take(handle, fcntl.LOCK_SH, what, timeout_s)
        yield partial(_taken, handle, fcntl.LOCK_EX)


@contextmanager
def _opened(folder: Path, what: str) -> Iterator[int]:
    import hashlib  # late: it loads all of OpenSSL, and a command that only reads takes no lock

    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = folder / (hashlib.sha256(what.encode()).hexdigest()[:24] + ".lock")
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise VmctlError(
            f"cannot lock {what}: {reason(error, path=True)}", hint="is XDG_RUNTIME_DIR yours and writable?"
        ) from error
    try:
        yield handle
    finally:
        os.close(handle)


def _take(handle: int, kind: int, what: str, timeout_s: float) -> None:
    try:
        wait_until(lambda: _taken(handle, kind), what=f"lock on {what}", timeout_s=timeout_s, interval_s=0.05)
    except WaitTimeout:
        raise Conflict(f"cannot work on {what}: another vmctl is at it", hint="wait for it to end") from None


def _taken(handle: int, kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
