"""`genpipe reproduce` as a person meets it: every pixel again, other weights, recipes that are not to be trusted."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Run, picture, refused
from PIL import Image, PngImagePlugin

from genpipe.images import read_recipe, save_png


@pytest.fixture
def drawn(run: Run, tiny_folder: Path) -> Path:
    """A picture that the command drew."""
    run("generate", "a cat on a red background", "--family", tiny_folder, "--candidates", 3, "--seed", 4)
    return Path("genpipe-out/0001-2.png")


def test_reproduce_draws_every_pixel_again(run: Run, tiny_folder: Path, drawn: Path) -> None:
    result = run("reproduce", drawn, "--family", tiny_folder, "--out", "again.png")
    assert result.code == 0 and "identical" in result.out
    assert np.array_equal(np.asarray(Image.open("again.png")), np.asarray(Image.open(drawn)))
    assert read_recipe("again.png") == read_recipe(drawn)
    assert "exists already" in refused(run("reproduce", drawn, "--family", tiny_folder, "--out", "again.png"))

    changed = Image.open(drawn).convert("RGB")
    changed.putpixel((3, 3), (1, 2, 3))
    save_png(changed, "changed.png", read_recipe(drawn))
    result = run("reproduce", "changed.png", "--family", tiny_folder)
    assert result.code == 1 and "different" in result.out


@pytest.mark.parametrize("flags", [["--mode", "prior", "--negative", "dogs"], ["--scheduler", "ddpm"]])
def test_reproduce_draws_dalle2s_pictures_again(run: Run, tiny_folder: Path, flags: list[str]) -> None:
    command = ["generate", "a cat on a red background", "--family", tiny_folder, "--pipeline", "dalle2", "--seed", 3]
    run(*command, "--candidates", 6, "--keep", 2, *flags)
    result = run("reproduce", "genpipe-out/0001-2.png", "--family", tiny_folder)
    assert result.code == 0 and "identical" in result.out
    recipe = read_recipe("genpipe-out/0001-2.png")
    recipe["settings"]["guidance_scale"] = 7.0
    save_png(Image.open("genpipe-out/0001-2.png"), "changed.png", recipe)
    assert run("reproduce", "changed.png", "--family", tiny_folder).code == 1


def test_recipes_from_before_there_were_upsamplers_still_hold(run: Run, tiny_folder: Path, drawn: Path) -> None:
    recipe = read_recipe(drawn)
    recipe["settings"] = {
        name: recipe["settings"][name] for name in ("temperature", "top_k", "top_p", "guidance_scale")
    }
    save_png(Image.open(drawn), "old.png", recipe)
    result = run("reproduce", "old.png", "--family", tiny_folder)
    assert result.code == 0 and "identical" in result.out


def test_reproduce_refuses_other_weights_and_families_it_cannot_know(run: Run, tiny_copy: Path, drawn: Path) -> None:
    assert "say where it lies with --family" in refused(run("reproduce", drawn))
    information = json.loads((tiny_copy / "family.json").read_text())
    information["parts"]["dvae"]["sha256"] = "0" * 64
    (tiny_copy / "family.json").write_text(json.dumps(information))
    assert "weights of hash" in refused(run("reproduce", drawn, "--family", tiny_copy))
    assert "is a grid of several pictures" in refused(run("reproduce", "genpipe-out/0001-grid.png"))


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": ""},
        {"prompt": 7},
        {"seed": -1},
        {"seed": 1.5},
        {"seed": 99},
        {"score": "high"},
        {"pipeline": "dalle9"},
        {"pipeline": ["dalle1"]},
        {"genpipe": "\x1b[2J"},
        {"family": {"name": "../../etc", "hash": "0" * 12}},
        {"family": {"name": "tiny", "hash": "0"}},
        {"family": "tiny"},
        {"call": {"first_seed": 4}},
        {"call": {"first_seed": 4, "candidates": 0}},
        {"call": {"first_seed": 2**64, "candidates": 1}},
        {"settings": {"temperature": -1}},
        {"pipeline": "dalle2", "settings": {"mode": "image"}},
        {"image": "0" * 64},
        {"image": "../../etc"},
        {"settings": {"temperature": 1.0, "callback": "os.system"}},
        {"settings": [1]},
        {"machine": {"device": "cuda; rm", "threads": 1}},
        {"machine": {"device": "cpu", "threads": 0}},
    ],
)
def test_reproduce_checks_a_recipe_like_user_input(
    run: Run, tiny_folder: Path, drawn: Path, change: dict[str, Any]
) -> None:
    save_png(Image.open(drawn), "hostile.png", {**read_recipe(drawn), **change})
    complaint = refused(run("reproduce", "hostile.png", "--family", tiny_folder))
    assert "The recipe in 'hostile.png' cannot be used" in complaint and "\x1b" not in complaint


def test_reproduce_wants_a_recipe(run: Run) -> None:
    picture(Path("plain.png"))
    assert "carries no recipe" in refused(run("reproduce", "plain.png"))
    chunk = PngImagePlugin.PngInfo()
    chunk.add_text("genpipe", "{not json")
    Image.new("RGB", (4, 4)).save("broken.png", pnginfo=chunk)
    assert "not valid JSON" in refused(run("reproduce", "broken.png"))
    Image.new("RGB", (4, 4)).save("photo.jpg")
    refused(run("reproduce", "photo.jpg"))
    assert "missing.png" in refused(run("reproduce", "missing.png"))
