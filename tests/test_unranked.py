"""Weights without a CLIP, or without its image tower: pictures come in order, and everybody is told so."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_INFO, all_tiny_parts
from PIL import Image

import app
from genpipe.clip.model import CLIP
from genpipe.errors import InputError
from genpipe.images import read_recipe
from pipelines.background import Line
from pipelines.cli import main
from pipelines.family import Family, load_family, save_family

PROMPT = "a cat on a red background"


def half(clip: CLIP, tower: str) -> CLIP:
    """The same CLIP with one of its towers."""
    kept = CLIP(**{**clip.config, "halves": tower}).eval()
    wanted = kept.state_dict()
    kept.load_state_dict({name: value for name, value in clip.state_dict().items() if name in wanted})
    kept.tokenizer = clip.tokenizer
    return kept


@pytest.fixture(scope="module")
def textual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family whose CLIP reads texts alone; its decoder draws as that of the whole family does."""
    parts: dict[str, Any] = all_tiny_parts()
    parts["clip"] = half(parts["clip"], "text")
    for name in ("decoder", "prior"):
        parts[name].register_to_config(clip_identity=None)
    folder = tmp_path_factory.mktemp("families") / "textual"
    save_family(folder, parts, {**TINY_INFO, "name": "textual"})
    return folder


@pytest.fixture(scope="module")
def clipless(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """DALL-E 1 alone, without any CLIP."""
    parts = all_tiny_parts()
    folder = tmp_path_factory.mktemp("families") / "clipless"
    save_family(folder, {part: parts[part] for part in ("dvae", "transformer")}, {**TINY_INFO, "defaults": {}})
    return load_family(folder)


@pytest.mark.parametrize("name", ["dalle1", "dalle2"])
def test_the_first_candidates_come_in_order_and_are_the_same_pictures(
    textual: Path, tiny_family: Family, name: str
) -> None:
    pipeline = load_family(textual).pipeline(name)
    assert not pipeline.ranks and tiny_family.pipeline(name).ranks
    drawn, small = [], pipeline.resolve_sampling({"upsample": False})
    with pytest.warns(UserWarning, match="no CLIP image tower") as caught:
        output = pipeline(
            [PROMPT, "two dogs"], 9, 3, 5, sampling=small, callback=lambda progress: drawn.append(progress.total)
        )
    assert sum("Not ranked" in str(each.message) for each in caught) == 1
    assert output.seeds == [[5, 6, 7]] * 2 and output.scores == [[None] * 3] * 2
    assert set(drawn) == {6}  # no more than are kept
    ranked = tiny_family.pipeline(name)(PROMPT, 3, 3, 5, sampling=small)
    expected = dict(zip(ranked.seeds[0], ranked.images[0], strict=True))
    assert all(
        expected[seed].tobytes() == image.tobytes() for seed, image in zip([5, 6, 7], output.images[0], strict=True)
    )


def test_without_any_clip_dalle1_draws(clipless: Family) -> None:
    assert clipless.clip is None and clipless.parts == ["dvae", "transformer"]
    with pytest.warns(UserWarning, match="Not ranked: these weights have no CLIP, "):
        output = clipless.dalle1(PROMPT, 4, 2)
    assert output.scores == [[None, None]] and len(output.images[0]) == 2
    with pytest.raises(InputError, match="has no decoder"):
        clipless.pipeline("dalle2")


def test_broken_weights_are_found_without_ranking_too(clipless: Family) -> None:
    dvae = clipless.dalle1.dvae
    before = {name: value.clone() for name, value in dvae.state_dict().items()}
    with torch.no_grad():
        dvae.codebook.fill_(float("nan"))
    try:
        with warnings.catch_warnings(), pytest.raises((InputError, FloatingPointError), match="NaN|not finite"):
            warnings.simplefilter("ignore")
            clipless.dalle1(PROMPT, 1, 1)
    finally:
        dvae.load_state_dict(before)


def test_a_picture_needs_the_image_tower(textual: Path) -> None:
    with warnings.catch_warnings(), pytest.raises(InputError, match="no CLIP image tower, which a given picture needs"):
        warnings.simplefilter("ignore")
        load_family(textual).dalle2(image=Image.new("RGB", (20, 20)))


def test_a_decoder_that_reads_clip_is_refused_without_one(tmp_path: Path) -> None:
    save_family(tmp_path / "lone", {"decoder": all_tiny_parts()["decoder"]}, {**TINY_INFO, "defaults": {}})
    with pytest.raises(InputError, match="no CLIP text tower"):
        load_family(tmp_path / "lone")


def test_the_command_and_its_recipe_say_so_and_the_picture_is_drawn_again(
    textual: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        told = capsys.readouterr()
        return int(end.value.code or 0), told.out, told.err

    command = ["generate", PROMPT, "--family", textual, "--pipeline", "dalle2", "--candidates", 5, "--keep", 2]
    code, out, err = run(*command)
    assert code == 0 and "score" not in out and "seed 1" in out
    assert err == "warning: Not ranked: these weights have no CLIP image tower, so no more candidates are drawn than " \
        "are kept.\n"  # fmt: skip
    _, out, _ = run(*command, "--json")
    document = json.loads(out)
    assert document["ranked"] is False and [each["score"] for each in document["results"][0]["pictures"]] == [
        None,
        None,
    ]
    recipe = read_recipe("genpipe-out/0001-2.png")
    assert recipe["score"] is None and recipe["call"] == {"first_seed": 0, "candidates": 2}
    code, out, _ = run("reproduce", "genpipe-out/0001-2.png", "--family", textual)
    assert code == 0 and "identical" in out


def test_the_page_says_so(textual: Path) -> None:
    page = app.Page(load_family(textual), Line())
    shown: dict[Any, Any] = {}
    for update in page.draw(PROMPT, "dalle2", 5, 2, 3):
        shown.update(update)
    gallery = shown[page.galleries["dalle2"]]
    assert [caption for _, caption in gallery] == ["seed 3", "seed 4"]
    assert shown[page.status].startswith("Done: not ranked, since these weights have no CLIP")
