"""A bounded look at a file: every read is counted, so that no header makes us read much or for long."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field
from typing import Any

from vmctl.errors import reason

SECTOR = 512
_MOST_BYTES = 2 << 20


class Unreadable(Exception):
    """The header cannot be read on; the text says why, and ``hint`` what may help."""

    def __init__(self, why: str, hint: str = "") -> None:
        super().__init__(why)
        self.hint = hint


@dataclass(slots=True)
class Window:
    """``size`` bytes of the open file ``handle`` from ``start`` on. Refused: reads beyond them, and too many."""

    handle: int
    size: int
    start: int = 0
    most: int = _MOST_BYTES
    _spent: int = field(default=0, init=False)

    def read(self, offset: int, count: int) -> bytes:
        """Exactly ``count`` bytes. Raises Unreadable."""
        if offset < 0 or offset + count > self.size:
            raise Unreadable("it is cut short")
        self._spent += count
        if self._spent > self.most:
            raise Unreadable("its header is absurdly long")
        try:
            data = os.pread(self.handle, count, self.start + offset)
        except OSError as error:
            raise Unreadable(f"it cannot be read: {reason(error)}") from error
        if len(data) != count:
            raise Unreadable("it is cut short")
        return data

    def up_to(self, offset: int, count: int) -> bytes:
        """At most ``count`` bytes, fewer at the end."""
        return self.read(offset, max(0, min(count, self.size - offset)))

    def unpack(self, form: str, offset: int) -> tuple[Any, ...]:
        """Numbers at an offset, as ``struct`` reads them."""
        return struct.unpack(form, self.read(offset, struct.calcsize(form)))


@dataclass(frozen=True, slots=True)
class DiskHeader:
    """What a disk image's header says. ``virtual_size`` in bytes; ``problems`` says why it is not to be used.

    ``backing`` is the name of the file it is based on, "" for none, and ``backing_format`` that file's format where it
    is noted; ``variant`` tells kinds of one format apart. ``snapshots``: it holds other states of the disk, too.
    """

    format: str
    virtual_size: int
    problems: tuple[str, ...] = ()
    variant: str = ""
    backing: str = ""
    backing_format: str = ""
    snapshots: bool = False
