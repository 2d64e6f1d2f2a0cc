"""The upsampler's stage: crops and their small pictures, a loss that falls, runs that resume and load, bad settings."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_dvae
from test_upsampler import UNET

from genpipe.dalle2.upsampler import Upsampler
from genpipe.data.scenes import EmojiScenes
from genpipe.errors import InputError
from genpipe.images import resize, to_unit
from genpipe.parts import load_part, save_part
from genpipe.training.config import DataConfig, OptimizerConfig, Recipe, RunConfig, check
from genpipe.training.loop import Trainer
from genpipe.training.recipes import recipe
from genpipe.training.upsampler_stage import UpsamplerStage

BLUR = {"kind": "blur", "kernel": 3, "sigma": [0.0, 0.8], "noise": [0.0, 0.03]}


def tiny(**changes: Any) -> Recipe:
    """16 to 64 pixels, crops of 32, on one thread; `changes` are fields of model, objective or run."""
    model = {"unet_config": UNET, "patch_size": 2, "prediction_type": "sample", "residual": True, "corruption": BLUR}
    model["num_inference_steps"] = 2
    objective = {"crop": 32, "min_snr_gamma": 0.0, "contrast_power": 0.0, "dvae": "", "dvae_share": 0.5}
    run: dict[str, Any] = {"steps": 6, "batch_size": 4, "precision": "no", "threads": 1, "log_every": 2}
    for name, value in changes.items():
        next(group for group in (objective, run, model) if group is model or name in group)[name] = value
    return Recipe(
        name="tiny upsampler",
        stage="upsampler",
        model=model,
        objective=objective,
        data=DataConfig(size=64),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2),
        run=RunConfig(validate_every=1000, **run),
    )


def test_a_batch_is_crops_and_their_small_corrupted_pictures() -> None:
    stage = UpsamplerStage(tiny(corruption={"kind": "none"}), None)
    pictures, captions = EmojiScenes(size=64).batch(0, 4)
    kept = pictures.copy()
    batch = stage.collate(pictures, captions, np.random.default_rng(0))
    assert np.array_equal(pictures, kept)
    assert batch["pixels"].shape == (4, 3, 32, 32) and batch["pixels"].dtype == torch.uint8
    torch.testing.assert_close(batch["low"], resize(to_unit(batch["pixels"]), 8, mode="bicubic", clamp=True))
    for crop, picture in zip(batch["pixels"].numpy(), pictures, strict=True):
        windows = np.lib.stride_tricks.sliding_window_view(picture, (32, 32), axis=(1, 2))
        assert (windows == crop[:, None, None]).all(axis=(0, 3, 4)).any()  # cut out of the picture as it is
    again = stage.collate(pictures, captions, np.random.default_rng(0))
    assert torch.equal(again["pixels"], batch["pixels"]) and torch.equal(again["low"], batch["low"])
    other = stage.collate(pictures, captions, np.random.default_rng(1))
    assert not torch.equal(other["pixels"], batch["pixels"])
    blurred = UpsamplerStage(tiny(), None).collate(pictures, captions, np.random.default_rng(0))
    assert torch.equal(blurred["pixels"], batch["pixels"]) and not torch.equal(blurred["low"], batch["low"])


def test_a_crop_may_be_the_whole_picture() -> None:
    pictures, captions = EmojiScenes(size=64).batch(0, 2)
    batch = UpsamplerStage(tiny(crop=64), None).collate(pictures, captions, np.random.default_rng(0))
    assert np.array_equal(batch["pixels"].numpy(), pictures)


def test_a_share_of_the_small_pictures_goes_through_the_dvae(tmp_path: Path) -> None:
    dvae = tiny_dvae(num_codes=16).eval()
    save_part(dvae, tmp_path / "dvae")
    pictures, captions = EmojiScenes(size=64).batch(0, 4)

    def seen(share: float) -> list[torch.Tensor]:
        stage = UpsamplerStage(tiny(crop=64, dvae=str(tmp_path / "dvae"), dvae_share=share), None)
        assert [type(module) for module in stage.frozen()] == [type(dvae)]
        batch = stage.collate(pictures, captions, np.random.default_rng(0))
        kept, looks = batch["low"].clone(), list[torch.Tensor]()
        stage.model.register_forward_pre_hook(lambda module, given: looks.append(given[2]))
        stage.loss(stage.model, batch, 0, torch.Generator().manual_seed(0))
        assert torch.equal(batch["low"], kept)
        return [kept, (looks[0] + 1) / 2]

    corrupted, low = seen(0.0)
    torch.testing.assert_close(low, corrupted)
    with torch.no_grad():
        clean = resize(to_unit(torch.from_numpy(pictures)), 16, mode="bicubic", clamp=True)
        drawn = dvae.decode(dvae.encode(clean))
    torch.testing.assert_close(seen(1.0)[1], drawn)
    some = [bool(torch.allclose(row, other, atol=1e-5)) for row, other in zip(seen(0.5)[1], drawn, strict=True)]
    assert 0 < sum(some) < 4


def test_a_dvae_needs_whole_pictures_of_its_own_size(tmp_path: Path) -> None:
    save_part(tiny_dvae(num_codes=16), tmp_path / "dvae")
    with pytest.raises(InputError, match="objective.crop is 32 and data.size 64; .* set both to 64"):
        UpsamplerStage(tiny(dvae=str(tmp_path / "dvae")), None)


@pytest.mark.parametrize("prediction", ["sample", "epsilon", "v_prediction"])
def test_one_batch_can_be_learned(prediction: str) -> None:
    stage = UpsamplerStage(tiny(prediction_type=prediction, residual=False, crop=16), None)
    batch = stage.collate(*EmojiScenes(size=64).batch(0, 4), np.random.default_rng(0))
    optimizer = torch.optim.Adam(stage.model.parameters(), lr=1e-2)
    losses = []
    for step in range(20):
        loss, logs = stage.loss(stage.model, batch, step, torch.Generator().manual_seed(0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert {"mse", "mse_clean", "mse_light", "mse_heavy", "mse_noise"} == logs.keys()


def test_a_run_is_saved_as_the_pipelines_load_it_and_shows_its_figures(tmp_path: Path) -> None:
    trainer = Trainer(tiny(), tmp_path)
    result = trainer.run()
    assert result.step == 6 and result.part == tmp_path / "upsampler"
    assert {"heldout_psnr", "heldout_psnr_bicubic", "heldout_sharpness", "heldout_colour"} <= result.figures.keys()
    assert result.figures["heldout_psnr"] > 15 and result.figures["heldout_colour"] < 0.5
    assert (tmp_path / "samples" / "00000006.png").is_file()
    model = load_part(Upsampler, result.part)
    assert model.config.num_inference_steps == 2 and dict(model.config.corruption) == BLUR

    goes_on = dataclasses.replace(tiny(), init=str(result.part), model={})
    assert UpsamplerStage(goes_on, None).model.config.corruption == model.config.corruption


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"crop": 30}, "multiples of 4"),
        ({"dvae": "nowhere", "crop": 64}, "nowhere"),
        ({"crop": 128}, "no larger than the picture"),
        ({"patch_size": 3}, "multiples of 12"),
        ({"corruption": {"kind": "blur", "kernel": 2}}, "odd number"),
        ({"residual": True, "prediction_type": "epsilon"}, "residual"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        UpsamplerStage(tiny(**changes), None)


def test_a_crop_of_0_is_refused() -> None:
    with pytest.raises(InputError, match="objective.crop is 0; it must be above 0"):
        check(tiny(crop=0))


@pytest.mark.parametrize("name", ["upsampler", "upsampler-paper-1", "upsampler-paper-2"])
def test_shipped_recipes_are_checked_and_their_crops_fit(name: str) -> None:
    shipped = recipe(name)
    check(shipped)
    with torch.device("meta"):
        multiple = Upsampler(**shipped.model).multiple
    assert shipped.objective["crop"] % multiple == 0 and shipped.data.size % multiple == 0
    if name != "upsampler":
        assert shipped.objective["crop"] * 4 == shipped.data.size  # a quarter of the side


def test_contrast_power_changes_the_loss_and_no_figure() -> None:
    pictures, captions = EmojiScenes(size=64).batch(0, 4)
    losses, figures = [], []
    for power in (0.0, 1.0):
        torch.manual_seed(0)
        stage = UpsamplerStage(tiny(contrast_power=power), None)
        batch = stage.collate(pictures, captions, np.random.default_rng(0))
        loss, logs = stage.loss(stage.model, batch, 0, torch.Generator().manual_seed(0))
        losses.append(loss.item())
        figures.append(logs["mse"].item())
    assert figures[0] == figures[1] and losses[0] == pytest.approx(figures[0]) and losses[1] != losses[0]
