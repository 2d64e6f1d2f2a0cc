"""Training the prior, and judging it: loss, statistics, dropped captions, resuming, cosines and retrieval."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_recipes import state_of, write_pictures

from genpipe.clip.model import CLIP
from genpipe.dalle2.losses import cumulative_alphas, diffuse, stratified_timesteps
from genpipe.dalle2.prior import PAPER_STD, Prior
from genpipe.data.scenes import EmojiScenes
from genpipe.errors import InputError
from genpipe.evaluation.prior import EncodedPairs, cosine_figures, nearest, prior_figures, retrieval
from genpipe.identity import weights_identity
from genpipe.images import to_unit
from genpipe.parts import load_part, save_part
from genpipe.training.config import DataConfig, OptimizerConfig, Recipe, RunConfig
from genpipe.training.data import Batch
from genpipe.training.loop import Trainer
from genpipe.training.prior_stage import PriorStage, training_pictures


def tiny_prior_recipe(family: Path, **objective: Any) -> Recipe:
    """One layer beside the tiny family's CLIP: 16 x 16 pixels."""
    settings = {
        "clip": str(family / "clip"), "new_clip": False, "text_dropout": 0.1, "repeats": 3, "statistics_pairs": 40,
    }  # fmt: skip
    return Recipe(
        name="tiny prior",
        stage="prior",
        model={"num_layers": 1, "num_heads": 2, "head_dim": 16},
        objective={**settings, **objective},
        data=DataConfig(size=16),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2),
        run=RunConfig(steps=4, batch_size=4, precision="no", threads=1, log_every=2, validate_every=1000),
    )


def stage_of(family: Path, **objective: Any) -> PriorStage:
    torch.manual_seed(0)
    return PriorStage(tiny_prior_recipe(family, **objective), None)


