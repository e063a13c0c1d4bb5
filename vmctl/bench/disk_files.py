"""The files that disks of a measurement are on: full of data, for what a hole is read from is no disk."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from vmctl import qemu_img
from vmctl.bench.setups import Backend, Setup
from vmctl.errors import VmctlError

_BLOCK = 1 << 20


class Files:
    """Files in a folder, made when they are first asked for. ``size`` in bytes, of whole MiB. Raises OSError,
    VmctlError without room.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self._folder, self.size = folder, size

    def of(self, slot: str, setup: Setup) -> tuple[Path, ...]:
        """The files of a row, from the one that is written to down to the last; the overlay of a chain is a new one.

        Rows that are never at work together may have the same ``slot``, and then share what can be shared.
        """
        match setup.backend:
            case Backend.NULL:
                return ()
            case Backend.RAW:
                return (self._raw(slot),)
            case Backend.QCOW2:
                return (self._qcow2(slot),)
            case _:
                top, below = self._folder / f"{slot}-top.qcow2", self._chain(setup.backend.depth)
                top.unlink(missing_ok=True)
                qemu_img.create(top, "qcow2", None, backing=below[0], backing_format="qcow2")
                return (top, *below)

    def _raw(self, name: str) -> Path:
        path = self._folder / f"{name}.raw"
        if not path.exists():
            self._require_room()
            with path.open("wb") as file:
                for _ in range(self.size // _BLOCK):
                    file.write(os.urandom(_BLOCK))
                os.fsync(file.fileno())
        return path

    def _qcow2(self, name: str) -> Path:
        path = self._folder / f"{name}.qcow2"
        if not path.exists():
            data = self._raw("data")
            self._require_room()
            qemu_img.convert(data, "raw", path, "qcow2")
        return path

    def _require_room(self) -> None:
        """Raise VmctlError where there is none for one disk more: VMs may have theirs there, and would stop."""
        total, _, free = shutil.disk_usage(self._folder)
        if total and free < self.size:  # some, as ramfs, do not say
            need = f"a disk of {self.size >> 20} MiB has no room, {free >> 20} MiB are free"
            raise VmctlError(f"cannot measure in {self._folder.parent}: {need}", hint="--size, or --folder elsewhere")

    def _chain(self, depth: int) -> list[Path]:
        """That many files, each on the next; only the last has data, so that reading goes all the way down."""
        below = [self._qcow2("level0")]
        for level in range(1, depth):
            path = self._folder / f"level{level}.qcow2"
            if not path.exists():
                qemu_img.create(path, "qcow2", None, backing=below[0], backing_format="qcow2")
            below.insert(0, path)
        return below
