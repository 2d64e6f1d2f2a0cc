"""Zero-shot classification: parity with open_clip, templates, chunks, saving, files, figures, confusion matrix."""

import json
import re
import shutil
import sys
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_parts
from PIL import Image

from genpipe.clip.model import CLIP
from genpipe.clip.templates import PLAIN_TEMPLATES, choose_templates
from genpipe.clip.zero_shot import (
    ZeroShotClassifier,
    build_classifier,
    classify_files,
    embed_pictures,
    load_classifier,
    save_classifier,
)
from genpipe.data.labelled import LabelledPictures
from genpipe.data.scenes import EmojiScenes
from genpipe.data.vocabulary import vocabulary
from genpipe.errors import InputError
from genpipe.evaluation import zero_shot as evaluation
from genpipe.evaluation.confusion import MAX_CLASSES, draw_confusion
from genpipe.evaluation.zero_shot import Tally, evaluate, measure, zero_shot_of_scenes
from genpipe.identity import weights_identity
from genpipe.images import open_picture, to_unit
from genpipe.parts import load_part, save_part

NANO = Path(evaluation.__file__).parent.parent / "families" / "nano" / "clip"
NAMES = ["cat", "dog", "two strawberries", "a red {background}"]


def new_clip(seed: int = 0) -> CLIP:
    clip = tiny_parts(seed)["clip"]
    assert isinstance(clip, CLIP)
    return clip


@pytest.fixture(scope="module")
def clip() -> CLIP:
    return new_clip()


