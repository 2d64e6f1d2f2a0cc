"""Emoji scenes: vocabulary, hold-out, captions that say what is drawn, twins that differ in one fact, determinism."""

import itertools
import pickle
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from genpipe.data import glyphs, layout
from genpipe.data.backgrounds import blend, named_colours, nearest_name
from genpipe.data.captions import known_words
from genpipe.data.glyphs import FONT_VARIABLE, Glyphs, find_font
from genpipe.data.likeness import Likeness
from genpipe.data.scenes import EmojiScenes, Placement, Scene, is_held_out, split_words
from genpipe.data.vocabulary import vocabulary
from genpipe.errors import InputError

# Nouns whose first letter misleads: u as in "you", silent h.
ARTICLE_EXCEPTIONS = {"unicorn": "a", "ufo": "a", "hourglass": "an"}
SIZE_WORDS = {"small": "small", "little": "small", "tiny": "small", "large": "large", "big": "large", "huge": "large"}
NUMBER_WORDS = {"one": 1, "two": 2, "three": 3, "four": 4, "2": 2, "3": 3, "4": 4}
RELATION_WORDS = {
    "to the left of": "left of",
    "left of": "left of",
    "to the right of": "right of",
    "right of": "right of",
    "above": "above",
    "over": "above",
    "on top of": "above",
    "below": "below",
    "underneath": "below",
    "under": "below",
    "beneath": "below",
}
LAST_PLACES = {"on the right": "left of", "on the left": "right of", "at the bottom": "above", "at the top": "below"}
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def _any_of(texts) -> str:
    return "|".join(sorted(map(re.escape, texts), key=len, reverse=True))


def _every_noun():
    for name, words in vocabulary().objects.items():
        for noun in words.names:
            yield name, noun


NAMES = {text: name for name, noun in _every_noun() for text in (noun.name, noun.plural)}
COLOURS = {text: name for name, words in vocabulary().backgrounds.items() for _, text in words.names}
NOUN = f"(?:{_any_of(NAMES)})"
ONE = f"(?:an?|one) ({NOUN})"
BACKGROUND = rf"\b({_any_of(COLOURS)}) (?:background|backdrop)|\bon ({_any_of(COLOURS)})$"


def read(caption: str) -> dict:
    """What a caption claims, found without the grammar that wrote it: objects, count, size, relation, background."""
    facts: dict = {"background": None, "relation": None, "size": None}
    found = re.search(BACKGROUND, caption)
    if found:
        facts["background"] = COLOURS[found[1] or found[2]]
    pair = re.search(rf"{ONE} ({_any_of(RELATION_WORDS)}) {ONE}\b", caption)
    places = re.search(rf"{ONE} (?:on|at) the \w+ and {ONE} ({_any_of(LAST_PLACES)})", caption)
    loose = re.search(rf"{ONE} (?:and|next to) {ONE}\b", caption)
    if pair:
        facts |= {"objects": (NAMES[pair[1]], NAMES[pair[3]]), "relation": RELATION_WORDS[pair[2]], "count": 1}
    elif places:
        facts |= {"objects": (NAMES[places[1]], NAMES[places[2]]), "relation": LAST_PLACES[places[3]], "count": 1}
    elif loose:
        facts |= {"objects": (NAMES[loose[1]], NAMES[loose[2]]), "count": 1}
    else:
        number = _any_of([*NUMBER_WORDS, "a", "an"])
        thing = re.search(rf"\b({number}) (?:({_any_of(SIZE_WORDS)}) )?({NOUN})\b", caption)
        assert thing, caption
        facts |= {"objects": (NAMES[thing[3]],), "count": NUMBER_WORDS.get(thing[1], 1)}
        facts["size"] = SIZE_WORDS.get(thing[2])
    return facts


def check_caption(caption: str, scene: Scene) -> dict:
    """Assert that everything a caption claims is true of the scene; return the claims."""
    facts = read(caption)
    assert facts["count"] == scene.count, caption
    assert facts["background"] in (None, scene.background), caption
    assert facts["size"] in (None, scene.size), caption
    if facts["relation"] is None:
        assert sorted(facts["objects"]) == sorted(scene.objects), caption
    else:
        told = (*facts["objects"], facts["relation"])
        other = (told[1], told[0], INVERSE[told[2]])
        assert (*scene.objects, scene.relation) in (told, other), caption
    return facts


