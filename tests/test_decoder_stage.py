"""Training the decoder: loss, dropping, learned variance, resuming, what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_recipes import state_of

from genpipe.dalle2.decoder import Decoder
from genpipe.dalle2.losses import cumulative_alphas, diffuse, stratified_timesteps
from genpipe.data.scenes import EmojiScenes
from genpipe.errors import InputError
from genpipe.identity import weights_identity
from genpipe.images import to_unit, unit_to_signed
from genpipe.parts import load_part, save_part
from genpipe.training.config import DataConfig, OptimizerConfig, Recipe, RunConfig
from genpipe.training.data import Batch
from genpipe.training.decoder_stage import DecoderStage
from genpipe.training.loop import Trainer

UNET = {
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "down_block_types": ["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"],
    "up_block_types": ["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "attention_head_dim": 16,
    "norm_num_groups": 8,
    "resnet_time_scale_shift": "scale_shift",
}


def tiny_decoder_recipe(family: Path, model: dict[str, Any] | None = None, **objective: Any) -> Recipe:
    """Two levels beside the tiny family's CLIP: 16 x 16 pixels."""
    settings = {
        "clip": str(family / "clip"), "new_clip": False, "image_dropout": 0.1, "text_dropout": 0.5,
        "min_snr_gamma": 0.0, "contrast_power": 0.0, "timestep_shift": 1.0, "bound_weight": 0.001,
    }  # fmt: skip
    return Recipe(
        name="tiny decoder",
        stage="decoder",
        model={"unet_config": UNET, "patch_size": 2, "prediction_type": "v_prediction", **(model or {})},
        objective={**settings, **objective},
        data=DataConfig(size=16),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2),
        run=RunConfig(steps=4, batch_size=4, precision="no", threads=1, log_every=2, validate_every=1000),
    )


def stage_of(family: Path, model: dict[str, Any] | None = None, **objective: Any) -> DecoderStage:
    torch.manual_seed(0)
    return DecoderStage(tiny_decoder_recipe(family, model, **objective), None)


def batch_of(stage: DecoderStage, rows: int = 4) -> Batch:
    pictures, captions = EmojiScenes(size=16, split="train").batch(0, rows)
    return stage.collate(pictures, captions, np.random.default_rng(0))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def test_the_loss_is_the_squared_error_of_v(tiny_folder: Path) -> None:
    stage = stage_of(tiny_folder, image_dropout=0.0, text_dropout=0.0)
    batch = batch_of(stage)
    loss, logs = stage.loss(stage.model, batch, 0, seeded())
    g = seeded()
    t = stratified_timesteps(4, 1000, g)
    x_0 = unit_to_signed(to_unit(batch["pixels"]))
    noise = torch.randn(x_0.shape, generator=g)
    alpha_bar = cumulative_alphas("squaredcos_cap_v2", 1000)[t]
    captions = EmojiScenes(size=16, split="train").batch(0, 4)[1]
    errors = []
    for i in range(4):  # row by row, the text padded to CLIP's context
        row, a = slice(i, i + 1), alpha_bar[i]
        text, image = stage.clip.encode_text([captions[i]]), stage.clip.embed_image(to_unit(batch["pixels"][row]))
        x_t = diffuse(x_0[row], noise[row], alpha_bar[row])
        answer = stage.model(x_t, t[row], image, text.embedding, text.states, text.mask)
        errors.append((answer - (a.sqrt() * noise[row] - (1 - a).sqrt() * x_0[row])).square().mean())
    torch.testing.assert_close(loss, torch.stack(errors).mean(), rtol=1e-4, atol=1e-5)
    assert {"mse", "mse_clean", "mse_noise"} <= logs.keys() and not any(value.requires_grad for value in logs.values())


def test_embedding_and_caption_are_dropped_independently(tiny_folder: Path) -> None:
    """10 % and 50 % (2204.06125, 2.1): both at once for 5 % of the rows."""
    stage = stage_of(tiny_folder)
    pictures = np.zeros((2000, 3, 16, 16), np.uint8)
    batch = stage.collate(pictures, ["a dog"] * 2000, np.random.default_rng(0))
    empty = stage.clip.tokenize([""]).ids[0]
    no_text, no_image = (batch["ids"] == empty).all(dim=1), ~batch["image_kept"]
    shares = [float(rows.float().mean()) for rows in (no_text, no_image, no_text & no_image)]
    assert shares == pytest.approx([0.5, 0.1, 0.05], abs=0.03)


