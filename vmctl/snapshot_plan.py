"""What is decided of snapshots: which kind, which go, and which files nobody needs any more. Pure."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from itertools import count

from vmctl.errors import NotFound, SpecError, Unsupported, WrongState, close_to
from vmctl.snapshot_xml import Snapshot

_NAME = r"[A-Za-z0-9][A-Za-z0-9_+-]*(?:\.[A-Za-z0-9_+-]+)*"
_LONGEST = 64
_SPANS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
OURS = re.compile(r"\.snap-[0-9a-f]{8}\.(?:qcow2|memory|nvram)$")
_OWN_REVERT = (9, 10, 0)
_INTERNAL_UEFI = (10, 10, 0)


class Kind(StrEnum):
    """Where the state lies: in the disks' own files, or in files that stay as they are below new ones."""

    INTERNAL = "internal"
    EXTERNAL = "external"


@dataclass(frozen=True, slots=True)
class Ref:
    """A snapshot as a user names it. ``snapshot`` "": the VM alone was named."""

    vm: str
    snapshot: str

    def __str__(self) -> str:
        return f"{self.vm}.{self.snapshot}" if self.snapshot else self.vm


def address(text: str, vms: Collection[str]) -> Ref:
    """``VM`` or ``VM.SNAPSHOT``; either may have dots: the longest name of a VM that is there. Raises NotFound."""
    found = [vm for vm in vms if text == vm or text.startswith(f"{vm}.")]
    if not found:
        head, dot, rest = text.partition(".")
        near = close_to(head, vms)
        raise NotFound(
            f"cannot find {text}: no VM of that name",
            meant=f"{near}{dot}{rest}" if near else "",
            hint="VM.SNAPSHOT names a snapshot; see `vmctl list`",
        )
    vm = max(found, key=len)
    return Ref(vm, text[len(vm) + 1 :])


def name_problem(name: str) -> str:
    """Why a snapshot cannot have this name; "" when it can."""
    if len(name) > _LONGEST or re.fullmatch(_NAME, name) is None:
        return f"the name {name!r} is not 1 to {_LONGEST} of letters, digits and inner _ . + -"
    return ""


def free_name(now: datetime, taken: Collection[str], stem: str = "snap") -> str:
    """A name by the time that nobody has."""
    first = f"{stem}-{now:%Y%m%d-%H%M%S}"
    return next(name for name in (first, *(f"{first}-{n}" for n in range(2, 10_000))) if name not in taken)


def span(text: str) -> timedelta:
    """``30m``, ``12h``, ``7d`` or ``2w``. Raises SpecError."""
    match = re.fullmatch(r"([0-9]{1,5})([mhdw])", text)
    if match is None or int(match[1]) == 0:
        raise SpecError(f"cannot read time {text!r}: not a whole number of m, h, d or w above 0", hint="as in 7d")
    return timedelta(**{_SPANS[match[2]]: int(match[1])})


@dataclass(frozen=True, slots=True)
class DiskState:
    """A disk to be in a snapshot. ``file``: whether it is a file that vmctl can reach; ``trusted``: its chain too."""

    target: str
    format: str
    file: bool = True
    readonly: bool = False


@dataclass(frozen=True, slots=True)
class Situation:
    """What the choice hangs on. ``state`` is running, paused, stopped or another; ``kinds`` of snapshots there are.

    ``unsaveable``: devices that QEMU cannot save. ``libvirt``: its version.
    """

    state: str
    uefi: bool
    nvram_qcow2: bool
    local: bool
    libvirt: tuple[int, ...]
    disks: tuple[DiskState, ...]
    kinds: frozenset[str] = frozenset()
    unsaveable: tuple[str, ...] = ()
    persistent: bool = True


@dataclass(frozen=True, slots=True)
class Wanted:
    """What was asked for; None is left to choose."""

    kind: Kind | None = None
    memory: bool | None = None
    freeze: bool = False


@dataclass(frozen=True, slots=True)
class Mode:
    """How a snapshot is taken, and why so. ``lacks``: why the memory of a running VM is not in it, unasked."""

    kind: Kind
    memory: bool
    disks: tuple[str, ...]
    why: str
    lacks: str = ""

    def __str__(self) -> str:
        what = f"{'memory and ' if self.memory else ''}disk{'s' if len(self.disks) > 1 else ''} {', '.join(self.disks)}"
        return f"{self.kind}, {what} ({self.why})"