def holds(first: Placement, relation: str, second: Placement) -> bool:
    """Whether the relation is plainly so: far apart on its axis, close together on the other."""
    across, down = second.x - first.x, second.y - first.y
    along, other = (across, down) if relation in ("left of", "right of") else (down, across)
    return (along if relation in ("left of", "above") else -along) > 0.4 and abs(other) <= 0.11


def scene_of(name: str, size: float = 0.9) -> Scene:
    return Scene("single", (name,), 1, "grey", None, None, (Placement(name, 0.5, 0.5, size),), (128, 128, 128))


# Vocabulary


def test_vocabulary_is_large_and_has_the_wanted_words():
    scenes = EmojiScenes()
    assert len(scenes.objects) >= 160 and len(set(scenes.objects)) == len(scenes.objects)
    assert 12 <= len(scenes.backgrounds) == len(set(scenes.backgrounds))
    assert {"strawberry", "guitar", "penguin", "tiger", "cat", "car"} <= set(scenes.objects)
    assert {"white", "black", "red", "green", "blue", "yellow"} <= set(scenes.backgrounds)


def test_every_name_means_one_object_and_is_well_formed():
    meanings: dict[str, str] = {}
    for name, noun in _every_noun():
        expected = ARTICLE_EXCEPTIONS.get(noun.name, "an" if noun.name[0] in "aeiou" else "a")
        assert noun.article == expected, noun
        for text in {noun.name, noun.plural}:
            assert re.fullmatch(r"[a-z][a-z' -]*[a-z]", text), text
            assert meanings.setdefault(text, name) == name, f"{text} names two objects"
    assert not set(meanings) & set(COLOURS)
    for article, name in [pair for words in vocabulary().backgrounds.values() for pair in words.names]:
        assert article == ("an" if name[0] in "aeiou" else "a")


def test_backgrounds_are_told_apart():
    colours = [np.array(words.colour) for words in vocabulary().backgrounds.values()]
    assert min(np.abs(a - b).max() for a, b in itertools.combinations(colours, 2)) >= 40


def test_every_glyph_is_drawn_and_unlike_every_other():
    scenes = EmojiScenes(size=16)
    pictures = np.stack([scenes.draw(scene_of(name)) for name in scenes.objects]).astype(int)
    flat = pictures.reshape(len(pictures), -1)
    assert (np.ptp(flat, axis=1) > 40).all()
    for i in range(len(flat) - 1):
        assert np.abs(flat[i + 1 :] - flat[i]).mean(axis=1).min() > 5, scenes.objects[i]


def test_known_words_cover_captions_and_nothing_is_unused_in_the_grammar():
    scenes = EmojiScenes(seed=3)
    generator = np.random.default_rng(0)
    seen = {word for i in range(12_000) for word in split_words(scenes.caption(scenes.scene(i), generator))}
    words = known_words()
    assert words == sorted(set(words)) and seen <= set(words)
    nouns = {word for text in (*NAMES, *COLOURS) for word in split_words(text)}
    assert set(words) - nouns == seen - nouns


def test_split_words_keeps_inner_marks_and_ignores_case():
    assert split_words("A T-shirt, “two” Jack-O\u2019-Lanterns: 3!") == [
        "a",
        "t-shirt",
        "two",
        "jack-o",
        "lanterns",
        "3",
    ]
    assert split_words("O\u2019Brien’s café -- x_y") == ["o'brien's", "café", "x", "y"]


# Scenes and pictures


def test_scenes_do_not_depend_on_order_or_instance():
    first, second = EmojiScenes(seed=7), pickle.loads(pickle.dumps(EmojiScenes(seed=7)))
    forward = [first.example(i) for i in range(20)]
    backward = [second.example(i) for i in reversed(range(20))][::-1]
    for a, b in zip(forward, backward, strict=True):
        assert a.scene == b.scene and a.caption == b.caption and np.array_equal(a.pixels, b.pixels)
    used = pickle.loads(pickle.dumps(first))
    assert np.array_equal(used.draw(forward[3].scene), forward[3].pixels)