def test_what_is_dropped_does_not_reach_the_decoder(tiny_folder: Path) -> None:
    stage = stage_of(tiny_folder, image_dropout=1.0, text_dropout=1.0)
    pictures = np.random.default_rng(0).integers(0, 256, (2, 3, 16, 16), dtype=np.uint8)
    batch = stage.collate(pictures, ["a dog", "two cats"], np.random.default_rng(0))
    condition = stage._condition(to_unit(batch["pixels"]), batch["ids"], batch["mask"])
    noise = torch.randn(1, 3, 16, 16, generator=seeded()).expand(2, -1, -1, -1)
    first, second = stage.model(noise, torch.tensor(500), *condition, batch["image_kept"])
    torch.testing.assert_close(first, second)


def test_one_batch_is_learned(tiny_folder: Path) -> None:
    """With x_0 for an answer; the noise and v cannot be known where there is next to none of it."""
    stage = stage_of(tiny_folder, {"prediction_type": "sample"}, image_dropout=0.0, text_dropout=0.0)
    batch, noise = batch_of(stage), seeded()
    optimizer = torch.optim.AdamW(stage.model.parameters(), lr=1e-2)
    losses = []
    for step in range(80):
        loss, _ = stage.loss(stage.model, batch, step, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-10:]) < 0.25 * np.mean(losses[:3]), losses[::10]


def test_noisy_steps_come_more_often_with_a_shift() -> None:
    t = stratified_timesteps(10_000, 1000, seeded(), shift=4.0)
    assert int(t.min()) >= 0 and int(t.max()) <= 999
    # half of the draws lie above s / (1 + s) of the way to noise
    assert float((t >= 800).float().mean()) == pytest.approx(0.5, abs=0.01)


def test_a_learned_variance_is_trained_by_the_bound_alone(tiny_folder: Path) -> None:
    stage = stage_of(tiny_folder, {"learned_variance": True})
    batch = batch_of(stage)
    loss, logs = stage.loss(stage.model, batch, 0, seeded())
    loss.backward()
    gradient = stage.model.unet.conv_out.weight.grad
    assert gradient is not None
    # channels come in blocks of patch_size^2: the three of the prediction first, then the three of the variance
    assert float(gradient[12:].abs().max()) > 0 and logs["bound"].isfinite()
    without = stage_of(tiny_folder, {"learned_variance": True}, bound_weight=0.0)
    without.loss(without.model, batch, 0, seeded())[0].backward()
    rest = without.model.unet.conv_out.weight.grad
    assert rest is not None and float(rest[12:].abs().max()) == 0
    torch.testing.assert_close(gradient[:12], rest[:12])


def test_a_resumed_run_equals_an_uninterrupted_one(tiny_folder: Path, tmp_path: Path) -> None:
    recipe = tiny_decoder_recipe(tiny_folder)
    whole = Trainer(recipe, tmp_path / "whole").run()
    recipe.run.save_every = 2
    stopped = Trainer(recipe, tmp_path / "parts", minutes=0).run()
    assert 0 < stopped.step < 4
    resumed = Trainer(recipe, tmp_path / "parts").run()
    assert whole.step == resumed.step == 4
    first, second = state_of(tmp_path / "whole", 4), state_of(tmp_path / "parts", 4)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    part = load_part(Decoder, resumed.part)
    assert part.config.clip_identity is not None


def test_figures_and_sample(tiny_folder: Path) -> None:
    stage = stage_of(tiny_folder)
    figures = stage.validate()
    assert set(figures) == {"heldout_mse_both", "heldout_mse_text", "heldout_mse_image"}
    assert all(np.isfinite(value) and value > 0 for value in figures.values())
    assert figures == stage.validate()
    assert stage.sample().width > 8 * 48


def test_what_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="name its folder with --set objective.clip"):
        stage_of(tiny_folder, clip="")
    with pytest.raises(InputError, match="multiple"):
        DecoderStage(tiny_decoder_recipe(tiny_folder, {"resolution": 18}), None)
    trained = stage_of(tiny_folder)
    assert trained.model.config.clip_identity == weights_identity(trained.clip)
    trained.model.register_to_config(clip_identity="of another CLIP")
    save_part(trained.model, tmp_path / "other")
    recipe = tiny_decoder_recipe(tiny_folder)
    recipe.init = str(tmp_path / "other")
    with pytest.raises(InputError, match="another CLIP"):
        DecoderStage(recipe, None)
