"""Attributes of objects in emoji scenes: captions name them, pictures show them; without them nothing changes."""

import colorsys
import hashlib
import itertools
from collections import Counter

import numpy as np
import pytest

from genpipe.data.captions import known_words
from genpipe.data.glyphs import Glyphs
from genpipe.data.holdout import holds_out
from genpipe.data.layout import Placement, Scene
from genpipe.data.scenes import EmojiScenes, is_held_out
from genpipe.data.styles import ATTRIBUTES, INK, STYLES, TINTS, named, shows_on
from genpipe.data.vocabulary import Noun, split_words, vocabulary
from genpipe.errors import InputError


def scene_of(name: str, attribute: str | None, size: float = 0.9) -> Scene:
    placed = (Placement(name, 0.5, 0.5, size),)
    return Scene("single", (name,), 1, "grey", None, None, placed, (160, 160, 160), (attribute,))


def drawn(name: str, attribute: str | None, side: int = 64) -> np.ndarray:
    return EmojiScenes(size=side).draw(scene_of(name, attribute))


def digest_of_plain_scenes() -> str:
    found = hashlib.sha256()
    settings: list[dict] = [{}, {"split": "heldout", "seed": 3}, {"split": "all", "seed": 1, "objects": "common"}]
    for keywords in settings:
        scenes = EmojiScenes(size=64 if "objects" in keywords else 32, styles=False, **keywords)
        for i in range(200):
            s = scenes.scene(i)
            places = [(p.object, round(p.x, 9), round(p.y, 9), round(p.size, 9)) for p in s.placements]
            caption = scenes.caption(s, np.random.default_rng(i))
            facts = (s.kind, s.objects, s.count, s.background, s.relation, s.size, places, s.colour, caption)
            found.update(repr(facts).encode())
            assert s.attributes == ()
    return found.hexdigest()


def test_without_styles_scenes_are_what_they_were_before_there_were_any() -> None:
    # Computed before styles were written.
    assert digest_of_plain_scenes() == "7c9435b6de6911ae8437f5404c7c914962c18246f5ebd0c7fc82b2e018ad06ac"


def test_the_same_seed_gives_the_same_scene_and_picture() -> None:
    a, b, other = (EmojiScenes(styles=True, seed=seed) for seed in (5, 5, 6))
    for i in range(20):
        one, two = a.example(i), b.example(i)
        assert one.scene == two.scene and one.caption == two.caption and np.array_equal(one.pixels, two.pixels)
    assert [a.scene(i) for i in range(20)] != [other.scene(i) for i in range(20)]


def test_half_of_the_objects_have_an_attribute_that_shows() -> None:
    counts: Counter[str | None] = Counter()
    scenes = EmojiScenes(styles=True, split="all")
    for scene in map(scenes.scene, range(1500)):
        assert len(scene.attributes) == len(scene.objects)
        assert all(shows_on(attribute, scene.background) for attribute in scene.attributes)
        counts.update(scene.attributes)
    total = sum(counts.values())
    assert set(counts) == {None, *ATTRIBUTES}
    assert counts[None] / total == pytest.approx(0.5, abs=0.05)
    assert sum(counts[tint] for tint in TINTS) / total == pytest.approx(0.25, abs=0.05)


def test_names_with_attributes() -> None:
    cat, axe, fish = Noun("cat", "cats", "a"), Noun("axe", "axes", "an"), Noun("fish", "fish", "a")
    assert named(cat, None) == cat
    assert named(cat, "orange") == Noun("orange cat", "orange cats", "an")
    assert named(axe, "red") == Noun("red axe", "red axes", "a")
    assert named(axe, "sketch") == Noun("sketch of an axe", "sketches of axes", "a")
    assert named(fish, "silhouette") == Noun("silhouette of a fish", "silhouettes of fish", "a")
    assert named(cat, "pixel art") == Noun("pixel art cat", "pixel art cats", "a")


def test_captions_name_every_attribute_with_its_object_and_all_words_are_known() -> None:
    scenes, words = EmojiScenes(styles=True, split="all"), set(known_words(styles=True))
    for i in range(400):
        scene = scenes.scene(i)
        caption = scenes.caption(scene, np.random.default_rng(i))
        assert set(split_words(caption)) <= words and len(caption.split()) <= 28
        for name, attribute in zip(scene.objects, scene.attributes, strict=True):
            nouns = [named(noun, attribute) for noun in vocabulary().objects[name].names]
            assert any((n.plural if scene.count > 1 else n.name) in caption for n in nouns), (caption, attribute)
    assert set(known_words(styles=True)) - set(known_words()) == {
        "sketch", "sketches", "silhouette", "silhouettes", "pixel", "art", "of",
    } - set(known_words())  # fmt: skip
    assert known_words(styles=False) == known_words()


