"""English captions of emoji scenes: one grammar; each of its choices is one number, so that twins share a wording."""

from __future__ import annotations

import functools
import re
from typing import NamedTuple, TypeVar

import numpy as np

from genpipe.data.layout import INVERSE, MAX_COUNT, Relation, Scene
from genpipe.data.styles import ATTRIBUTES, named
from genpipe.data.vocabulary import Noun, split_words, vocabulary

Name = TypeVar("Name")
Table = tuple[tuple[float, str], ...]  # (weight, text); the weights of a table add up to one

MENTION_SHARE = 0.75  # of captions that name the background, when that is left open
_SYNONYM_SHARE = 0.25
_NUMERAL_SHARE = 0.12
_SIZE_SHARE = 0.7  # of small and large objects that are called so

_FRAMES: Table = (
    (0.64, "{thing} {on}"),
    (0.18, "{prefix} {thing} {on}"),
    (0.09, "{colour} background with {thing}"),
    (0.05, "{there} {thing} {on}"),
    (0.04, "on {colour} background, {thing}"),
)
_FRAMES_WITHOUT_BACKGROUND: Table = ((0.76, "{thing}"), (0.19, "{prefix} {thing}"), (0.05, "{there} {thing}"))
_PREFIXES: Table = ((0.5, "a picture of"), (0.25, "an image of"), (0.15, "a drawing of"), (0.1, "an illustration of"))
_THERE = ("there is", "there are")
_ON: Table = (
    (0.64, "on {a} {colour} background"),
    (0.12, "on {colour}"),
    (0.06, "against {a} {colour} background"),
    (0.05, "against {a} {colour} backdrop"),
    (0.03, "on {a} {colour} backdrop"),
    (0.06, "with {a} {colour} background"),
    (0.04, "in front of {a} {colour} background"),
)
_NUMBERS = ("one", "two", "three", "four")
_SIZES: dict[str, Table] = {
    "small": ((0.6, "small"), (0.25, "little"), (0.15, "tiny")),
    "large": ((0.45, "large"), (0.4, "big"), (0.15, "huge")),
}
_RELATIONS: dict[Relation, Table] = {
    "left of": ((0.6, "to the left of"), (0.4, "left of")),
    "right of": ((0.6, "to the right of"), (0.4, "right of")),
    "above": ((0.8, "above"), (0.1, "over"), (0.1, "on top of")),
    "below": ((0.6, "below"), (0.25, "under"), (0.1, "beneath"), (0.05, "underneath")),
}
_PLACES: dict[Relation, tuple[str, str]] = {
    "left of": ("on the left", "on the right"),
    "right of": ("on the right", "on the left"),
    "above": ("at the top", "at the bottom"),
    "below": ("at the bottom", "at the top"),
}
# People say "left of" and "above" more often than their inverses, and CLIP learns from it: were the order of the nouns
# and the relation word both even, neither of them alone would tell anything about the picture (an exclusive or).
_PLAIN_RELATIONS: tuple[Relation, ...] = ("left of", "above")
PLAIN_SHARE = 0.7
# The last two forms do not say where the objects are; each must stay behind those that do.
_FORMS: Table = (
    (0.86, "relation"),
    (0.06, "places"),
    (0.05, "{first} and {second}"),
    (0.03, "{first} next to {second}"),
)
_FORMS_WITH_RELATION_SHARE = 0.92
UNPLACED_SHARE = 1 - _FORMS_WITH_RELATION_SHARE


class Wording(NamedTuple):
    """Every choice of one caption as a number in [0, 1). Two scenes captioned with one wording differ in facts only."""

    frame: float
    prefix: float
    mention: float
    on: float
    background_name: float
    earlier_name: float  # of the object that comes first in the alphabet, so that it keeps its synonym when swapped
    later_name: float
    number: float
    say_size: float
    size_word: float
    form: float
    plain: float
    relation_word: float

    @classmethod
    def draw(cls, generator: np.random.Generator) -> Wording:
        return cls(*generator.random(len(cls._fields)).tolist())

    def leaving_out_places(self, share: float) -> Wording:
        """The same, but for a form that leaves a pair's places out in `share` of all wordings, in [0, 1]."""
        placed, said = _FORMS_WITH_RELATION_SHARE, 1 - share
        if self.form < said:
            return self._replace(form=self.form / said * placed)
        return self._replace(form=placed + (self.form - said) / share * (1 - placed))


def _pick(table: Table, u: float) -> str:
    for weight, text in table:
        u -= weight
        if u < 0:
            return text
    return table[-1][1]


