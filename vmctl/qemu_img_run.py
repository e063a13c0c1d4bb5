"""How qemu-img is run: on what, within which limits, and what its failures are told as."""

from __future__ import annotations

import errno
import json
import os
import re
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vmctl.errors import ImageError, NoRoom

_STDERR_TAIL = 300
_MOST_SAID = 16 << 20
_UNLIMITED = 1 << 62
_FULL = "No space left on device"
_FREE = "that are free"
_PROGRESS = re.compile(rb"\((\d+)\.(\d+)/100%\)")


def said_last(errors: bytes) -> str:
    """The end of what QEMU's programs say on stderr, on one line: they break it, and indent the rest by tabs."""
    lines = (line.strip() for line in errors.decode(errors="replace").splitlines())
    return "; ".join(filter(None, lines))[-_STDERR_TAIL:]


def run(words: Sequence[str], *, what: str, timeout_s: float) -> bytes:
    """Run qemu-img on what is known to be good, and return its output. Raises ImageError, with what it said."""
    try:
        done = subprocess.run(
            ["qemu-img", *words], check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=timeout_s
        )
    except FileNotFoundError as error:
        raise ImageError(f"cannot {what}: qemu-img is missing", hint="apt-get install qemu-utils") from error
    except subprocess.TimeoutExpired as error:
        raise ImageError(f"cannot {what}: qemu-img did not end in {timeout_s:.0f} s") from error
    except subprocess.CalledProcessError as error:
        tail = said_last(error.stderr)
        raise ImageError(f"cannot {what}: {tail or f'qemu-img exit status {error.returncode}'}") from error
    return done.stdout


@dataclass(frozen=True, slots=True)
class Source:
    """A disk to read, alone: ``size`` bytes (0: all) from ``start`` of the file open as ``handle``, no backing file.

    It is read by its descriptor, so that nobody can put another file in its place once its header has been read.
    """

    handle: int
    format: str
    start: int = 0
    size: int = 0

    def options(self) -> str:
        """qemu-img's name for it, which leaves nothing to guess."""
        file: dict[str, Any] = {"driver": "file", "filename": f"/proc/self/fd/{self.handle}"}
        if self.size:
            file = {"driver": "raw", "offset": self.start, "size": self.size, "file": file}
        tree: dict[str, Any] = {"driver": self.format, "file": file}
        if self.format in {"qcow2", "vmdk"}:
            tree["backing"] = None
        return "json:" + json.dumps(tree)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a qemu-img that reads a file of unknown origin may use: memory and file size in bytes, CPU and wall time.

    ``allowed`` says which MiB those of ``file_size`` are.
    """

    memory: int = 2 << 30
    cpu_s: int = 3600
    file_size: int = _UNLIMITED
    wall_s: float = 3600.0
    allowed: str = _FREE

    def words(self) -> list[str]:
        """The command in front of qemu-img. It also dies with us, which a plain child would not."""
        return [
            *("setpriv", "--pdeathsig", "KILL", "prlimit", "--core=0", f"--as={self.memory}", f"--cpu={self.cpu_s}"),
            f"--fsize={self.file_size}",
        ]


def too_large(what: str, limits: Limits) -> ImageError:
    """The error of a result that the limits do not allow."""
    return _told(what, f"the result takes more than the {limits.file_size >> 20} MiB {limits.allowed}")


def _told(what: str, reason: str) -> ImageError:
    full = reason == _FULL or reason.endswith(_FREE)
    return (NoRoom if full else ImageError)(f"cannot {what}: {reason}", hint="make room" if full else "")


def run_limited(
    words: Sequence[str],
    source: Source,
    limits: Limits,
    what: str,
    moved: Callable[[float], None] = lambda _share: None,
) -> bytes:
    """Run qemu-img under limits and return its output but for progress, which ``moved`` hears."""
    try:
        process = subprocess.Popen(
            [*limits.words(), "qemu-img", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(source.handle,),
            # One arena: each thread's own would count 64 MiB against the limit.
            env=os.environ | {"MALLOC_ARENA_MAX": "1", "LC_ALL": "C"},
        )
    except FileNotFoundError as error:
        raise ImageError(f"cannot {what}: {error.filename} is missing", hint="apt-get install util-linux") from error
    with process:
        try:
            output, errors = _listen(process, limits, what, moved)
            code = process.wait()
        except BaseException:
            process.kill()
            raise
    if code:
        raise _failed(what, code, limits, errors)
    return output


def _listen(
    process: subprocess.Popen[bytes], limits: Limits, what: str, moved: Callable[[float], None]
) -> tuple[bytes, bytes]:
    """All a process says, until it has closed both its ends. Raises ImageError when the time is over."""
    deadline = time.monotonic() + limits.wall_s
    said = {process.stdout: bytearray(), process.stderr: bytearray()}
    with selectors.DefaultSelector() as waiting:
        for pipe in said:
            assert pipe is not None
            waiting.register(pipe, selectors.EVENT_READ)
        while waiting.get_map():
            if not (ready := waiting.select(max(0.0, deadline - time.monotonic()))):
                raise ImageError(f"cannot {what}: qemu-img did not end in {limits.wall_s:.0f} s")
            for key, _ in ready:
                data = os.read(key.fd, 65536)
                if not data:
                    waiting.unregister(key.fileobj)
                elif told := _PROGRESS.findall(data):
                    moved((int(told[-1][0]) + int(told[-1][1]) / 100) / 100)
                else:
                    kept = said[key.fileobj]  # type: ignore[index]
                    kept += data
                    del kept[:-_MOST_SAID]
    return bytes(said[process.stdout]), bytes(said[process.stderr])


def _failed(what: str, code: int, limits: Limits, errors: bytes) -> ImageError:
    tail = said_last(errors)
    # A write cut off in its middle, by the limit or the disk's end, goes on unaligned: an "Invalid argument".
    told = (errno.EFBIG, errno.EINVAL, errno.ENOSPC)
    writing = "error while" in tail and "error while reading" not in tail
    if code == -signal.SIGXFSZ or (writing and any(os.strerror(number) in tail for number in told)):
        return too_large(what, limits) if limits.file_size < _UNLIMITED else _told(what, _FULL)
    if code in {-signal.SIGXCPU, -signal.SIGKILL}:
        return _told(what, f"qemu-img used more than {limits.cpu_s} s of CPU time, or was killed")
    return _told(what, tail or f"qemu-img exit status {code}")
