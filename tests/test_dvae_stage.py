"""The dVAE's stage beyond a plain run: tokens that stay as they are, or nearly, while the rest learns."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_recipes import tiny_recipe

from genpipe.dalle1.dvae import DVAE
from genpipe.data.scenes import EmojiScenes
from genpipe.errors import InputError
from genpipe.images import to_unit
from genpipe.parts import load_part
from genpipe.training.config import Recipe
from genpipe.training.loop import Trainer


def decoder_alone(trained: Path, **run: Any) -> Recipe:
    recipe = tiny_recipe("dvae", **run)
    objective = {**recipe.objective, "freeze_codes": True}
    return dataclasses.replace(recipe, objective=objective, init=str(trained), model={})


def test_frozen_codes_stay_and_the_decoder_learns_what_tokens_decode_to(tmp_path: Path) -> None:
    first = Trainer(tiny_recipe("dvae", steps=6, batch_size=8), tmp_path / "first").run().part
    more = Trainer(decoder_alone(first, steps=60, batch_size=16, ema_decay=0.0), tmp_path / "more").run().part
    before, after = load_part(DVAE, first).eval(), load_part(DVAE, more).eval()
    pixels = to_unit(torch.from_numpy(EmojiScenes(size=16, seed=5).batch(0, 32)[0]))
    with torch.no_grad():
        tokens = before.encode(pixels)
        assert torch.equal(after.encode(pixels), tokens) and torch.equal(after.codebook, before.codebook)
        errors = [float((part.decode(tokens) - pixels).square().mean()) for part in (before, after)]
    assert errors[1] < 0.9 * errors[0]


def test_frozen_codes_need_a_trained_dvae(tmp_path: Path) -> None:
    recipe = tiny_recipe("dvae", steps=2)
    fresh = dataclasses.replace(recipe, objective={**recipe.objective, "freeze_codes": True})
    with pytest.raises(InputError, match="freeze_codes leaves tokens as they are; name a trained dVAE"):
        Trainer(fresh, tmp_path)


def test_kept_codes_change_less_often_than_free_ones(tmp_path: Path) -> None:
    first = Trainer(tiny_recipe("dvae", steps=30, batch_size=16), tmp_path / "first").run().part
    pixels = to_unit(torch.from_numpy(EmojiScenes(size=16, seed=5).batch(0, 64)[0]))
    before, same = load_part(DVAE, first).eval(), []
    for weight in (0.0, 30.0):
        recipe = tiny_recipe("dvae", steps=60, batch_size=16, ema_decay=0.0)
        objective = {**recipe.objective, "keep_codes": weight}
        recipe = dataclasses.replace(recipe, objective=objective, init=str(first), model={})
        after = load_part(DVAE, Trainer(recipe, tmp_path / str(weight)).run().part).eval()
        with torch.no_grad():
            same.append(float((after.encode(pixels) == before.encode(pixels)).float().mean()))
            assert not torch.equal(after.encode_features(pixels), before.encode_features(pixels))
    assert same[1] > 0.9 > same[0]


def test_kept_codes_need_a_trained_dvae(tmp_path: Path) -> None:
    recipe = tiny_recipe("dvae", steps=2)
    fresh = dataclasses.replace(recipe, objective={**recipe.objective, "keep_codes": 1.0})
    with pytest.raises(InputError, match="keep_codes holds on to tokens; name a trained dVAE"):
        Trainer(fresh, tmp_path)


def test_frozen_codes_need_not_be_kept(tmp_path: Path) -> None:
    first = Trainer(tiny_recipe("dvae", steps=2), tmp_path / "first").run().part
    frozen = decoder_alone(first, steps=2)
    both = dataclasses.replace(frozen, objective={**frozen.objective, "keep_codes": 1.0})
    with pytest.raises(InputError, match="freeze_codes keeps every token already"):
        Trainer(both, tmp_path / "both")
