"""The known weakness of CLIP: what is asked, and the bookkeeping against a plain loop."""

import re
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import Run, refused
from test_clip_commands import document

from genpipe.clip.architecture import nano_architecture
from genpipe.clip.model import CLIP
from genpipe.data.captions import known_words
from genpipe.data.layout import RELATIONS
from genpipe.data.scenes import EmojiScenes, is_held_out
from genpipe.data.vocabulary import vocabulary
from genpipe.errors import InputError
from genpipe.evaluation import weakness
from genpipe.evaluation.weakness import SUBJECTS, Question, Share, table, weakness_figures, wilson
from genpipe.images import to_unit
from genpipe.tokenizer import CaptionTokenizer

COUNTING, POSITION, SINGLE = range(3)


def build_clip() -> CLIP:
    """Untrained, 16 px, with a tokenizer that knows the scenes' words, so that no caption is cut."""
    tokenizer = CaptionTokenizer.train(known_words(), vocab_size=1000)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        small = {"width": 48, "vision_layers": 1, "text_layers": 1, "embed_dim": 16}
        clip = CLIP(nano_architecture(tokenizer.vocab_size, image_size=16, **small))
    clip.tokenizer = tokenizer
    return clip.eval()


@pytest.fixture(scope="module")
def clip() -> CLIP:
    return build_clip()


def questions(stream: int, count: int, seed: int = 0) -> list[Question]:
    scenes = EmojiScenes(size=16, split="heldout", seed=seed)
    return list(islice(SUBJECTS[stream].questions(scenes, stream), count))


def differing(captions: tuple[str, ...]) -> set[str]:
    """What is left of each caption when the words that all begin and end with are taken away."""
    words = [caption.split() for caption in captions]
    shortest = min(map(len, words))
    front = next((i for i in range(shortest) if len({w[i] for w in words}) > 1), shortest)
    back = next((i for i in range(1, shortest - front + 1) if len({w[-i] for w in words}) > 1), shortest) - 1
    return {" ".join(w[front : len(w) - back]) for w in words}


def test_wilson_by_hand() -> None:
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(20, 20) == pytest.approx((0.8389, 1.0), abs=1e-4)
    share = Share(8, 10, 0.25)
    assert share.to_json() == {
        "accuracy": 0.8, "interval": list(wilson(8, 10)), "right": 8, "count": 10, "chance": 0.25
    }  # fmt: skip


def test_counts_differ_in_the_number_alone() -> None:
    asked = questions(COUNTING, 12)
    for number, question in enumerate(asked):
        scene = question.scene
        assert scene.count == question.own + 1 == number % 4 + 1 and len(scene.placements) == scene.count
        assert (scene.kind == "single") == (scene.count == 1) and is_held_out(scene)
        noun = vocabulary().objects[scene.objects[0]].names[0]
        things = [f"one {noun.name}", *(f"{word} {noun.plural}" for word in ("two", "three", "four"))]
        background = vocabulary().backgrounds[scene.background].names[0]
        expected = [f"a picture of {thing} on {' '.join(background)} background" for thing in things]
        assert question.captions == tuple(expected)


def test_positions_differ_in_the_relation_and_the_exchanged_caption_in_the_order() -> None:
    for number, question in enumerate(questions(POSITION, 12)):
        *four, exchanged = question.captions
        assert question.scene.relation == RELATIONS[number % 4] == RELATIONS[question.own] and is_held_out(
            question.scene
        )
        assert differing(tuple(four)) == {"to the left of", "to the right of", "above", "below"}
        relation = ("to the left of", "to the right of", "above", "below")[question.own]
        first, second = (f" {vocabulary().objects[name].names[0].name} " for name in question.scene.objects)
        assert re.search(f"{first}{relation} an?{second}on", four[question.own])
        assert sorted(exchanged.split()) == sorted(four[question.own].split()) and exchanged not in four
        assert re.search(f"{second}{relation} an?{first}on", exchanged)
        a, b = question.scene.placements
        drawn = {"left of": a.x < b.x, "right of": a.x > b.x, "above": a.y < b.y, "below": a.y > b.y}
        assert drawn[question.scene.relation]


def test_backgrounds_and_objects_differ_in_one_fact_each() -> None:
    backgrounds = list(vocabulary().backgrounds)
    for question in questions(SINGLE, 12):
        of, others, (elsewhere, neither) = question.captions[:14], question.captions[14:17], question.captions[17:]
        own = of[question.own]
        assert [caption.split()[-2] for caption in of] == backgrounds and is_held_out(question.scene)
        assert own == weakness.caption_of(question.scene) and own.split()[-2] == question.scene.background
        assert len({own, *others}) == 4
        assert {caption.split(" on ")[-1] for caption in others} == {own.split(" on ")[-1]}
        assert elsewhere in of and elsewhere != own
        assert neither == others[0].replace(own.split(" on ")[-1], elsewhere.split(" on ")[-1])