def test_seeds_and_splits_give_other_scenes():
    starts = [
        tuple(EmojiScenes(split=split, seed=seed).scene(i) for i in range(4))
        for split in ("train", "heldout", "all")
        for seed in (0, 1)
    ]
    assert len(set(starts)) == len(starts)


def test_a_scene_is_the_same_at_every_size_and_the_pictures_agree():
    small, large = EmojiScenes(size=32), EmojiScenes(size=64)
    for i in range(30):
        assert small.scene(i) == large.scene(i)
        shrunk = large.example(i).pixels.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
        assert np.abs(shrunk - small.example(i).pixels).mean() < 16


def test_shares_of_kinds_counts_and_sizes():
    scenes = [EmojiScenes().scene(i) for i in range(3000)]
    kinds = Counter(scene.kind for scene in scenes)
    assert kinds["single"] / 3000 == pytest.approx(0.25, abs=0.04)
    assert kinds["count"] / 3000 == pytest.approx(0.30, abs=0.04)
    assert kinds["pair"] / 3000 == pytest.approx(0.45, abs=0.04)
    assert set(Counter(scene.count for scene in scenes)) == {1, 2, 3, 4}
    assert {scene.size for scene in scenes if scene.kind == "single"} == {None, "small", "large"}
    assert {scene.size for scene in scenes if scene.kind != "single"} == {None}
    relations = Counter(scene.relation for scene in scenes if scene.kind == "pair")
    assert set(relations) == {"left of", "right of", "above", "below"} and min(relations.values()) > 250


def test_objects_are_whole_apart_and_where_the_relation_says():
    for scene in (EmojiScenes(split="all").scene(i) for i in range(1500)):
        assert tuple(p.object for p in scene.placements) == scene.objects * scene.count
        for p in scene.placements:
            half = p.size / 2
            assert half - 1e-9 <= p.x <= 1 - half + 1e-9 and half - 1e-9 <= p.y <= 1 - half + 1e-9
        for p, q in itertools.combinations(scene.placements, 2):
            assert max(abs(p.x - q.x), abs(p.y - q.y)) >= (p.size + q.size) / 2 - 1e-9
        if scene.kind == "pair":
            assert holds(scene.placements[0], scene.relation, scene.placements[1])
        if scene.kind == "single":
            lowest, highest = layout.SINGLE_SIZES[scene.size]
            assert lowest <= scene.placements[0].size <= highest


@pytest.mark.parametrize("size", [8, 31, 32, 64, 200])
def test_drawing_fills_the_background_and_keeps_to_its_box(size):
    pixels = EmojiScenes(size=size).draw(scene_of("strawberry", size=0.5))
    assert pixels.shape == (size, size, 3) and pixels.dtype == np.uint8
    rows, columns = np.nonzero((pixels != 128).any(axis=-1))
    longer = max(np.ptp(rows), np.ptp(columns)) + 1
    assert abs(longer - size / 2) <= 1.5
    assert abs((rows.min() + rows.max() + 1) / 2 - size / 2) <= 1.5


def test_drawing_composites_like_pillow():
    scenes = EmojiScenes(size=64)
    glyph = vocabulary().objects["penguin"].glyph
    colour, keep = Glyphs().scaled(glyph, 40)
    height, width = keep.shape[:2]
    top, left = round(32 - height / 2), round(32 - width / 2)
    drawn = scenes.draw(scene_of("penguin", size=40 / 64))[top : top + height, left : left + width]
    assert np.abs(drawn - (colour + keep / 255 * 128)).max() <= 1
    assert max(height, width) == 40
    bitmap = Glyphs().bitmap(glyph)
    assert width / height == pytest.approx(bitmap.width / bitmap.height, abs=0.03)
    assert (colour.astype(int) + keep <= 255).all()


def test_drawing_leaves_scene_and_cached_glyphs_alone():
    scenes = EmojiScenes()
    scene = scenes.scene(5)
    first = scenes.draw(scene)
    kept = first.copy()
    first[:] = 0
    assert np.array_equal(scenes.draw(scene), kept)
    assert scene == scenes.scene(5)


