"""qemu-img. Formats are always given: what qemu-img guesses, a guest may have written."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmctl.errors import ImageError
from vmctl.qemu_img_run import Limits, Source, run, run_limited, said_last

_QUICK_TIMEOUT_S = 60
_COPY_TIMEOUT_S = 3600


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What qemu-img says of an image file. Sizes in bytes; "" where there is no backing file."""

    format: str
    virtual_size: int
    actual_size: int
    backing_file: str
    backing_format: str
    snapshots: int = 0


def create(path: Path, format: str, size: int | None, *, backing: Path | None = None, backing_format: str = "") -> None:
    """Make an empty image of ``size`` bytes, or an overlay on ``backing``, whose format must then be given.

    ``size`` None: that of ``backing``.
    """
    if backing is not None and not backing_format:
        raise ImageError(f"cannot create image {path}: the format of {backing} is not given")
    words = ["create", "-q", "-f", format]
    if backing is not None:
        words += ["-b", str(backing), "-F", backing_format]
    words += [str(path)] if size is None else [str(path), str(size)]
    run(words, what=f"create image {path}", timeout_s=_QUICK_TIMEOUT_S)


def convert(source: Path, source_format: str, target: Path, target_format: str, *, compress: bool = False) -> None:
    """Copy an image into another format. Equal sources give equal targets: clusters are written in order.

    Not for files of unknown origin: a backing file named inside would be read too.
    """
    words = ["convert", "-q", "-f", source_format, "-O", target_format]
    if compress:
        words.append("-c")
    run([*words, str(source), str(target)], what=f"convert image {source}", timeout_s=_COPY_TIMEOUT_S)


LOOKING = Limits(memory=1 << 30, cpu_s=30, file_size=0, wall_s=60.0)


def inspect(source: Source, *, what: str, limits: Limits = LOOKING) -> ImageInfo:
    """What qemu-img says of a disk, under limits."""
    shown = run_limited(["info", "--output=json", source.options()], source, limits, what)
    return _info(json.loads(shown))


def plain_extents(source: Source, *, what: str, limits: Limits = LOOKING) -> tuple[Extent, ...] | None:
    """Where all that a disk holds lies in its file as it is; None where some does not, or in absurdly many pieces."""
    if source.size:
        return None  # where in the file a part of it is, qemu-img says of some formats only
    try:
        shown = _extents(run_limited(["map", "--output=json", source.options()], source, limits, what))
    except (ImageError, ValueError, KeyError):
        return None  # a copy of it tells what is wrong
    if any(e.depth or (e.offset is None if e.data and not e.zero else not e.zero) for e in shown):
        return None
    return tuple(e for e in shown if not e.zero)


def copy(
    source: Source,
    target: Path,
    target_format: str,
    *,
    what: str,
    options: str = "",
    compress: bool = False,
    offload: bool = False,
    limits: Limits | None = None,
    moved: Callable[[float], None] = lambda _share: None,
) -> None:
    """Copy a disk into a new file, under limits; ``moved`` hears the share that is done.

    With ``offload`` the kernel copies where it can (on some file systems it only notes that two files share blocks),
    and nobody looks for zeros: for sources in which there are none that could be left out.
    """
    words = ["convert", "-p", "-O", target_format]
    if offload and not compress:
        words.append("-C")
    if options:
        words += ["-o", options]
    if compress:
        words += ["-c", "-W"]  # out of order: clusters are compressed side by side
    run_limited([*words, source.options(), str(target)], source, limits or Limits(), what, moved)


def info(path: Path, format: str, *, in_use: bool = False) -> ImageInfo:
    """Sizes and backing file of an image that is known to be of ``format``, ``in_use`` by a running VM or not."""
    words = ["info", *(["-U"] if in_use else []), "-f", format, "--output=json", str(path)]
    shown = run(words, what=f"inspect image {path}", timeout_s=_QUICK_TIMEOUT_S)
    return _info(json.loads(shown))


def _info(values: dict[str, Any]) -> ImageInfo:
    return ImageInfo(
        format=values["format"],
        virtual_size=values["virtual-size"],
        actual_size=values["actual-size"],
        backing_file=values.get("backing-filename", ""),
        backing_format=values.get("backing-filename-format", ""),
        snapshots=len(values.get("snapshots", ())),
    )


@dataclass(frozen=True, slots=True)
class Extent:
    """A piece of a disk as its guest sees it, and where in the chain its data is.

    ``depth`` counts layers from the top, 0 first. ``offset`` is the place in that layer's file; None where the data
    is not there as it is: zeros, nothing at all, or compressed.
    """

    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    offset: int | None


def extents(path: Path, format: str) -> tuple[Extent, ...]:
    """Where all blocks of a disk are. Follows its backing chain, which must be known to be good."""
    words = ["map", "-U", "-f", format, "--output=json", str(path)]
    return _extents(run(words, what=f"map disk {path}", timeout_s=_COPY_TIMEOUT_S))


def _extents(shown: bytes) -> tuple[Extent, ...]:
    return tuple(
        Extent(e["start"], e["length"], e["depth"], e.get("present", True), e["zero"], e["data"], e.get("offset"))
        for e in json.loads(shown)
    )


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What a check of a disk's metadata found: clusters that are wrong, and ones that are only lost space."""

    corruptions: int
    leaks: int
    repaired: int
    errors: int

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.corruptions or self.leaks or self.errors)


