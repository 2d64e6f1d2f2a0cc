"""Twins of emoji scenes, and the changes that make one, as functions of scene and generator alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from genpipe.data.layout import (
    MAX_COUNT,
    NUMBERS,
    Placement,
    Relation,
    Scene,
    place_count,
    place_pair,
    place_single,
)

TwinKind = Literal["swapped", "recounted", "recoloured", "turned", "renamed"]

_TURNED: dict[Relation, Relation] = {
    "left of": "above",
    "above": "left of",
    "right of": "below",
    "below": "right of",
}


@dataclass(frozen=True, eq=False)
class Twins:
    """Two scenes that differ in one fact, with captions of the same wording; pixels uint8 (size, size, 3), RGB.

    kind: "swapped" (a pair's objects have exchanged their places), "recounted" (another number of the same object, in
    a layout of its own, on the same background), "recoloured" (another background, named in both captions),
    "turned" (a pair side by side is now one above the other, or the other way round) or "renamed" (another object in
    the place of one).
    """

    kind: TwinKind
    scene: Scene
    twin_scene: Scene
    caption: str
    twin_caption: str
    pixels: np.ndarray
    twin_pixels: np.ndarray


def swap(scene: Scene, generator: np.random.Generator) -> Scene:
    """The pair's objects exchanged, each with its attribute: each takes the other's place and size."""
    first, second = scene.placements
    exchanged = (
        Placement(second.object, first.x, first.y, first.size),
        Placement(first.object, second.x, second.y, second.size),
    )
    attributes = scene.attributes[::-1]
    return replace(scene, objects=scene.objects[::-1], placements=exchanged, attributes=attributes)


def turn(scene: Scene, generator: np.random.Generator) -> Scene:
    """The same pair along the other axis, in a new layout on the same background.

    What came first comes first again, so that captions of one wording name the two in the same order.
    """
    assert scene.relation is not None
    relation = _TURNED[scene.relation]
    numbers = iter(generator.random(NUMBERS).tolist())
    placements = place_pair((scene.objects[0], scene.objects[1]), relation, numbers)
    return replace(scene, relation=relation, placements=placements)


def recount(scene: Scene, generator: np.random.Generator) -> Scene:
    """Another number of the object, 1 to 4, in a new layout on the same background."""
    numbers = iter(generator.random(NUMBERS).tolist())
    others = [count for count in range(1, MAX_COUNT + 1) if count != scene.count]
    count = others[int(next(numbers) * len(others))]
    name = scene.objects[0]
    if count == 1:
        return replace(scene, kind="single", count=1, placements=place_single(name, None, numbers))
    return replace(scene, kind="count", count=count, placements=place_count(name, count, numbers))


def rename(scene: Scene, old: str, new: str) -> Scene:
    """The object `new` wherever `old` was, of the same size and with its attribute."""
    placements = tuple(replace(each, object=new) if each.object == old else each for each in scene.placements)
    return replace(scene, objects=tuple(new if name == old else name for name in scene.objects), placements=placements)
