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


# Marks within a decade, from few to many. One mark, or two, do not show how far a logarithmic axis reaches.
_LOG_STEPS = ((1.0,), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0))
_LEAST_TICKS = 3


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
    shown: list[float] = []
    for steps in _LOG_STEPS:
        decades = range(math.floor(math.log10(ends[0])), math.ceil(math.log10(ends[1])) + 1)
        ticks = (step * 10.0**decade for decade in decades for step in steps)
        shown = [tick for tick in ticks if ends[0] <= tick <= ends[1]]
        if len(shown) >= _LEAST_TICKS:
            break
    else:
        step = _step((ends[1] - ends[0]) / 8)
        numbers = range(math.ceil(ends[0] / step), math.floor(ends[1] / step) + 1)
        shown = [step * number for number in numbers]
    while len(shown) > 9:
        shown = shown[::2]
    return Scale(*ends, True, tuple(shown))


def _linear_scale(values: Iterable[float]) -> Scale:
    found = list(values) or [1.0]
    low, high = min(0.0, *found), max(0.0, *found)
    if high == low:
        high = low + 1.0
    step = _step((high - low) / 5)
    first, last = math.floor(low / step), math.ceil(high / step - 1e-9)
    ticks = tuple(step * number for number in range(first, last + 1))
    return Scale(ticks[0], ticks[-1], False, ticks)


def _step(rough: float) -> float:
    """The round number next to it, from above."""
    size = 10.0 ** math.floor(math.log10(rough))
    return next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
