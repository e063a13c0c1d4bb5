"""A chart as strokes, filled shapes and words at places, and these as SVG. What draws PNG draws the same. Pure.

Colours are those of Okabe and Ito (2008), which people with any kind of colour blindness tell apart; each series has a
shape of its own besides.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import NamedTuple

from vmctl.bench.chart import Chart, Point, Scale, scale
from vmctl.bench.units import tick, told

INK, FAINT, PAPER = "#222222", "#d8d8d8", "#ffffff"
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
WIDTH = 860
_LETTER = 6.7  # mean width at size 12, on the safe side
_SIZE, _TITLE = 12, 15
_VALUE_ROOM = 64
_LANE, _GAP, _R = 12.5, 9, 4.2


@dataclass(frozen=True, slots=True)
class Line:
    """A straight stroke."""

    x1: float
    y1: float
    x2: float
    y2: float
    colour: str
    width: float = 1.0


@dataclass(frozen=True, slots=True)
class Shape:
    """A filled polygon, or with one place a disc of radius ``r``."""

    places: tuple[tuple[float, float], ...]
    colour: str
    r: float = 0.0


@dataclass(frozen=True, slots=True)
class Text:
    """Words whose base line begins, is centred or ends (start, middle, end) at a place."""

    x: float
    y: float
    words: str
    anchor: str = "start"
    size: float = _SIZE
    colour: str = INK
    bold: bool = False


Item = Line | Shape | Text


@dataclass(frozen=True, slots=True)
class Drawing:
    """Items, later ones above earlier ones, on paper of a size."""

    width: float
    height: float
    items: tuple[Item, ...]


def _polygon(x: float, y: float, corners: int, turn: float, r: float = _R * 1.2) -> tuple[tuple[float, float], ...]:
    angles = [turn + 2 * math.pi * number / corners for number in range(corners)]
    return tuple((x + r * math.sin(angle), y - r * math.cos(angle)) for angle in angles)


def _symbol(number: int, x: float, y: float) -> Shape:
    """The shape of a series, by its number."""
    colour = COLOURS[number % len(COLOURS)]
    kind = number % 6
    if kind == 0:
        return Shape(((x, y),), colour, _R)
    corners, turn = ((3, 0.0), (4, math.pi / 4), (4, 0.0), (3, math.pi), (5, 0.0))[kind - 1]
    return Shape(_polygon(x, y, corners, turn), colour)


class _Frame(NamedTuple):
    """Where the axis lies."""

    left: float
    right: float
    axis: Scale

    def x(self, value: float) -> float:
        return self.left + self.axis.at(value) * (self.right - self.left)


def draw(chart: Chart) -> Drawing:
    """The chart as a drawing. A series keeps its colour and shape whether or not others have points."""
    used = chart.used()
    items: list[Item] = [Text(0, 18, chart.title, size=_TITLE, bold=True)]
    y = 32.0
    if len(used) > 1:
        legend, y = _legend(chart, used, y)
        items += legend
    top = y + 4
    labels = max((len(label) for label, _ in chart.rows), default=0) * _LETTER
    frame = _Frame(min(labels, WIDTH * 0.4) + 14, WIDTH - _VALUE_ROOM, scale(chart))
    heights = [len(chart.drawable(row) or (0,)) * _LANE + _GAP for _, row in chart.rows]
    bottom = top + sum(heights)
    items += _grid(chart, frame, top, bottom)
    y = top
    for (label, row), height in zip(chart.rows, heights, strict=True):
        items.append(Line(0, y + height, frame.right, y + height, "#eeeeee"))
        items.append(Text(frame.left - 8, y + height / 2 + 4, label, anchor="end"))
        items += _points(chart, row, frame, y + _GAP / 2)
        y += height
    items.append(Text((frame.left + frame.right) / 2, bottom + 34, chart.axis, anchor="middle"))
    return Drawing(WIDTH, bottom + 42, tuple(items))


def _legend(chart: Chart, used: Sequence[str], y: float) -> tuple[list[Item], float]:
    items: list[Item] = []
    x = 4.0
    for name in used:
        width = 18 + len(name) * _LETTER + 14
        if x + width > WIDTH and x > 4:
            x, y = 4.0, y + 18
        items += [_symbol(chart.series.index(name), x + 4, y + 4), Text(x + 14, y + 8, name)]
        x += width
    return items, y + 18


def _grid(chart: Chart, frame: _Frame, top: float, bottom: float) -> list[Item]:
    items: list[Item] = []
    for value in frame.axis.ticks:
        x = frame.x(value)
        items += [
            Line(x, top, x, bottom, FAINT),
            Text(x, bottom + 16, tick(value, chart.unit), anchor="middle", size=11),
        ]
    if chart.mark is not None:
        items.append(Line(frame.x(chart.mark), top, frame.x(chart.mark), bottom, "#777777", 1.5))
    return [*items, Line(frame.left, bottom, frame.right, bottom, INK)]


def _points(chart: Chart, row: Mapping[str, Point], frame: _Frame, y: float) -> list[Item]:
    items: list[Item] = []
    for lane, (name, point) in enumerate(chart.drawable(row).items()):
        at, colour = y + lane * _LANE + _LANE / 2, COLOURS[chart.series.index(name) % len(COLOURS)]
        if point.low is not None and point.high is not None:
            items.append(Line(frame.x(max(point.low, frame.axis.low)), at, frame.x(point.high), at, colour, 2))
        items.append(_symbol(chart.series.index(name), frame.x(point.value), at))
        items.append(Text(frame.right + 8, at + 4, told(point.value, chart.unit), size=10.5))
    return items


def stacked(drawings: Sequence[Drawing], *, margin: float = 20) -> Drawing:
    """Several drawings below each other on one sheet."""
    items: list[Item] = []
    y = margin
    for one in drawings:
        items += [_moved(item, margin, y) for item in one.items]
        y += one.height + margin
    return Drawing(max((one.width for one in drawings), default=0) + 2 * margin, y, tuple(items))


def _moved(item: Item, dx: float, dy: float) -> Item:
    if isinstance(item, Line):
        return replace(item, x1=item.x1 + dx, x2=item.x2 + dx, y1=item.y1 + dy, y2=item.y2 + dy)
    if isinstance(item, Shape):
        return replace(item, places=tuple((x + dx, y + dy) for x, y in item.places))
    return replace(item, x=item.x + dx, y=item.y + dy)


def svg(drawing: Drawing, title: str) -> str:
    """As an SVG element (W3C, SVG 1.1) to stand in a page; ``title`` is what is read out in its place."""
    size = f'viewBox="0 0 {drawing.width:g} {drawing.height:g}" width="{drawing.width:g}" height="{drawing.height:g}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" font-family="sans-serif">'
    return "\n".join([head, f"<title>{escape(title)}</title>", *_elements(drawing.items), "</svg>"])


def _elements(items: Iterable[Item]) -> list[str]:
    return [_element(item) for item in items]


def _element(item: Item) -> str:
    if isinstance(item, Line):
        ends = f'x1="{item.x1:.1f}" y1="{item.y1:.1f}" x2="{item.x2:.1f}" y2="{item.y2:.1f}"'
        return f'<line {ends} stroke="{item.colour}" stroke-width="{item.width:g}"/>'
    if isinstance(item, Text):
        weight = ' font-weight="bold"' if item.bold else ""
        place = f'x="{item.x:.1f}" y="{item.y:.1f}" text-anchor="{item.anchor}" font-size="{item.size:g}"'
        return f'<text {place} fill="{item.colour}"{weight}>{escape(item.words)}</text>'
    if len(item.places) == 1:
        ((x, y),) = item.places
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{item.r:g}" fill="{item.colour}"/>'
    corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in item.places)
    return f'<polygon points="{corners}" fill="{item.colour}"/>'
