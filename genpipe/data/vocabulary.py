"""The words of the emoji scenes, read from vocabulary.json: objects with glyphs, backgrounds with colours."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from genpipe.errors import InputError

EMPHASIS = 3  # how many times as often as others an emphasised object is drawn
_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")


@dataclass(frozen=True)
class Noun:
    """One way to name a thing: singular, plural and the indefinite article of the singular ("a" or "an")."""

    name: str
    plural: str
    article: str


@dataclass(frozen=True)
class ObjectWords:
    """An object of the scenes: its names (the usual one first, then synonyms) and its emoji, one character.

    common: whether it is one of the few that differ much in shape and colour, which small models learn to draw.
    """

    names: tuple[Noun, ...]
    glyph: str
    common: bool


@dataclass(frozen=True)
class BackgroundWords:
    """A background: its names as (article, name) pairs, the usual one first, and its RGB colour, 0 to 255."""

    names: tuple[tuple[str, str], ...]
    colour: tuple[int, int, int]


@dataclass(frozen=True)
class Vocabulary:
    """All objects and backgrounds, by their usual names, in the order of the data file."""

    objects: dict[str, ObjectWords]
    backgrounds: dict[str, BackgroundWords]


@functools.cache
def vocabulary() -> Vocabulary:
    """Read vocabulary.json, once per process. Treat the result as read-only: it is shared."""
    data = json.loads(Path(__file__).with_name("vocabulary.json").read_text(encoding="utf-8"))
    objects = {
        entry["name"]: ObjectWords(
            names=tuple(Noun(n["name"], n["plural"], n["article"]) for n in (entry, *entry["synonyms"])),
            glyph=chr(int(entry["glyph"], 16)),
            common=entry.get("common", False),
        )
        for entry in data["objects"]
    }
    backgrounds = {
        entry["name"]: BackgroundWords(
            names=tuple((n["article"], n["name"]) for n in (entry, *entry["synonyms"])),
            colour=(entry["colour"][0], entry["colour"][1], entry["colour"][2]),
        )
        for entry in data["backgrounds"]
    }
    return Vocabulary(objects, backgrounds)


def choices(objects: str, emphasis: Sequence[str] = ()) -> tuple[str, ...]:
    """Names of which one in so many is drawn for a scene; some of them stand there several times.

    objects: "all", "common", or "mixed": all, and half of the time common ones. emphasis: names that are drawn three
    times as often as they would be. Raises InputError for a name that is not among the objects.
    """
    entries = vocabulary().objects
    common = tuple(name for name, words in entries.items() if words.common)
    chosen = common if objects == "common" else tuple(entries)
    unknown = [name for name in emphasis if name not in chosen]
    if unknown:
        kind = "" if chosen == tuple(entries) else "common "
        raise InputError(f"{unknown[0]!r} is to be emphasised, but it is no {kind}object of the scenes; leave it out.")
    if objects == "mixed":
        chosen += common * (round((len(chosen) - len(common)) / len(common)) - 1)
    return chosen + tuple(name for name in chosen if name in emphasis) * (EMPHASIS - 1)


def split_words(text: str) -> list[str]:
    """Lower-case words of a text, in order: runs of letters and digits, with inner hyphens and apostrophes kept."""
    return _WORD.findall(text.lower().replace("\u2019", "'"))
