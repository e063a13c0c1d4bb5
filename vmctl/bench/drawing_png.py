"""A drawing as PNG: the only module that imports Pillow, which brings a font of its own."""

from __future__ import annotations

import io
from functools import cache
from typing import TYPE_CHECKING

from vmctl.bench.drawing import PAPER, Drawing, Line, Shape, Text

if TYPE_CHECKING:
    from PIL import ImageDraw, ImageFont

_SCALE = 2  # pixels to a unit of the drawing: sharp on screens of today
_FINER = 2  # drawn that much larger and made small again: Pillow's strokes are not smoothed by themselves
# The font that Pillow brings has the letters of ASCII; these stand for the signs that charts have beside them.
_SIGNS = str.maketrans({"×": "x", "µ": "u", "–": "-", "·": "-"})
_ANCHORS = {"start": "ls", "middle": "ms", "end": "rs"}


@cache
def _font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def png(drawing: Drawing) -> bytes:
    """The picture, in PNG's bytes."""
    from PIL import Image, ImageDraw

    factor = _SCALE * _FINER
    image = Image.new("RGB", (round(drawing.width * factor), round(drawing.height * factor)), PAPER)
    pen = ImageDraw.Draw(image)
    for item in drawing.items:
        _put(pen, item, factor)
    image = image.resize((image.width // _FINER, image.height // _FINER), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue()


def _put(pen: ImageDraw.ImageDraw, item: Line | Shape | Text, factor: float) -> None:
    if isinstance(item, Line):
        ends = [value * factor for value in (item.x1, item.y1, item.x2, item.y2)]
        pen.line(ends, fill=item.colour, width=max(1, round(item.width * factor)))
    elif isinstance(item, Text):
        bold = round(0.04 * item.size * factor) if item.bold else 0
        pen.text(
            (item.x * factor, item.y * factor),
            item.words.translate(_SIGNS).encode("ascii", "replace").decode(),
            fill=item.colour,
            font=_font(item.size * factor),
            anchor=_ANCHORS[item.anchor],
            stroke_width=bold,
        )
    elif len(item.places) == 1:
        ((x, y),) = item.places
        pen.ellipse([(value * factor) for value in (x - item.r, y - item.r, x + item.r, y + item.r)], fill=item.colour)
    else:
        pen.polygon([(x * factor, y * factor) for x, y in item.places], fill=item.colour)
