"""Makes an empty qcow2 on top of another disk: a header, and the tables of nothing.

Source: QEMU's docs/interop/qcow2.txt.

qemu-img makes the same, in a process of its own that takes longer than all of this.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

from vmctl import disk_header
from vmctl.disk_header.window import Unreadable, Window
from vmctl.errors import ImageError, reason

_BITS = 16
_CLUSTER = 1 << _BITS
_PER_L1 = (_CLUSTER // 8) * _CLUSTER  # bytes of the disk that one entry of its first table stands for
_SECTOR = 512
_HEADER = 104
_COUNTS_OF_16_BITS = 4
_BACKING_FORMAT = 0xE2792ACA
_LONGEST_NAME = 1023


def make(path: Path, base: Path, base_format: str) -> None:
    """A new file ``path`` that reads as ``base`` does, on the disk for good. Raises ImageError; then there is none."""
    what = f"cannot create image {path}"
    name = os.fsencode(base)
    if len(name) > _LONGEST_NAME:
        raise ImageError(f"{what}: the path of {base} is longer than qcow2 can say")
    try:
        parts = _parts(_size(base, base_format), name, base_format.encode())
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except (OSError, Unreadable) as error:
        raise ImageError(f"{what}: {reason(error, path=True)}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            for number, part in enumerate(parts):
                os.pwrite(handle, part, number * _CLUSTER)
            file.truncate(-(-((len(parts) - 1) * _CLUSTER + len(parts[-1])) // _CLUSTER) * _CLUSTER)
            os.fsync(handle)
    except OSError as error:
        path.unlink()
        raise ImageError(f"{what}: {error.strerror}") from error


def _size(path: Path, form: str) -> int:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        window = Window(handle, os.lseek(handle, 0, os.SEEK_END))
        size = window.size if form == "raw" else disk_header.examine(window, form).virtual_size
    finally:
        os.close(handle)
    return -(-size // _SECTOR) * _SECTOR


def _parts(size: int, base: bytes, form: bytes) -> list[bytes]:
    """The whole file, each from a cluster on: header, table of refcounts, refcounts, first table of the disk."""
    entries = max(1, -(-size // _PER_L1))
    clusters = 3 + -(-entries * 8 // _CLUSTER)
    extension = struct.pack(">II", _BACKING_FORMAT, len(form)) + form.ljust(-(-len(form) // 8) * 8, b"\0") + bytes(8)
    at = _HEADER + len(extension)
    head = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", 3, at, len(base), _BITS, size, 0, entries, 3 * _CLUSTER,
                       _CLUSTER, 1, 0, 0)  # fmt: skip
    head += struct.pack(">QQQII", 0, 0, 0, _COUNTS_OF_16_BITS, _HEADER) + extension + base
    counts = struct.pack(">H", 1) * clusters
    return [head, struct.pack(">Q", 2 * _CLUSTER), counts, bytes(entries * 8)]
