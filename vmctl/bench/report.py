"""Results as a page, a picture, and text. Computed from what is kept, never while measuring."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from vmctl import render
from vmctl.bench import drawing
from vmctl.bench.chart import Chart
from vmctl.bench.drawing import Drawing
from vmctl.bench.kinds import KINDS
from vmctl.bench.section import Section, Table
from vmctl.bench.store import Kept
from vmctl.render import ReportView

Values = Mapping[str, Any]


def latest(kept: Sequence[Kept]) -> tuple[str, ...]:
    """The ids of the newest whole result of each workload on each accelerator."""
    newest = {(one.workload, one.accelerator): one.id for one in kept if one.complete and not one.problem}
    return tuple(newest.values())


def sections(results: Sequence[Values]) -> list[Section]:
    """All results, workload by workload."""
    found = []
    for kind in KINDS:
        mine = [values for values in results if values["workload"] == kind.name]
        found += kind.sections(mine) if mine else []
    return found


@dataclass(frozen=True, slots=True)
class _Shown:
    """A section as the page has it."""

    title: str
    facts: Sequence[tuple[str, str]]
    pictures: Sequence[str]
    notes: Sequence[str]
    tables: Sequence[Table]


def html(results: Sequence[Values]) -> str:
    """One page with all of it: pictures, tables and samples, and nothing that is loaded from elsewhere."""
    shown = [
        _Shown(one.title, one.facts, [_svg(chart) for chart in one.charts], one.notes, one.tables)
        for one in sections(results)
    ]
    # Inside of a script element nothing but the element's end is special.
    raw = [(values["id"], json.dumps(values).replace("<", "\\u003c")) for values in results]
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return render.report(ReportView("What virtualization costs here", made, shown, raw))


def _svg(chart: Chart) -> str:
    return drawing.svg(drawing.draw(chart), f"{chart.title}: {chart.axis}")


def picture(results: Sequence[Values]) -> Drawing | None:
    """All charts below each other; None where there are none."""
    drawings = [drawing.draw(chart) for one in sections(results) for chart in one.charts]
    return drawing.stacked(drawings) if drawings else None
