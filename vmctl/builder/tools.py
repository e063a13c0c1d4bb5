"""Runs the host programs a build needs, and says in one place which Debian package each comes from."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from vmctl.errors import ImageError

PACKAGE_OF = {
    "apt-cache": "apt",
    "apt-get": "apt",
    "debugfs": "e2fsprogs",
    "dpkg-deb": "dpkg",
    "e2fsck": "e2fsprogs",
    "gcc": "gcc",
    "lz4": "lz4",
    "mcopy": "mtools",
    "mformat": "mtools",
    "mke2fs": "e2fsprogs",
    "mmd": "mtools",
    "mmdebstrap": "mmdebstrap",
    "qemu-img": "qemu-utils",
    "sfdisk": "fdisk",
}
# An ordinary user's PATH leaves these out, and mke2fs and debugfs are there.
_SYSTEM_FOLDERS = ("/usr/local/sbin", "/usr/sbin", "/sbin")
_STDERR_TAIL = 300
_GRACE_S = 20
# A program that takes seconds has hung after so long, also on an emulated machine, where all takes twenty times that.
HUNG_S = 900


class ToolFailed(ImageError):
    """A host program failed; ``said`` is all it wrote to standard error."""

    def __init__(self, message: str, said: str) -> None:
        super().__init__(message)
        self.said = said


def search_path(env: Mapping[str, str] = os.environ) -> str:
    """PATH with the system folders behind it."""
    return os.pathsep.join([env.get("PATH", "/usr/bin:/bin"), *_SYSTEM_FOLDERS])


def require(names: Sequence[str], what: str) -> None:
    """Raise one ImageError that names every missing program and the packages to install."""
    missing = [name for name in names if shutil.which(name, path=search_path()) is None]
    if missing:
        packages = sorted({PACKAGE_OF[name] for name in missing})
        raise ImageError(f"cannot {what}: {', '.join(missing)} missing", hint=f"apt-get install {' '.join(packages)}")


def _environment(env: Mapping[str, str] | None) -> dict[str, str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("LC_") and key != "LANGUAGE"}
    return clean | {"LC_ALL": "C", "PATH": search_path()} | dict(env or {})


def run(
    command: Sequence[str | Path],
    *,
    what: str,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
    stdin: bytes = b"",
    cwd: Path | None = None,
) -> bytes:
    """Run ``command`` and return its standard output. Every failure becomes ``cannot WHAT: REASON``.

    The locale is C and the umask 022 whatever the caller's are: both leak into what tools write.
    """
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words,
            input=stdin,
            capture_output=True,
            check=True,
            timeout=timeout_s,
            env=_environment(env),
            cwd=cwd,
            umask=0o022,
        )
    except FileNotFoundError as error:
        hint = f"apt-get install {PACKAGE_OF[words[0]]}" if words[0] in PACKAGE_OF else ""
        raise ImageError(f"cannot {what}: {words[0]} is missing", hint=hint) from error
    except subprocess.TimeoutExpired as error:
        raise ImageError(f"cannot {what}: {words[0]} did not end in {timeout_s:.0f} s") from error
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip()
        tail = said[-_STDERR_TAIL:] or f"exit status {error.returncode}"
        raise ToolFailed(f"cannot {what}: {words[0]}: {tail}", said) from error
    return done.stdout


def running(
    command: Sequence[str | Path], *, what: str, timeout_s: float, env: Mapping[str, str] | None = None, hint: str = ""
) -> Iterator[str]:
    """Run ``command`` and yield what it says, line by line. Failures are told as by ``run``.

    Leaving the loop early, by an interrupt too, ends the command: by SIGINT, which it may clean up after.
    """
    words = [str(word) for word in command]
    tail: deque[str] = deque(maxlen=8)
    process = subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=_environment(env),
        umask=0o022,
        text=True,
        errors="replace",
        start_new_session=True,  # so that its children can be ended with it
    )
    clock = threading.Timer(timeout_s, lambda: _end(process))
    clock.start()
    try:
        for line in process.stdout or ():
            tail.append(line.rstrip())
            yield line
        if process.wait() != 0:
            reason = " / ".join(tail)[-_STDERR_TAIL:] or f"exit status {process.returncode}"
            raise ImageError(f"cannot {what}: {words[0]}: {reason}", hint=hint)
    finally:
        clock.cancel()
        _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is not None:
        return
    for number in (signal.SIGINT, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
            return
