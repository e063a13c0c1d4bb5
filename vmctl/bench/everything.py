"""All measurements of a host one after the other, with what is left told, and gone on with after an interrupt.

A run is a file that names the result of each part that is through; the results themselves are kept as any other.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vmctl.bench import parts as every_part
from vmctl.bench import store
from vmctl.bench.parts import Part
from vmctl.errors import Conflict, NotFound, SpecError, Unsupported, VmctlError
from vmctl.events import Event, Progress, Reporter, Status, Step
from vmctl.hosts import Host
from vmctl.locks import held


@dataclass(frozen=True, slots=True)
class Through:
    """One part that is through: its result's id, or why there is none."""

    name: str
    result: str
    problem: str
    took_s: float


@dataclass(frozen=True, slots=True)
class Run:
    """A run of everything, as far as it is."""

    id: str
    made: str
    uri: str
    quick: bool
    only: tuple[str, ...]
    parts: tuple[Through, ...]
    complete: bool

    def to_json(self) -> dict[str, Any]:
        """The documented JSON form."""
        return {**asdict(self), "parts": [asdict(one) for one in self.parts]}


def folder(place: Path) -> Path:
    """Where runs are kept, among the results."""
    return place / "runs"


def runs(place: Path) -> tuple[Run, ...]:
    """All runs that can be read, oldest first."""
    found = []
    for path in store.files(folder(place)):
        try:
            found.append(_run_of(store.read(path)))
        except (OSError, ValueError, RecursionError, KeyError, TypeError):
            continue  # of another vmctl: its results are in the list all the same
    return tuple(sorted(found, key=lambda one: (one.made, one.id)))


def _run_of(values: Mapping[str, Any]) -> Run:
    parts = tuple(
        Through(str(one["name"]), str(one["result"]), str(one["problem"]), float(one["took_s"]))
        for one in values["parts"]
    )
    only, complete = tuple(map(str, values["only"])), bool(values["complete"])
    return Run(str(values["id"]), str(values["made"]), str(values["uri"]), bool(values["quick"]), only, parts, complete)


def find(place: Path, named: str) -> Run:
    """The run of that id. Raises NotFound."""
    for one in runs(place):
        if one.id == named:
            return one
    raise NotFound(f"cannot find run {named}: there is none", hint="`vmctl bench run` makes one")


def begin(place: Path, uri: str, only: Sequence[str], *, quick: bool, new: bool) -> Run:
    """The last run, where it was cut off and asked for the same on the same host; or a new one."""
    if not new:
        asked = (uri, quick, set(only))
        last = [one for one in runs(place) if (one.uri, one.quick, set(one.only)) == asked]
        if last and not last[-1].complete:
            return last[-1]
    made = datetime.now(UTC).isoformat(timespec="seconds")
    return Run(store.new_id(folder(place), "run", made), made, uri, quick, tuple(only), (), complete=False)


def _keep(place: Path, run_: Run) -> None:
    store.write(folder(place), run_.to_json(), "run")


class Clock:
    """How long is left: what is expected of the parts that are left, by how the ones that are through kept to it."""

    def __init__(self, parts: tuple[Part, ...], through: tuple[Through, ...]) -> None:
        self._parts = parts
        self._took = {one.name: one.took_s for one in through if one.result}
        self._current, self._share = "", 0.0

    def now(self, name: str, share: float) -> None:
        """That part is at work, and so much of it is done."""
        self._current, self._share = name, max(0.0, min(1.0, share))

    def over(self, one: Through) -> None:
        """That part is through."""
        if one.result:
            self._took[one.name] = one.took_s

    def left_s(self, left: tuple[str, ...]) -> float:
        """For the parts of these names."""
        expected = {part.name: part.expected_s for part in self._parts}
        known = [name for name in self._took if name in expected]
        before = sum(expected[name] for name in known)
        pace = sum(self._took[name] for name in known) / before if before else 1.0
        return pace * sum(expected[name] * ((1 - self._share) if name == self._current else 1.0) for name in left)


def duration(seconds: float) -> str:
    """A time to go, for people."""
    whole = round(seconds)
    return f"{whole} s" if whole < 100 else f"{whole // 60} min {whole % 60:02d} s"


def run(host: Host, report: Reporter, only: Sequence[str] = (), *, quick: bool, new: bool) -> Run:
    """Measure everything that is not through yet; what cannot be measured there is told, and the rest goes on.

    ``only`` names parts, for not all of it. Raises Conflict while another run, or another measurement, is at work;
    SpecError for a part that there is not.
    """
    if not host.conn.qemu:
        raise Unsupported(f"cannot measure at {host.conn.uri}: no QEMU guests run there")
    place = store.folder(host.folders.data)
    with held(host.folders.runtime, f"runs of measurements on {host.lock_scope}"):
        parts = chosen(every_part.parts(host, quick=quick), only)
        now = begin(place, host.conn.uri, only, quick=quick, new=new)
        through = {one.name for one in now.parts}
        if through:
            report(Step(f"going on with {now.id}: {len(through)} of {len(parts)} parts are through"))
        clock = Clock(parts, now.parts)
        _keep(place, now)
        for number, part in enumerate(parts, 1):
            if part.name in through:
                continue
            left = tuple(one.name for one in parts[number - 1 :] if one.name not in through)
            clock.now(part.name, 0.0)
            to_go = duration(clock.left_s(left))
            report(Step(f"{number} of {len(parts)}: {part.name}; all of it in about {to_go}"))
            done = _measured(host, part, _telling(report, clock, part, number, len(parts), left))
            clock.over(done)
            through.add(part.name)
            now = replace(now, parts=(*now.parts, done))
            _keep(place, now)
        now = replace(now, complete=True)
        _keep(place, now)
    return now


def chosen(parts: tuple[Part, ...], only: Sequence[str]) -> tuple[Part, ...]:
    """The parts of those names, or all. Raises SpecError."""
    known = [part.name for part in parts]
    unknown = [f"there is no part {name} on this host" for name in only if name not in known]
    if unknown:
        raise SpecError("cannot measure", problems=unknown, hint="parts: " + ", ".join(known))
    return tuple(part for part in parts if not only or part.name in only)


def _measured(host: Host, part: Part, report: Reporter) -> Through:
    began = time.monotonic()
    try:
        head = part.measure(host, report)
    except Conflict:
        raise
    except VmctlError as error:
        why = f"{error.message} ({error.hint})" if error.hint else error.message
        report(Step(f"{part.name}: {why}"))
        return Through(part.name, "", why, round(time.monotonic() - began, 3))
    return Through(part.name, head.id, "", round(time.monotonic() - began, 3))


def _telling(report: Reporter, clock: Clock, part: Part, number: int, count: int, left: tuple[str, ...]) -> Reporter:
    """A Reporter that tells of a part's progress as the whole run's."""

    def tell(event: Event) -> None:
        if not isinstance(event, Progress):
            report(event)
            return
        share = event.done / event.total if event.total else 0.0
        clock.now(part.name, share)
        to_go = duration(clock.left_s(left))
        report(Status("bench run", f"{number} of {count}, {part.name}: {100 * share:.0f} %; {to_go} to go"))

    return tell
