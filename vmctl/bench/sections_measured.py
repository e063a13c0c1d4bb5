"""Sections of every workload whose rows have measures, each with a unit and samples by rounds: disks, networks. Pure.

They are read as they are kept, so that such a workload joins without a function of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from vmctl.bench import stats, units
from vmctl.bench.chart import Chart, Point
from vmctl.bench.section import Case, Section, Table, facts

Values = Mapping[str, Any]
Measure: TypeAlias = tuple[str, str, str]  # its name, its unit, and which way is better
_FACTORS = {"ns": (1e-9, "s"), "us": (1e-6, "s"), "µs": (1e-6, "s"), "ms": (1e-3, "s"), "1/s": (1.0, "/s")}


def _scale(unit: str) -> tuple[float, str]:
    """What to multiply by for a unit that takes prefixes of the SI."""
    return _FACTORS.get(unit, (1.0, unit))


def titled(
    title: str, apart: Callable[[Mapping[str, Any]], str] = lambda _: ""
) -> Callable[[Sequence[Values]], list[Section]]:
    """The sections of such results under a title.

    ``apart``: of a row's settings, what it is to be shown as in pictures and tables of its own; "" for together.
    """
    return lambda results: [_section(title, values, apart) for values in results]


def _points(values: Values) -> dict[Measure, dict[str, Point]]:
    """By measure: the rows' medians, with the least and the largest round."""
    found: dict[Measure, dict[str, Point]] = {}
    for row in values["rows"]:
        for one in row["measures"]:
            factor, unit = _scale(one["unit"])
            samples = [sample["value"] * factor for sample in one["samples"]]
            if samples:
                point = Point(stats.median(samples), min(samples), max(samples))
                found.setdefault((one["name"], unit, one["better"]), {})[row["name"]] = point
    return found


def _section(title: str, values: Values, apart: Callable[[Mapping[str, Any]], str]) -> Section:
    charts: list[Chart] = []
    tables: list[Table] = []
    found = _points(values)
    groups: dict[str, list[str]] = {}
    for row in values["rows"]:
        if row["measures"]:
            groups.setdefault(apart(row["setting"]), []).append(row["name"])
    for label, names in groups.items():
        own = f"{title}, {label}" if label else title
        charts += [_chart(own, measure, points, names) for measure, points in found.items()]
        tables.append(_medians(f"Medians, {label}" if label else "Medians", found, names))
    missing = tuple(
        (row["name"], row["skipped"] or row["failed"]) for row in values["rows"] if row["skipped"] or row["failed"]
    )
    if missing:
        tables.append(Table("Not measured", ("row", "because"), missing))
    notes = ("Whiskers are the least and the largest round.",)
    return Section(title, facts(values), tuple(charts), tuple(tables), notes)


def _chart(title: str, measure: Measure, points: Mapping[str, Point], names: Sequence[str]) -> Chart:
    name, unit, better = measure
    rows = tuple((row, {name: points[row]}) for row in names if row in points)
    return Chart(f"{title}: {name}", f"{better} is better", unit, (name,), rows)


def _medians(title: str, found: Mapping[Measure, Mapping[str, Point]], names: Sequence[str]) -> Table:
    rows = tuple(
        (
            name,
            *(units.told(points[name].value, unit) if name in points else "" for (_, unit, _), points in found.items()),
        )
        for name in names
    )
    return Table(title, ("row", *(name for name, _, _ in found)), rows)


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
