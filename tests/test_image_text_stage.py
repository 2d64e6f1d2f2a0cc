"""Training heads: the loss, cached features, rates by layer, class weights, early stopping, resuming, the recipe."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_recipes import record_of, state_of

from genpipe.clip.image_text import TransformerClassifier, encode_pairs, load_image_text_classifier
from genpipe.clip.model import CLIP
from genpipe.data.labelled_pairs import LabelledPairs
from genpipe.errors import InputError
from genpipe.identity import weights_identity
from genpipe.parts import load_part, save_part
from genpipe.training.config import DataConfig, OptimizerConfig, Recipe, RunConfig, apply_overrides
from genpipe.training.early_stopping import EarlyStopping
from genpipe.training.image_text_stage import ImageTextStage, held_out, load_starting_clip, tower_depths
from genpipe.training.loop import Trainer
from genpipe.training.optimizer import make_optimizer, parameter_groups
from genpipe.training.recipes import recipe


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pairs: "same" where the picture's colour is the text's, "other" where not; three of four are "other"."""
    folder = tmp_path_factory.mktemp("pairs")
    colours = {"red": (200, 20, 20), "white": (250, 250, 250), "blue": (20, 20, 200)}
    rows = [("image", "text", "label")]
    for i in range(24):
        shown, told = list(colours)[i % 3], list(colours)[(i % 3 + (1 if i % 4 else 0)) % 3]
        Image.new("RGB", (16, 16), colours[shown]).save(folder / f"{i:02}.png")
        rows.append((f"{i:02}.png", f"a {told} background", "same" if shown == told else "other"))
    with open(folder / "pairs.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder / "pairs.csv"


def tiny_recipe(family: Path, source: Path, kind: str = "transformer", **changes: Any) -> Recipe:
    """One layer of width 16 on the tiny family's CLIP; `changes` go to the objective or to the run."""
    objective = {
        "clip": str(family), "head": kind, "tune": False, "tower_rate": 0.5, "layer_decay": 0.5, "patience": 0,
        "class_weights": "none", "validation_share": 0.25, "cache_megabytes": 100,
    }  # fmt: skip
    run = {"steps": 6, "batch_size": 4, "precision": "no", "threads": 1, "log_every": 2, "validate_every": 2}
    return Recipe(
        name="tiny image-text",
        stage="image_text",
        model={"linear": True, "width": 16, "num_layers": 1, "num_heads": 2, "dropout": 0.1},
        objective={key: changes.get(key, value) for key, value in objective.items()},
        data=DataConfig(size=16, source=str(source)),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        run=RunConfig(**{key: changes.get(key, value) for key, value in run.items()}),
    )


def stage_of(family: Path, source: Path, kind: str = "transformer", **changes: Any) -> ImageTextStage:
    torch.manual_seed(0)
    return ImageTextStage(tiny_recipe(family, source, kind, **changes), None)


def test_the_loss_is_the_same_with_and_without_kept_features(tiny_folder: Path, listed: Path) -> None:
    losses = []
    for kept in (100, 0):
        stage = stage_of(tiny_folder, listed, cache_megabytes=kept, class_weights="inverse_frequency")
        stage.model.eval()
        batch = stage.batches()[1]
        assert stage.is_cached == bool(kept) and ("pixels" in batch) != stage.is_cached
        loss, logs = stage.loss(stage.model, batch, 0, torch.Generator())
        assert loss.requires_grad and not logs["accuracy"].requires_grad
        losses.append(loss.detach())
    torch.testing.assert_close(losses[0], losses[1])

    rows = [stage.rows[place] for place in batch["place"].tolist()]
    pairs = LabelledPairs(listed)
    logits = stage.model(encode_pairs(stage.classifier.clip, batch["pixels"], [pairs.texts[row] for row in rows]))
    labels = torch.tensor([pairs.labels[row] for row in rows])
    torch.testing.assert_close(losses[0], F.cross_entropy(logits, labels, weight=stage.weights).detach())


def test_class_weights_and_held_out_pairs_worked_out(tiny_folder: Path, listed: Path) -> None:
    stage = stage_of(tiny_folder, listed, class_weights="inverse_frequency")
    labels = np.array(stage.pairs.labels)  # 18 other, 6 same; a quarter of each is held out: 4.5 -> 4 and 1.5 -> 2
    assert [int((labels[stage.rows] == c).sum()) for c in (0, 1)] == [14, 4]
    assert sorted(stage.rows + stage.held_rows) == list(range(24)) and stage.weights is not None
    assert stage.weights.tolist() == pytest.approx([18 / (2 * 14), 18 / (2 * 4)])
    assert held_out(np.array([0, 1, 1]), 0.9, seed=0).sum() == 1  # one of each class stays to train on
    assert stage_of(tiny_folder, listed).weights is None


def test_every_epoch_shows_every_pair_once(tiny_folder: Path, listed: Path) -> None:
    stage = stage_of(tiny_folder, listed)
    batches = stage.batches()
    places = torch.cat([batches[number]["place"] for number in range(9)]).tolist()  # two epochs of 18
    assert sorted(places[:18]) == sorted(places[18:]) == list(range(18)) and places[:18] != places[18:]


def test_rates_fall_from_layer_to_layer(tmp_path: Path, tiny_folder: Path, listed: Path) -> None:
    clip = load_part(CLIP, tiny_folder / "clip")
    architecture = json.loads(json.dumps(clip.config["architecture"]))
    architecture["vision_cfg"]["layers"], architecture["text_cfg"]["layers"] = 3, 2
    deep = CLIP(architecture)
    deep.tokenizer = clip.tokenizer
    depths = tower_depths(deep)
    assert depths.keys() == {name for name, _ in deep.named_parameters()}
    expected = {
        "visual.conv1.weight": 3, "visual.positional_embedding": 3, "visual.transformer.resblocks.0.ln_1.weight": 2,
        "visual.transformer.resblocks.2.ln_1.weight": 0, "visual.ln_post.weight": 0, "visual.proj": 0,
        "token_embedding.weight": 2, "transformer.resblocks.0.ln_1.weight": 1,
        "transformer.resblocks.1.ln_1.weight": 0, "ln_final.weight": 0, "text_projection": 0,
    }  # fmt: skip
    assert {name: depths[f"towers.{name}"] for name in expected} == expected

    save_part(deep, tmp_path / "deep")
    stage = stage_of(tmp_path / "deep", listed, tune=True)
    groups = parameter_groups(stage.model, 0.1, stage.rates())
    rate_of = {id(parameter): group["rate"] for group in groups for parameter in group["params"]}
    found = {name: rate_of.get(id(parameter)) for name, parameter in stage.model.named_parameters()}
    assert found["head.classes.weight"] == 1.0
    assert found["clip.towers.visual.transformer.resblocks.2.mlp.c_fc.weight"] == 0.5
    assert found["clip.towers.visual.conv1.weight"] == 0.5 * 0.5**3
    assert found["clip.towers.transformer.resblocks.0.mlp.c_fc.weight"] == 0.25
    unused = {"clip.towers.logit_scale", "clip.towers.visual.proj", "clip.towers.text_projection"}
    assert {name for name, rate in found.items() if rate is None} == unused


def test_the_rate_of_a_group_is_its_share_of_the_learning_rate(tiny_folder: Path, listed: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny_recipe(tiny_folder, listed, tune=True, steps=1), tmp_path / "run")
    trainer.run()
    peak = 1e-2 / 2  # the first of two warm-up steps
    assert sorted({round(group["lr"] / peak, 6) for group in trainer.optimizer.param_groups}) == [0.25, 0.5, 1.0]
    # one update of AdamW moves a weight by at most about its rate
    before = load_part(CLIP, tiny_folder / "clip").towers.visual.conv1.weight
    moved = (trainer.stage.model.clip.towers.visual.conv1.weight - before).abs().max()
    assert 0 < moved <= 0.25 * peak * 1.1
    plain = make_optimizer(torch.nn.Linear(2, 2), OptimizerConfig())
    assert [(len(group["params"]), group["weight_decay"]) for group in plain.param_groups] == [(1, 1e-2), (1, 0.0)]


def test_early_stopping_counts_validations_without_a_better_one() -> None:
    stopping = EarlyStopping("loss", patience=2)
    seen = [(stopping.improved({"loss": loss}, step), stopping.over) for step, loss in enumerate([3, 2, 2, 1, 4, 5], 1)]
    assert seen == [(True, False), (True, False), (False, False), (True, False), (False, False), (False, True)]
    again = EarlyStopping("loss", patience=2)
    again.restore(json.loads(json.dumps(stopping.record())))
    assert again.over and (again.best, again.step) == (1, 4)
    endless = EarlyStopping("loss", patience=0)
    assert [endless.improved({"loss": 1.0}, step) for step in range(1, 5)] == [True, False, False, False]
    assert not endless.over


def losses_of(folder: Path) -> dict[int, float]:
    with open(folder / "log.csv", newline="") as file:
        return {int(row[0]): float(row[3]) for row in csv.reader(file) if row[2] == "heldout_loss"}


def spoiled(family: Path, source: Path, **changes: Any) -> Recipe:
    """A run that gets worse: at this learning rate validation soon does."""
    settings = tiny_recipe(family, source, "mlp", patience=2, steps=60, **changes)
    return replace(settings, optimizer=OptimizerConfig(learning_rate=0.3, warmup_steps=8, decay="constant"))


def test_a_run_ends_early_and_keeps_its_best_weights(tiny_folder: Path, listed: Path, tmp_path: Path) -> None:
    settings = spoiled(tiny_folder, listed)
    trainer = Trainer(settings, tmp_path / "run")
    result = trainer.run()
    losses = losses_of(tmp_path / "run")
    best = min(losses, key=losses.__getitem__)
    assert result.stopped_early and not result.interrupted and result.step == best + 4 == max(losses) < 60
    clip = load_part(CLIP, tiny_folder / "clip")
    classifier = load_image_text_classifier(result.part, clip)
    stage = trainer.stage
    stage.classifier.head.load_state_dict(classifier.head.state_dict())
    stage.model.eval()
    assert stage.validate()["heldout_loss"] == pytest.approx(losses[best], rel=1e-6)

    weights = classifier.head.state_dict()
    again = Trainer(settings, tmp_path / "run").run()  # has nothing left to do, and leaves the best where they are
    assert again.stopped_early and again.step == result.step
    kept = load_image_text_classifier(again.part, clip).head.state_dict()
    assert all(torch.equal(kept[name], weights[name]) for name in weights)


@pytest.mark.parametrize("tune", [False, True])
def test_a_resumed_run_equals_an_uninterrupted_one(tiny_folder: Path, listed: Path, tmp_path: Path, tune: bool) -> None:
    settings = tiny_recipe(tiny_folder, listed, tune=True) if tune else spoiled(tiny_folder, listed)
    whole = Trainer(settings, tmp_path / "whole").run()
    for _ in range(3):
        cut = Trainer(settings, tmp_path / "parts", minutes=1e-9).run()
    assert cut.step == 3
    rest = Trainer(settings, tmp_path / "parts").run()
    assert rest.step == whole.step and rest.stopped_early == whole.stopped_early
    one, two = (state_of(tmp_path / name, whole.step) for name in ("whole", "parts"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    clip = None if tune else load_part(CLIP, tiny_folder / "clip")
    a, b = (load_image_text_classifier(run.part, clip).state_dict() for run in (whole, rest))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert "stopping" in record_of(tmp_path / "parts", whole.step)


def test_a_tuned_run_saves_its_clip_and_a_frozen_one_does_not(tiny_folder: Path, listed: Path, tmp_path: Path) -> None:
    start = weights_identity(load_part(CLIP, tiny_folder / "clip"))
    tuned = Trainer(tiny_recipe(tiny_folder, listed, tune=True), tmp_path / "tuned").run()
    classifier = load_image_text_classifier(tuned.part)
    assert isinstance(classifier.head, TransformerClassifier) and classifier.head.names == ("other", "same")
    assert classifier.head.config["clip_identity"] == weights_identity(classifier.clip) != start
    frozen = Trainer(tiny_recipe(tiny_folder, listed), tmp_path / "frozen").run()
    assert not (frozen.part / "clip").exists()
    head = load_image_text_classifier(frozen.part, load_part(CLIP, tiny_folder / "clip")).head
    assert head.config["clip_identity"] == start
    # a head trained on goes on from the CLIP beside it
    more = replace(tiny_recipe(tiny_folder, listed, steps=1), init=str(tuned.part))
    stage = ImageTextStage(more, None)
    assert weights_identity(stage.classifier.clip) == classifier.head.config["clip_identity"]
    assert torch.equal(stage.model.class_token, classifier.head.class_token)


@pytest.mark.parametrize(("kind", "rate"), [("mlp", 1e-2), ("transformer", 1e-3)])
def test_one_batch_is_learned(tiny_folder: Path, listed: Path, kind: str, rate: float) -> None:
    """Whether a picture's colour is the one that the text names: neither alone tells."""
    settings = tiny_recipe(tiny_folder, listed, kind)
    settings.model["dropout"] = 0.0
    torch.manual_seed(0)
    stage = ImageTextStage(replace(settings, data=replace(settings.data, validation=str(listed))), None)
    optimizer = torch.optim.AdamW(stage.model.parameters(), lr=rate)
    stage.model.train()
    for step in range(120):
        loss, _ = stage.loss(stage.model, {"place": torch.arange(24)}, step, torch.Generator())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(stage.model.parameters(), 1.0)
        optimizer.step()
    stage.model.eval()
    figures = stage.validate()
    assert figures["heldout_accuracy"] == figures["heldout_balanced_accuracy"] == 1.0
    assert stage.sample().size[0] > 0


def test_refusals(tiny_folder: Path, listed: Path, tmp_path: Path) -> None:
    def refused(message: str, source: Path = listed, kind: str = "mlp", **changes: Any) -> None:
        settings = tiny_recipe(tiny_folder, source, kind, **changes.pop("objective", {}))
        data, model = changes.pop("data", {}), changes.pop("model", {})
        with pytest.raises(InputError, match=message):
            ImageTextStage(
                replace(settings, data=replace(settings.data, **data), model={**settings.model, **model}, **changes),
                None,
            )

    other = listed.parent / "other.csv"
    other.write_text("image,text,label\n00.png,a dog,same\n01.png,a dog,neither\n")
    refused("name a list or shards with --data FILE", data={"source": "scenes"})
    refused("'neither' .* is not among the 2 classes", data={"validation": str(other)})
    refused('data.crop is "stage_1"', data={"crop": "stage_1"})
    refused("set objective.validation_share or data.validation", objective={"validation_share": 0.0})
    refused("2 pairs are too few to hold", source=other)
    refused('there is no CLIP "nowhere"', objective={"clip": "nowhere"})
    refused("has nothing to learn", kind="sum", model={"linear": False})
    refused("cannot be built with these model settings", kind="transformer", model={"width": 15})
    for setting in ("objective.head=best", "objective.class_weights=some", "objective.layer_decay=0"):
        with pytest.raises(InputError, match=setting.partition("=")[0]):
            apply_overrides(recipe("image-text"), [setting])
    assert load_starting_clip("nano", "").image_size == (32, 32)
