"""The workloads there are: how results of each are shown, counted and compared. Pure.

A workload joins by a line in KINDS, and by one in parts.py if it belongs to a run of everything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from vmctl.bench import links, sections, sections_measured
from vmctl.bench.levels_result import levels_of
from vmctl.bench.measured import Measured, measured_of
from vmctl.bench.result import Rows, trap_of
from vmctl.bench.section import Case, Section
from vmctl.errors import SpecError

Values = Mapping[str, Any]


class Kind(NamedTuple):
    """One workload, by the name its results bear. ``rows`` None: two of them cannot be compared."""

    name: str
    sections: Callable[[Sequence[Values]], list[Section]]
    cases: Callable[[Values], list[Case]]
    rows: Callable[[Values], Rows | Measured] | None = None


KINDS = (
    Kind("trap", sections.traps, sections.trap_cases, trap_of),
    Kind("popek-goldberg", sections.popek, sections.popek_cases),
    Kind("io", sections_measured.titled("Disks"), sections_measured.cases, measured_of),
    Kind("net", sections_measured.titled("Networks", links.apart), sections_measured.cases, measured_of),
    Kind("levels", sections.levels, sections.levels_cases, levels_of),
    Kind("sheet", sections.sheets, sections.sheet_cases),
)
BY_NAME = {kind.name: kind for kind in KINDS}


def rows_of(values: Values) -> Rows | Measured:
    """The rows of a result. Raises SpecError for a workload that has none to compare."""
    found = BY_NAME[values["workload"]].rows
    if found is None:
        raise SpecError(
            f"cannot compare {values['id']}: it has no figures that could be",
            hint="vmctl bench list shows what each result is",
        )
    return found(values)
