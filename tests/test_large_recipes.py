"""The larger recipes: each is built and takes one training step on two pictures; sizes and costs are as written."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from genpipe.training.batches import SceneBatches
from genpipe.training.config import Recipe, apply_overrides
from genpipe.training.data import Batch
from genpipe.training.optimizer import make_optimizer
from genpipe.training.recipes import RECIPES, recipe
from genpipe.training.stage import MicroBatch, Stage
from genpipe.training.stages import STAGES

LARGE = ("clip-64", "dvae-64", "dalle1-64", "prior-64", "decoder-64", "upsampler-256")
READS = {"dalle1-64": ("dvae", "dvae-64"), "prior-64": ("clip", "clip-64"), "decoder-64": ("clip", "clip-64")}
BATCH = 2


def small_batch(name: str) -> Recipe:
    """The recipe with a batch of two; the code book stays as drawn, as two pictures have too few cells for it."""
    changes = [f"run.batch_size={BATCH}", "data.workers=0"]
    objective = recipe(name).objective
    for key, value in (("tokenizer_captions", 2000), ("warm_up_steps", 0), ("statistics_pairs", 4)):
        changes += [f"objective.{key}={value}"] if key in objective else []
    return apply_overrides(recipe(name), changes)


def batch_of(stage: Stage, own: Recipe) -> Batch:
    """Two pictures, their texts as long as texts may be: what a step costs hangs on the longest text of its batch."""
    batch = SceneBatches(own.data, BATCH, stage.collate)[0]
    return {**batch, "mask": torch.ones_like(batch["mask"])} if "mask" in batch else batch


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Untrained CLIP and dVAE, saved, for the recipes that read one."""
    folder = tmp_path_factory.mktemp("parts")
    for name in ("clip-64", "dvae-64"):
        own = small_batch(name)
        STAGES[own.stage](own, None).model.save_pretrained(folder / name)
    yield {name: folder / name for name in ("clip-64", "dvae-64")}


def test_larger_recipes_have_all_objects_with_styles_and_say_that_they_were_not_run() -> None:
    for name in LARGE:
        own = recipe(name)
        assert (own.data.objects, own.data.styles, own.run.precision) == ("all", True, "bf16")
        assert own.data.size == int(name.rpartition("-")[2])
        text = " ".join(str(RECIPES[name].__doc__).split())
        assert "Computed, not run" in text


def steps_of(own: Recipe, parts: dict[str, Path]) -> tuple[Stage, float]:
    """One training step on two pictures; the stage and the step's GFLOP per picture."""
    stage = STAGES[own.stage](own, None)
    batch = batch_of(stage, own)
    optimizer = make_optimizer(stage.model, own.optimizer)
    for module in (stage.model.train(), *stage.frozen()):
        module.to("cpu")
    stage.before_step(batch, 0, torch.Generator().manual_seed(0))
    before = [parameter.detach().clone() for parameter in stage.model.parameters()]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        for loss, _ in stage.losses(stage.model, [MicroBatch(batch, (0, 1))], 1):
            assert torch.isfinite(loss)
            loss.backward()
    torch.nn.utils.clip_grad_norm_(stage.model.parameters(), own.optimizer.clip_norm)
    optimizer.step()
    after = list(stage.model.parameters())
    assert all(torch.isfinite(parameter).all() for parameter in after)
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    return stage, counter.get_total_flops() / BATCH / 1e9


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_a_larger_recipe_takes_a_step_and_costs_what_it_says(name: str, parts: dict[str, Path]) -> None:
    own = small_batch(name)
    if name in READS:
        key, part = READS[name]
        own = apply_overrides(own, [f"objective.{key}={parts[part]}"])
    stage, gflop = steps_of(own, parts)
    millions = sum(parameter.numel() for parameter in stage.model.parameters()) / 1e6
    whole = recipe(name).run
    hours = gflop * whole.batch_size * whole.steps / 1e5 / 3600
    print(f"{name}: {millions:.1f} million parameters, {gflop:.1f} GFLOP a picture, {hours:.2f} GPU-hours")
    text = " ".join(str(RECIPES[name].__doc__).split())
    told = re.search(r"([\d.]+) million parameters.* ([\d,.]+) GFLOP .*?([\d.]+) GPU-hours", text)
    assert told, text
    assert float(told[1]) == pytest.approx(millions, rel=0.03)
    assert float(told[2].replace(",", "")) == pytest.approx(gflop, rel=0.05)
    assert float(told[3]) == pytest.approx(hours, rel=0.1)
