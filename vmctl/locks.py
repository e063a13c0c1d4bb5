"""Locks between vmctl processes of one user. The kernel drops them with the process, however it dies."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vmctl.errors import Conflict, VmctlError, WaitTimeout, reason
from vmctl.wait import wait_until


@contextmanager
def held(folder: Path, what: str, *, timeout_s: float = 0.0) -> Iterator[None]:
    """Hold the lock called ``what``. Raises Conflict when another process still has it after ``timeout_s``."""
    import hashlib  # late: it loads all of OpenSSL, and a command that only reads takes no lock

    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = folder / (hashlib.sha256(what.encode()).hexdigest()[:24] + ".lock")
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise VmctlError(
            f"cannot lock {what}: {reason(error, path=True)}", hint="is XDG_RUNTIME_DIR yours and writable?"
        ) from error

    def take() -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    try:
        try:
            wait_until(take, what=f"lock on {what}", timeout_s=timeout_s, interval_s=0.05)
        except WaitTimeout:
            raise Conflict(f"cannot work on {what}: another vmctl is at it", hint="wait for it to end") from None
        yield
    finally:
        os.close(handle)