def test_pictures_are_the_same_when_the_cache_is_full(monkeypatch):
    expected = [EmojiScenes().example(i).pixels for i in range(5)]
    monkeypatch.setattr(glyphs, "_CACHE_BYTES", 0)
    scenes = EmojiScenes()
    assert all(np.array_equal(scenes.example(i).pixels, expected[i]) for i in range(5))


def test_batch_is_examples_channels_first():
    scenes = EmojiScenes(size=24, seed=2)
    pixels, captions = scenes.batch(10, 6)
    assert pixels.shape == (6, 3, 24, 24) and pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    for i in range(6):
        example = scenes.example(10 + i)
        assert np.array_equal(pixels[i].transpose(1, 2, 0), example.pixels) and captions[i] == example.caption


# Hold-out


def test_a_tenth_of_the_combinations_is_held_out():
    scenes = EmojiScenes()
    colours = [
        is_held_out(Scene("single", (name,), 1, background, None, None, (), (0, 0, 0)))
        for name in scenes.objects
        for background in scenes.backgrounds
    ]
    assert np.mean(colours) == pytest.approx(0.1, abs=0.02)
    free = {name: [] for name in scenes.backgrounds}
    for (name, background), held in zip(itertools.product(scenes.objects, scenes.backgrounds), colours, strict=True):
        if not held:
            free[background].append(name)
    pairs = [
        is_held_out(Scene("pair", pair, 1, background, "above", None, (), (0, 0, 0)))
        for background, names in free.items()
        for pair in itertools.combinations(names[:60], 2)
    ]
    assert np.mean(pairs) == pytest.approx(0.1, abs=0.02)


def test_hold_out_is_stable_and_ignores_order():
    # Worked out once: a change of the hash would silently turn training combinations into held-out ones.
    def held(objects, background):
        return is_held_out(Scene("pair", objects, 1, background, "above", None, (), (0, 0, 0)))

    scenes = EmojiScenes()
    names = sorted(scenes.objects)[:40]
    for a, b in itertools.combinations(names, 2):
        assert held((a, b), "white") == held((b, a), "white")
    single = [b for b in scenes.backgrounds if is_held_out(Scene("single", ("cat",), 1, b, None, None, (), (0, 0, 0)))]
    assert single == ["yellow", "green", "beige"]


def test_splits_are_disjoint():
    assert not any(is_held_out(EmojiScenes(split="train").scene(i)) for i in range(1500))
    assert all(is_held_out(EmojiScenes(split="heldout").scene(i)) for i in range(500))
    share = np.mean([is_held_out(EmojiScenes(split="all").scene(i)) for i in range(1500)])
    assert 0.12 < share < 0.26  # 0.1 for one object, 1 - 0.9 ** 3 for two
    assert Counter(EmojiScenes(split="heldout").scene(i).kind for i in range(500))["single"] > 80


# Captions


def test_captions_say_what_is_drawn():
    scenes = EmojiScenes(split="all", seed=1)
    told = []
    for i in range(3000):
        example = scenes.example(i)
        told.append((example, check_caption(example.caption, example.scene)))
        assert len(example.caption.split()) <= 24 and example.caption == example.caption.lower().strip()
        assert not re.search(r"[{}]|  |\ba [aeio]|\ban [^aeiouh]", example.caption), example.caption
    assert np.mean([facts["background"] is not None for _, facts in told]) == pytest.approx(0.75, abs=0.04)
    pairs = [facts for example, facts in told if example.scene.kind == "pair"]
    assert 0.02 < np.mean([facts["relation"] is None for facts in pairs]) < 0.15
    sized = [facts for example, facts in told if example.scene.size]
    assert 0.5 < np.mean([facts["size"] is not None for facts in sized]) < 0.9


def test_the_plain_form_is_the_most_frequent_and_captions_vary():
    scenes = EmojiScenes(split="all")
    scene = next(s for s in map(scenes.scene, range(5000)) if s.objects == ("strawberry",) and s.count == 3)
    generator = np.random.default_rng(0)
    captions = Counter(scenes.caption(scene, generator, mention_background=True) for _ in range(2000))
    assert captions.most_common(1)[0][0] == f"three strawberries on a {scene.background} background"
    assert len(captions) > 30 and any("3 strawberries" in caption for caption in captions)