def test_figures_are_what_a_plain_loop_counts(clip: CLIP) -> None:
    count, scenes = 9, EmojiScenes(size=16, split="heldout", seed=3)
    right: Counter[str] = Counter()
    for stream in (COUNTING, POSITION, SINGLE):
        for question in questions(stream, count, seed=3):
            pixels = to_unit(np.ascontiguousarray(scenes.draw(question.scene).transpose(2, 0, 1))[None])
            with torch.no_grad():
                image = clip.encode_image(pixels).normalized[0]
                value = [float(clip.encode_text(caption).normalized[0] @ image) for caption in question.captions]
            own = value[question.own]
            if stream == COUNTING:
                right["counting"] += own == max(value)
                right[f"counting, {['one', 'two', 'three', 'four'][question.own]}"] += own == max(value)
            elif stream == POSITION:
                *four, exchanged = value
                opposite = {"left of": 1, "right of": 0, "above": 3, "below": 2}[str(question.scene.relation)]
                right["position"] += own == max(four)
                right["position, opposite"] += own > four[opposite]
                right["position, exchanged"] += own > exchanged
                right["position, axis"] += max(own, four[opposite]) == max(four)
            else:
                right["background"] += own == max(value[:14])
                right["object"] += own == max(own, *value[14:17])
                right["binding"] += own == max(own, value[14], *value[17:])
    figures = weakness_figures(clip, count, seed=3, chunk_size=4)
    assert {row: share.right for row, share in figures.items()} == {row: right[row] for row in figures}
    assert 0 < sum(right.values()) < sum(share.count for share in figures.values())
    assert [figures[f"counting, {word}"].count for word in ("one", "two", "three", "four")] == [3, 2, 2, 2]
    assert {share.count for row, share in figures.items() if not row.startswith("counting, ")} == {count}


def test_an_untrained_clip_guesses(clip: CLIP) -> None:
    done: list[tuple[int, int]] = []
    figures = weakness_figures(clip, 120, report=lambda *progress: done.append(progress))
    for row in ("counting", "position", "position, axis", "background", "binding", "object"):
        low, high = figures[row].interval
        assert low < figures[row].chance < high, row
    assert done[-1] == (360, 360) and done == sorted(done)


def test_the_seed_decides_and_nothing_else(clip: CLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    first = weakness_figures(clip, 16, seed=1)
    assert first == weakness_figures(clip, 16, seed=1, chunk_size=5)
    assert first != weakness_figures(clip, 16, seed=2)
    monkeypatch.setattr(weakness, "_TEXTS_KEPT", 10)
    assert first == weakness_figures(clip, 16, seed=1)


def test_captions_that_a_clip_does_not_tell_apart_are_no_right_answers() -> None:
    clip = build_clip()
    with torch.no_grad():  # every text is embedded at the origin
        clip.towers.text_projection.zero_()
    assert {share.right for share in weakness_figures(clip, 8).values()} == {0}


def test_broken_weights_end_in_a_message() -> None:
    clip = build_clip()
    with torch.no_grad():
        clip.towers.text_projection.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="text embeddings are not finite"):
        weakness_figures(clip, 1)
    with pytest.raises(InputError, match="at least 1, got 0"):
        weakness_figures(clip, 0)


def test_the_command_prints_one_column_per_clip(run: Run, tiny_folder: Path) -> None:  # noqa: F811
    part = tiny_folder / "clip"
    asked = ["evaluate", "clip", "--clip", tiny_folder, "--clip", part, "--count", 5, "--seed", 3]
    printed = document(run(*asked, "--json"))
    assert (printed["questions"], printed["seed"]) == (5, 3)
    assert [entry["clip"] for entry in printed["models"]] == [str(tiny_folder), str(part)]
    one, two = (entry["figures"] for entry in printed["models"])
    assert one == two and one["position"]["count"] == 5
    lines = run(*asked).out.splitlines()
    assert lines[0].split()[-1] == "chance" and len(lines) == 1 + len(one) + 1
    for line, (row, share) in zip(lines[1:], one.items(), strict=False):
        assert line.startswith(row) and line.count(f"{share['accuracy']:.1%} (") == 2
        assert line.endswith(f"{share['chance']:.1%}")


def test_the_table_of_one_question() -> None:
    rows = table([("short", {"counting": Share(1, 1, 0.25)}), ("x" * 50, {"counting": Share(0, 1, 0.25)})]).splitlines()
    assert "..." + "x" * 25 in rows[0] and "x" * 26 not in rows[0]
    assert "100.0% (20.7 - 100.0)" in rows[1] and "  0.0% ( 0.0 -  79.3)" in rows[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--count", 0], "at least 1, got 0"),
        (["--seed", -1], "at least 0, not -1"),
        (["--clip", "none such"], "There is no CLIP 'none such'"),
        (["--clip", "empty"], "holds no CLIP"),
        (["--clip", "ViT-B-32:none"], "no weights 'none'"),
    ],
)
def test_the_command_refuses(run: Run, arguments: list, words: str) -> None:  # noqa: F811
    Path("empty").mkdir()
    assert words in refused(run("evaluate", "clip", *arguments))
