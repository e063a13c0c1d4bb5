"""What each level of virtualization makes of the same work, raw, and its figures. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from vmctl.bench import stats, units
from vmctl.bench.result import Head, RowResult, Run, head_of
from vmctl.bench.table import SUSPECT_PERCENT, per_call

NATIVE = "native"


class Work(NamedTuple):
    """One row: what it is, and how its cost is said: as so many of ``unit`` a second, or as a time (``unit`` "s")."""

    name: str
    title: str
    unit: str
    why: str


WORKS = (
    Work("integer", "integer arithmetic", "op/s", "shifts, exclusive or, additions and multiplications in registers"),
    Work("float", "floating point", "FLOP/s", "multiplications and additions in double precision, by SSE2, one core"),
    Work(
        "memory_bandwidth", "memory bandwidth", "B/s", "a copy through 16 MiB, read and written bytes, as STREAM counts"
    ),
    Work("memory_latency", "memory latency", "s", "one read at an address that the read before it found, in 16 MiB"),
    Work("syscall", "system call", "s", "getppid"),
    Work("page_fault", "page fault", "s", "first touch of a page of 4 KiB that was given back"),
    Work("context_switch", "context switch", "s", "a byte by pipe to another process on the same CPU"),
    Work("pipe", "pipe", "B/s", "64 KiB at a time to another process"),
    Work("file_create", "file create", "s", "create, close and remove a file on a tmpfs"),
)
BY_NAME = {work.name: work for work in WORKS}


@dataclass(frozen=True, slots=True)
class Level:
    """All rows in one place; ``skipped`` says why there is no such place here, ``failed`` what went wrong in it."""

    name: str
    title: str
    detail: str = ""
    rows: tuple[RowResult, ...] = ()
    skipped: str = ""
    failed: str = ""
    took_s: float = 0.0

    def missing(self) -> tuple[RowResult, ...]:
        """The rows that it has not, where it has not all of them for a reason."""
        if not (self.skipped or self.failed):
            return ()
        there = {row.name for row in self.rows}
        return tuple(RowResult(one.name, (), self.skipped, self.failed) for one in WORKS if one.name not in there)

    def ns(self, row: str) -> float | None:
        """Time of one unit, in ns, by the quickest of all parts; None where it was not measured."""
        found = next((one for one in self.rows if one.name == row and one.runs), None)
        return min(quickest(found)) if found else None


def quickest(row: RowResult) -> list[float]:
    """Of each round the quickest part, in ns for one unit: a neighbour only ever makes one longer.

    (Chen and Revels 2016.) More than half of the parts may be spoilt, for a process has no CPU to itself, and whole
    rounds by a neighbour on the same core or the same memory.
    """
    return [min(per_call(run)) for run in row.runs]


@dataclass(frozen=True, slots=True)
class Share:
    """One busy vCPU: the weight it was given, and the seconds of CPU time it got."""

    weight: int
    cpu_s: float


@dataclass(frozen=True, slots=True)
class Shares:
    """Busy vCPUs that compete for one CPU for ``window_s``; ``skipped`` says why there are none."""

    window_s: float = 0.0
    shares: tuple[Share, ...] = ()
    skipped: str = ""

    def lines(self) -> tuple[tuple[int, float, float], ...]:
        """Of each: its weight, the share it was promised, and the share it got."""
        weights, times = sum(one.weight for one in self.shares), sum(one.cpu_s for one in self.shares)
        return tuple((one.weight, one.weight / weights, one.cpu_s / times if times else 0.0) for one in self.shares)


@dataclass(frozen=True, slots=True)
class LevelsResult:
    """Every level."""

    head: Head
    levels: tuple[Level, ...] = ()
    shares: Shares | None = None

    @property
    def rows(self) -> tuple[RowResult, ...]:
        """The rows of all levels in one list, for a comparison."""
        return tuple(
            RowResult(f"{level.name} {row.name}", row.runs, row.skipped, row.failed)
            for level in self.levels
            for row in (*level.rows, *level.missing())
        )

    def to_json(self) -> dict[str, Any]:
        """The documented JSON form."""
        shares = (
            None
            if self.shares is None
            else {
                "window_s": round(self.shares.window_s, 3),
                "skipped": self.shares.skipped,
                "shares": [asdict(one) for one in self.shares.shares],
            }
        )
        return {**self.head.to_json(), "levels": [_level_json(level) for level in self.levels], "shares": shares}


def _level_json(level: Level) -> dict[str, Any]:
    return {
        "name": level.name,
        "title": level.title,
        "detail": level.detail,
        "skipped": level.skipped,
        "failed": level.failed,
        "took_s": round(level.took_s, 3),
        "rows": rows_json(level.rows),
    }


def rows_json(rows: tuple[RowResult, ...]) -> list[dict[str, Any]]:
    """Rows whose ticks are nanoseconds."""
    return [
        {
            "name": row.name,
            "skipped": row.skipped,
            "runs": [
                {
                    "round": run.guest,
                    "units": run.calls,
                    "ns": list(run.ticks),
                    "waited_percent": run.waited_percent,
                }
                for run in row.runs
            ],
        }
        for row in rows
    ]


def rows_of(values: list[Mapping[str, Any]]) -> tuple[RowResult, ...]:
    """Such rows as they were kept."""
    return tuple(
        RowResult(
            row["name"],
            tuple(
                Run(run["round"], run["units"], tuple(run["ns"]), waited_percent=run["waited_percent"])
                for run in row["runs"]
            ),
            row["skipped"],
        )
        for row in values
    )


def levels_of(values: Mapping[str, Any]) -> LevelsResult:
    """A result as it was kept; the values have been checked against the schema."""
    levels = tuple(Level(**{**level, "rows": rows_of(level["rows"])}) for level in values["levels"])
    kept = values["shares"]
    shares = Shares(**{**kept, "shares": tuple(Share(**one) for one in kept["shares"])}) if kept else None
    return LevelsResult(head_of(values), levels, shares)


class Figure(NamedTuple):
    """One row on one level: time of a unit in ns, and how many times the native one, with its spread over rounds."""

    ns: float
    times: float | None = None
    least: float | None = None
    most: float | None = None
    waited_percent: float | None = None

    @property
    def suspect(self) -> bool:
        """Whether it waited for a CPU longer than is good for a figure."""
        return self.waited_percent is not None and self.waited_percent > SUSPECT_PERCENT


def figures(result: LevelsResult) -> dict[str, dict[str, Figure]]:
    """By row and level. Ratios are to native; without it there are none."""
    native = next((level for level in result.levels if level.name == NATIVE), None)
    found: dict[str, dict[str, Figure]] = {}
    for level in result.levels:
        for row in level.rows:
            if not row.runs:
                continue
            base, rounds = native.ns(row.name) if native else None, quickest(row)
            ns = min(rounds)
            waits = [run.waited_percent for run in row.runs if run.waited_percent is not None]
            waited = stats.median(waits) if waits else None
            ratios = (ns / base, min(rounds) / base, max(rounds) / base) if base else None
            figure = Figure(ns, *ratios, waited) if ratios else Figure(ns, waited_percent=waited)
            found.setdefault(row.name, {})[level.name] = figure
    return found


def told(work: Work, ns: float) -> str:
    """A cost for people: as a rate, or as a time."""
    return units.si(ns * 1e-9, "s") if work.unit == "s" else units.si(1e9 / ns, work.unit)
