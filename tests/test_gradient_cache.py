"""Gradient caching: many small batches give the gradient of the large one that they make up, noise and all."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training_loop import assert_same, column
from tiny_recipes import state_of, tiny_recipe

from genpipe.clip.loss import contrastive_loss
from genpipe.training.batches import SceneBatches
from genpipe.training.clip_stage import ClipStage
from genpipe.training.config import Recipe
from genpipe.training.gradient_cache import cached_losses
from genpipe.training.loop import Trainer
from genpipe.training.stage import MicroBatch


def noisy_recipe(**run: Any) -> Recipe:
    """Twins, blur and noise, and patches that are dropped at random."""
    recipe = tiny_recipe("clip", **run)
    recipe.model["architecture"]["vision_cfg"]["patch_dropout"] = 0.5
    recipe.data.hard_negatives, recipe.objective["degrade"] = 1.0, 0.8
    return recipe


def micro_batches(stage: ClipStage, recipe: Recipe, count: int) -> list[MicroBatch]:
    batches = SceneBatches(recipe.data, recipe.run.batch_size, stage.collate)
    return [MicroBatch(batches[number], (100 + number, 200 + number)) for number in range(count)]


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5, msg=name)


def test_one_graph_at_a_time_gives_the_gradient_of_all_parts() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(12, 5, generator=generator)
    weight, scale = torch.randn(5, 4, generator=generator).requires_grad_(), torch.tensor(7.0, requires_grad=True)

    def loss(parts: list[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        image, text = (torch.cat([part[i] for part in parts]) for i in (0, 1))
        return contrastive_loss(image, text, parts[0][2]), {}  # one scale will do

    whole = loss([(rows @ weight, (rows * rows) @ weight, scale)])[0]
    expected = torch.autograd.grad(whole, (weight, scale))
    calls: list[bool] = []

    def features(part: torch.Tensor) -> tuple[torch.Tensor, ...]:
        calls.append(torch.is_grad_enabled())
        return part @ weight, (part * part) @ weight, scale

    values = []
    for value, _ in cached_losses(features, rows.split(4), loss):
        assert sum(calls) == len(values) + 1  # graphs come one by one
        (value / 3).backward()
        values.append(value.item())
    assert values == pytest.approx([whole.item()] * 3) and calls == [False] * 3 + [True] * 3
    torch.testing.assert_close(weight.grad, expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scale.grad, expected[1], rtol=1e-5, atol=1e-6)


def test_four_batches_of_clip_have_the_gradient_of_one() -> None:
    recipe = noisy_recipe(accumulate=4)
    torch.manual_seed(0)
    stage = ClipStage(recipe, None)
    stage.model.train()
    parts = micro_batches(stage, recipe, 4)

    losses = []
    for loss, logs in stage.losses(stage.model, parts, 0):
        (loss / 4).backward()
        losses.append((loss.item(), logs))
    ours = gradients(stage.model)
    whole, expected_logs = stage._loss([stage._features(stage.model, p.batch, p.generator()) for p in parts])
    whole.backward()
    assert [value for value, _ in losses] == pytest.approx([whole.item()] * 4) and "twin_loss" in expected_logs
    for _, logs in losses:
        assert logs.keys() == expected_logs.keys()
        assert all(torch.allclose(logs[name], expected_logs[name]) for name in logs)
    assert_close(ours, gradients(stage.model))
    assert float(ours["towers.logit_scale"].abs()) > 1e-4

    for part in parts:  # the loss of each batch alone teaches something else
        (stage.loss(stage.model, part.batch, 0, part.generator())[0] / 4).backward()
    alone = gradients(stage.model)
    assert max(float((alone[name] - ours[name]).abs().max()) for name in ours) > 1e-2


def test_accumulating_equals_a_larger_batch_through_the_whole_loop(tmp_path: Path) -> None:
    states = {}
    for batch_size, accumulate in ((4, 4), (16, 1)):
        recipe = tiny_recipe("clip", steps=2, log_every=1, batch_size=batch_size, accumulate=accumulate)
        recipe.data.hard_negatives = recipe.objective["degrade"] = 0.0
        recipe.optimizer.epsilon = 1e-3  # or rounding would decide where gradients vanish
        Trainer(recipe, tmp_path / str(accumulate)).run()
        states[accumulate] = state_of(tmp_path / str(accumulate), 2)
    for name in ("loss", "gradient_norm", "accuracy"):
        assert column(tmp_path / "4", name) == pytest.approx(column(tmp_path / "1", name), rel=1e-4)
    assert_close(states[4], states[1])


def test_resuming_between_cached_updates_is_exact(tmp_path: Path) -> None:
    recipe = noisy_recipe(steps=3, accumulate=2, save_every=2)
    Trainer(recipe, tmp_path / "whole").run()
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-00000003")
    resumed = Trainer(recipe, tmp_path / "resumed")
    assert resumed.state.step == 2 and resumed.run().step == 3
    assert_same(state_of(tmp_path / "whole", 3), state_of(tmp_path / "resumed", 3))
