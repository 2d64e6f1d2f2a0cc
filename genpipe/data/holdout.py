"""Which combinations of emoji scenes are kept out of training: a tenth, by a hash of their names."""

from __future__ import annotations

import functools
import hashlib

from genpipe.data.backgrounds import nearest_name
from genpipe.data.layout import Attributes, Scene


@functools.cache
def _is_combination_held_out(first: str, second: str) -> bool:
    digest = hashlib.sha256(f"genpipe emoji scenes 1: {first} + {second}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % 10 == 0


def holds_out(objects: tuple[str, ...], background: str, attributes: Attributes = ()) -> bool:
    """`is_held_out` of a scene that shows this; attributes are those of the objects, in their order."""
    if len(objects) == 2 and _is_combination_held_out(*sorted(objects)):
        return True
    named = [(name, f"{attribute} style") for name, attribute in zip(objects, attributes, strict=False) if attribute]
    if any(_is_combination_held_out(name, style) for name, style in named):
        return True
    return any(_is_combination_held_out(name, f"{background} background") for name in objects)


def is_held_out(scene: Scene) -> bool:
    """Whether a scene shows a combination that is kept out of training: the one definition of the hold-out.

    A tenth of all (object, background) combinations, a tenth of all unordered (object, object) combinations and a tenth
    of all (attribute, object) combinations are held out, by a hash (SHA-256) of their names: the same on every
    computer, and unchanged for old combinations when the vocabulary grows. A scene is held out when at least one of its
    combinations is. A background without a name counts as the named one whose colour is nearest.
    """
    return holds_out(scene.objects, scene.background or nearest_name(scene.colour), scene.attributes)
