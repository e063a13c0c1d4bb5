"""The files a disk is made of: its own and those below it, read by our own eyes before qemu-img follows any name.

A qcow2 from elsewhere may name any file of the host's as its backing file, and whoever reads the disk reads that file.
So each layer below the first must lie in the folder of a storage pool, where only who runs this host puts files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from vmctl import disk_header
from vmctl.disk_header import DiskHeader, Window
from vmctl.disk_header.window import Unreadable
from vmctl.errors import ImageError, NotFound, VmctlError, reason

_DEEPEST = 512
_FORMATS = {"qcow2", "raw"}


@dataclass(frozen=True, slots=True)
class Layer:
    """One file of a chain. Sizes in bytes; ``size`` is what it takes on its host."""

    path: str
    format: str
    virtual_size: int
    size: int


@dataclass(frozen=True, slots=True)
class Chain:
    """A disk's files from the top down."""

    layers: tuple[Layer, ...]

    @property
    def top(self) -> Layer:
        """The file that is written to."""
        return self.layers[0]

    @property
    def base(self) -> Layer | None:
        """What the top is based on."""
        return self.layers[1] if len(self.layers) > 1 else None


def inside(path: str, folders: Collection[str]) -> bool:
    """Whether a file lies in one of the folders, links followed."""
    real = os.path.realpath(path)
    return any(real.startswith(os.path.realpath(folder).rstrip("/") + "/") for folder in folders if folder)


def backing_path(name: str, of: str) -> str:
    """The file that a header of the file ``of`` names; "" when it is no plain file name."""
    name = name.removeprefix("file:")
    if name.startswith("json:"):
        try:
            tree = json.loads(name.removeprefix("json:"))
            while isinstance(tree.get("file"), dict):
                tree = tree["file"]
            name = tree["filename"] if tree.get("driver", "file") == "file" else ""
        except (ValueError, KeyError, AttributeError, RecursionError):
            return ""
    elif ":" in name.split("/")[0]:
        return ""
    return os.path.normpath(str(Path(of).parent / name)) if isinstance(name, str) and name else ""


def _header(path: str, form: str, doing: str) -> tuple[DiskHeader, int]:
    """What the header of a file says, and the bytes it takes. Raises ImageError for what must not be followed."""
    found, taken = _examined(path, form, doing)
    problems = [one for one in found.problems if not one.startswith("it has a backing file")]
    if problems:
        raise ImageError(f"cannot {doing}: {path}: {'; '.join(problems)}")
    return found, taken


def _examined(path: str, form: str, doing: str) -> tuple[DiskHeader, int]:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise NotFound(f"cannot {doing}: there is no file {path}") from error
    except OSError as error:
        raise VmctlError(
            f"cannot {doing}: {reason(error)}", hint="files of the system's VMs are root's: sudo vmctl …"
        ) from error
    try:
        found = disk_header.examine(Window(handle, os.lseek(handle, 0, os.SEEK_END)), form)
        taken = os.fstat(handle).st_blocks * 512
    except Unreadable as error:
        raise ImageError(f"cannot {doing}: {path}: {error}") from error
    finally:
        os.close(handle)
    return found, taken


def named(path: str, form: str, *, doing: str) -> tuple[str, str]:
    """What the header of a file names as its backing file, to the letter, and as that one's format.

    Also of one that was not closed. Raises ImageError, NotFound.
    """
    header, _ = _examined(path, form, doing)
    return header.backing, header.backing_format


def read(path: str, form: str, folders: Callable[[], Collection[str]], *, doing: str) -> Chain:
    """The chain of the disk at ``path``; ``folders`` are those of the pools. Raises ImageError, NotFound."""
    layers: list[Layer] = []
    known: Collection[str] | None = None
    while path:
        if path in {layer.path for layer in layers} or len(layers) >= _DEEPEST:
            raise ImageError(f"cannot {doing}: its backing chain does not end")
        if form not in _FORMATS:
            raise ImageError(f"cannot {doing}: the format of {path} is {form or 'not recorded'}, not qcow2 or raw")
        header, taken = _header(path, form, doing)
        layers.append(Layer(path, form, header.virtual_size, taken))
        backing = header.backing
        if not backing:
            break
        below, form = backing_path(backing, path), header.backing_format
        known = folders() if known is None else known
        if not below or not inside(below, known):
            remote = "://" in backing or backing.startswith("json:")
            raise ImageError(
                f"cannot {doing}: its backing file {backing} is in no storage pool, and would be read with it",
                hint="" if remote else "if it is yours, make its folder a pool: vmctl disk pool create",
            )
        path = below
    return Chain(tuple(layers))


def foreign_problem(path: str, folders: Callable[[], Collection[str]]) -> str:
    """Why an existing file must not be given to a VM as qcow2: "" when it may, and for what is no qcow2."""
    try:
        read(path, "qcow2", folders, doing=f"use {path}")
    except (ImageError, NotFound) as error:
        return error.message.removeprefix(f"cannot use {path}: ")
    return ""
