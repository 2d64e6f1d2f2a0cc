"""Runs of seconds: they learn, resume exactly after any end, share work between processes, refuse what cannot be."""

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_dvae
from PIL import Image
from tiny_recipes import (
    command_in_group,
    exit_code,
    free_port,
    record_of,
    start,
    state_of,
    tiny_recipe,
    train_alone,
    train_and_die,
    train_in_group,
    train_on_full_disk,
    write_pictures,
    write_shards,
)

from genpipe.clip.model import CLIP
from genpipe.dalle1.dvae import DVAE
from genpipe.dalle1.transformer import DALLE1Transformer
from genpipe.errors import InputError
from genpipe.images import read_recipe
from genpipe.parts import load_part, save_part
from genpipe.training.__main__ import run as run_command
from genpipe.training.clip_stage import twin_loss
from genpipe.training.config import OptimizerConfig, Recipe, apply_overrides
from genpipe.training.loop import Trainer, batch_seed
from genpipe.training.muon import orthogonal
from genpipe.training.optimizer import learning_rate, make_optimizer, parameter_groups
from genpipe.training.precision import resolve_precision
from genpipe.training.state import State

PARTS = {"dvae": DVAE, "clip": CLIP, "transformer": DALLE1Transformer}


@pytest.fixture(scope="module")
def dvae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dVAE that uses several of its codes."""
    recipe = tiny_recipe("dvae", steps=10, batch_size=8)
    return Trainer(recipe, tmp_path_factory.mktemp("dvae")).run().part


@pytest.fixture(scope="module")
def picture_sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    pictures = write_pictures(folder / "pictures")
    return {"folder": pictures, "shards": write_shards(folder / "shards", pictures)}


def rows_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "log.csv", newline="") as handle:
        return list(csv.DictReader(handle))


def column(folder: Path, name: str) -> list[float]:
    return [float(row["value"]) for row in rows_of(folder) if row["name"] == name]


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


# schedule, optimiser, average -----------------------------------------------------------------------------------------


def test_learning_rate_by_hand() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=4, decay="cosine", final_fraction=0.2)
    assert [learning_rate(config, step, 12) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate(config, 4, 12) == 1.0
    assert learning_rate(config, 8, 12) == pytest.approx(0.6)  # half-way: the mean of peak and floor
    assert learning_rate(config, 6, 12) == pytest.approx(0.2 + 0.8 * (1 + 0.5**0.5) / 2)
    assert learning_rate(config, 12, 12) == learning_rate(config, 99, 12) == pytest.approx(0.2)
    linear = OptimizerConfig(learning_rate=1.0, warmup_steps=0, decay="linear", final_fraction=0.0)
    assert [learning_rate(linear, step, 4) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    constant = OptimizerConfig(learning_rate=2.0, warmup_steps=2, decay="constant")
    assert [learning_rate(constant, step, 100) for step in (0, 1, 2, 99)] == [1.0, 2.0, 2.0, 2.0]
    assert learning_rate(OptimizerConfig(learning_rate=1.0, warmup_steps=50), 9, 10) == pytest.approx(0.2)


def test_weight_decay_spares_gains_biases_and_embeddings() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    model.register_parameter("scale", torch.nn.Parameter(torch.zeros(())))
    model[1].weight.requires_grad_(True)
    frozen = torch.nn.Parameter(torch.zeros(2, 2), requires_grad=False)
    model.register_parameter("frozen", frozen)
    decayed, others = parameter_groups(model, 0.1)
    assert [p is model[1].weight for p in decayed["params"]] == [True] and decayed["weight_decay"] == 0.1
    assert {id(p) for p in others["params"]} == {
        id(p) for p in (model[0].weight, model[1].bias, model[2].weight, model[2].bias, model.scale)
    }
    assert others["weight_decay"] == 0.0


def test_muon_steps_the_matrices_of_layers_and_adamw_the_rest() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 32, 2), torch.nn.Linear(32, 2), torch.nn.Embedding(40, 40))
    kernel, narrow, table = model[0].weight, model[1].weight, model[2].weight
    before = {p: p.detach().clone() for p in model.parameters()}
    config = OptimizerConfig(method="muon", learning_rate=0.1, weight_decay=0.5)
    optimizer = make_optimizer(model, config)
    assert [p is kernel for g in optimizer.param_groups if g["muon"] for p in g["params"]] == [True]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    kernel.grad = torch.randn(kernel.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    # Both terms of Nesterov's first step are shares of the gradient, whose length does not count; 0.2 sqrt(32) of RMS.
    step = 0.1 * 0.2 * 32**0.5 * orthogonal(kernel.grad.reshape(32, 32)).view_as(kernel)
    taken = before[kernel] * (1 - 0.1 * 0.5) - kernel.detach()
    assert float((taken - step).norm() / step.norm()) < 0.05  # bfloat16 rounds them differently
    assert torch.allclose(narrow, before[narrow] * (1 - 0.1 * 0.5) - 0.1)  # AdamW's first step is the learning rate
    assert torch.allclose(table, before[table] - 0.1)


def test_orthogonal_keeps_directions_and_levels_lengths() -> None:
    u, _ = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(1)))
    v, _ = torch.linalg.qr(torch.randn(64, 40, generator=torch.Generator().manual_seed(2)))
    lengths = torch.linspace(0.05, 3, 40)
    for matrix, exact in ((u * lengths @ v.T, u @ v.T), ((u * lengths @ v.T).T, (u @ v.T).T)):
        levelled = orthogonal(matrix)
        assert levelled.shape == matrix.shape and levelled.dtype == matrix.dtype
        singular = torch.linalg.svdvals(levelled)
        assert 0.6 < float(singular.min()) and float(singular.max()) < 1.3
        cosine = torch.nn.functional.cosine_similarity(levelled.flatten(), exact.flatten(), dim=0)
        assert float(cosine) > 0.97
    assert not orthogonal(torch.zeros(3, 5)).any()


def test_the_average_follows_its_formula() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    state = State(model, make_optimizer(model, OptimizerConfig()), ema_decay=0.2)
    average = 0.0
    for t, weight in enumerate([1.0, 5.0, -3.0, 2.0, 7.0]):
        model.weight.data.fill_(weight)
        state.advance(batches=2)
        decay = min(0.2, (1 + t) / (10 + t)) if t else 0.0  # the first update is taken whole
        average = decay * average + (1 - decay) * weight
        assert float(state.ema.shadow_params[0]) == pytest.approx(average)
    assert (state.step, state.seen) == (5, 10)
    with state.averaged_weights():
        assert model.weight.item() == pytest.approx(average) and not model.training
    assert model.weight.item() == 7.0 and model.training


def test_seeds_differ_between_runs_batches_and_streams() -> None:
    seeds = {batch_seed(seed, number, stream) for seed in range(3) for number in range(500) for stream in range(2)}
    assert len(seeds) == 3000 and min(seeds) >= 0 and max(seeds) < 2**63
    assert len({seed % 2**32 for seed in seeds}) == 3000  # torch's generator reads half of a seed on some devices


def test_precision_is_what_was_asked_for_or_what_the_device_has() -> None:
    device = torch.device("cpu")
    assert resolve_precision("no", device) == "no" and resolve_precision("bf16", device) == "bf16"
    assert resolve_precision("auto", device) in ("no", "bf16")
    assert resolve_precision("auto", torch.device("meta")) == "no"


# learning -------------------------------------------------------------------------------------------------------------


def test_the_dvae_learns_and_leaves_what_a_run_leaves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny_recipe("dvae", steps=40, batch_size=32, log_every=1, validate_every=10, save_every=39)
    recipe.optimizer.learning_rate, recipe.run.ema_decay = 0.03, 0.8
    trainer = Trainer(recipe, tmp_path)
    result = trainer.run()
    assert (result.step, result.interrupted, result.part) == (40, False, tmp_path / "dvae")
    decibels, losses = column(tmp_path, "heldout_psnr"), column(tmp_path, "loss")
    assert len(decibels) == 4 and decibels[-1] > decibels[0] + 0.5 and decibels[-1] == result.figures["heldout_psnr"]
    assert len(losses) == 40 and sum(losses[-8:]) < 0.8 * sum(losses[3:11])  # before that, it has no codes
    assert column(tmp_path, "learning_rate")[:2] == pytest.approx([0.015, 0.03])
    assert column(tmp_path, "beta")[:3] == [0, 0, 0] and column(tmp_path, "temperature")[-1] == 0.5
    assert min(column(tmp_path, "pictures_per_second")) > 0 and min(column(tmp_path, "gradient_norm")) > 0
    seconds = [float(row["seconds"]) for row in rows_of(tmp_path)]
    assert seconds == sorted(seconds)

    samples = sorted((tmp_path / "samples").iterdir())
    assert [path.name for path in samples] == [f"{step:08d}.png" for step in (10, 20, 30, 40)]
    assert read_recipe(samples[-1]) == {"step": 40} and min(Image.open(samples[-1]).size) >= 64
    assert list((tmp_path / "tensorboard").glob("events*"))
    assert json.loads((tmp_path / "recipe.json").read_text()) == recipe.to_dict()
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000039", "step-00000040"] and result.checkpoint == tmp_path / "checkpoints" / kept[1]
    shown = capsys.readouterr().err
    assert "40/40" in shown and "loss=" in shown and "pictures_per_s=" in shown and "heldout_perplexity" in shown

    part, tensors = load_part(DVAE, result.part), state_of(tmp_path, 40)
    assert all(torch.equal(p, tensors[f"ema.{i}"]) for i, p in enumerate(part.parameters()))
    assert not torch.equal(part.codebook, tensors["model.codebook"])


def test_clip_learns_which_caption_belongs_to_which_picture(tmp_path: Path, picture_sources: dict[str, Path]) -> None:
    recipe = tiny_recipe("clip", steps=30, batch_size=6, log_every=1)
    recipe.optimizer.learning_rate, recipe.run.ema_decay = 1e-3, 0.5
    recipe.data.source, recipe.objective["degrade"] = str(picture_sources["folder"]), 0.0
    result = Trainer(recipe, tmp_path).run()
    losses = column(tmp_path, "loss")
    assert losses[-1] < 0.5 * losses[0] and result.figures["seen_retrieval"] > 0.6
    assert (result.part / "tokenizer.json").read_text() == (tmp_path / "tokenizer.json").read_text()
    assert "twin_swapped" not in " ".join(result.figures)


def test_the_transformer_learns(tmp_path: Path, dvae_folder: Path) -> None:
    recipe = tiny_recipe("dalle1", dvae_folder, steps=30, batch_size=8, log_every=1, validate_every=10)
    recipe.optimizer.learning_rate, recipe.run.ema_decay = 0.01, 0.5
    result = Trainer(recipe, tmp_path).run()
    for name in ("text", "image"):
        assert column(tmp_path, name)[-1] < 0.85 * column(tmp_path, name)[0]
        assert column(tmp_path, f"heldout_{name}")[-1] < column(tmp_path, f"heldout_{name}")[0]
    assert load_part(DALLE1Transformer, result.part).config.num_image_tokens == 16
    size = Image.open(tmp_path / "samples" / "00000030.png").size
    assert size[0] >= 8 * 3 * 16 and size[1] >= 4 * 3 * 16  # two candidates for each of sixteen captions


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    recipe = tiny_recipe("dvae", steps=2)
    before = Trainer(recipe, tmp_path).run()
    weights = {name: p.clone() for name, p in load_part(DVAE, before.part).state_dict().items()}
    shutil.rmtree(before.part)  # as after a kill between the last checkpoint and the part
    again = Trainer(recipe, tmp_path).run()
    assert (again.step, again.figures) == (2, before.figures)
    assert_same(weights, dict(load_part(DVAE, again.part).state_dict()))


def test_the_codebook_comes_from_the_encoder_when_the_warm_up_ends(tmp_path: Path) -> None:
    trainer = Trainer(tiny_recipe("dvae", steps=3), tmp_path)
    model = trainer.stage.model
    initial = model.codebook.detach().clone()
    batch = next(trainer.stream)
    for step in (0, 1, 3):
        trainer.stage.before_step(batch, step, torch.Generator())
    assert torch.equal(model.codebook, initial)
    trainer.stage.before_step(batch, 2, torch.Generator().manual_seed(0))
    features = model.encode_features(batch["pixels"] / 255).permute(0, 2, 3, 1).flatten(0, 2)
    assert torch.cdist(model.codebook, features).min(dim=1).values.max() < 1e-3


def test_twins_are_told_apart_by_cross_entropy() -> None:
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])  # the second pair is exchanged
    loss, accuracy = twin_loss(image, text, torch.tensor(2.0))
    right, wrong = math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))
    assert float(loss) == pytest.approx((right + wrong) / 2) and float(accuracy) == 0.5
    tilted = torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    loss, _ = twin_loss(image[:2], tilted, torch.tensor(1.0))
    by_picture = [math.log(1 + math.exp(0.0 - 0.6)), math.log(1 + math.exp(0.8 - 1.0))]
    by_caption = [math.log(1 + math.exp(0.8 - 0.6)), math.log(1 + math.exp(0.0 - 1.0))]
    assert float(loss) == pytest.approx(sum(by_picture + by_caption) / 4)


def test_half_precision_trains_full_precision_weights(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run.precision bf16 cannot be had in this process"):
        Trainer(tiny_recipe("dvae", steps=2), tmp_path / "first")  # so that this process has a precision
        Trainer(tiny_recipe("dvae", steps=2, precision="bf16"), tmp_path / "second")
    assert not (tmp_path / "second").exists()
    recipe = tiny_recipe("dvae", steps=4, precision="bf16", log_every=1)
    assert exit_code(start(train_alone, recipe, tmp_path / "third")) == 0
    assert all(
        tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in state_of(tmp_path / "third", 4).values()
    )
    Trainer(tiny_recipe("dvae", steps=4, log_every=1), tmp_path / "fourth").run()
    ours, theirs = column(tmp_path / "third", "loss"), column(tmp_path / "fourth", "loss")
    assert ours != theirs and ours == pytest.approx(theirs, rel=0.1)


# resuming -------------------------------------------------------------------------------------------------------------


def exact_recipe(stage: str, dvae: Path) -> Recipe:
    """Dropout, accumulation, a validation on the way, a cosine schedule: all that could shift a random state."""
    recipe = tiny_recipe(stage, dvae, accumulate=2, save_every=2, validate_every=3)
    if stage == "dalle1":
        recipe.model["dropout"] = 0.2
    return recipe


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, dvae_folder: Path) -> dict[str, Path]:
    folders = {stage: tmp_path_factory.mktemp(stage) for stage in ("dvae", "dalle1")}
    for stage, folder in folders.items():
        Trainer(exact_recipe(stage, dvae_folder), folder).run()
    return folders


@pytest.mark.parametrize(
    ("stage", "step", "moment", "newest"),
    [
        ("dvae", 1, "update", 0),  # nothing was saved yet
        ("dvae", 5, "update", 4),
        ("dvae", 6, "save", 4),
        ("dalle1", 3, "update", 2),
        ("dalle1", 6, "save", 4),
    ],
)
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    tmp_path: Path, dvae_folder: Path, uninterrupted: dict[str, Path], stage: str, step: int, moment: str, newest: int
) -> None:
    recipe = exact_recipe(stage, dvae_folder)
    assert exit_code(start(train_and_die, recipe, tmp_path, step, moment)) == -signal.SIGKILL
    kept = sorted((tmp_path / "checkpoints").glob("step-*"))
    assert [int(path.name[5:]) for path in kept][-1:] == ([newest] if newest else [])
    trainer = Trainer(recipe, tmp_path)
    assert trainer.state.step == newest
    result = trainer.run()
    assert result.step == 7 and not list((tmp_path / "checkpoints").glob(".writing-*"))
    assert_same(state_of(uninterrupted[stage], 7), state_of(tmp_path, 7))
    ours, theirs = (load_part(PARTS[result.part.name], f / result.part.name) for f in (tmp_path, uninterrupted[stage]))
    assert_same(dict(ours.state_dict()), dict(theirs.state_dict()))
    assert column(tmp_path, "loss") == column(uninterrupted[stage], "loss")
    assert [int(row["step"]) for row in rows_of(tmp_path)] == [
        int(row["step"]) for row in rows_of(uninterrupted[stage])
    ]


def test_resuming_makes_no_difference_for_clip_and_worker_processes(tmp_path: Path) -> None:
    recipe = tiny_recipe("clip", steps=4, save_every=2)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    Trainer(recipe, whole).run()
    first = Trainer(recipe, halves)
    before_step = first.stage.before_step

    def stop(batch: Any, step: int, generator: torch.Generator) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        before_step(batch, step, generator)

    first.stage.before_step = stop  # type: ignore[method-assign]
    assert first.run().step == 3
    recipe.data.workers = 1  # may change: it changes nothing
    Trainer(recipe, halves).run()
    assert_same(state_of(whole, 4), state_of(halves, 4))


def test_starting_anew_keeps_the_run_before_aside_and_out_of_the_way(tmp_path: Path) -> None:
    old = tiny_recipe("dvae", steps=2)
    Trainer(old, tmp_path).run()
    new = tiny_recipe("dvae", steps=3, seed=1)
    Trainer(new, tmp_path, resume=False)  # and killed before its first checkpoint
    aside = tmp_path / "previous"
    assert sorted(p.name for p in aside.iterdir()) == [
        "checkpoints",
        "log.csv",
        "recipe.json",
        "samples",
        "tensorboard",
    ]
    resumed = Trainer(new, tmp_path)
    assert resumed.state.step == 0
    resumed.run()
    assert {int(row["step"]) for row in rows_of(tmp_path)} == {2, 3}
    assert [p.name for p in (tmp_path / "samples").iterdir()] == ["00000003.png"]
    assert state_of(aside, 2) and record_of(aside, 2)["recipe"] == old.to_dict()


def test_what_a_kill_left_behind_is_put_right(tmp_path: Path) -> None:
    recipe = tiny_recipe("dvae", steps=2)
    part = Trainer(recipe, tmp_path).run().part
    (tmp_path / ".dvae.new-0123abcd").mkdir()
    part.rename(tmp_path / ".dvae.old-0123abcd")  # killed between the two renames of save_part
    (tmp_path / "checkpoints" / ".writing-00000009-1").mkdir()
    recipe.run.steps = 3
    trainer = Trainer(recipe, tmp_path)
    assert load_part(DVAE, part) is not None and not list(tmp_path.glob(".dvae.*"))
    trainer.run()
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_settings_that_say_which_run_it_is_cannot_change_on_the_way(tmp_path: Path, dvae_folder: Path) -> None:
    recipe = tiny_recipe("dalle1", dvae_folder, steps=1)
    Trainer(recipe, tmp_path / "run").run()
    for change in ("run.batch_size=5", "run.seed=1", "data.seed=1", "model.width=64", "objective.text_weight=0.5"):
        with pytest.raises(InputError, match=change.partition("=")[0]) as refusal:
            Trainer(apply_overrides(recipe, [change]), tmp_path / "run")
        assert "--no-resume" in str(refusal.value) and "may" not in str(refusal.value)
    with pytest.raises(InputError, match="stage"):
        Trainer(tiny_recipe("dvae", steps=1), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "recipe.json").read_text()) == recipe.to_dict()

    moved = Path(shutil.copytree(dvae_folder, tmp_path / "moved"))
    overrides = ["run.steps=2", "optimizer.learning_rate=0.001", "run.log_every=1", f"objective.dvae={moved}"]
    trainer = Trainer(apply_overrides(recipe, overrides), tmp_path / "run")
    assert trainer.bent == ["optimizer.learning_rate 0.003 -> 0.001", "run.steps 1 -> 2"]
    assert trainer.run().step == 2
    save_part(tiny_dvae(num_codes=16), moved)  # other weights
    with pytest.raises(InputError, match="have changed"):
        Trainer(apply_overrides(recipe, [*overrides, "run.steps=3"]), tmp_path / "run")


def test_a_checkpoint_without_the_newer_entries_is_taken_up(tmp_path: Path, dvae_folder: Path) -> None:
    recipe = tiny_recipe("dalle1", dvae_folder, steps=2, accumulate=3)
    Trainer(recipe, tmp_path).run()
    record = record_of(tmp_path, 2)
    del record["fingerprint"], record["batches"], record["recipe"]["data"]["validation"]
    (tmp_path / "checkpoints" / "step-00000002" / "state.json").write_text(json.dumps(record))
    recipe.run.steps, recipe.run.accumulate = 3, 1
    trainer = Trainer(recipe, tmp_path)
    assert (trainer.state.step, trainer.state.seen) == (2, 6)
    moved = apply_overrides(recipe, [f"objective.dvae={shutil.copytree(dvae_folder, tmp_path / 'moved')}"])
    with pytest.raises(InputError, match="objective.dvae"):  # whose contents cannot be compared
        Trainer(moved, tmp_path)


# ends that nobody wanted ----------------------------------------------------------------------------------------------


TINY_DVAE = [
    "model.resolution=16", "model.num_codes=16", "model.widths=[16]", "model.blocks_per_group=1", "model.code_width=8",
    "data.size=16", "run.batch_size=4", "run.precision=no", "run.threads=1", "run.log_every=1",
]  # fmt: skip


def test_an_interrupt_saves_and_names_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from genpipe.training.stages import DVAEStage

    def interrupt(self: DVAEStage, batch: Any, step: int, generator: torch.Generator) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)  # launchers pass on what the terminal has sent already

    monkeypatch.setattr(DVAEStage, "before_step", interrupt)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        run_command("dvae", [*TINY_DVAE, "run.steps=1000"], None, tmp_path, True)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    checkpoint = tmp_path / "checkpoints" / "step-00000003"
    shown = capsys.readouterr()
    assert f"stopped at step 3 of 1000; the same command goes on from {checkpoint}" in shown.err
    assert f"3 of 1000 steps; weights in {tmp_path / 'dvae'}" in shown.out
    monkeypatch.undo()
    run_command("dvae", [*TINY_DVAE, "run.steps=4"], None, tmp_path, True)
    assert "run.steps 1000 -> 4" in (shown := capsys.readouterr()).err and "4 of 4 steps" in shown.out


def test_a_time_budget_ends_a_run_with_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_command("dvae", [*TINY_DVAE, "run.steps=100000"], 1e-6, tmp_path, True)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert "stopped at step 1 of 100000" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_is_never_saved(tmp_path: Path, dvae_folder: Path) -> None:
    recipe = tiny_recipe("dalle1", dvae_folder, steps=2)
    Trainer(recipe, tmp_path).run()
    before = state_of(tmp_path, 2)
    weights = (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    diverging = apply_overrides(recipe, ["run.steps=9", "optimizer.learning_rate=1e30", "run.save_minutes=0"])
    diverging.run.log_every = 100  # it must be noticed at the checkpoint
    with pytest.raises(FloatingPointError, match=r"step [34].*step-0000000[23].*optimizer.learning_rate"):
        Trainer(diverging, tmp_path).run()
    for path in sorted((tmp_path / "checkpoints").iterdir()):
        assert all(tensor.isfinite().all() for tensor in state_of(tmp_path, int(path.name[5:])).values())
    if weights == (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes():
        assert_same(before, state_of(tmp_path, 2))


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    recipe = tiny_recipe("dvae", steps=7, save_every=2)
    assert exit_code(start(train_on_full_disk, recipe, tmp_path, 4, 20_000)) == 2
    words = (tmp_path / "error.txt").read_text()
    assert "step-00000006 could not be written" in words and f"{tmp_path}/checkpoints/step-00000004 is unt" in words
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    trainer = Trainer(recipe, tmp_path)
    assert trainer.state.step == 4 and trainer.run().step == 7


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["objective.dvae="], "objective.dvae=FOLDER"),
        (["objective.dvae=/nowhere"], "/nowhere"),
        (["init=/nowhere"], "/nowhere"),
        (["data.source=/nowhere/pictures"], "/nowhere/pictures"),
        (["data.source=/nowhere/{0..3}.tar"], "shards are missing"),
        (["data.validation=/nowhere"], "/nowhere"),
        (["data.size=18"], "multiple of 4"),
        (["model.text_length=2"], "context_length"),
        (["model.num_heads=3"], "num_heads"),
        (["model.width=-4"], "cannot be built"),
        (["objective.vocab_size=5"], "vocab_size"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    tmp_path: Path, dvae_folder: Path, overrides: list[str], complaint: str
) -> None:
    with pytest.raises(InputError, match=complaint):
        Trainer(apply_overrides(tiny_recipe("dalle1", dvae_folder), overrides), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_together_is_refused(tmp_path: Path, dvae_folder: Path) -> None:
    with pytest.raises(InputError, match="data.size is 32.*resolution is 16"):
        Trainer(apply_overrides(tiny_recipe("dvae"), ["data.size=32"]), tmp_path / "run")
    with pytest.raises(InputError, match="64 cells; raise run.batch_size"):
        Trainer(apply_overrides(tiny_recipe("dvae"), ["model.num_codes=65"]), tmp_path / "run")
    transformer = Trainer(tiny_recipe("dalle1", dvae_folder, steps=1), tmp_path / "16px").run().part
    larger = apply_overrides(tiny_recipe("dalle1", dvae_folder), [f"init={transformer}", "data.size=24"])
    with pytest.raises(InputError, match="another dVAE or data.size"):
        Trainer(larger, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_missing_emoji_font_shows_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENPIPE_EMOJI_FONT", "/nowhere/font.ttf")
    with pytest.raises(InputError, match="fonts-noto-color-emoji"):
        Trainer(tiny_recipe("dvae"), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be used.*--out"):
        Trainer(tiny_recipe("dvae"), tmp_path / "file" / "run")


def test_a_damaged_newest_checkpoint_is_named(tmp_path: Path) -> None:
    recipe = tiny_recipe("dvae", steps=4, save_every=2)
    Trainer(recipe, tmp_path).run()
    damaged = tmp_path / "checkpoints" / "step-00000004"
    content = (damaged / "state.safetensors").read_bytes()
    (damaged / "state.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="step-00000004 cannot be read"):
        Trainer(recipe, tmp_path)
    shutil.rmtree(damaged)
    assert Trainer(recipe, tmp_path).state.step == 2


def test_long_captions_are_cut_with_one_warning(tmp_path: Path, dvae_folder: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Trainer(apply_overrides(tiny_recipe("dalle1", dvae_folder, steps=2), ["model.text_length=4"]), tmp_path).run()
    assert len([w for w in caught if "its tail is ignored" in str(w.message)]) == 1


# other data -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["dvae", "clip", "dalle1"])
@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_pictures_from_disk_train_every_stage(
    tmp_path: Path, dvae_folder: Path, picture_sources: dict[str, Path], stage: str, kind: str
) -> None:
    recipe = tiny_recipe(stage, dvae_folder, steps=2, save_every=1, validate_every=1)
    recipe.data.source = str(picture_sources[kind])
    whole = Trainer(recipe, tmp_path / "whole").run()
    figure = {"dvae": "seen_psnr", "clip": "seen_retrieval", "dalle1": "seen_image"}[stage]
    assert figure in whole.figures and (tmp_path / "whole" / "samples" / "00000002.png").is_file()
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-00000002")
    Trainer(recipe, tmp_path / "resumed").run()
    assert_same(state_of(tmp_path / "whole", 2), state_of(tmp_path / "resumed", 2))


def test_broken_pictures_are_reported_and_validation_can_have_its_own(
    tmp_path: Path, picture_sources: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(picture_sources["folder"], tmp_path / "pictures"))
    (folder / "03.png").write_bytes(b"no picture")
    overrides = [*TINY_DVAE, "run.steps=3", f"data.source={folder}", f"data.validation={picture_sources['folder']}"]
    run_command("dvae", overrides, None, tmp_path / "run", True)
    assert "1 picture cannot be read (first:" in capsys.readouterr().err.replace("\n", " ")
    assert "heldout_psnr" in {row["name"] for row in rows_of(tmp_path / "run")}


# several processes ----------------------------------------------------------------------------------------------------


def test_two_processes_learn_what_one_learns_from_the_same_batches(tmp_path: Path, dvae_folder: Path) -> None:
    jobs: list[tuple[Recipe, Path]] = []
    for stage, accumulate in (("dvae", 1), ("dalle1", 1), ("clip", 1), ("clip", 2)):
        recipe = tiny_recipe(stage, dvae_folder, steps=4, save_every=3, accumulate=accumulate)
        recipe.optimizer.epsilon = 1e-4  # or rounding would decide where gradients vanish
        jobs.append((recipe, tmp_path / f"{stage}-{accumulate}-2"))
    port, logs = free_port(), [tmp_path / f"{rank}.log" for rank in range(2)]
    processes = [start(train_in_group, jobs, rank, port, log) for rank, log in enumerate(logs)]
    assert [exit_code(process) for process in processes] == [0, 0], logs[0].read_text() + logs[1].read_text()

    for recipe, folder in jobs:
        one, accumulate = folder.with_suffix(".1"), recipe.run.accumulate
        Trainer(apply_overrides(recipe, [f"run.accumulate={2 * accumulate}"]), one).run()
        ours, theirs = state_of(one, 4), state_of(folder, 4)
        assert ours.keys() == theirs.keys() and record_of(folder, 4)["batches"] == 8 * accumulate
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], atol=2e-4, rtol=1e-2, msg=f"{recipe.stage} {name}")
        moved = max(float((ours[n] - state_of(one, 3)[n]).abs().max()) for n in ours if n.startswith("model."))
        assert moved > 1e-3  # so the tolerance above says something
        assert len([row for row in rows_of(folder) if row["name"] == "loss"]) == 2  # one process writes

    resumed = Trainer(apply_overrides(jobs[0][0], ["run.steps=5", "run.accumulate=2"]), jobs[0][1])
    assert (resumed.state.step, resumed.state.seen) == (4, 8)  # one process goes on where two were
    assert resumed.run().step == 5


def test_a_process_that_fails_does_not_leave_the_other_waiting(tmp_path: Path, dvae_folder: Path) -> None:
    port, logs = free_port(), [tmp_path / f"{rank}.log" for rank in range(2)]
    changes = ["data.size=16", "model.width=32", "objective.vocab_size=300", "objective.tokenizer_captions=10"]
    arguments = ["dalle1", "--out", str(tmp_path / "run"), *(word for change in changes for word in ("--set", change))]
    processes = [
        start(command_in_group, [*arguments, "--set", f"objective.dvae={folder}"], rank, port, logs[rank])
        for rank, folder in enumerate([dvae_folder, "/nowhere"])
    ]
    assert exit_code(processes[1]) == 2
    assert exit_code(processes[0]) == 1
    assert "error: /nowhere is not a folder" in logs[1].read_text()
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_launcher_trains_and_its_interrupt_saves(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["-m", "genpipe.training", "dvae", "--out", str(tmp_path)]
    command += [word for change in TINY_DVAE for word in ("--set", change)]
    done = subprocess.run([*command, "--set", "run.steps=3"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "3 of 3 steps" in done.stdout, done.stderr
    assert record_of(tmp_path, 3)["batches"] == 6

    endless = [*command, "--set", "run.steps=1000000", "--set", "run.save_minutes=1000"]
    process = subprocess.Popen(endless, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    shown = ""
    while "4/1000000" not in shown and (piece := process.stderr.read(1)):
        shown += piece
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    rest = process.communicate(timeout=120)[1]
    assert process.returncode != 0 and "the same command goes on from" in rest, shown + rest
    assert max(int(path.name[5:]) for path in (tmp_path / "checkpoints").iterdir()) > 3
