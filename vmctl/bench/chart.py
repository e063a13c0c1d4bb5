"""A picture of figures, as values: rows by series on one axis, as dots with their spread. Pure.

Dots, not bars: on a logarithmic axis a bar begins nowhere. (Cleveland and McGill 1984; Cleveland 1985.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class Point(NamedTuple):
    """A value, and how far it was seen to spread."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Chart:
    """``rows`` are labels with points by the name of a series; ``unit`` is of the SI, or × or % (see units).

    ``mark`` is a value that the others are to be seen against, as 1 of a ratio.
    """

    title: str
    axis: str
    unit: str
    series: tuple[str, ...]
    rows: tuple[tuple[str, Mapping[str, Point]], ...]
    log: bool = True
    mark: float | None = None

    def values(self) -> list[float]:
        """Everything that must have room on the axis."""
        points = [point for _, row in self.rows for point in row.values()]
        found = [one for point in points for one in point if one is not None]
        found += [] if self.mark is None else [self.mark]
        return [one for one in found if one > 0] if self.log else found

    def drawable(self, row: Mapping[str, Point]) -> dict[str, Point]:
        """The points that the axis can show, in the order of the series. A logarithm has no place for 0."""
        return {name: row[name] for name in self.series if name in row and (row[name].value > 0 or not self.log)}

    def used(self) -> tuple[str, ...]:
        """The series of which there is a point."""
        return tuple(name for name in self.series if any(name in self.drawable(row) for _, row in self.rows))


@dataclass(frozen=True, slots=True)
class Scale:
    """Values to places between 0 and 1, and where the axis bears marks."""

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...] = field(default=())

    def at(self, value: float) -> float:
        """Where a value stands; one beyond the axis at its end."""
        if self.log:
            value = max(value, self.low)
            place = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            place = (value - self.low) / (self.high - self.low)
        return min(1.0, max(0.0, place))


def scale(chart: Chart) -> Scale:
    """An axis with room for all of a chart."""
    values = chart.values()
    return _log_scale(values) if chart.log else _linear_scale(values)


def _log_scale(values: Iterable[float]) -> Scale:
    found = list(values) or [1.0]
    low, high = min(found), max(found)
    if high / low < 1.5:
        low, high = low / 1.25, high * 1.25
    ends = (low / (high / low) ** 0.03, high * (high / low) ** 0.03)
    steps = (1.0,) if high / low > 50 else (1.0, 2.0, 5.0) if high / low > 3 else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
    decades = range(math.floor(math.log10(ends[0])), math.ceil(math.log10(ends[1])) + 1)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    shown = [tick for tick in ticks if ends[0] <= tick <= ends[1]]
    while len(shown) > 9:
        shown = shown[::2]
    return Scale(*ends, True, tuple(shown))


def _linear_scale(values: Iterable[float]) -> Scale:
    found = list(values) or [1.0]
    low, high = min(0.0, *found), max(0.0, *found)
    if high == low:
        high = low + 1.0
    rough = (high - low) / 5
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
    first, last = math.floor(low / step), math.ceil(high / step - 1e-9)
    ticks = tuple(step * number for number in range(first, last + 1))
    return Scale(ticks[0], ticks[-1], False, ticks)
