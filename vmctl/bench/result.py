"""Results of measuring: raw samples with their dimensions, and JSON of them. Statistics are made from these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Head:
    """What every result begins with. Only results of equal ``dimensions`` can be compared."""

    id: str
    workload: str
    made: str
    vmctl: str
    complete: bool
    dimensions: Mapping[str, Any]
    environment: Mapping[str, Any]

    def with_environment(self, **known: Any) -> Head:
        """The same with more known of the conditions."""
        return replace(self, environment={**self.environment, **known})

    def to_json(self) -> dict[str, Any]:
        """The documented JSON form."""
        return {
            "format": FORMAT,
            "id": self.id,
            "workload": self.workload,
            "made": self.made,
            "vmctl": self.vmctl,
            "complete": self.complete,
            "dimensions": dict(self.dimensions),
            "environment": dict(self.environment),
        }


def head_of(values: Mapping[str, Any]) -> Head:
    """The head of a result as it was kept."""
    names = ("id", "workload", "made", "vmctl", "complete", "dimensions", "environment")
    return Head(**{name: values[name] for name in names})


@dataclass(frozen=True, slots=True)
class Run:
    """One row in one guest: so many calls in each part, and what each part took, in ticks of the TSC.

    ``waited_percent`` is how much of that time the vCPU waited for a CPU of the host; None where it is not known.
    """

    guest: int
    calls: int
    ticks: tuple[int, ...]
    asked_ns: int = 0
    waited_percent: float | None = None


@dataclass(frozen=True, slots=True)
class RowResult:
    """All of one row; ``skipped`` says why it cannot be had there, ``failed`` how it ended the guest."""

    name: str
    runs: tuple[Run, ...] = ()
    skipped: str = ""
    failed: str = ""


@dataclass(frozen=True, slots=True)
class Guest:
    """One guest: the rate of its TSC and who told it, how long it lived, and how it ended."""

    number: int
    khz: int
    clock: str
    lived_s: float
    end: str


class Rows(Protocol):
    """A result that can be compared with another: rows of runs, whose ticks are a cost."""

    @property
    def head(self) -> Head:
        """What it begins with."""

    @property
    def rows(self) -> tuple[RowResult, ...]:
        """All of it."""


@dataclass(frozen=True, slots=True)
class TrapResult:
    """A trap table, raw."""

    head: Head
    guests: tuple[Guest, ...] = ()
    rows: tuple[RowResult, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """The documented JSON form."""
        guests = [
            {"number": g.number, "khz": g.khz, "clock": g.clock, "lived_s": round(g.lived_s, 3), "end": g.end}
            for g in self.guests
        ]
        return {**self.head.to_json(), "guests": guests, "rows": [_row_json(row) for row in self.rows]}


def _row_json(row: RowResult) -> dict[str, Any]:
    runs = [
        {
            "guest": run.guest,
            "calls": run.calls,
            "asked_ns": run.asked_ns,
            "waited_percent": run.waited_percent,
            "ticks": list(run.ticks),
        }
        for run in row.runs
    ]
    return {"name": row.name, "skipped": row.skipped, "failed": row.failed, "runs": runs}


def trap_of(values: Mapping[str, Any]) -> TrapResult:
    """A trap table as it was kept; the values have been checked against the schema."""
    rows = tuple(
        RowResult(
            row["name"],
            tuple(Run(**{**run, "ticks": tuple(run["ticks"])}) for run in row["runs"]),
            row["skipped"],
            row["failed"],
        )
        for row in values["rows"]
    )
    return TrapResult(head_of(values), tuple(Guest(**guest) for guest in values["guests"]), rows)
