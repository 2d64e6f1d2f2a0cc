"""Captioned emoji scenes, drawn on the fly: a small world of objects, counts, colours and places with a hold-out."""

from __future__ import annotations

import functools
import hashlib
import operator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from genpipe.data.captions import PLAIN_SHARE, Wording, known_words, write_caption
from genpipe.data.glyphs import Glyphs, find_font
from genpipe.data.layout import (
    MAX_COUNT,
    RELATIONS,
    Kind,
    Placement,
    Relation,
    Scene,
    SizeWord,
    place_count,
    place_pair,
    place_single,
)
from genpipe.data.vocabulary import split_words, vocabulary
from genpipe.errors import InputError

__all__ = [
    "EmojiScenes",
    "Example",
    "Placement",
    "Scene",
    "Twins",
    "find_font",
    "is_held_out",
    "known_words",
    "split_words",
]

Split = Literal["train", "heldout", "all"]
Objects = Literal["all", "common"]
TwinKind = Literal["swapped", "recounted", "recoloured", "turned"]

_KIND_ENDS: tuple[tuple[Kind, float], ...] = (("single", 0.25), ("count", 0.55), ("pair", 1.0))  # cumulative shares
_SIZES: tuple[SizeWord | None, ...] = (None, None, "small", "large")
_SMALLEST_PICTURE, _LARGEST_PICTURE = 8, 2048
_RECOLOURED_SHARE = 0.35  # of twins whose kind is left open; scenes that allow nothing else come on top
_COLOUR_JITTER = 8  # levels, of 255, to either side of a background's named colour
_NUMBERS = 16  # uniform numbers drawn at once for a scene: more than any layout takes

_TURNED: dict[Relation, Relation] = {
    "left of": "above",
    "above": "left of",
    "right of": "below",
    "below": "right of",
}

# Independent streams of random numbers of one index.
_SCENE, _CAPTION, _TWIN, _OTHER_SCENE = range(4)


