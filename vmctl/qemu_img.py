"""qemu-img. Formats are always given: what qemu-img guesses, a guest may have written."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vmctl.errors import ImageError

_QUICK_TIMEOUT_S = 60
_COPY_TIMEOUT_S = 3600
_STDERR_TAIL = 300


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


def info(path: Path, format: str) -> ImageInfo:
    """Sizes and backing file of an image that is known to be of ``format``."""
    shown = _run(
        ["info", "-f", format, "--output=json", str(path)], what=f"inspect image {path}", timeout_s=_QUICK_TIMEOUT_S
    )
    values = json.loads(shown)
    return ImageInfo(
        format=values["format"],
        virtual_size=values["virtual-size"],
        actual_size=values["actual-size"],
        backing_file=values.get("backing-filename", ""),
        backing_format=values.get("backing-filename-format", ""),
    )
