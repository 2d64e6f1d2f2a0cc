"""Captioned emoji scenes, drawn on the fly: a small world of objects, counts, colours and places with a hold-out."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from genpipe.data.backgrounds import blend, named_colours, nearest_name, vary
from genpipe.data.captions import PLAIN_SHARE, UNPLACED_SHARE, Wording, known_words, write_caption
from genpipe.data.glyphs import Glyphs, find_font
from genpipe.data.holdout import holds_out, is_held_out
from genpipe.data.layout import (
    MAX_COUNT,
    NUMBERS,
    RELATIONS,
    Attributes,
    Kind,
    Placement,
    Scene,
    SizeWord,
    place_count,
    place_pair,
    place_single,
)
from genpipe.data.likeness import Likeness
from genpipe.data.styles import draw_attributes, shows_on
from genpipe.data.twins import TwinKind, Twins, recount, rename, swap, turn
from genpipe.data.vocabulary import choices, split_words, vocabulary
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
Objects = Literal["all", "common", "mixed"]

_KIND_ENDS: tuple[tuple[Kind, float], ...] = (("single", 0.25), ("count", 0.55), ("pair", 1.0))  # cumulative shares
_SIZES: tuple[SizeWord | None, ...] = (None, None, "small", "large")
_SMALLEST_PICTURE, _LARGEST_PICTURE = 8, 2048
_RECOLOURED_SHARE = 0.35  # of twins whose kind is left open; scenes that allow nothing else come on top
_STYLED_SHARE = 0.5  # of objects that have an attribute, where there are styles
_ALIKE = 6  # objects among which a renamed one's likes are chosen

# Independent streams of random numbers of one index.
_SCENE, _CAPTION, _TWIN, _OTHER_SCENE, _STYLE, _OTHER_STYLE, _FAINT, _BLEND = range(8)


@dataclass(frozen=True, eq=False)
class Example:
    """A drawn and captioned scene; pixels uint8 (size, size, 3), RGB."""

    pixels: np.ndarray
    caption: str
    scene: Scene


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
    objects: "all", "common" for the few that differ much in shape and colour (see the vocabulary), or "mixed": all, and
        half of the time common ones.
    styles: half of the objects have an attribute, which captions name and some of which are held out with some objects:
        a sketch, a silhouette, pixel art or another colour; see `genpipe.data.styles`.
    plain_share: how often a place is told by "left of" or "above" rather than by "right of" or "below", in [0, 1].
    unplaced_share: of captions of two objects, twins' aside, that do not say where they are, in [0, 1].
    emphasis: names of objects that are drawn three times as often as others.
    faint_share: of scenes in which at least one object has nearly the colours of its background (`Likeness.faint`),
        in [0, 1]; the others are left to chance, which makes a few more of them faint.
    blended_share: of scenes, twins aside, whose background is a blend of two named colours, in [0, 1]; it has no name,
        and captions leave it out. A blend is on the side of the hold-out of the named colour that is nearest to it.
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
        unplaced_share: float = UNPLACED_SHARE,
        objects: Objects = "all",
        styles: bool = False,
        emphasis: Sequence[str] = (),
        faint_share: float = 0.0,
        blended_share: float = 0.0,
    ):
        self.size = _whole_number(size, "The size of a scene in pixels", _SMALLEST_PICTURE, _LARGEST_PICTURE)
        self.seed = _whole_number(seed, "The seed of the scenes", 0)
        if split not in get_args(Split):
            raise InputError(f"The split must be one of {', '.join(get_args(Split))}, not {split!r}.")
        if objects not in get_args(Objects):
            raise InputError(f"The objects must be one of {', '.join(get_args(Objects))}, not {objects!r}.")
        whats = ("plain relations", "pairs without places", "faint scenes", "blended backgrounds")
        for what, share in zip(whats, (plain_share, unplaced_share, faint_share, blended_share), strict=True):
            if not 0 <= share <= 1:
                raise InputError(f"The share of {what} must be from 0 to 1, not {share!r}.")
        self.split: Split = split
        self.faint_share = faint_share
        self.blended_share = blended_share
        self.plain_share = plain_share
        self.unplaced_share = unplaced_share
        self._choices = choices(objects, emphasis)
        self.objects = tuple(dict.fromkeys(self._choices))
        self.backgrounds = tuple(vocabulary().backgrounds)
        self.styles = styles
        self._glyphs = Glyphs(font)
        self._likeness = Likeness(self._glyphs)

    def _generator(self, index: int, stream: int) -> np.random.Generator:
        index = _whole_number(index, "The index of a scene", 0)
        return np.random.default_rng((self.seed, get_args(Split).index(self.split), index, stream))

    def scene(self, index: int) -> Scene:
        """Scene number `index` (0, 1, 2, ... without end). Raises InputError for a negative index."""
        scene = self._named_scene(index)
        generator = self._generator(index, _BLEND)
        return self._blend(scene, generator) if generator.random() < self.blended_share else scene

    def _named_scene(self, index: int) -> Scene:
        faint = self.faint_share > 0 and self._generator(index, _FAINT).random() < self.faint_share
        return self._sample(self._generator(index, _SCENE), self._generator(index, _STYLE), faint=faint)

    def _sample(
        self,
        generator: np.random.Generator,
        style_generator: np.random.Generator,
        asked: Kind | None = None,
        faint: bool = False,
    ) -> Scene:
        """Draw a scene: its kind first, then combinations until the split allows one, so that kinds keep shares."""
        kind_number, detail, *rest = generator.random(NUMBERS).tolist()
        numbers = iter(rest)
        kind = next(name for name, end in _KIND_ENDS if kind_number < end) if asked is None else asked
        objects, attributes, background, jitter = self._combine(generator, style_generator, kind, faint)
        colour = vary(background, jitter)
        if kind == "pair":
            relation = RELATIONS[int(detail * len(RELATIONS))]
            placements = place_pair((objects[0], objects[1]), relation, numbers)
            return Scene(kind, objects, 1, background, relation, None, placements, colour, attributes)
        if kind == "count":
            count = 2 + int(detail * (MAX_COUNT - 1))
            placements = place_count(objects[0], count, numbers)
            return Scene(kind, objects, count, background, None, None, placements, colour, attributes)
        size = _SIZES[int(detail * len(_SIZES))]
        placements = place_single(objects[0], size, numbers)
        return Scene(kind, objects, 1, background, None, size, placements, colour, attributes)

    @functools.cached_property
    def _faint(self) -> frozenset[tuple[str, str]]:
        return self._likeness.faint(self.objects, named_colours())

    def _combine(
        self, generator: np.random.Generator, style_generator: np.random.Generator, kind: Kind, faint: bool
    ) -> tuple[tuple[str, ...], Attributes, str, list[float]]:
        """Objects, attributes and background on the split's side of the hold-out, and three more uniform numbers."""
        styled = style_generator.random(2 if kind == "pair" else 1) < _STYLED_SHARE if self.styles else ()
        while True:
            first, second, third, *more = generator.random(6).tolist()
            objects: tuple[str, ...] = (_choice(self._choices, first),)
            if kind == "pair":
                objects = (*objects, _choice(self._choices, second))
                if objects[0] == objects[1]:
                    continue
            background = _choice(self.backgrounds, third)
            if faint and self._faint.isdisjoint((name, background) for name in objects):
                continue
            attributes = draw_attributes(styled, style_generator)
            if self._allows(objects, background, attributes):
                return objects, attributes, background, more

    def _allows(self, objects: tuple[str, ...], background: str, attributes: Attributes) -> bool:
        """Whether a scene of this is on the split's side of the hold-out, with attributes that can be seen."""
        if not all(shows_on(attribute, background) for attribute in attributes):
            return False
        return self.split == "all" or holds_out(objects, background, attributes) == (self.split == "heldout")

    def _blend(self, scene: Scene, generator: np.random.Generator) -> Scene:
        """The scene on a blend of its background and another; the name nearest to it is on the split's side."""
        while True:
            other, share = generator.random(2).tolist()
            colour = blend(scene.background, _choice(self.backgrounds, other), share)
            if self._allows(scene.objects, nearest_name(colour), scene.attributes):
                return replace(scene, background="", colour=colour)

    def draw(self, scene: Scene) -> np.ndarray:
        """The picture of a scene, uint8 (size, size, 3), RGB.

        Objects are upright, whole and inside the picture; sizes and places are rounded to whole pixels. Raises
        InputError when the font is missing, an object is not in the vocabulary or an attribute not among the styles.
        """
        side = self.size
        pixels = np.empty((side, side, 3), dtype=np.uint8)
        pixels[:] = scene.colour
        for placement in scene.placements:
            words = vocabulary().objects.get(placement.object)
            if words is None:
                raise InputError(f"There is no object {placement.object!r} in the emoji scenes' vocabulary.")
            longer = min(max(round(placement.size * side), 1), side)
            colour, keep = self._glyphs.scaled(words.glyph, longer, scene.attribute_of(placement.object))
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
        wording = Wording.draw(generator).leaving_out_places(self.unplaced_share)
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
        index). "renamed" puts another object in one's place, half of the time one of those that look most like it. The
        twin of a "train" scene is never a held-out combination. Raises InputError for another kind.
        """
        if kind is not None and kind not in get_args(TwinKind):
            raise InputError(f"The kind of twins must be one of {', '.join(get_args(TwinKind))}, not {kind!r}.")
        scene = self._named_scene(index)
        generator = self._generator(index, _TWIN)
        may_recount = scene.kind == "count" or (scene.kind == "single" and scene.size is None)
        recolour_number = generator.random()
        if kind is None:
            kind = "swapped" if scene.kind == "pair" else "recounted" if may_recount else "recoloured"
            if recolour_number < _RECOLOURED_SHARE:
                kind = "recoloured"
        elif kind in ("swapped", "turned") and scene.kind != "pair":
            scene = self._other_scene(index, "pair")
        elif kind == "recounted" and not may_recount:
            scene = self._other_scene(index, "count")
        change = {
            "swapped": swap, "recounted": recount, "recoloured": self._recolour, "turned": turn, "renamed": self._rename
        }  # fmt: skip
        twin_scene = change[kind](scene, generator)
        wording = Wording.draw(generator)
        mention = True if kind == "recoloured" else None
        placed = kind in ("swapped", "turned")
        caption, twin_caption = (
            write_caption(s, wording, mention, placed, self.plain_share) for s in (scene, twin_scene)
        )
        return Twins(kind, scene, twin_scene, caption, twin_caption, self.draw(scene), self.draw(twin_scene))

    def _other_scene(self, index: int, kind: Kind) -> Scene:
        return self._sample(self._generator(index, _OTHER_SCENE), self._generator(index, _OTHER_STYLE), kind)

    def _recolour(self, scene: Scene, generator: np.random.Generator) -> Scene:
        """Another background under the same objects; in training, one that is not held out with any of them."""
        others = tuple(
            name
            for name in self.backgrounds
            if name != scene.background
            and all(shows_on(attribute, name) for attribute in scene.attributes)
            and not (self.split == "train" and holds_out(scene.objects, name))
        )
        choice, *jitter = generator.random(4).tolist()
        background = _choice(others, choice)
        return replace(scene, background=background, colour=vary(background, jitter))

    def _rename(self, scene: Scene, generator: np.random.Generator) -> Scene:
        """Another object in the place of one; in training, one that is not held out with what stays."""
        which, alike, choice = generator.random(3).tolist()
        old = scene.objects[int(which * len(scene.objects))]
        renamed = [
            rename(scene, old, name)
            for name in self._likeness.nearest_first(old, (name for name in self.objects if name not in scene.objects))
        ]
        allowed = [
            each
            for each in renamed
            if self.split != "train" or not holds_out(each.objects, each.background, each.attributes)
        ]
        return allowed[int(choice * (len(allowed) if alike < 0.5 else min(_ALIKE, len(allowed))))]