@pytest.mark.parametrize("mention", [True, False])
def test_the_background_is_named_on_demand(mention):
    scenes, generator = EmojiScenes(), np.random.default_rng(0)
    for i in range(300):
        scene = scenes.scene(i)
        background = check_caption(scenes.caption(scene, generator, mention), scene)["background"]
        assert background == (scene.background if mention else None)


def test_captions_depend_on_the_generator_only():
    scenes = EmojiScenes()
    scene = scenes.scene(0)
    texts = [[scenes.caption(scene, g) for _ in range(9)] for g in map(np.random.default_rng, (1, 1, 2))]
    assert texts[0] == texts[1] != texts[2]


# Twins


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("kind", ["swapped", "recounted", "recoloured", "turned", "renamed", None])
def test_twins_differ_in_one_fact(kind, split):
    scenes = EmojiScenes(split=split, seed=4)
    kinds = Counter()
    for i in range(200):
        twins = scenes.twins(i, kind)
        a, b = twins.scene, twins.twin_scene
        assert kind in (None, twins.kind)
        kinds[twins.kind] += 1
        said, twin_said = check_caption(twins.caption, a), check_caption(twins.twin_caption, b)
        assert not np.array_equal(twins.pixels, twins.twin_pixels)
        assert np.array_equal(twins.pixels, scenes.draw(a)) and np.array_equal(twins.twin_pixels, scenes.draw(b))
        if split == "train":
            assert not is_held_out(a) and not is_held_out(b)
        if kind is None:
            assert a == scenes.scene(i)
        if twins.kind == "swapped":
            assert b.objects == a.objects[::-1] and (a.background, a.colour, a.relation) == (
                (b.background, b.colour, b.relation)
            )
            assert [(p.x, p.y, p.size) for p in a.placements] == [(p.x, p.y, p.size) for p in b.placements]
            assert said["relation"] == twin_said["relation"] is not None
            assert said["objects"] == twin_said["objects"][::-1]
        elif twins.kind == "recounted":
            assert a.objects == b.objects and a.colour == b.colour and a.count != b.count
            assert {**said, "count": 0} == {**twin_said, "count": 0}
        elif twins.kind == "turned":
            assert (a.objects, a.background, a.colour) == (b.objects, b.background, b.colour)
            flat = ("left of", "right of")
            assert (a.relation in flat) != (b.relation in flat)
            assert said["objects"] == twin_said["objects"]
            assert said["relation"] != twin_said["relation"]
        elif twins.kind == "renamed":
            assert len(set(a.objects) - set(b.objects)) == len(set(b.objects) - set(a.objects)) == 1
            assert len(a.objects) == len(b.objects) and (a.background, a.count) == (b.background, b.count)
            places = [[(p.x, p.y, p.size) for p in scene.placements] for scene in (a, b)]
            assert places[0] == places[1] and said["objects"] != twin_said["objects"]
            assert {**said, "objects": 0} == {**twin_said, "objects": 0}
        else:
            assert a.placements == b.placements and a.background != b.background
            assert said["background"] == a.background and twin_said["background"] == b.background
            assert {**said, "background": 0} == {**twin_said, "background": 0}
    assert set(kinds) == ({kind} if kind else {"swapped", "recounted", "recoloured"})


def test_renamed_twins_are_alike_half_of_the_time():
    scenes, likeness = EmojiScenes(objects="common"), Likeness(Glyphs())
    ranks = []
    for i in range(300):
        twins = scenes.twins(i, "renamed")
        before, after = set(twins.scene.objects), set(twins.twin_scene.objects)
        (old,), (new,) = before - after, after - before
        others = [name for name in scenes.objects if name not in twins.scene.objects]
        ranks.append(likeness.nearest_first(old, others).index(new))
    assert len(set(ranks)) > 25 and 0.45 < np.mean(np.array(ranks) < 6) < 0.7  # any, and more often one of the nearest


def test_what_is_round_and_red_looks_like_what_is_round_and_red():
    nearest = Likeness(Glyphs()).nearest_first("tomato", ["penguin", "tree", "apple", "elephant"])
    assert nearest[0] == "apple" and sorted(nearest) == ["apple", "elephant", "penguin", "tree"]


