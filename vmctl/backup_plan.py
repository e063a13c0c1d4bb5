"""What a backup takes of each disk, and which backups may go: decided from what is known, nothing done. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum

from vmctl.backup_manifest import Manifest
from vmctl.errors import SpecError, WrongState


class Wanted(StrEnum):
    """How much a backup shall take."""

    AUTO = "auto"
    FULL = "full"
    INCREMENTAL = "incremental"


@dataclass(frozen=True, slots=True)
class DiskNow:
    """A disk as it is. ``size`` is what the guest sees; ``marks``: whether its format keeps a bitmap of changes."""

    target: str
    serial: str
    source: str
    format: str
    size: int
    marks: bool


@dataclass(frozen=True, slots=True)
class DiskPlan:
    """How a disk is taken. ``parent`` and ``since``: the backup and checkpoint it counts from, "" for all of it.

    ``why``: why all of it, where there was something to count from.
    """

    disk: DiskNow
    parent: str = ""
    since: str = ""
    why: str = ""


def plan(
    disks: Collection[DiskNow],
    last: Manifest | None,
    dirty: Mapping[str, int] | None,
    wanted: Wanted,
    *,
    vm: str = "",
    uuid: str = "",
) -> tuple[DiskPlan, ...]:
    """How to take each disk. ``last``: the newest whole backup; ``dirty``: the disks whose bitmaps since then are good.

    ``dirty`` None: libvirt knows nothing of the checkpoint of ``last``. Raises WrongState when an increment is asked
    for and no disk can be one.
    """
    found = tuple(_one(disk, last, dirty, wanted, uuid) for disk in disks)
    if wanted is Wanted.INCREMENTAL and not any(one.parent for one in found):
        reasons = sorted({f"disk {one.disk.target}: {one.why}" for one in found})
        raise WrongState(
            f"cannot back up VM {vm} incrementally: {'; '.join(reasons)}",
            hint="--full takes all of it; later ones count from there",
        )
    return found


def _one(disk: DiskNow, last: Manifest | None, dirty: Mapping[str, int] | None, wanted: Wanted, uuid: str) -> DiskPlan:
    if wanted is Wanted.FULL:
        return DiskPlan(disk)
    if last is None:
        return DiskPlan(disk, why="there is no backup before it" if wanted is Wanted.INCREMENTAL else "")
    if why := _obstacle(disk, last, dirty, uuid):
        return DiskPlan(disk, why=why)
    return DiskPlan(disk, parent=last.id, since=last.checkpoint)


def _obstacle(disk: DiskNow, last: Manifest, dirty: Mapping[str, int] | None, uuid: str) -> str:
    before = last.disk(disk.target)
    if last.uuid != uuid:
        return f"backup {last.id} is of another VM of that name"
    if not disk.marks:
        return f"a {disk.format} disk keeps no bitmap of what changes"
    if before is None:
        return f"it is not in backup {last.id}"
    if before.serial != disk.serial:
        return f"another disk was there in backup {last.id}"
    if before.size != disk.size:
        return f"its size is not what it was in backup {last.id}"
    if not last.checkpoint or dirty is None:
        return f"the checkpoint of backup {last.id} is lost"
    if disk.target not in dirty:
        return f"its bitmap of what changed since backup {last.id} is lost or broken, or not all in one file"
    return ""


@dataclass(frozen=True, slots=True)
class Pruning:
    """What is pruned. ``delete``: backups that go. ``merge``: those kept that take over what they need of them.

    ``broken``: those of ``keep`` that cannot be restored, and why: they are not counted.
    """

    delete: tuple[str, ...]
    merge: tuple[str, ...]
    keep: tuple[str, ...]
    broken: Mapping[str, str] = field(default_factory=dict)


def prune(
    points: Collection[Manifest],
    *,
    keep: int | None,
    older_than: timedelta | None,
    now: datetime,
    broken: Mapping[str, str],
) -> Pruning:
    """Which backups go: all but the newest ``keep``, and of those only what is older than ``older_than``.

    Of ``broken`` ones (by id: why) none counts as kept: the newest whole one stays in any case. A kept one that is
    laid over one that goes takes its content over, which a broken one cannot: what that is laid over stays with it.
    """
    ordered = sorted(points, key=lambda one: one.id)
    whole = [one.id for one in ordered if one.id not in broken]
    fewest = max(1, keep or 0)
    oldest = whole[-fewest] if len(whole) >= fewest and not (keep is None and older_than is None) else ""
    doomed = {
        one.id
        for one in ordered
        if one.id < oldest and (older_than is None or now - datetime.fromisoformat(one.created) > older_than)
    }
    for one in reversed(ordered):  # children before what they are laid over
        if one.id in broken and one.id not in doomed:
            doomed -= _below(one, points)
    kept = [one for one in ordered if one.id not in doomed]
    merge = tuple(one.id for one in kept if one.parents & doomed)
    why = {one.id: broken[one.id] for one in kept if one.id in broken}
    return Pruning(tuple(sorted(doomed)), merge, tuple(one.id for one in kept), why)


def _below(one: Manifest, points: Collection[Manifest]) -> set[str]:
    """The backups that one is laid over, directly or not."""
    known = {other.id: other for other in points}
    found: set[str] = set()
    ahead = [one.id]
    while ahead:
        at = known.get(ahead.pop())
        more = at.parents - found if at else frozenset()
        found |= more
        ahead += more
    return found


def needless(checkpoints: Mapping[str, tuple[str, str]], needed: Mapping[str, Collection[str]]) -> tuple[str, ...]:
    """The checkpoints that no backup counts from. ``checkpoints``: name to backup's id and folder.

    ``needed``: by folder, the checkpoints its backups count from; one of a folder that is not there now is left alone.
    """
    return tuple(name for name, (_, folder) in checkpoints.items() if folder in needed and name not in needed[folder])


def parse_age(text: str) -> timedelta:
    """``12h``, ``30d`` or ``2w`` as a span of time. Raises SpecError."""
    match = re.fullmatch(r"([0-9]{1,6})([hdw])", text.strip())
    if match is None:
        raise SpecError(f"cannot read age {text!r}: not a whole number of h, d or w", hint="as in 30d")
    hours = {"h": 1, "d": 24, "w": 168}[match[2]]
    return timedelta(hours=int(match[1]) * hours)
