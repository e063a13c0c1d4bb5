"""Sections of every workload whose rows have measures, each with a unit and samples by rounds: disks, networks. Pure.

They are read as they are kept, so that such a workload joins without a function of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vmctl.bench import stats, units
from vmctl.bench.chart import Chart, Point
from vmctl.bench.section import Case, Section, Table, facts

Values = Mapping[str, Any]
_FACTORS = {"ns": (1e-9, "s"), "us": (1e-6, "s"), "µs": (1e-6, "s"), "ms": (1e-3, "s"), "1/s": (1.0, "/s")}


def _scale(unit: str) -> tuple[float, str]:
    """What to multiply by for a unit that takes prefixes of the SI."""
    return _FACTORS.get(unit, (1.0, unit))


def titled(title: str) -> Callable[[Sequence[Values]], list[Section]]:
    """The sections of such results under a title."""
    return lambda results: [_section(title, values) for values in results]


def _points(values: Values) -> dict[tuple[str, str, str], dict[str, Point]]:
    """By measure, unit and which way is better: the rows' medians, with the least and the largest round."""
    found: dict[tuple[str, str, str], dict[str, Point]] = {}
    for row in values["rows"]:
        for one in row["measures"]:
            factor, unit = _scale(one["unit"])
            samples = [sample["value"] * factor for sample in one["samples"]]
            if samples:
                point = Point(stats.median(samples), min(samples), max(samples))
                found.setdefault((one["name"], unit, one["better"]), {})[row["name"]] = point
    return found


def _section(title: str, values: Values) -> Section:
    charts, found = [], _points(values)
    for (name, unit, better), points in found.items():
        rows = tuple((row, {name: point}) for row, point in points.items())
        charts.append(Chart(f"{title}: {name}", f"{better} is better", unit, (name,), rows))
    header = ("row", *(name for name, _, _ in found))
    names = [row["name"] for row in values["rows"] if row["measures"]]
    cells = tuple(
        (
            name,
            *(units.told(points[name].value, unit) if name in points else "" for (_, unit, _), points in found.items()),
        )
        for name in names
    )
    missing = tuple(
        (row["name"], row["skipped"] or row["failed"]) for row in values["rows"] if row["skipped"] or row["failed"]
    )
    tables = [Table("Medians", header, cells)]
    if missing:
        tables.append(Table("Not measured", ("row", "because"), missing))
    notes = ("Whiskers are the least and the largest round.",)
    return Section(title, facts(values), tuple(charts), tuple(tables), notes)


def cases(values: Values) -> list[Case]:
    """Each row as a test case."""
    found = _points(values)
    return [
        Case(
            row["name"],
            ", ".join(
                f"{name} {units.told(points[row['name']].value, unit)}"
                for (name, unit, _), points in found.items()
                if row["name"] in points
            ),
            row["skipped"],
            row["failed"],
        )
        for row in values["rows"]
    ]