def batch_of(stage: PriorStage, rows: int = 4) -> Batch:
    pictures, captions = EmojiScenes(size=16, split="train").batch(0, rows)
    return stage.collate(pictures, captions, np.random.default_rng(0))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def test_the_loss_is_the_squared_error_of_the_clean_embedding(tiny_folder: Path) -> None:
    """Worked out row by row, with the caption read anew for each of the three noised embeddings of a picture."""
    stage = stage_of(tiny_folder, text_dropout=0.0)
    width = stage.model.config.embedding_dim
    stage.model.set_statistics(torch.randn(50, width, generator=seeded()) + 1)
    batch = batch_of(stage)
    loss, logs = stage.loss(stage.model, batch, 0, seeded())

    g, text = seeded(), stage.clip.encode_text(stage.clip.tokenize(EmojiScenes(size=16, split="train").batch(0, 4)[1]))
    t = stratified_timesteps(12, 1000, g)
    noise = torch.randn(12, width, generator=g)
    unit = F.normalize(stage.clip.embed_image(to_unit(batch["pixels"])), dim=-1)
    x_0 = (width**0.5 * unit - stage.model.mean) / stage.model.std
    alphas = cumulative_alphas("squaredcos_cap_v2", 1000)
    errors, cosines = [], []
    for i in range(12):
        row = slice(i // 3, i // 3 + 1)
        x_t = diffuse(x_0[row], noise[i : i + 1], alphas[t[i : i + 1]])
        answer = stage.model(x_t, t[i : i + 1], text.embedding[row], text.states[row], text.mask[row])
        errors.append((answer - x_0[row]).square().mean())
        cosines.append(F.cosine_similarity(stage.model.from_prior(answer), unit[row]))
    torch.testing.assert_close(loss, torch.stack(errors).mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logs["cosine_true"], torch.stack(cosines).mean(), rtol=1e-4, atol=1e-5)
    assert {"cosine_text", "cosine_shuffled", "mse_clean", "mse_noise"} <= logs.keys()
    assert not any(value.requires_grad for value in logs.values())


def test_one_batch_is_learned(tiny_folder: Path) -> None:
    """Told apart by their captions, the pictures' embeddings come out at every noise level."""
    stage = stage_of(tiny_folder, text_dropout=0.0, repeats=8)
    batch = batch_of(stage)
    with torch.no_grad():
        stage.model.set_statistics(stage.clip.embed_image(to_unit(batch["pixels"])))
    optimizer = torch.optim.AdamW(stage.model.parameters(), lr=1e-2)
    noise, first = seeded(), 0.0
    for step in range(80):
        loss, logs = stage.loss(stage.model, batch, step, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first = first or float(loss.detach())
    assert first > 0.7 and float(loss) < 0.15
    assert logs["cosine_true"] > 0.98 and logs["cosine_true"] > logs["cosine_shuffled"]


def test_a_dropped_caption_is_the_empty_one_and_the_embedding_stays(tiny_folder: Path) -> None:
    stage = stage_of(tiny_folder, text_dropout=1.0)
    batch, empty = batch_of(stage), stage.clip.tokenize([""])
    assert torch.equal(batch["ids"], empty.ids.expand(4, -1)) and torch.equal(batch["mask"], empty.mask.expand(4, -1))
    assert not batch["text_kept"].any()
    image, _ = stage._embeddings(batch)
    torch.testing.assert_close(image, stage.clip.embed_image(to_unit(batch["pixels"])))
    assert stage.loss(stage.model, batch, 0, seeded())[0].isfinite()
    many = stage_of(tiny_folder, text_dropout=0.1)
    pictures = np.zeros((2000, 3, 16, 16), np.uint8)
    dropped = ~many.collate(pictures, ["a dog"] * 2000, np.random.default_rng(0))["text_kept"]
    assert 0.08 < dropped.float().mean() < 0.12


def test_stored_embeddings_take_the_place_of_the_pixels(tiny_folder: Path) -> None:
    stage = stage_of(tiny_folder)
    batch = batch_of(stage)
    with torch.no_grad():
        stored = {**batch, "image_embedding": stage.clip.embed_image(to_unit(batch["pixels"]))}
    stored["pixels"] = torch.zeros_like(batch["pixels"])
    before, after = (stage.loss(stage.model, b, 0, seeded())[0] for b in (batch, stored))
    torch.testing.assert_close(before, after)


def test_statistics_come_from_training_pictures_before_the_first_step(tiny_folder: Path, tmp_path: Path) -> None:
    stage = stage_of(tiny_folder)
    batch = batch_of(stage)
    stage.before_step(batch, 1, seeded())
    assert not stage.model.mean.any()
    stage.before_step(batch, 0, seeded())
    pictures = training_pictures(DataConfig(size=16), 40)
    with torch.no_grad():
        unit = len(stage.model.mean) ** 0.5 * F.normalize(stage.clip.embed_image(to_unit(pictures)), dim=-1)
    torch.testing.assert_close(stage.model.mean, unit.mean(dim=0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stage.model.std, unit.std(dim=0), rtol=1e-4, atol=1e-5)
    save_part(stage.model, tmp_path / "prior")
    for start, expected in (
        ("", torch.full_like(stage.model.std, 1 / PAPER_STD)),
        (str(tmp_path / "prior"), stage.model.std),
    ):
        recipe = tiny_prior_recipe(tiny_folder, statistics_pairs=0 if not start else 40)
        recipe.init = start
        other = PriorStage(recipe, None)
        other.before_step(batch, 0, seeded())
        torch.testing.assert_close(other.model.std, expected)


def test_a_resumed_run_equals_an_uninterrupted_one(tiny_folder: Path, tmp_path: Path) -> None:
    recipe = tiny_prior_recipe(tiny_folder)
    recipe.data.source = str(write_pictures(tmp_path / "pictures"))
    Trainer(recipe, tmp_path / "whole").run()
    assert Trainer(recipe, tmp_path / "halves", minutes=0).run().step == 1  # the time is over after one step
    result = Trainer(recipe, tmp_path / "halves").run()
    assert result.step == 4
    whole, halves = (state_of(tmp_path / name, 4) for name in ("whole", "halves"))
    assert whole.keys() == halves.keys() >= {"model.mean", "model.std"}
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    part = load_part(Prior, tmp_path / "whole" / "prior")
    clip = load_part(CLIP, tiny_folder / "clip")
    assert part.config.clip_identity == weights_identity(clip) and torch.equal(part.mean, whole["model.mean"])
    assert (tmp_path / "whole" / "samples" / "00000004.png").is_file()
    wanted = ("mse", "cosine_one_step", "cosine_true", "cosine_text", "cosine_shuffled", "retrieval")
    assert {f"seen_{name}" for name in wanted} <= result.figures.keys()


def test_what_does_not_fit_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="objective.clip"):
        stage_of(tiny_folder, clip="")
    with pytest.raises(InputError, match="statistics_pairs"):
        stage_of(tiny_folder, statistics_pairs=1)
    save_part(Prior(16, 48, 32, 1, 2, 16, text_projection=True, clip_identity="another"), tmp_path / "prior")
    recipe = tiny_prior_recipe(tiny_folder)
    recipe.init = str(tmp_path / "prior")
    with pytest.raises(InputError, match="another CLIP"):
        PriorStage(recipe, None)
    recipe = tiny_prior_recipe(tiny_folder)
    recipe.model["num_heads"] = 0
    with pytest.raises(InputError):
        PriorStage(recipe, None)


# evaluation -----------------------------------------------------------------------------------------------------------


def pairs_by_hand() -> EncodedPairs:
    """Pictures along the axes of the plane; the texts lie at cosines 0.8 and 0.6 to their own, the other way round."""
    image, text = torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([[0.8, 0.6], [0.8, 0.6]])
    return EncodedPairs(["a", "b"], image, 5 * text, torch.zeros(2, 1, 1), torch.ones(2, 1, dtype=torch.bool))


def test_cosines_and_retrieval_by_hand() -> None:
    pairs = pairs_by_hand()
    predicted = torch.tensor([[7.0, 0.0], [3.0, 4.0]])
    figures = cosine_figures(predicted, pairs)
    expected = {
        "cosine_true": (1 + 0.8) / 2,
        "cosine_text": (0.8 + 0.48 + 0.48) / 2,
        "cosine_shuffled": (0 + 0.6) / 2,
        "cosine_text_true": (0.8 + 0.6) / 2,
        "cosine_true_shuffled": 0.0,
    }
    assert figures == pytest.approx(expected, abs=1e-6)
    assert retrieval(predicted, pairs) == 1.0
    assert retrieval(pairs.text, pairs) == 0.5
    assert retrieval(predicted.flip(0), pairs) == 0.0 and retrieval(predicted.flip(0), pairs, among=1) == 1.0
    assert nearest(predicted, pairs.image).tolist() == [0, 1]
    same = EncodedPairs(["a", "a"], pairs.image, pairs.text, pairs.states, pairs.mask)
    assert retrieval(predicted.flip(0), same) == 1.0  # the same caption word by word


def test_figures_of_a_prior(tiny_folder: Path) -> None:
    stage = stage_of(tiny_folder)
    scenes = EmojiScenes(size=16, split="heldout")
    figures = prior_figures(stage.model.eval(), stage.clip, scenes, count=6, num_inference_steps=2, guidance_scale=2.0)
    assert figures == prior_figures(stage.model, stage.clip, scenes, 6, 2, 2.0)
    assert (
        all(-1 <= value <= 1 for value in figures.values()) and {"mean_cosine_true", "text_retrieval"} <= figures.keys()
    )
    with pytest.raises(InputError, match="at least 2"):
        prior_figures(stage.model, stage.clip, scenes, count=1)


def test_a_prior_goes_on_beside_a_new_clip_only_where_that_is_said(tiny_folder: Path, tmp_path: Path) -> None:
    model = stage_of(tiny_folder).model
    model.set_statistics(torch.randn(50, model.config.embedding_dim, generator=seeded()))
    save_part(model, tmp_path / "prior")
    clip = load_part(CLIP, tiny_folder / "clip")
    with torch.no_grad():
        clip.towers.visual.proj.mul_(-1)  # another CLIP, whose image embeddings lie elsewhere
    save_part(clip, tmp_path / "clip")
    recipe = tiny_prior_recipe(tiny_folder, clip=str(tmp_path / "clip"))
    recipe.init = str(tmp_path / "prior")
    with pytest.raises(InputError, match="objective.new_clip=true"):
        PriorStage(recipe, None)
    recipe.objective["new_clip"] = True
    stage = PriorStage(recipe, None)
    assert stage.model.config.clip_identity == weights_identity(clip) != model.config.clip_identity
    before = stage.model.mean.clone()
    stage.before_step(batch_of(stage), 0, seeded())
    assert not torch.equal(stage.model.mean, before)