def choose(doing: str, now: Situation, wanted: Wanted) -> Mode:
    """How to take a snapshot. Raises Unsupported or WrongState with the reason when it cannot be, and a way out."""
    if now.state not in {"running", "paused", "stopped", "crashed"}:
        hint = "vmctl start goes on from its saved memory; then take it" if now.state == "saved" else ""
        raise WrongState(f"cannot {doing}: the VM is {now.state}", hint=hint)
    if not now.persistent:
        raise Unsupported(
            f"cannot {doing}: the VM is transient and ends when it stops", hint="virsh define makes it stay"
        )
    disks = tuple(disk for disk in now.disks if not disk.readonly)
    if not disks:
        raise Unsupported(f"cannot {doing}: the VM has no disk that is written to")
    memory = _memory(doing, now, wanted)
    unasked = now.state in {"running", "paused"} and wanted.memory is None and not wanted.freeze
    lacks = _unsaveable(now) if unasked and not memory else ""
    problems = {kind: _problem(kind, now, disks, memory=memory, freeze=wanted.freeze) for kind in Kind}
    if wanted.kind is not None:
        if problem := problems[wanted.kind]:
            other = next(kind for kind in Kind if kind is not wanted.kind)
            raise Unsupported(
                f"cannot {doing}: {problem}", hint="" if problems[other] else f"--{other} can be taken here"
            )
        return Mode(wanted.kind, memory, tuple(disk.target for disk in disks), "as asked", lacks)
    order = [Kind.INTERNAL, Kind.EXTERNAL] if "internal" in now.kinds else [Kind.EXTERNAL, Kind.INTERNAL]
    for kind in order:
        if not problems[kind]:
            return Mode(kind, memory, tuple(disk.target for disk in disks), lacks or _why(kind, now, problems), lacks)
    raise Unsupported(
        f"cannot {doing}: {'; '.join(dict.fromkeys(problems.values()))}",
        hint="--no-memory takes the disks alone" if memory and not _any_problem_without_memory(now, disks) else "",
    )


def _any_problem_without_memory(now: Situation, disks: tuple[DiskState, ...]) -> str:
    return _problem(Kind.EXTERNAL, now, disks, memory=False, freeze=False)


def _why(kind: Kind, now: Situation, problems: Mapping[Kind, str]) -> str:
    if kind is Kind.INTERNAL:
        return problems[Kind.EXTERNAL] or "as its other snapshots"
    return problems[Kind.INTERNAL] or "new writes go to files of their own"


def _unsaveable(now: Situation) -> str:
    return f"QEMU cannot save its {' and '.join(now.unsaveable)}"


def _memory(doing: str, now: Situation, wanted: Wanted) -> bool:
    running = now.state in {"running", "paused"}
    if wanted.freeze and now.state != "running":
        raise WrongState(f"cannot {doing}: only a running guest can be frozen, and it is {now.state}")
    if wanted.memory and wanted.freeze:
        raise SpecError(f"cannot {doing}: with its memory a guest would wake up frozen", hint="--freeze, or --memory")
    if wanted.memory and not running:
        raise WrongState(
            f"cannot {doing} with memory: the VM is {now.state}", hint="without --memory its disks are taken"
        )
    if wanted.memory and now.unsaveable:
        raise Unsupported(
            f"cannot {doing} with memory: {_unsaveable(now)}",
            hint="--no-memory takes the disks alone",
        )
    if wanted.memory is None:
        return running and not wanted.freeze and not now.unsaveable
    return wanted.memory


def _problem(kind: Kind, now: Situation, disks: tuple[DiskState, ...], *, memory: bool, freeze: bool) -> str:
    if strange := [disk.target for disk in disks if not disk.file]:
        return f"disk {', '.join(strange)} is no file in a storage pool of this machine"
    if kind is Kind.EXTERNAL:
        if not now.local:
            return "files on another machine cannot be put back from here"
        if odd := [disk.target for disk in disks if disk.format not in {"qcow2", "raw"}]:
            return f"disk {', '.join(odd)} is neither qcow2 nor raw"
        if "internal" in now.kinds:
            return "the VM has internal snapshots, which need its disks' files free to go back"
        return ""
    if "external" in now.kinds:
        return "the VM has external snapshots, whose files must stay as they are"
    if odd := [disk.target for disk in disks if disk.format != "qcow2"]:
        return f"disk {', '.join(odd)} is not qcow2"
    if now.uefi and not (now.nvram_qcow2 and now.libvirt >= _INTERNAL_UEFI):
        return "the variables of its UEFI would not be in an internal one"
    if now.state in {"running", "paused"} and not memory:
        return "an internal one of a running VM has its memory"
    return "a frozen guest has no internal one" if freeze else ""


def libvirts_own(version: tuple[int, ...]) -> bool:
    """Whether this libvirt reverts to and deletes external snapshots itself, siblings included."""
    return version >= _OWN_REVERT


def victims(found: Sequence[Snapshot], now: datetime, *, most: int | None) -> tuple[list[Snapshot], list[Snapshot]]:
    """Which snapshots of vmctl's have expired, and which are the oldest above ``most`` of those that are left."""
    ours = sorted((one for one in found if one.kept is not None), key=lambda one: one.created)
    expired = [one for one in ours if one.kept and one.kept.expires and one.kept.expires <= now]
    left = [one for one in ours if one not in expired]
    return expired, left[: max(0, len(left) - most)] if most is not None else []


