"""qemu-img. Formats are always given: what qemu-img guesses, a guest may have written."""

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
from pathlib import Path
from typing import Any

from vmctl.errors import ImageError

_QUICK_TIMEOUT_S = 60
_COPY_TIMEOUT_S = 3600
_STDERR_TAIL = 300
_MOST_SAID = 1 << 20
_UNLIMITED = 1 << 62
_FULL = "No space left on device"


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What qemu-img says of an image file. Sizes in bytes; "" where there is no backing file."""

    format: str
    virtual_size: int
    actual_size: int
    backing_file: str
    backing_format: str


def _run(words: Sequence[str], *, what: str, timeout_s: float) -> bytes:
    try:
        done = subprocess.run(
            ["qemu-img", *words], check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=timeout_s
        )
    except FileNotFoundError as error:
        raise ImageError(f"cannot {what}: qemu-img is missing", hint="apt-get install qemu-utils") from error
    except subprocess.TimeoutExpired as error:
        raise ImageError(f"cannot {what}: qemu-img did not end in {timeout_s:.0f} s") from error
    except subprocess.CalledProcessError as error:
        tail = error.stderr.decode(errors="replace").strip()[-_STDERR_TAIL:]
        raise ImageError(f"cannot {what}: {tail or f'qemu-img exit status {error.returncode}'}") from error
    return done.stdout


def create(path: Path, format: str, size: int, *, backing: Path | None = None, backing_format: str = "") -> None:
    """Make an empty image of ``size`` bytes, or an overlay on ``backing``, whose format must then be given."""
    if backing is not None and not backing_format:
        raise ImageError(f"cannot create image {path}: the format of {backing} is not given")
    words = ["create", "-q", "-f", format]
    if backing is not None:
        words += ["-b", str(backing), "-F", backing_format]
    _run([*words, str(path), str(size)], what=f"create image {path}", timeout_s=_QUICK_TIMEOUT_S)


def convert(source: Path, source_format: str, target: Path, target_format: str, *, compress: bool = False) -> None:
    """Copy an image into another format. Equal sources give equal targets: clusters are written in order.

    Not for files of unknown origin: a backing file named inside would be read too.
    """
    words = ["convert", "-q", "-f", source_format, "-O", target_format]
    if compress:
        words.append("-c")
    _run([*words, str(source), str(target)], what=f"convert image {source}", timeout_s=_COPY_TIMEOUT_S)


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
    """What a qemu-img that reads a file of unknown origin may use: memory and file size in bytes, CPU and wall time."""

    memory: int = 2 << 30
    cpu_s: int = 3600
    file_size: int = _UNLIMITED
    wall_s: float = 3600.0

    def words(self) -> list[str]:
        """The command in front of qemu-img. It also dies with us, which a plain child would not."""
        return [
            *("setpriv", "--pdeathsig", "KILL", "prlimit", "--core=0", f"--as={self.memory}", f"--cpu={self.cpu_s}"),
            f"--fsize={self.file_size}",
        ]


LOOKING = Limits(memory=1 << 30, cpu_s=30, file_size=0, wall_s=60.0)
_PROGRESS = re.compile(rb"\((\d+)\.(\d+)/100%\)")


def inspect(source: Source, *, what: str, limits: Limits = LOOKING) -> ImageInfo:
    """What qemu-img says of a disk, under limits."""
    shown = _limited(["info", "--output=json", source.options()], source, limits, what)
    return _info(json.loads(shown))


def copy(
    source: Source,
    target: Path,
    target_format: str,
    *,
    what: str,
    options: str = "",
    compress: bool = False,
    limits: Limits | None = None,
    moved: Callable[[float], None] = lambda _share: None,
) -> None:
    """Copy a disk into a new file, under limits; ``moved`` hears the share that is done."""
    words = ["convert", "-p", "-O", target_format]
    if options:
        words += ["-o", options]
    if compress:
        words += ["-c", "-W"]  # out of order: clusters are compressed side by side
    _limited([*words, source.options(), str(target)], source, limits or Limits(), what, moved)


def _limited(
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
        raise ImageError(f"cannot {what}: {_reason(code, limits, errors)}")
    return output


def _listen(
    process: subprocess.Popen[bytes], limits: Limits, what: str, moved: Callable[[float], None]
) -> tuple[bytes, bytes]:
    """All a process says, until it has closed both its ends. Raises ImageError when the time is over."""
    deadline = time.monotonic() + limits.wall_s
    said = {process.stdout: b"", process.stderr: b""}
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
                    said[key.fileobj] = (said[key.fileobj] + data)[-_MOST_SAID:]  # type: ignore[index]
    return said[process.stdout], said[process.stderr]


def _reason(code: int, limits: Limits, errors: bytes) -> str:
    tail = errors.decode(errors="replace").strip()[-_STDERR_TAIL:]
    # A write cut off in its middle, by the limit or the disk's end, goes on unaligned: an "Invalid argument".
    told = (errno.EFBIG, errno.EINVAL, errno.ENOSPC)
    writing = "error while" in tail and "error while reading" not in tail
    if code == -signal.SIGXFSZ or (writing and any(os.strerror(number) in tail for number in told)):
        limited = limits.file_size < _UNLIMITED
        return f"the result takes more than the {limits.file_size >> 20} MiB that are free" if limited else _FULL
    if code in {-signal.SIGXCPU, -signal.SIGKILL}:
        return f"qemu-img used more than {limits.cpu_s} s of CPU time, or was killed"
    return tail or f"qemu-img exit status {code}"


def info(path: Path, format: str) -> ImageInfo:
    """Sizes and backing file of an image that is known to be of ``format``."""
    shown = _run(
        ["info", "-f", format, "--output=json", str(path)], what=f"inspect image {path}", timeout_s=_QUICK_TIMEOUT_S
    )
    return _info(json.loads(shown))


def _info(values: dict[str, Any]) -> ImageInfo:
    return ImageInfo(
        format=values["format"],
        virtual_size=values["virtual-size"],
        actual_size=values["actual-size"],
        backing_file=values.get("backing-filename", ""),
        backing_format=values.get("backing-filename-format", ""),
    )
