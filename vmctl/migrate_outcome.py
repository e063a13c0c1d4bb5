"""Where a VM is after a migration, from what both hosts say of it, and what is to be done about it. Pure.

An error of the migration's does not tell: libvirt can report one after the VM has begun to run on the target, and a
daemon that died in the middle says nothing at all.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from vmctl.hypervisor.states import State


class Seen(NamedTuple):
    """The VM on one host: ``state`` None where there is none of its UUID; not ``known``: nobody could be asked.

    ``ended``: it is off, and had run there; False also where that is not known any more.
    """

    known: bool
    state: State | None = None
    why: str = ""
    ended: bool = False

    @property
    def there(self) -> bool:
        """Whether a QEMU process has it."""
        return self.state in {State.RUNNING, State.PAUSED, State.STOPPING, State.SUSPENDED}

    @property
    def runs(self) -> bool:
        """Whether its processors run."""
        return self.state in {State.RUNNING, State.STOPPING, State.SUSPENDED}

    @property
    def told(self) -> str:
        """For people."""
        if not self.known:
            return "not known (no answer)"
        return "not there" if self.state is None else f"{self.state}{f' ({self.why})' if self.why else ''}"


class Where(StrEnum):
    """The verdict."""

    MOVED = "moved"
    STAYED = "stayed"
    HALF = "paused on the source, nothing on the target"
    POSTCOPY = "in post-copy, which was cut off"
    TWICE = "on both hosts"
    LOST = "on neither host as a whole"
    UNKNOWN = "not known"


CUT_OFF = "post-copy failed"
_POSTCOPY = {"post-copy", CUT_OFF}


def judge(source: Seen, target: Seen) -> Where:
    """Where it is. Never says STAYED or HALF, after which it may be resumed, while the target cannot be asked."""
    if not target.known:
        return Where.STAYED if source.known and source.runs else Where.UNKNOWN
    if source.known and source.why in _POSTCOPY and source.there and target.there:
        return Where.POSTCOPY
    if target.why in _POSTCOPY and target.there:
        # What it lacks was in a QEMU that is no more.
        return Where.LOST if target.why == CUT_OFF and source.known and not source.there else Where.POSTCOPY
    if target.runs:
        return Where.TWICE if source.known and source.runs else Where.MOVED
    if not source.known:
        return Where.UNKNOWN
    if source.runs:
        return Where.STAYED
    if source.there:
        if source.why in _POSTCOPY:
            return Where.LOST
        if target.there or source.why != "migration":
            return Where.UNKNOWN if target.there else Where.STAYED
        # It went on there, and has ended since: its memory here is older than its disks.
        return Where.LOST if target.ended or target.state is State.SAVED else Where.HALF
    return Where.MOVED if target.there else Where.LOST