def test_faint_are_objects_of_nearly_their_background():
    backgrounds = {name: words.colour for name, words in vocabulary().backgrounds.items()}
    names = [name for name, words in vocabulary().objects.items() if words.common]
    faint = Likeness(Glyphs()).faint(names, backgrounds)
    assert len(faint) == round(0.15 * len(names) * len(backgrounds))
    expected = {("elephant", "grey"), ("pig", "pink"), ("pumpkin", "orange"), ("snowman", "white"), ("star", "yellow")}
    assert expected < faint and not faint & {("pig", "green"), ("snowman", "black"), ("star", "navy")}


def test_faint_scenes_are_as_many_as_asked_for_and_still_of_the_split():
    def share(scenes):
        drawn = [scenes.scene(i) for i in range(1000)]
        assert all(is_held_out(scene) == (scenes.split == "heldout") for scene in drawn)
        kinds = np.mean([scene.kind == "pair" for scene in drawn])
        assert 0.4 < kinds < 0.5  # as without
        return np.mean([any((name, s.background) in scenes._faint for name in s.objects) for s in drawn])

    assert share(EmojiScenes(objects="common")) < 0.3
    assert share(EmojiScenes(objects="common", faint_share=1.0)) == 1
    assert 0.55 < share(EmojiScenes(objects="common", faint_share=0.5, split="heldout")) < 0.75
    assert EmojiScenes(faint_share=0.0).scene(5) == EmojiScenes().scene(5)
    with pytest.raises(InputError, match="The share of faint scenes must be from 0 to 1, not 1.5"):
        EmojiScenes(faint_share=1.5)


def test_blended_backgrounds_have_no_name_and_keep_their_distance_from_held_out_colours():
    scenes, named = EmojiScenes(objects="common", blended_share=1.0), EmojiScenes(objects="common")
    drawn = [scenes.scene(i) for i in range(1000)]
    assert {scene.background for scene in drawn} == {""} and len({scene.colour for scene in drawn}) > 800
    for i, scene in enumerate(drawn):
        assert not is_held_out(scene)
        assert not is_held_out(replace(scene, background=nearest_name(scene.colour)))
        assert replace(scene, background="", colour=(0, 0, 0)) == replace(
            named.scene(i), background="", colour=(0, 0, 0)
        )  # everything else is as it was
    colours = {
        word
        for background in vocabulary().backgrounds.values()
        for _, name in background.names
        for word in name.split()
    }
    captions = [scenes.example(i).caption for i in range(200)]
    assert not any(colours & {*caption.split()} - {"orange"} for caption in captions)  # an orange is an object, too
    assert tuple(scenes.draw(drawn[0])[0, 0]) == drawn[0].colour
    assert scenes.caption(drawn[0], np.random.default_rng(0), mention_background=True)  # there is none to mention


def test_as_many_backgrounds_are_blended_as_asked_for_and_none_of_twins():
    scenes = EmojiScenes(blended_share=0.3)
    assert 0.25 < np.mean([not scenes.scene(i).background for i in range(1000)]) < 0.35
    assert all(scenes.twins(i).scene.background for i in range(30))
    held_out = EmojiScenes(split="heldout", blended_share=1.0)
    assert all(is_held_out(scene) for scene in map(held_out.scene, range(200)))
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(InputError, match="The share of blended backgrounds must be from 0 to 1, not"):
            EmojiScenes(blended_share=wrong)


def test_a_blend_lies_between_two_colours():
    colours = named_colours()
    assert blend("white", "black", 0.0) == colours["white"] and blend("white", "black", 1.0) == colours["black"]
    assert blend("white", "black", 0.5) == (134, 134, 134)
    assert all(nearest_name(colour) == name for name, colour in colours.items())


def test_half_of_the_objects_of_mixed_scenes_are_common():
    scenes, words = EmojiScenes(objects="mixed"), vocabulary().objects
    names = [name for i in range(3000) for name in scenes.scene(i).objects]
    assert 0.45 < np.mean([words[name].common for name in names]) < 0.55
    assert len(set(names)) == len(words) == len(scenes.objects)
    assert scenes._choices != EmojiScenes().objects == EmojiScenes()._choices