def published_clip() -> CLIP:
    """Tiny towers with open_clip's own tokenizer."""
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
    text = {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    torch.manual_seed(0)
    return CLIP({"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}, tokenizer_name="ViT-B-32").eval()


def pictures(count: int, size: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(count))


# Building -------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:a text is longer than")  # the tiny tokenizer has few words
@pytest.mark.parametrize("templates", ["openai-imagenet", "simple", "plain"])
@pytest.mark.parametrize("published", [False, True])
def test_equal_to_the_builder_of_open_clip(clip: CLIP, templates: str, published: bool) -> None:
    theirs = {
        "openai-imagenet": open_clip.OPENAI_IMAGENET_TEMPLATES,
        "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES,
        "plain": PLAIN_TEMPLATES,
    }[templates]
    names = ["cat", "dog", "bunch of grapes"]
    tokenizer = open_clip.get_tokenizer("ViT-B-32", context_length=20)
    if published:
        clip = published_clip()
    else:
        tokenizer = lambda texts: clip.tokenize(texts).ids  # noqa: E731
    expected = open_clip.build_zero_shot_classifier(clip.towers, tokenizer, names, theirs)  # D, C
    classifier = build_classifier(clip, names, templates)
    assert classifier.names == tuple(names) and len(classifier.templates) == len(theirs)
    torch.testing.assert_close(classifier.weights, expected.T, rtol=0, atol=1e-5)

    image = clip.encode_image(pictures(3, 32)).normalized.detach()
    logits = clip.towers.logit_scale.detach().exp() * image @ expected  # as open_clip's zero-shot evaluation
    torch.testing.assert_close(classifier(image), logits, rtol=0, atol=1e-4)


def test_template_sets() -> None:
    assert [len(choose_templates(name)) for name in ("plain", "simple", "openai-imagenet")] == [1, 7, 80]
    own = ["a {} in the snow", "simple", "{} and {}", "a {} in  the snow"]
    assert choose_templates(own) == (own[0], *choose_templates("simple"), own[2])
    assert choose_templates("my {}") == ("my {}",)
    for wrong, message in (
        ("imagenet", "no template set 'imagenet'; choose from plain, simple, openai-imagenet"),
        ("a {0}", "no template set 'a {0}'"),
        ([], "No template was given"),
        ("{}" + "x" * 500, "has 502 characters, the limit is 500"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            choose_templates(wrong)


def test_the_prompts_hold_the_names_letter_by_letter(clip: CLIP) -> None:
    classifier = build_classifier(clip, NAMES, ["{} and {}", "the {}"])
    for row, name in enumerate(NAMES):
        prompts = clip.encode_text([f"{name} and {name}", "the " + name]).normalized.detach()
        torch.testing.assert_close(classifier.weights[row], F.normalize(prompts.mean(dim=0), dim=0))


def test_probabilities_by_hand() -> None:
    classifier = ZeroShotClassifier(["cat", "dog"], ["{}"], 2, logit_scale=2.0, clip_identity="x")
    classifier.weights = torch.eye(2)
    embedding = torch.tensor([[3.0, 4.0], [0.0, -7.0]])
    before = embedding.clone()
    torch.testing.assert_close(classifier(embedding), torch.tensor([[1.2, 1.6], [0.0, -2.0]]))
    # 1 / (1 + e^0.4) = 0.401312..., 1 / (1 + e^-2) = 0.880797...
    expected = torch.tensor([[0.401312, 0.598688], [0.880797, 0.119203]])
    torch.testing.assert_close(classifier.probabilities(embedding), expected, rtol=0, atol=1e-6)
    assert torch.equal(embedding, before)


def test_the_logit_scale_is_the_models_own_clipped() -> None:
    clip = new_clip()
    with torch.no_grad():
        clip.logit_scale.fill_(3.0)
    assert build_classifier(clip, NAMES).config["logit_scale"] == pytest.approx(np.exp(3.0), rel=1e-6)
    with torch.no_grad():
        clip.logit_scale.fill_(9.0)
    assert build_classifier(clip, NAMES).config["logit_scale"] == 100.0


def test_neither_chunks_nor_building_change_anything(clip: CLIP) -> None:
    before = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    seen: list[tuple[int, int]] = []
    whole = build_classifier(clip, NAMES, "simple", chunk_size=1000)
    for chunk_size in (1, 5, 7):
        chunked = build_classifier(clip, NAMES, "simple", chunk_size, report=lambda *done: seen.append(done))
        torch.testing.assert_close(chunked.weights, whole.weights, rtol=0, atol=1e-6)
    assert seen[-4:] == [(7, 28), (14, 28), (21, 28), (28, 28)]
    assert all(torch.equal(tensor, before[name]) for name, tensor in clip.state_dict().items())
    assert not whole.weights.requires_grad and NAMES[3] == "a red {background}"
    with pytest.raises(InputError, match="chunk_size must be at least 1"):
        build_classifier(clip, NAMES, chunk_size=0)


class SmallMemoryCLIP(CLIP):
    """A CLIP on a machine where no more than three texts or pictures at once fit."""

    def embed_image(self, pixels: torch.Tensor) -> torch.Tensor:
        self.fits(len(pixels))
        return super().embed_image(pixels)

    def encode_text(self, texts):  # type: ignore[no-untyped-def]
        self.fits(len(texts))
        return super().encode_text(texts)

    def fits(self, count: int) -> None:
        self.sizes.append(count)
        if count > 3:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")


def test_chunks_halve_for_good_when_memory_runs_out() -> None:
    clip = new_clip()
    expected = build_classifier(clip, NAMES, "simple").weights, torch.cat(list(embed_pictures(clip, pictures(20))))
    clip.__class__ = SmallMemoryCLIP
    clip.sizes = []
    weights = build_classifier(clip, NAMES, "simple", chunk_size=16).weights
    rows = torch.cat(list(embed_pictures(clip, pictures(20), chunk_size=12)))
    torch.testing.assert_close(weights, expected[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(rows, expected[1], rtol=0, atol=1e-6)
    assert [size for size in clip.sizes if size > 3] == [16, 8, 4, 12, 6]  # each was tried once


def test_classes_that_cannot_be_used(clip: CLIP) -> None:
    for names, message in (
        (["cat"], "at least two classes"),
        (["cat", " "], "number 2 of 2 is empty"),
        (["cat", "dog", "Cat"], "'Cat' is there twice"),
        (["straße", "dog", "strasse"], "twice"),
    ):
        with pytest.raises(InputError, match=message):
            build_classifier(clip, names)
    long = "a very long name that leaves no room for anything else at all, " * 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(InputError, match="are the same text to this CLIP, which reads 32 tokens"):
            build_classifier(clip, ["cat", "dog"], long[:180] + " {}")
        build_classifier(clip, ["cat", "dog"], [long[:180] + " {}", "a {}"])


def test_a_long_text_is_said_once() -> None:
    clip = new_clip()
    long = ["x" * 150, "y" * 150, "zebra " * 30]
    with pytest.warns(UserWarning, match="a text is longer than the 30 tokens") as caught:
        build_classifier(clip, long, "simple", chunk_size=4)
    assert len(caught) == 1


def test_broken_weights_are_named() -> None:
    clip = new_clip()
    with torch.no_grad():
        clip.towers.text_projection[0, 0] = float("nan")
        clip.towers.visual.proj[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="text embeddings are not finite"):
        build_classifier(clip, NAMES)
    with pytest.raises(FloatingPointError, match="image embeddings are not finite"):
        list(embed_pictures(clip, pictures(2)))


# Saving ---------------------------------------------------------------------------------------------------------------


def test_saved_and_used_again(clip: CLIP, tmp_path: Path) -> None:
    built = build_classifier(clip, NAMES, ["simple", "my {}"])
    save_classifier(built, tmp_path / "pets")
    assert sorted(path.suffix for path in (tmp_path / "pets").iterdir()) == [".json", ".safetensors"]
    loaded = load_classifier(tmp_path / "pets", clip)
    assert (loaded.names, loaded.templates) == (built.names, built.templates)
    assert loaded.config["clip_identity"] == weights_identity(clip)
    image = pictures(3)
    assert torch.equal(loaded(clip.embed_image(image)), built(clip.embed_image(image)))
    save_classifier(build_classifier(clip, ["x", "y"]), tmp_path / "pets")  # takes the place of the old one
    assert load_classifier(tmp_path / "pets").names == ("x", "y")


def test_another_clip_is_refused(clip: CLIP, tmp_path: Path) -> None:
    save_classifier(build_classifier(clip, NAMES), tmp_path / "pets")
    save_part(clip, tmp_path / "half", dtype=torch.float16)
    load_classifier(tmp_path / "pets", load_part(CLIP, tmp_path / "half"))  # the same weights, as families ship them
    with pytest.raises(InputError, match="built with another CLIP; choose that one, or build it again"):
        load_classifier(tmp_path / "pets", new_clip(seed=1))


def test_a_classifier_takes_nothing_elses_place(clip: CLIP, tmp_path: Path) -> None:
    classifier = build_classifier(clip, NAMES)
    save_part(clip, tmp_path / "clip")
    (tmp_path / "file").write_text("x")
    (tmp_path / "notes" / "deep").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    for name in ("clip", "file", "notes"):
        with pytest.raises(InputError, match=f"{name}' exists and holds no classifier"):
            save_classifier(classifier, tmp_path / name)
    load_part(CLIP, tmp_path / "clip")
    save_classifier(classifier, tmp_path / "empty")
    assert load_classifier(tmp_path / "empty", clip).names == tuple(NAMES)


def test_damaged_classifiers_are_refused(clip: CLIP, tmp_path: Path) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    save_classifier(build_classifier(clip, NAMES), good)
    save_part(clip, tmp_path / "clip")
    with pytest.raises(InputError, match="describes a 'CLIP', expected was a 'ZeroShotClassifier'"):
        load_classifier(tmp_path / "clip")
    for change, message in (
        ({"names": NAMES[:3]}, rf"mis-shaped weights \[4, {clip.embedding_dim}\] instead of \[3, "),
        ({"names": ["cat"] * 4}, "there twice"),
        ({"templates": ["a cat"]}, "no template set"),
        ({"embedding_dim": -1}, "does not describe a ZeroShotClassifier that can be built"),
    ):
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(good, bad)
        config = json.loads((bad / "config.json").read_text())
        (bad / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(InputError, match=message):
            load_classifier(bad)
    broken = build_classifier(clip, NAMES)
    broken.weights[1] = float("nan")
    save_classifier(broken, bad)
    with pytest.raises(InputError, match="not of length 1"):
        load_classifier(bad)


# Pictures -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_pictures_in_chunks(clip: CLIP) -> None:
    pixels = pictures(7)
    before = pixels.clone()
    expected = clip.encode_image(pixels).normalized
    for chunk_size in (1, 3, 7, 100):
        chunks = list(embed_pictures(clip, pixels, chunk_size))
        assert [len(chunk) for chunk in chunks] == [min(chunk_size, 7 - i) for i in range(0, 7, chunk_size)]
        torch.testing.assert_close(torch.cat(chunks), expected, rtol=0, atol=1e-6)
    several = [pixels[0], torch.rand(3, 40, 20), pixels[1]]
    torch.testing.assert_close(
        next(embed_pictures(clip, several)),
        torch.cat([clip.encode_image(each[None]).normalized for each in several]),
        rtol=0,
        atol=1e-6,
    )
    assert torch.equal(pixels, before) and list(embed_pictures(clip, [])) == []
    with pytest.raises(InputError, match=r"\[0, 1\]"):
        next(embed_pictures(clip, pixels * 255))


def test_a_stream_of_pictures_is_never_held(clip: CLIP) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def stream() -> Iterator[torch.Tensor]:
        nonlocal most
        for index in range(500):
            most = max(most, sum(reference() is not None for reference in alive))
            picture = torch.full((3, 16, 16), index / 500)
            alive.append(weakref.ref(picture))
            yield picture

    assert sum(len(chunk) for chunk in embed_pictures(clip, stream(), chunk_size=20)) == 500 and most <= 42


@pytest.fixture
def data_folder(tmp_path: Path) -> Path:
    """Two class folders of three pictures each, the third of which shows the other class, and one broken picture."""
    colours = {"red": (220, 10, 10), "blue": (10, 10, 220)}
    for name, other in (("red", "blue"), ("blue", "red")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number, colour in enumerate((name, name, other)):
            Image.new("RGB", (40 + 9 * number, 50), colours[colour]).save(tmp_path / "data" / name / f"{number}.png")
    (tmp_path / "data" / "red" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return tmp_path / "data"


@pytest.fixture
def colour_classifier(clip: CLIP, data_folder: Path) -> ZeroShotClassifier:
    """A classifier whose directions are those of the pictures red/0.png and blue/0.png."""
    classifier = build_classifier(clip, ["red", "green", "blue"])
    with torch.no_grad():
        for row, name in ((0, "red"), (2, "blue")):
            pixels = to_unit([open_picture(data_folder / name / "0.png")])
            classifier.weights[row] = clip.encode_image(pixels).normalized[0]
        classifier.weights[1] = -classifier.weights[0] - classifier.weights[2]
    return classifier


def test_files(clip: CLIP, colour_classifier: ZeroShotClassifier, data_folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    found = classify_files(clip, colour_classifier, [data_folder], 2, 4, lambda *done: seen.append(done))
    assert [(path.parent.name, path.name, classes[0][0]) for path, classes in found.pictures] == [
        ("blue", "0.png", "blue"),
        ("blue", "1.png", "blue"),
        ("blue", "2.png", "red"),
        ("red", "0.png", "red"),
        ("red", "1.png", "red"),
        ("red", "2.png", "blue"),
    ]
    assert [path.name for path, _ in found.skipped] == ["broken.png"] and seen[-1] == (7, 7)
    pixels = to_unit([open_picture(data_folder / "red" / "2.png")])
    expected = colour_classifier.probabilities(clip.embed_image(pixels)).detach()[0]
    path, classes = found.pictures[-1]
    assert [name for name, _ in classes] == ["blue", "red"]
    assert [value for _, value in classes] == pytest.approx([float(expected[2]), float(expected[0])], abs=1e-5)
    (_, everything), *_ = classify_files(clip, colour_classifier, [path], top=10).pictures
    assert len(everything) == 3 and sum(value for _, value in everything) == pytest.approx(1.0)


def test_files_that_cannot_be_used(clip: CLIP, colour_classifier: ZeroShotClassifier, data_folder: Path) -> None:
    broken = data_folder / "red" / "broken.png"
    with pytest.raises(InputError, match="broken.png"):
        classify_files(clip, colour_classifier, [data_folder / "blue", broken])
    with pytest.raises(InputError, match="no file or folder"):
        classify_files(clip, colour_classifier, [data_folder / "green"])
    with pytest.raises(InputError, match="at least 1, got 0"):
        classify_files(clip, colour_classifier, [data_folder], top=0)
    for path in data_folder.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match="None of the 7 pictures found can be read"):
        classify_files(clip, colour_classifier, [data_folder])


# Evaluation -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [1, 4, 64])
def test_a_data_set(clip: CLIP, colour_classifier: ZeroShotClassifier, data_folder: Path, chunk_size: int) -> None:
    data = LabelledPictures(data_folder, colour_classifier.names)
    seen: list[tuple[int, int]] = []
    figures = evaluate(clip, colour_classifier, data, chunk_size, lambda *done: seen.append(done))
    assert seen == [(number, 7) for number in range(1, 7)]
    assert figures.confusions == {(0, 0): 2, (0, 2): 1, (2, 2): 2, (2, 0): 1}
    assert [(each.name, each.count, each.top1, each.top5) for each in figures.classes] == [
        ("red", 3, 2, 3),
        ("green", 0, 0, 0),
        ("blue", 3, 2, 3),
    ]
    assert (figures.count, figures.top1, figures.top5, figures.mean_per_class) == (6, 4 / 6, 1.0, 2 / 3)
    assert figures.skipped == {"picture cannot be read": 1}
    report = json.loads(json.dumps(figures.to_json(), allow_nan=False))
    assert report["per_class"][1] == {"class": "green", "pictures": 0, "top1": None, "top5": None}
    assert report["confusions"] == [[0, 0, 2], [0, 2, 1], [2, 0, 1], [2, 2, 2]]
    text = figures.to_text()
    assert "top-1 66.7%, top-5 100.0% of 6 pictures among 3 classes" in text and "red taken for blue: 1" in text
    with pytest.raises(InputError, match="other classes than the classifier"):
        evaluate(clip, colour_classifier, LabelledPictures(data_folder))


def test_top_five_by_hand() -> None:
    tally = Tally("abcdefg")
    logits = torch.tensor([[7.0, 6, 5, 4, 3, 2, 1], [1.0, 2, 3, 4, 5, 6, 7], [0.0, 9, 1, 2, 3, 4, 5]])
    tally.add(logits, torch.tensor([0, 2, 0]))  # first, fifth, last
    tally.add(logits[:1], torch.tensor([5]))  # sixth
    figures = tally.figures({"x": 2})
    assert (figures.top1, figures.top5, figures.mean_per_class) == (1 / 4, 2 / 4, pytest.approx(1 / 6))
    assert figures.worst_confusions(2) == [("a", "b", 1), ("c", "g", 1)] and figures.skipped == {"x": 2}
    with pytest.raises(InputError, match="no picture to classify"):
        Tally("ab").figures()


def test_scenes_are_counted_as_a_plain_loop_counts(clip: CLIP) -> None:
    figures = zero_shot_of_scenes(clip, ["a {}", "the {}"], count=9, seed=3, chunk_size=4)
    names = list(vocabulary().objects)
    classifier = build_classifier(clip, names, ["a {}", "the {}"])
    scenes = EmojiScenes(size=16, split="heldout", seed=3)
    singles = [scene for scene in map(scenes.scene, range(200)) if scene.kind == "single"][:9]
    pairs: list[tuple[int, int]] = []
    with torch.no_grad():
        for scene in singles:
            pixels = to_unit(np.ascontiguousarray(scenes.draw(scene).transpose(2, 0, 1)))
            pairs.append((names.index(scene.objects[0]), int(classifier(clip.embed_image(pixels)).argmax())))
    assert figures.confusions == {pair: pairs.count(pair) for pair in pairs}
    assert [each.name for each in figures.classes] == names and figures.count == 9
    with pytest.raises(InputError, match="at least 1, got 0"):
        zero_shot_of_scenes(clip, count=0)


def test_the_shipped_clip_names_objects() -> None:
    figures = zero_shot_of_scenes(load_part(CLIP, NANO), count=64)
    assert figures.top1 >= 0.35 and figures.top5 >= 0.75  # 0.52 and 0.90 of 1,000; by chance 0.005 and 0.025


def test_the_module_prints_json(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = tmp_path / "new" / "confusion.png"
    command = ["zero_shot", str(tiny_folder), "--count", "3", "--confusion", str(drawn), "--templates", "a {}"]
    monkeypatch.setattr(sys, "argv", command)
    evaluation.main()
    report = json.loads(capsys.readouterr().out)
    assert report["templates"] == ["a {}"] and report["pictures"] == 3 and len(report["per_class"]) == 198
    assert open_picture(drawn).width > 198 * 8
    monkeypatch.setattr(sys, "argv", [*command, "--templates", "imagenet"])
    with pytest.raises(SystemExit, match="2"):
        evaluation.main()
    assert capsys.readouterr().err.startswith("error: There is no template set 'imagenet'")


def test_the_order_of_examples_does_not_matter(clip: CLIP) -> None:
    classifier = build_classifier(clip, NAMES)
    examples = [(pixels, number % 4) for number, pixels in enumerate(pictures(12))]
    assert measure(clip, classifier, examples).confusions == measure(clip, classifier, examples[::-1], 5).confusions


# The picture ----------------------------------------------------------------------------------------------------------


def colours_of(picture: Image.Image) -> set[tuple[int, ...]]:
    return {colour for _, colour in picture.getcolors(maxcolors=1 << 24) or ()}  # type: ignore[misc]


def test_the_confusion_matrix_as_a_picture() -> None:
    confusions = {(0, 0): 9, (0, 2): 1, (2, 0): 5}
    before = dict(confusions)
    picture = draw_confusion(["red", "green", "blue"], confusions)
    assert picture.mode == "RGB" and confusions == before
    cell = 56
    bottom = picture.height - 10
    left = next(x for x in range(picture.width) if picture.getpixel((x, bottom)) == (215, 215, 215)) + 1

    def level(true: int, chosen: int) -> tuple[int, ...]:
        pixel = picture.getpixel((left + chosen * cell + 5, bottom - (3 - true) * cell + 5))
        assert isinstance(pixel, tuple)
        return pixel

    assert level(0, 0)[2] > level(0, 0)[0] + 80  # right: blue
    assert level(2, 0)[0] > level(2, 0)[2] + 80 and level(2, 0) == (190, 30, 30)  # the whole row is wrong: full red
    assert level(0, 2)[0] > level(0, 2)[2] + 40 and level(0, 2)[1] > level(2, 0)[1]  # a tenth of it: lighter
    assert level(1, 0) == level(1, 1) == (236, 236, 236) and level(0, 1) == (255, 255, 255)


@pytest.mark.parametrize("count", [2, 25, 198, MAX_CLASSES])
def test_confusion_matrices_of_any_size(count: int) -> None:
    one = draw_confusion([f"class {i}" for i in range(count)], {(i, i): 3 for i in range(count)} | {(0, count - 1): 1})
    assert count <= min(one.size) and max(one.size) < 4200
    other = draw_confusion(
        [f"other {i}" for i in range(count)], {(i, i): 3 for i in range(count)} | {(0, count - 1): 1}
    )
    assert (one.tobytes() != other.tobytes()) == (count <= 400)  # up to there, names stand beside the rows
    # One picture of four is seen among thousands of cells.
    assert any(red > 200 and green < 200 and red > blue + 30 for red, green, blue in colours_of(one))


def test_too_many_classes_for_a_picture() -> None:
    with pytest.raises(InputError, match="2,001 classes cannot be drawn, the limit is 2,000"):
        draw_confusion(["x"] * (MAX_CLASSES + 1), {})