def _pick_name(names: tuple[Name, ...], u: float) -> Name:
    """The usual name (the first), or for a quarter of u one of the synonyms."""
    synonyms = len(names) - 1
    if not synonyms or u >= _SYNONYM_SHARE:
        return names[0]
    return names[1 + int(u / _SYNONYM_SHARE * synonyms)]


def _one(noun: Noun) -> str:
    return f"{noun.article} {noun.name}"


def _counted(scene: Scene, noun: Noun, wording: Wording) -> str:
    if scene.count > 1:
        number = str(scene.count) if wording.number < _NUMERAL_SHARE else _NUMBERS[scene.count - 1]
        return f"{number} {noun.plural}"
    # A wording that writes numerals says "one": "1 cat" is nobody's caption.
    number = _NUMBERS[0] if wording.number < _NUMERAL_SHARE else ""
    if scene.size is not None and wording.say_size < _SIZE_SHARE:
        return f"{number or 'a'} {_pick(_SIZES[scene.size], wording.size_word)} {noun.name}"
    return f"{number or noun.article} {noun.name}"


def _related(scene: Scene, wording: Wording, state_relation: bool, plain_share: float) -> str:
    assert scene.relation is not None
    objects = vocabulary().objects
    first, second = scene.objects
    numbers = (wording.earlier_name, wording.later_name)
    if first > second:
        numbers = (numbers[1], numbers[0])
    a = _one(named(_pick_name(objects[first].names, numbers[0]), scene.attribute_of(first)))
    b = _one(named(_pick_name(objects[second].names, numbers[1]), scene.attribute_of(second)))
    form = _pick(_FORMS, wording.form * (_FORMS_WITH_RELATION_SHARE if state_relation else 1.0))
    if form == "relation":
        if (wording.plain < plain_share) == (scene.relation in _PLAIN_RELATIONS):
            return f"{a} {_pick(_RELATIONS[scene.relation], wording.relation_word)} {b}"
        return f"{b} {_pick(_RELATIONS[INVERSE[scene.relation]], wording.relation_word)} {a}"
    if form == "places":
        places = _PLACES[scene.relation]
        return f"{a} {places[0]} and {b} {places[1]}"
    return form.format(first=a, second=b)


def write_caption(
    scene: Scene,
    wording: Wording,
    mention_background: bool | None,
    state_relation: bool,
    plain_share: float = PLAIN_SHARE,
) -> str:
    """The caption of a scene, lower-case. The wording decides on what is None; True forces, False forbids.

    mention_background: what has no name is never mentioned.
    state_relation: True makes sure that a pair's caption says where the objects are; False leaves it to the wording,
    which leaves it out for one pair in twelve.
    """
    if scene.kind == "pair":
        thing = _related(scene, wording, state_relation, plain_share)
    else:
        name = scene.objects[0]
        noun = _pick_name(vocabulary().objects[name].names, wording.earlier_name)
        thing = _counted(scene, named(noun, scene.attribute_of(name)), wording)
    mention = wording.mention < MENTION_SHARE if mention_background is None else mention_background
    article = colour = ""
    if scene.background:
        article, colour = _pick_name(vocabulary().backgrounds[scene.background].names, wording.background_name)
    frame = _pick(_FRAMES if mention and scene.background else _FRAMES_WITHOUT_BACKGROUND, wording.frame)
    return frame.format(
        thing=thing,
        prefix=_pick(_PREFIXES, wording.prefix),
        there=_THERE[scene.kind == "count"],
        on=_pick(_ON, wording.on).format(a=article, colour=colour),
        colour=f"{article} {colour}",
    )


@functools.cache
def _all_words(styles: bool) -> tuple[str, ...]:
    tables = (_FRAMES, _FRAMES_WITHOUT_BACKGROUND, _PREFIXES, _ON, _FORMS[3:], *_SIZES.values(), *_RELATIONS.values())
    texts = [re.sub(r"{\w+}", " ", text) for table in tables for _, text in table]
    texts += [*_THERE, *_NUMBERS, *map(str, range(2, MAX_COUNT + 1)), "a", "an", "and"]
    texts += [text for places in _PLACES.values() for text in places]
    for words in vocabulary().objects.values():
        texts += [text for noun in words.names for text in (noun.name, noun.plural)]
    texts += [name for background in vocabulary().backgrounds.values() for _, name in background.names]
    for noun in [named(Noun("a", "a", "a"), attribute) for attribute in ATTRIBUTES if styles]:
        texts += [noun.name, noun.plural]
    return tuple(sorted({word for text in texts for word in split_words(text)}))


def known_words(styles: bool = False) -> list[str]:
    """Every lower-case word that a caption of an emoji scene can contain, sorted; words as `split_words` cuts them.

    styles: of scenes whose objects have attributes.
    """
    return list(_all_words(styles))
