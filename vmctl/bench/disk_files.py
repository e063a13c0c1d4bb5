"""The files that disks of a measurement are on: full of data, for what a hole is read from is no disk."""

from __future__ import annotations

import os
from pathlib import Path

from vmctl import qemu_img
from vmctl.bench.setups import Backend, Setup

_BLOCK = 1 << 20


class Files:
    """Files in a folder, made when they are first asked for. ``size`` in bytes, of whole MiB. Raises OSError."""

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
            with path.open("wb") as file:
                for _ in range(self.size // _BLOCK):
                    file.write(os.urandom(_BLOCK))
                os.fsync(file.fileno())
        return path

    def _qcow2(self, name: str) -> Path:
        path = self._folder / f"{name}.qcow2"
        if not path.exists():
            qemu_img.convert(self._raw("data"), "raw", path, "qcow2")
        return path

    def _chain(self, depth: int) -> list[Path]:
        """That many files, each on the next; only the last has data, so that reading goes all the way down."""
        below = [self._qcow2("level0")]
        for level in range(1, depth):
            path = self._folder / f"level{level}.qcow2"
            if not path.exists():
                qemu_img.create(path, "qcow2", None, backing=below[0], backing_format="qcow2")
            below.insert(0, path)
        return below