@functools.cache
def _is_combination_held_out(first: str, second: str) -> bool:
    digest = hashlib.sha256(f"genpipe emoji scenes 1: {first} + {second}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % 10 == 0


def _holds_out(objects: tuple[str, ...], background: str) -> bool:
    if len(objects) == 2 and _is_combination_held_out(*sorted(objects)):
        return True
    return any(_is_combination_held_out(name, f"{background} background") for name in objects)


def is_held_out(scene: Scene) -> bool:
    """Whether a scene shows a combination that is kept out of training: the one definition of the hold-out.

    A tenth of all (object, background) combinations and a tenth of all unordered (object, object) combinations are
    held out, by a hash (SHA-256) of their names: the same on every computer, and unchanged for old combinations when
    the vocabulary grows. A scene is held out when at least one of its combinations is.
    """
    return _holds_out(scene.objects, scene.background)


@dataclass(frozen=True, eq=False)
class Example:
    """A drawn and captioned scene; pixels uint8 (size, size, 3), RGB."""

    pixels: np.ndarray
    caption: str
    scene: Scene


@dataclass(frozen=True, eq=False)
class Twins:
    """Two scenes that differ in one fact, with captions of the same wording; pixels uint8 (size, size, 3), RGB.

    kind: "swapped" (a pair's objects have exchanged their places), "recounted" (another number of the same object, in
    a layout of its own, on the same background), "recoloured" (another background, named in both captions) or
    "turned" (a pair side by side is now one above the other, or the other way round).
    """

    kind: TwinKind
    scene: Scene
    twin_scene: Scene
    caption: str
    twin_caption: str
    pixels: np.ndarray
    twin_pixels: np.ndarray


def _whole_number(value: int, what: str, lowest: int, highest: int | None = None) -> int:
    limit = f"at least {lowest}" if highest is None else f"from {lowest} to {highest}"
    try:
        number = operator.index(value)
    except TypeError:
        raise InputError(f"{what} must be a whole number, {limit}, not {value!r}.") from None
    if number < lowest or (highest is not None and number > highest):
        raise InputError(f"{what} must be {limit}, not {number}.")
    return number


def _choice(names: tuple[str, ...], u: float) -> str:
    return names[int(u * len(names))]


class EmojiScenes:
    """An endless data set of emoji scenes: scene number `index` is a pure function of (seed, split, index).

    size: side of the pictures in pixels, 8 to 2048.
    font: path of the colour emoji font; see `find_font`. It is looked for when the first picture is drawn: scenes and
        captions need no font.
    split: "train" (no held-out combination), "heldout" (at least one in each scene) or "all"; see `is_held_out`.
    seed: whole number, zero or more.
    objects: "all", or "common" for the few that differ much in shape and colour; see the vocabulary.
    plain_share: how often a place is told by "left of" or "above" rather than by "right of" or "below", in [0, 1].
    Raises InputError for arguments outside these limits. Instances hold no random state: they can be pickled, shared
    between worker processes and asked in any order.
    """

    def __init__(
        self,
        size: int = 32,
        font: str | Path | None = None,
        split: Split = "train",
        seed: int = 0,
        plain_share: float = PLAIN_SHARE,
        objects: Objects = "all",
    ):
        self.size = _whole_number(size, "The size of a scene in pixels", _SMALLEST_PICTURE, _LARGEST_PICTURE)
        self.seed = _whole_number(seed, "The seed of the scenes", 0)
        if split not in get_args(Split):
            raise InputError(f"The split must be one of {', '.join(get_args(Split))}, not {split!r}.")
        if objects not in get_args(Objects):
            raise InputError(f"The objects must be one of {', '.join(get_args(Objects))}, not {objects!r}.")
        if not 0 <= plain_share <= 1:
            raise InputError(f"The share of plain relations must be from 0 to 1, not {plain_share!r}.")
        self.split: Split = split
        self.plain_share = plain_share
        self.objects = tuple(name for name, words in vocabulary().objects.items() if words.common or objects == "all")
        self.backgrounds = tuple(vocabulary().backgrounds)
        self._glyphs = Glyphs(font)

    def _generator(self, index: int, stream: int) -> np.random.Generator:
        index = _whole_number(index, "The index of a scene", 0)
        return np.random.default_rng((self.seed, get_args(Split).index(self.split), index, stream))

    def scene(self, index: int) -> Scene:
        """Scene number `index` (0, 1, 2, ... without end). Raises InputError for a negative index."""
        return self._sample(self._generator(index, _SCENE))

    def _sample(self, generator: np.random.Generator, asked: Kind | None = None) -> Scene:
        """Draw a scene: its kind first, then combinations until the split allows one, so that kinds keep shares."""
        kind_number, detail, *rest = generator.random(_NUMBERS).tolist()
        numbers = iter(rest)
        kind: Kind = next(name for name, end in _KIND_ENDS if kind_number < end)
        if asked is not None:
            kind = asked
        objects, background, jitter = self._combine(generator, kind)
        colour = self._vary(background, jitter)
        if kind == "pair":
            relation = RELATIONS[int(detail * len(RELATIONS))]
            placements = place_pair((objects[0], objects[1]), relation, numbers)
            return Scene(kind, objects, 1, background, relation, None, placements, colour)
        if kind == "count":
            count = 2 + int(detail * (MAX_COUNT - 1))
            placements = place_count(objects[0], count, numbers)
            return Scene(kind, objects, count, background, None, None, placements, colour)
        size = _SIZES[int(detail * len(_SIZES))]
        return Scene(kind, objects, 1, background, None, size, place_single(objects[0], size, numbers), colour)

    def _combine(self, generator: np.random.Generator, kind: Kind) -> tuple[tuple[str, ...], str, list[float]]:
        """Objects and background on the split's side of the hold-out, and three more uniform numbers."""
        while True:
            first, second, third, *more = generator.random(6).tolist()
            objects: tuple[str, ...] = (_choice(self.objects, first),)
            if kind == "pair":
                objects = (*objects, _choice(self.objects, second))
                if objects[0] == objects[1]:
                    continue
            background = _choice(self.backgrounds, third)
            if self.split == "all" or _holds_out(objects, background) == (self.split == "heldout"):
                return objects, background, more

    def _vary(self, background: str, numbers: list[float]) -> tuple[int, int, int]:
        """The background's colour, each channel moved a little; the extremes are clipped."""
        named = vocabulary().backgrounds[background].colour
        levels = 2 * _COLOUR_JITTER + 1
        red, green, blue = (
            min(max(level - _COLOUR_JITTER + int(u * levels), 0), 255) for level, u in zip(named, numbers, strict=True)
        )
        return red, green, blue

    def draw(self, scene: Scene) -> np.ndarray:
        """The picture of a scene, uint8 (size, size, 3), RGB.

        Objects are upright, whole and inside the picture; sizes and places are rounded to whole pixels. Raises
        InputError when the font is missing or an object is not in the vocabulary.
        """
        side = self.size
        pixels = np.empty((side, side, 3), dtype=np.uint8)
        pixels[:] = scene.colour
        for placement in scene.placements:
            words = vocabulary().objects.get(placement.object)
            if words is None:
                raise InputError(f"There is no object {placement.object!r} in the emoji scenes' vocabulary.")
            colour, keep = self._glyphs.scaled(words.glyph, min(max(round(placement.size * side), 1), side))
            height, width = keep.shape[:2]
            left = min(max(round(placement.x * side - width / 2), 0), side - width)
            top = min(max(round(placement.y * side - height / 2), 0), side - height)
            patch = pixels[top : top + height, left : left + width]
            rest = np.multiply(keep, patch, dtype=np.uint16)
            rest += 127
            rest //= 255
            np.add(rest, colour, out=patch, casting="unsafe")
        return pixels

    def caption(self, scene: Scene, generator: np.random.Generator, mention_background: bool | None = None) -> str:
        """An English caption of the scene, lower-case, at most about 20 words.

        mention_background: None names the background for three captions in four; True always, False never.
        """
        wording = Wording.draw(generator)
        return write_caption(scene, wording, mention_background, False, self.plain_share)

    def example(self, index: int) -> Example:
        """Scene number `index` drawn and captioned."""
        scene = self.scene(index)
        return Example(self.draw(scene), self.caption(scene, self._generator(index, _CAPTION)), scene)

    def batch(self, first_index: int, n: int) -> tuple[np.ndarray, list[str]]:
        """Examples first_index, ..., first_index + n - 1: pixels uint8 (n, 3, size, size) and n captions."""
        n = _whole_number(n, "The number of scenes in a batch", 1)
        examples = [self.example(first_index + i) for i in range(n)]
        pixels = np.stack([example.pixels for example in examples])
        return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)), [example.caption for example in examples]

    def twins(self, index: int, kind: TwinKind | None = None) -> Twins:
        """Scene number `index` and its twin, which differs in one fact only; both drawn, captioned with one wording.

        kind: None takes a kind that suits the scene. A kind that does not suit it (only pairs can be swapped or turned,
        only counts and medium-sized single objects recounted) takes another scene, which is as fixed for (seed, split,
        index). The twin of a "train" scene is never a held-out combination. Raises InputError for another kind.
        """
        if kind is not None and kind not in get_args(TwinKind):
            raise InputError(f"The kind of twins must be one of {', '.join(get_args(TwinKind))}, not {kind!r}.")
        scene = self.scene(index)
        generator = self._generator(index, _TWIN)
        may_recount = scene.kind == "count" or (scene.kind == "single" and scene.size is None)
        recolour_number = generator.random()
        if kind is None:
            kind = "swapped" if scene.kind == "pair" else "recounted" if may_recount else "recoloured"
            if recolour_number < _RECOLOURED_SHARE:
                kind = "recoloured"
        elif kind in ("swapped", "turned") and scene.kind != "pair":
            scene = self._sample(self._generator(index, _OTHER_SCENE), "pair")
        elif kind == "recounted" and not may_recount:
            scene = self._sample(self._generator(index, _OTHER_SCENE), "count")
        change = {
            "swapped": self._swap,
            "recounted": self._recount,
            "recoloured": self._recolour,
            "turned": self._turn,
        }
        twin_scene = change[kind](scene, generator)
        wording = Wording.draw(generator)
        mention = True if kind == "recoloured" else None
        placed = kind in ("swapped", "turned")
        caption, twin_caption = (
            write_caption(s, wording, mention, placed, self.plain_share) for s in (scene, twin_scene)
        )
        return Twins(kind, scene, twin_scene, caption, twin_caption, self.draw(scene), self.draw(twin_scene))

    def _swap(self, scene: Scene, generator: np.random.Generator) -> Scene:
        """The pair's objects exchanged: each takes the other's place and size."""
        first, second = scene.placements
        exchanged = (
            Placement(second.object, first.x, first.y, first.size),
            Placement(first.object, second.x, second.y, second.size),
        )
        return replace(scene, objects=scene.objects[::-1], placements=exchanged)

    def _turn(self, scene: Scene, generator: np.random.Generator) -> Scene:
        """The same pair along the other axis, in a new layout on the same background.

        What came first comes first again, so that captions of one wording name the two in the same order.
        """
        assert scene.relation is not None
        relation = _TURNED[scene.relation]
        numbers = iter(generator.random(_NUMBERS).tolist())
        placements = place_pair((scene.objects[0], scene.objects[1]), relation, numbers)
        return replace(scene, relation=relation, placements=placements)

    def _recount(self, scene: Scene, generator: np.random.Generator) -> Scene:
        """Another number of the object, 1 to 4, in a new layout on the same background."""
        numbers = iter(generator.random(_NUMBERS).tolist())
        others = [count for count in range(1, MAX_COUNT + 1) if count != scene.count]
        count = others[int(next(numbers) * len(others))]
        name = scene.objects[0]
        if count == 1:
            return replace(scene, kind="single", count=1, placements=place_single(name, None, numbers))
        return replace(scene, kind="count", count=count, placements=place_count(name, count, numbers))

    def _recolour(self, scene: Scene, generator: np.random.Generator) -> Scene:
        """Another background under the same objects; in training, one that is not held out with any of them."""
        others = tuple(
            name
            for name in self.backgrounds
            if name != scene.background and not (self.split == "train" and _holds_out(scene.objects, name))
        )
        choice, *jitter = generator.random(4).tolist()
        background = _choice(others, choice)
        return replace(scene, background=background, colour=self._vary(background, jitter))
