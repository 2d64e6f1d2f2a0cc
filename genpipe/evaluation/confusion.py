"""A confusion matrix as a picture that stays readable with hundreds of classes."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from genpipe.errors import InputError

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

MAX_CLASSES = 2000
_LARGEST_SIDE = 3600  # pixels of the matrix, where classes are many
_LARGEST_CELL, _SMALLEST_NAMED_CELL, _SMALLEST_NUMBERED_CELL = 56, 8, 28
_LARGEST_FONT = 14
_NAME_LIMIT = 200  # pixels of a name
_MARGIN = 10
_RIGHT, _WRONG = np.array([20, 80, 160]), np.array([190, 30, 30])  # a whole row in one cell
_EMPTY, _WHITE, _LINE, _INK = (236, 236, 236), (255, 255, 255), (215, 215, 215), (0, 0, 0)
_BAND = (246, 246, 250)  # every other block of rows, to lead the eye
_BLOCK = 5


def draw_confusion(names: Sequence[str], confusions: Mapping[tuple[int, int], int]) -> Image.Image:
    """`confusions[true, chosen]` pictures -> RGB picture: a row for each true class, a column for each chosen one.

    The depth of a cell's colour is its share of the row (blue on the diagonal, red elsewhere; even one picture of
    hundreds shows), rows without pictures are grey. Large cells also hold the number. Raises InputError for more than
    2,000 classes.
    """
    count = len(names)
    if count > MAX_CLASSES:
        raise InputError(f"A confusion matrix of {count:,} classes cannot be drawn, the limit is {MAX_CLASSES:,}.")
    cell = max(1, min(_LARGEST_CELL, _LARGEST_SIDE // count, max(_SMALLEST_NAMED_CELL + 4, 900 // count)))
    side = cell * count
    font = ImageFont.load_default(min(_LARGEST_FONT, cell + 1))
    heading = ImageFont.load_default(_LARGEST_FONT)
    shown = [_shortened(name, font) for name in names] if cell >= _SMALLEST_NAMED_CELL else []
    room = math.ceil(max((font.getlength(name) for name in shown), default=0)) + 2 * _MARGIN
    top = room + 3 * _LARGEST_FONT
    both_ends = side > 1200  # far from the names, so they stand on all four sides
    right, bottom = (room, room) if both_ends else (_MARGIN, _MARGIN)

    total, right_ones = sum(confusions.values()), sum(n for (true, chosen), n in confusions.items() if true == chosen)
    title = f"rows: true class, columns: first choice; {right_ones:,} of {total:,} pictures right (blue), errors red"
    width = max(room + side + right, math.ceil(heading.getlength(title)) + 2 * _MARGIN)

    picture = Image.new("RGB", (width, top + side + bottom), _WHITE)
    cells = Image.fromarray(_colours(count, confusions, bands=cell < _SMALLEST_NUMBERED_CELL))
    picture.paste(cells.resize((side, side), Image.Resampling.NEAREST), (room, top))
    draw = ImageDraw.Draw(picture)
    _draw_lines(draw, count, cell, room, top)
    for number, name in enumerate(shown):
        middle = top + (number + 0.5) * cell
        draw.text((room - 4, middle), name, _INK, font, anchor="rm")
        if both_ends:
            draw.text((room + side + 4, middle), name, _INK, font, anchor="lm")
    if shown:
        picture.paste(_upright(shown, font, cell, room), (room, top - room))
        if both_ends:
            picture.paste(_upright(shown, font, cell, room, below=True), (room, top + side))
    if cell >= _SMALLEST_NUMBERED_CELL:
        _draw_numbers(draw, confusions, cell, room, top)
    draw.text((_MARGIN, _MARGIN), title, _INK, heading)
    return picture


def _colours(count: int, confusions: Mapping[tuple[int, int], int], bands: bool) -> np.ndarray:
    """One pixel per cell, uint8 (C, C, 3)."""
    totals = np.zeros(count)
    for (true, _), number in confusions.items():
        totals[true] += number
    levels = np.empty((count, count, 3), dtype=np.uint8)
    levels[:] = _WHITE
    if bands:
        levels[np.arange(count) // _BLOCK % 2 == 1] = _BAND
    levels[totals == 0] = _EMPTY
    for (true, chosen), number in confusions.items():
        depth = 0.25 + 0.75 * math.sqrt(number / totals[true])
        full = _RIGHT if true == chosen else _WRONG
        levels[true, chosen] = np.rint(np.array(_WHITE) * (1 - depth) + full * depth)
    return levels


def _draw_lines(draw: ImageDraw.ImageDraw, count: int, cell: int, left: int, top: int) -> None:
    side = cell * count
    draw.rectangle([(left - 1, top - 1), (left + side, top + side)], outline=_LINE)
    if cell < _SMALLEST_NAMED_CELL:
        return
    for offset in range(0, side, cell * (1 if cell >= _SMALLEST_NUMBERED_CELL else _BLOCK)):
        draw.line([(left + offset, top), (left + offset, top + side)], _LINE)
        draw.line([(left, top + offset), (left + side, top + offset)], _LINE)


def _draw_numbers(
    draw: ImageDraw.ImageDraw, confusions: Mapping[tuple[int, int], int], cell: int, left: int, top: int
) -> None:
    for (true, chosen), number in confusions.items():
        text = f"{number:,}"
        font = ImageFont.load_default(max(8, min(_LARGEST_FONT, cell * 3 // (2 * len(text)))))
        place = (left + (chosen + 0.5) * cell, top + (true + 0.5) * cell)
        draw.text(place, text, _WHITE, font, anchor="mm", stroke_width=1, stroke_fill=_INK)


def _upright(names: Sequence[str], font: Font, cell: int, room: int, below: bool = False) -> Image.Image:
    """The names of the columns, to be read from below, touching the matrix from above or from below it."""
    strip = Image.new("RGB", (room, cell * len(names)), _WHITE)
    draw = ImageDraw.Draw(strip)
    for number, name in enumerate(names):
        x, anchor = (room - 4, "rm") if below else (4, "lm")
        draw.text((x, (number + 0.5) * cell), name, _INK, font, anchor=anchor)
    return strip.transpose(Image.Transpose.ROTATE_90)


def _shortened(name: str, font: Font, limit: int = _NAME_LIMIT) -> str:
    if font.getlength(name) <= limit:
        return name
    while name and font.getlength(name + "...") > limit:
        name = name[:-1]
    return name + "..."