def check(path: Path, format: str, *, repair: str = "") -> CheckResult:
    """Check an image's metadata; ``repair`` is "leaks" or "all". Never one that is in use: that looks corrupt."""
    words = ["check", "-f", format, "--output=json", *(["-r", repair] if repair else []), str(path)]
    try:
        done = subprocess.run(
            ["qemu-img", *words], capture_output=True, stdin=subprocess.DEVNULL, timeout=_COPY_TIMEOUT_S, check=False
        )
        told = json.loads(done.stdout[done.stdout.index(b"{") :])
    except FileNotFoundError as error:
        raise ImageError(f"cannot check {path}: qemu-img is missing", hint="apt-get install qemu-utils") from error
    except subprocess.TimeoutExpired as error:
        raise ImageError(f"cannot check {path}: qemu-img did not end in {_COPY_TIMEOUT_S} s") from error
    except ValueError as error:
        tail = said_last(done.stderr)
        raise ImageError(f"cannot check {path}: {tail or f'qemu-img exit status {done.returncode}'}") from error
    fixed = int(told.get("corruptions-fixed", 0)) + int(told.get("leaks-fixed", 0))
    return CheckResult(
        int(told.get("corruptions", 0)), int(told.get("leaks", 0)), fixed, int(told.get("check-errors", 0))
    )


def copy_known(
    source: Path,
    source_format: str,
    target: Path,
    target_format: str,
    *,
    what: str,
    backing: Path | None = None,
    backing_format: str = "",
    compress: bool = False,
    moved: Callable[[float], None] = lambda _share: None,
) -> None:
    """Copy a disk whose whole chain is known to be good into a new file; with ``backing``, only what differs from it.

    The copy is synced. ``moved`` hears the share that is done.
    """
    words = ["convert", "-p", "-S", "4k", "-f", source_format, "-O", target_format]
    if backing is not None:
        words += ["-B", str(backing), "-F", backing_format]
    if compress:
        words += ["-c", "-W"]
    handle = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        limits = Limits(memory=8 << 30, cpu_s=86400, wall_s=86400.0)
        run_limited([*words, str(source), str(target)], Source(handle, source_format), limits, what, moved)
    finally:
        os.close(handle)
    made = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(made)
    finally:
        os.close(made)


def require_equal(one: Path, one_format: str, other: Path, other_format: str, *, what: str) -> None:
    """Read two disks, both with chains known to be good, and raise ImageError unless a guest would read the same."""
    words = ["compare", "-f", one_format, "-F", other_format, str(one), str(other)]
    run(words, what=f"{what}: the copy is not what was copied", timeout_s=_COPY_TIMEOUT_S)


def resize(path: Path, format: str, size: int, *, shrink: bool = False) -> None:
    """Give an image that nobody uses ``size`` bytes."""
    words = ["resize", "-q", "-f", format, *(["--shrink"] if shrink else []), str(path), str(size)]
    run(words, what=f"resize disk {path}", timeout_s=_QUICK_TIMEOUT_S)


def rebase(path: Path, format: str, backing: Path | None, backing_format: str, *, what: str) -> None:
    """Base an overlay on another file (None: on none), its content unchanged: what differs is copied into it first."""
    onto = ["-b", "" if backing is None else str(backing), *(["-F", backing_format] if backing else [])]
    run(["rebase", "-q", "-f", format, *onto, str(path)], what=what, timeout_s=_COPY_TIMEOUT_S)


def repoint(path: Path, format: str, backing: Path | str, backing_format: str, *, what: str) -> None:
    """Base an overlay on another file that reads the same as its base; nothing is copied or looked at.

    ``backing`` is named to the letter.
    """
    words = ["rebase", "-q", "-u", "-f", format, "-b", str(backing), "-F", backing_format, str(path)]
    run(words, what=what, timeout_s=_QUICK_TIMEOUT_S)


def commit(
    path: Path, format: str, base: Path, *, what: str, moved: Callable[[float], None] = lambda _share: None
) -> None:
    """Bring what an overlay holds into ``base``, the file it is based on; the overlay stays, and reads the same.

    Its chain must be known to be good.
    """
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        limits = Limits(memory=8 << 30, cpu_s=86400, wall_s=86400.0)
        words = ["commit", "-p", "-d", "-f", format, "-b", str(base), str(path)]
        run_limited(words, Source(handle, format), limits, what, moved)
    finally:
        os.close(handle)


def bitmaps(path: Path, format: str) -> dict[str, bool]:
    """The dirty bitmaps that an image that nobody uses carries, and whether each can be trusted."""
    if format != "qcow2":
        return {}
    shown = run(
        ["info", "-f", format, "--output=json", str(path)], what=f"inspect image {path}", timeout_s=_QUICK_TIMEOUT_S
    )
    data = json.loads(shown).get("format-specific", {}).get("data", {})
    return {one["name"]: "in-use" not in one["flags"] for one in data.get("bitmaps", ())}


def add_bitmap(path: Path, name: str) -> None:
    """Let a qcow2 that nobody uses mark from now on what is written to it."""
    words = ["bitmap", "--add", "-g", "65536", "-f", "qcow2", str(path), name]
    run(words, what=f"mark changes of {path}", timeout_s=_QUICK_TIMEOUT_S)


def remove_bitmap(path: Path, name: str) -> None:
    """Take a bitmap from a qcow2 that nobody uses."""
    words = ["bitmap", "--remove", "-f", "qcow2", str(path), name]
    run(words, what=f"drop a bitmap of {path}", timeout_s=_QUICK_TIMEOUT_S)


def merge_bitmap(path: Path, source: str, target: str) -> None:
    """Mark in bitmap ``target`` what ``source`` marks, and let it go on marking; of a qcow2 that nobody uses."""
    words = ["bitmap", "--merge", source, "--enable", "-f", "qcow2", str(path), target]
    run(words, what=f"merge bitmaps of {path}", timeout_s=_QUICK_TIMEOUT_S)
