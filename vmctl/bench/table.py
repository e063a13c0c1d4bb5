"""The trap table's figures, from raw samples. Pure.

A row's figure is the median of its guests' medians: a guest is one independent look, the parts within it are not.
Spread (MAD) and p99 are over all parts of all guests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vmctl.bench import stats
from vmctl.bench.result import RowResult, Run, TrapResult
from vmctl.bench.rows import BASE, BY_NAME, handled_by

SUSPECT_PERCENT = 2.0  # of its time that a vCPU waited for a CPU: from here on the reader is told


@dataclass(frozen=True, slots=True)
class Line:
    """One row's figures. Cycles are the TSC's; net is without the empty loop and without time asked for."""

    name: str
    gross_cycles: float
    net_cycles: float
    net_ns: float
    mad_cycles: float
    p99_cycles: float
    calls: int
    parts: int
    guests: int
    waited_percent: float | None
    suspect: bool
    exit: str
    handled_by: str
    note: str = ""


def per_call(run: Run) -> list[float]:
    """Gross cycles of a call, by parts."""
    return [ticks / run.calls for ticks in run.ticks]


def guest_medians(row: RowResult) -> list[float]:
    """Gross cycles of a call as each guest saw it."""
    return [stats.median(per_call(run)) for run in row.runs]


def table(result: TrapResult) -> tuple[Line, ...]:
    """The figures of every row that has any, and a line with a note for every other."""
    rates = {guest.number: guest.khz for guest in result.guests}
    empty = next((row for row in result.rows if row.name == BASE), RowResult(BASE))
    base = {run.guest: stats.median(per_call(run)) for run in empty.runs}
    return tuple(_line(row, result, rates, base) for row in result.rows)


def _line(row: RowResult, result: TrapResult, rates: Mapping[int, int], base: Mapping[int, float]) -> Line:
    known, dimensions = BY_NAME.get(row.name), result.head.dimensions
    how = known.exit if known and dimensions["accelerator"] == "kvm" else ""
    who = handled_by(known, dimensions["accelerator"], interpreted=dimensions["interpreted"]) if known else ""
    note = row.failed or row.skipped
    if not row.runs:
        return Line(row.name, 0, 0, 0, 0, 0, 0, 0, 0, None, False, how, who, note)
    parts = [part for run in row.runs for part in per_call(run)]
    nets = []
    for run in row.runs:
        asked = run.asked_ns * rates.get(run.guest, 0) / 1e6
        nets.append((stats.median(per_call(run)) - base.get(run.guest, 0.0) - asked, rates.get(run.guest, 0)))
    waits = [run.waited_percent for run in row.runs if run.waited_percent is not None]
    waited = max(waits, default=None)
    return Line(
        row.name,
        gross_cycles=stats.median(guest_medians(row)),
        net_cycles=stats.median([cycles for cycles, _ in nets]),
        net_ns=stats.median([cycles * 1e6 / khz if khz else 0.0 for cycles, khz in nets]),
        mad_cycles=stats.mad(parts),
        p99_cycles=stats.percentile(parts, 99),
        calls=sum(run.calls * len(run.ticks) for run in row.runs),
        parts=len(parts),
        guests=len(row.runs),
        waited_percent=waited,
        suspect=waited is not None and waited > SUSPECT_PERCENT,
        exit=how,
        handled_by=who,
        note=note,
    )