def test_emphasised_objects_are_drawn_three_times_as_often():
    hard = ("sun", "cat")
    names = [name for i in range(4000) for name in EmojiScenes(objects="common", emphasis=hard).scene(i).objects]
    # of 40 + 2 x 2 places three each; pairs, which are two different ones, hold them a little less often
    assert 0.11 < np.mean([name in hard for name in names]) < 0.16
    assert EmojiScenes(objects="common", emphasis=()).scene(5) == EmojiScenes(objects="common").scene(5)


@pytest.mark.parametrize(("objects", "name"), [("common", "tiger"), ("all", "yeti"), ("mixed", "")])
def test_what_is_no_object_cannot_be_emphasised(objects, name):
    with pytest.raises(InputError, match=f"'{name}' is to be emphasised, but it is no .*object of the scenes"):
        EmojiScenes(objects=objects, emphasis=[name])


def test_twin_captions_share_their_wording():
    scenes = EmojiScenes()
    for i in range(200):
        twins = scenes.twins(i, "swapped")
        assert sorted(twins.caption.split()) == sorted(twins.twin_caption.split())
        assert twins.caption != twins.twin_caption


def test_twins_are_deterministic():
    a, b = EmojiScenes(seed=9).twins(11), EmojiScenes(seed=9).twins(11)
    assert (a.caption, a.twin_caption, a.twin_scene) == (b.caption, b.twin_caption, b.twin_scene)
    assert np.array_equal(a.twin_pixels, b.twin_pixels)


# Bad input


@pytest.mark.parametrize(
    "arguments",
    [{"size": 7}, {"size": 4000}, {"size": 32.0}, {"seed": -1}, {"seed": "x"}, {"split": "test"}, {"split": None}],
)
def test_bad_arguments(arguments):
    with pytest.raises(InputError, match=str(next(iter(arguments)))):
        EmojiScenes(**arguments)


def test_bad_calls():
    scenes = EmojiScenes()
    with pytest.raises(InputError, match="index"):
        scenes.scene(-1)
    with pytest.raises(InputError, match="batch"):
        scenes.batch(0, 0)
    with pytest.raises(InputError, match="mirrored"):
        scenes.twins(0, "mirrored")
    with pytest.raises(InputError, match="'wug'"):
        scenes.draw(scene_of("wug"))


def test_numpy_integers_are_numbers():
    assert EmojiScenes(seed=np.int64(3)).scene(np.int32(4)) == EmojiScenes(seed=3).scene(4)


def test_without_font_scenes_and_captions_work_and_drawing_says_how_to_get_one(tmp_path, monkeypatch):
    monkeypatch.delenv(FONT_VARIABLE, raising=False)
    monkeypatch.setattr(glyphs, "_FONT_FOLDERS", (str(tmp_path),))
    scenes = EmojiScenes()
    assert scenes.caption(scenes.scene(0), np.random.default_rng(0))
    with pytest.raises(InputError, match="fonts-noto-color-emoji"):
        scenes.example(0)


def test_font_is_taken_from_argument_then_environment_then_folders(tmp_path, monkeypatch):
    real = find_font()
    copy = tmp_path / "NotoColorEmoji.ttf"
    copy.symlink_to(real)
    monkeypatch.setenv(FONT_VARIABLE, str(copy))
    assert find_font() == copy and find_font(real) == real
    monkeypatch.delenv(FONT_VARIABLE)
    monkeypatch.setattr(glyphs, "_FONT_FOLDERS", (str(tmp_path / "none"), str(tmp_path)))
    assert find_font() == copy
    with pytest.raises(InputError, match="missing.ttf"):
        find_font(tmp_path / "missing.ttf")
    monkeypatch.setenv(FONT_VARIABLE, str(tmp_path / "gone.ttf"))
    with pytest.raises(InputError, match="gone.ttf"):
        find_font()


def test_a_file_that_is_no_font_or_has_no_emoji(tmp_path):
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(b"not a font")
    with pytest.raises(InputError, match="broken.ttf"):
        EmojiScenes(font=broken).example(0)
    with pytest.raises(InputError, match="no colour emoji"):
        Glyphs(find_font()).scaled("\u0627", 20)