@pytest.mark.parametrize("tint", TINTS)
def test_a_tint_has_the_hue_of_its_name_all_over(tint: str) -> None:
    wanted = colorsys.rgb_to_hsv(*(level / 255 for level in vocabulary().backgrounds[tint].colour))[0]
    colour, keep = Glyphs().scaled(vocabulary().objects["strawberry"].glyph, 56, tint)
    inside = colour[keep[..., 0] == 0]
    assert len(inside) > 500 and len(np.unique(inside, axis=0)) > 5  # shaded
    for pixel in np.unique(inside, axis=0):
        hue = colorsys.rgb_to_hsv(*(pixel / 255))[0]
        assert min(abs(hue - wanted), 1 - abs(hue - wanted)) < 0.04, pixel


def test_a_silhouette_has_the_shape_in_one_colour() -> None:
    plain, silhouette = (drawn("penguin", attribute) for attribute in (None, "silhouette"))
    glyph = vocabulary().objects["penguin"].glyph
    colour, keep = Glyphs().scaled(glyph, 56, "silhouette")
    assert np.unique(colour[keep[..., 0] == 0], axis=0).tolist() == [list(INK)]
    assert np.array_equal(keep, Glyphs().scaled(glyph, 56)[1])
    assert not np.array_equal(plain, silhouette)


def test_a_sketch_is_ink_with_the_background_inside() -> None:
    sketch, silhouette = (drawn("heart", attribute).astype(int) for attribute in ("sketch", "silhouette"))
    assert sketch[32, 32].tolist() == [160] * 3 and silhouette[32, 32].tolist() == list(INK)
    assert (np.abs(sketch - INK).max(axis=-1) < 20).sum() > 60  # a closed line
    assert (sketch <= 161).all()


def test_pixel_art_has_at_most_eight_cells_a_side() -> None:
    colour, keep = Glyphs().scaled(vocabulary().objects["cat"].glyph, 64, "pixel art")
    assert set(np.unique(keep)) == {0, 255} and max(keep.shape) == 64
    changes = [int((np.diff(colour.astype(int), axis=axis) != 0).any(axis=(1 - axis, 2)).sum()) for axis in (0, 1)]
    assert max(changes) <= 7


def test_every_attribute_of_every_object_leaves_something_to_see() -> None:
    glyphs = Glyphs()
    for words in vocabulary().objects.values():
        for attribute in (*STYLES, "red"):
            colour, keep = glyphs.scaled(words.glyph, 24, attribute)
            assert (255 - keep.astype(int))[..., 0].sum() > 255 * 12, (words.names[0].name, attribute)
            assert (colour.astype(int) + keep <= 255).all()


def test_a_tenth_of_attributes_with_objects_is_held_out_and_the_rest_keeps_its_side() -> None:
    free = [name for name in vocabulary().objects if not holds_out((name,), "white")]
    held = [
        is_held_out(Scene("single", (n,), 1, "white", None, None, (), (0, 0, 0), (a,))) for n in free for a in TINTS
    ]
    assert np.mean(held) == pytest.approx(0.1, abs=0.025)
    for names in itertools.combinations(sorted(vocabulary().objects)[:20], 2):
        assert holds_out(names, "white", (None, None)) == holds_out(names, "white")
    train, heldout = (EmojiScenes(styles=True, split=split) for split in ("train", "heldout"))
    assert not any(is_held_out(train.scene(i)) for i in range(300))
    assert all(is_held_out(heldout.scene(i)) for i in range(300))
    by_attribute_alone = [s for s in map(heldout.scene, range(300)) if not holds_out(s.objects, s.background)]
    assert by_attribute_alone


@pytest.mark.parametrize("kind", ["swapped", "recounted", "recoloured", "turned"])
def test_twins_keep_the_attributes_with_their_objects(kind) -> None:
    scenes = EmojiScenes(size=16, styles=True)
    for i in range(30):
        twins = scenes.twins(i, kind)
        for name in twins.scene.objects:
            assert twins.scene.attribute_of(name) == twins.twin_scene.attribute_of(name)
        assert all(shows_on(attribute, twins.twin_scene.background) for attribute in twins.twin_scene.attributes)
        assert not is_held_out(twins.twin_scene)


def test_an_unknown_attribute_is_refused() -> None:
    with pytest.raises(InputError, match="'plaid'"):
        drawn("cat", "plaid")
