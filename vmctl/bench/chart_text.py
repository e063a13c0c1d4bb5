"""A chart in letters, for terminals. Pure."""

from __future__ import annotations

from vmctl.bench.chart import Chart, Point, Scale, scale
from vmctl.bench.units import tick

_SYMBOLS = "○●▲■◆△□◇"
_LEAST = 24


def text(chart: Chart, width: int = 100) -> str:
    """The chart in that many columns: a line for each row, a symbol for each series, marks below."""
    used = chart.used()
    if not used:
        return f"{chart.title}\n(nothing to show)"
    labels = max(len(label) for label, _ in chart.rows)
    room = max(_LEAST, width - labels - 2)
    axis = scale(chart)
    symbols = {name: _SYMBOLS[number % len(_SYMBOLS)] for number, name in enumerate(used)}
    lines = [chart.title]
    if len(used) > 1:
        lines.append("  ".join(f"{symbols[name]} {name}" for name in used))
    for label, row in chart.rows:
        lines.append(f"{label:<{labels}}  {_row(chart.drawable(row), symbols, axis, room, chart.mark)}".rstrip())
    rule, marks = _axis(axis, chart.unit, room)
    pad = " " * (labels + 2)
    return "\n".join([*lines, pad + rule, (pad + marks).rstrip(), (pad + chart.axis).rstrip()])


def _column(axis: Scale, value: float, room: int) -> int:
    return round(axis.at(value) * (room - 1))


def _row(points: dict[str, Point], symbols: dict[str, str], axis: Scale, room: int, mark: float | None) -> str:
    cells = [" "] * room
    if points:
        ends = [_column(axis, point.value, room) for point in points.values()]
        for column in range(min(ends), max(ends) + 1):
            cells[column] = "·"
    if mark is not None:
        cells[_column(axis, mark, room)] = "│"
    taken: set[int] = set()
    for name, point in points.items():
        at = _column(axis, point.value, room)
        # Where one is already, beside it: rather one column off than not to be seen.
        free = next((one for one in (at, at + 1, at - 1, at + 2, at - 2) if one not in taken and 0 <= one < room), at)
        taken.add(free)
        cells[free] = symbols[name]
    return "".join(cells)


def _axis(axis: Scale, unit: str, room: int) -> tuple[str, str]:
    rule, marks = ["─"] * room, [" "] * room
    free = 0
    for value in axis.ticks:
        at = _column(axis, value, room)
        rule[at] = "┴"
        label = tick(value, unit)
        start = min(max(0, at - len(label) // 2), room - len(label))
        if start >= free:
            marks[start : start + len(label)] = label
            free = start + len(label) + 1
    return "".join(rule), "".join(marks)