@dataclass(frozen=True, slots=True)
class Merge:
    """What ``top`` holds goes into ``base``, which ``top`` alone is based on, and ``top`` goes."""

    base: str
    top: str


@dataclass(frozen=True, slots=True)
class Files:
    """Files and who needs them: ``bases`` of each, ``mine`` pins of this VM (its disks now, its snapshots), ``others``.

    Of ``own`` files the content may be moved, and those of them that are ``made`` may go when nobody needs them.
    """

    bases: Mapping[str, str]
    mine: Mapping[str, frozenset[str]]
    others: Collection[str]
    own: Collection[str]
    made: frozenset[str] = frozenset()


def tag(uuid: str, what: str, free: Callable[[str], bool]) -> str:
    """The word in the names of new files of a VM, one of which ``free`` says that no file has it.

    The same as long as the VM is as it is: so a dry run names the files that are made.
    """
    words = (hashlib.sha256(f"{uuid} {what} {n}".encode()).hexdigest()[:8] for n in count())
    return next(word for word in words if free(word))


def tidy(files: Files) -> tuple[tuple[str, ...], tuple[Merge, ...]]:
    """Which files can go at once, and which two can become one: those that no snapshot, VM or other disk needs."""
    bases = dict(files.bases)
    mine = {path: set(pins) for path, pins in files.mine.items() if pins}
    own = [path for path in files.own if path not in files.others]
    gone: list[str] = []
    while free := [
        path for path in own if path in files.made and path not in {*gone, *mine} and path not in bases.values()
    ]:
        gone += free
        for path in free:
            bases.pop(path, None)
    merges: list[Merge] = []
    left = [path for path in own if path not in gone]
    while step := _mergeable(left, mine, bases):
        merges.append(step)
        if pins := mine.pop(step.top, None):
            mine[step.base] = pins
        bases = {one: step.base if base == step.top else base for one, base in bases.items() if one != step.top}
        left.remove(step.top)
    return tuple(gone), tuple(merges)


def _mergeable(own: Sequence[str], mine: Mapping[str, object], bases: Mapping[str, str]) -> Merge | None:
    for path in own:
        above = [top for top, base in bases.items() if base == path]
        if path not in mine and len(above) == 1 and above[0] in own:
            return Merge(path, above[0])
    return None


@dataclass(frozen=True, slots=True)
class Branch:
    """A line of the tree: how deep, and whether each level above goes on below it."""

    snapshot: Snapshot | None
    lasts: tuple[bool, ...]

    @property
    def lead(self) -> str:
        """The lines in front of its name."""
        if not self.lasts:
            return ""
        rails = "".join("   " if last else "│  " for last in self.lasts[:-1])
        return f"{rails}{'└─ ' if self.lasts[-1] else '├─ '}"


def tree(found: Iterable[Snapshot]) -> tuple[Branch, ...]:
    """The snapshots as they come from each other; a Branch of None is where the VM is now."""
    all_ = sorted(found, key=lambda one: (one.created, one.name))
    names = {one.name for one in all_}
    lines: list[Branch] = []
    roots: list[Snapshot | None] = [one for one in all_ if one.parent not in names]
    if not any(one.current for one in all_):
        roots.append(None)
    # A stack of its own: fifty levels are fine for Python's, thousands are not.
    waiting: list[tuple[Snapshot | None, tuple[bool, ...]]] = []

    def push(these: Sequence[Snapshot | None], lasts: tuple[bool, ...]) -> None:
        waiting.extend([(one, (*lasts, n == len(these) - 1)) for n, one in enumerate(these)][::-1])

    push(roots, ())
    while waiting:
        snapshot, lasts = waiting.pop()
        lines.append(Branch(snapshot, lasts))
        if snapshot is None:
            continue
        below: list[Snapshot | None] = [one for one in all_ if one.parent == snapshot.name]
        if snapshot.current:
            below.append(None)
        push(below, lasts)
    return tuple(lines)


def union(ranges: Iterable[tuple[int, int]]) -> int:
    """How many bytes lie in any of the ranges (begin, end)."""
    total, reached = 0, 0
    for begin, end in sorted(ranges):
        total += max(0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def one_of(found: Iterable[Snapshot], ref: Ref) -> Snapshot:
    """The snapshot that is named. Raises NotFound."""
    there = list(found)
    for one in there:
        if one.name == ref.snapshot:
            return one
    known = [one.name for one in there]
    meant = close_to(ref.snapshot, known)
    raise NotFound(
        f"cannot find snapshot {ref}: VM {ref.vm} has {', '.join(known) or 'none'}",
        meant=f"{ref.vm}.{meant}" if meant else "",
        hint=f"vmctl snapshot list {ref.vm}",
    )
