"""What an emoji scene is, and where its objects go: one object, the same object two to four times, or two objects."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["single", "count", "pair"]
Relation = Literal["left of", "right of", "above", "below"]
SizeWord = Literal["small", "large"]
Attributes = tuple[str | None, ...]  # see Scene

RELATIONS: tuple[Relation, ...] = ("left of", "right of", "above", "below")
INVERSE: dict[Relation, Relation] = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
}
MAX_COUNT = 4
NUMBERS = 16  # uniform numbers drawn at once for a scene: more than any layout takes

# Longer side of a glyph as a share of the picture, (lowest, highest). Several objects never touch a neighbour's cell.
SINGLE_SIZES: dict[SizeWord | None, tuple[float, float]] = {
    "small": (0.35, 0.45),
    None: (0.60, 0.75),
    "large": (0.85, 0.95),
}
COUNT_SIZES = {2: (0.42, 0.47), 3: (0.38, 0.44), 4: (0.36, 0.42)}
PAIR_SIZES = (0.42, 0.48)
_GAP = 0.02  # free share of the picture between two neighbours
_PAIR_SLANT = 0.05  # a pair leaves its common row or column by at most this to either side


@dataclass(frozen=True)
class Placement:
    """One object in the picture: centre (x to the right, y down) and longer side, as shares of the picture's side."""

    object: str
    x: float
    y: float
    size: float


@dataclass(frozen=True)
class Scene:
    """What a picture shows.

    kind: "single" (one object), "count" (the same object 2 to 4 times) or "pair" (two different objects).
    objects: the one object's name, or the pair's two names; a pair reads "objects[0] relation objects[1]".
    size: "small" or "large" for a single object that is, None for the medium size and for the other kinds.
    background: name of its colour; "" for a blend of two colours, which has none.
    colour: RGB, 0 to 255, of the background as drawn: the named colour, slightly varied, or the blend.
    attributes: of each of `objects`, one of genpipe.data.styles' or None for the emoji as it is; () where all are so.
    """

    kind: Kind
    objects: tuple[str, ...]
    count: int
    background: str
    relation: Relation | None
    size: SizeWord | None
    placements: tuple[Placement, ...]
    colour: tuple[int, int, int]
    attributes: Attributes = ()

    def attribute_of(self, name: str) -> str | None:
        """The attribute of the object of this name."""
        return dict(zip(self.objects, self.attributes, strict=False)).get(name)


def _between(u: float, lowest: float, highest: float) -> float:
    return lowest + u * (highest - lowest)


def place_single(name: str, size: SizeWord | None, numbers: Iterator[float]) -> tuple[Placement, ...]:
    """One object near the middle. Takes 3 of `numbers`, uniform in [0, 1)."""
    side = _between(next(numbers), *SINGLE_SIZES[size])
    play = min(0.15, (1 - side) / 2)
    x, y = (_between(next(numbers), 0.5 - play, 0.5 + play) for _ in range(2))
    return (Placement(name, x, y, side),)


# Cells, half the picture a side, by their centres (column, row); a centre of 0.5 leaves play to both sides.
_CELLS: dict[int, tuple[tuple[tuple[float, float], ...], ...]] = {
    2: (
        ((0.25, 0.5), (0.75, 0.5)),
        ((0.5, 0.25), (0.5, 0.75)),
        ((0.25, 0.25), (0.75, 0.75)),
        ((0.75, 0.25), (0.25, 0.75)),
    ),
    3: (
        ((0.5, 0.25), (0.25, 0.75), (0.75, 0.75)),
        ((0.25, 0.25), (0.75, 0.25), (0.5, 0.75)),
        ((0.25, 0.5), (0.75, 0.25), (0.75, 0.75)),
        ((0.25, 0.25), (0.25, 0.75), (0.75, 0.5)),
    ),
    4: (((0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)),),
}


def place_count(name: str, count: int, numbers: Iterator[float]) -> tuple[Placement, ...]:
    """The same object 2 to 4 times at one size, without overlap. Takes 2 + 2 * count of `numbers`."""
    side = _between(next(numbers), *COUNT_SIZES[count])
    choices = _CELLS[count]
    cells = choices[int(next(numbers) * len(choices))]
    play = (0.5 - side - _GAP) / 2

    def jitter(centre: float) -> float:
        reach = play if centre != 0.5 else 0.1
        return _between(next(numbers), centre - reach, centre + reach)

    return tuple(Placement(name, jitter(column), jitter(row), side) for column, row in cells)


def place_pair(objects: tuple[str, str], relation: Relation, numbers: Iterator[float]) -> tuple[Placement, ...]:
    """Two objects in a row or column, so that objects[0] `relation` objects[1] holds. Takes 7 of `numbers`."""
    sides = [_between(next(numbers), *PAIR_SIZES) for _ in range(2)]
    middle = _between(next(numbers), 0.4, 0.6)
    along, across = [], []
    for centre, side in zip((0.25, 0.75), sides, strict=True):
        along.append(_between(next(numbers), centre - (0.5 - side) / 2, centre + (0.5 - side) / 2))
        across.append(_between(next(numbers), middle - _PAIR_SLANT, middle + _PAIR_SLANT))
    first, second = (0, 1) if relation in ("left of", "above") else (1, 0)
    flat = relation in ("left of", "right of")

    def at(name: str, i: int) -> Placement:
        x, y = (along[i], across[i]) if flat else (across[i], along[i])
        return Placement(name, x, y, sides[i])

    return at(objects[0], first), at(objects[1], second)
