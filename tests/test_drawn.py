"""Drawn pictures beside true ones: the file, the choice of a batch, the loss, the training, the command."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import Run, refused
from safetensors.torch import load_file, save_file
from tiny_recipes import tiny_recipe

from genpipe.clip.model import CLIP
from genpipe.data.drawn import DrawnScenes, DrawnSettings, load_drawn, save_drawn
from genpipe.errors import InputError
from genpipe.parts import load_part
from genpipe.training.clip_stage import degrade, drawn_loss
from genpipe.training.loop import Trainer

SETTINGS = DrawnSettings(seed=3, size=16, objects="common", unplaced_share=0.3)


def numbered(count: int, first: int = 0) -> np.ndarray:
    """Pictures (count, 3, 16, 16) that say which they are."""
    return np.stack([np.full((3, 16, 16), first + number, np.uint8) for number in range(count)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "drawn").mkdir()
    save_drawn(tmp_path / "drawn" / "a.safetensors", numbered(3), SETTINGS)
    other = DrawnSettings(seed=4, size=16, objects="all", unplaced_share=0.0)
    save_drawn(tmp_path / "drawn" / "b.safetensors", numbered(5, 3), other)
    return tmp_path / "drawn"


def test_a_batch_shows_scenes_beside_what_was_drawn_for_them(folder: Path) -> None:
    drawn = DrawnScenes(folder, 16)
    assert len(drawn) == 8
    triples = drawn.pick(64, np.random.default_rng(0))
    numbers = triples.drawn[:, 0, 0, 0].tolist()
    assert set(numbers) == set(range(8)) and triples.true.shape == triples.drawn.shape == (64, 3, 16, 16)
    scenes = [load_drawn(folder / name)[0].scenes() for name in ("a.safetensors", "b.safetensors")]
    for row, number in enumerate(numbers):
        example = scenes[number > 2].example(number - 3 if number > 2 else number)
        assert np.array_equal(triples.true[row].transpose(1, 2, 0), example.pixels)
        assert triples.captions[row] == example.caption
    again = drawn.pick(64, np.random.default_rng(0))
    assert np.array_equal(again.drawn, triples.drawn) and again.captions == triples.captions


def test_no_damaged_or_foreign_file_is_read(folder: Path) -> None:
    with pytest.raises(InputError, match="pictures of 16 pixels; data.size is 32"):
        DrawnScenes(folder, 32)
    with pytest.raises(InputError, match="holds no drawn pictures"):
        DrawnScenes(folder / "nowhere", 16)
    file = folder / "a.safetensors"
    whole = file.read_bytes()
    tensors = load_file(file)
    file.write_bytes(whole[:-100])
    with pytest.raises(InputError, match="a.safetensors' holds no drawn pictures"):
        DrawnScenes(folder, 16)
    named = {"seed": 3, "size": 16, "objects": "common", "unplaced_share": 0.3}
    wrong = [
        {}, {"genpipe_drawn": "[]"}, {"genpipe_drawn": "{"}, {"genpipe_drawn": json.dumps({**named, "objects": "few"})},
        {"genpipe_drawn": json.dumps({**named, "size": "16"})}, {"genpipe_drawn": json.dumps({**named, "more": 1})},
    ]  # fmt: skip
    for header in wrong:
        save_file(tensors, file, metadata=header)
        with pytest.raises(InputError, match="make it with genpipe data draw"):
            DrawnScenes(folder, 16)
    for pictures in (torch.zeros(2, 3, 16, 8, dtype=torch.uint8), torch.zeros(2, 3, 16, 16), torch.zeros(0, 3, 16, 16)):
        save_file({"drawn": pictures}, file, metadata={"genpipe_drawn": json.dumps(named)})
        with pytest.raises(InputError, match=r"uint8 \(n, 3, 16, 16\) is needed"):
            DrawnScenes(folder, 16)


def test_a_file_that_cannot_be_written_is_told_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").mkdir()
    with pytest.raises(InputError, match="a.safetensors' cannot be written"):
        save_drawn(tmp_path / "a.safetensors", numbered(1), SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_the_loss_of_drawn_pictures() -> None:
    text = torch.eye(4)[:2]
    drawn = torch.eye(4)[2:]
    scale = torch.tensor(30.0)
    loss, found = drawn_loss(torch.cat([text, drawn]), text, scale)
    assert loss < 1e-3 and found == 1
    loss, found = drawn_loss(torch.cat([drawn, text]), text, scale)
    assert 45 < loss < 46 and found == 0  # 30 of two, half of 30 among all, chance for texts
    same = torch.ones(4, 2) / 2**0.5
    loss, _ = drawn_loss(same, same[:2], scale)
    assert torch.isclose(loss, torch.tensor(np.log(2) + (np.log(4) + np.log(2)) / 2).float())


def test_clip_learns_to_rank_scenes_above_drawn_pictures(folder: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("clip", steps=30, batch_size=4, log_every=1)
    recipe.objective |= {"drawn": str(folder), "drawn_rows": 6}
    trainer = Trainer(recipe, tmp_path / "run")
    trainer.run()
    log = [line.split(",") for line in (tmp_path / "run" / "log.csv").read_text().splitlines()]
    found = [float(line[3]) for line in log if line[2] == "drawn_accuracy"]
    losses = [float(line[3]) for line in log if line[2] == "drawn_loss"]
    assert len(found) == 30 and np.mean(found[-5:]) > 0.9 and losses[-1] < losses[0]
    recipe.run.accumulate = 2
    with pytest.raises(InputError, match="set run.accumulate=1"):
        Trainer(recipe, tmp_path / "other")


def test_a_frozen_text_tower_stays_what_it_was(tmp_path: Path) -> None:
    first = Trainer(tiny_recipe("clip", steps=1), tmp_path / "first").run()
    recipe = tiny_recipe("clip", steps=2)
    recipe.objective["freeze_text"] = True
    with pytest.raises(InputError, match="name a trained CLIP with init=FOLDER"):
        Trainer(recipe, tmp_path / "second")
    recipe.init = str(first.part)
    second = Trainer(recipe, tmp_path / "second").run()
    before, after = (load_part(CLIP, each.part).state_dict() for each in (first, second))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("visual" in name or "logit_scale" in name for name in changed)
    assert not any(torch.equal(before[name], after[name]) for name in before if name.endswith("visual.proj"))


class Negative:
    """A dVAE whose pictures come back as their negatives."""

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        return 1 - tokens


def test_some_pictures_pass_through_the_dvae() -> None:
    pixels = torch.full((400, 3, 8, 8), 0.1)
    out = degrade(pixels, 0.25, torch.Generator().manual_seed(0), Negative())  # type: ignore[arg-type]
    turned = out.mean(dim=(1, 2, 3)) > 0.5
    assert 0.15 < turned.float().mean() < 0.35 and torch.equal(pixels, torch.full_like(pixels, 0.1))
    assert degrade(pixels, 0.0, torch.Generator(), Negative()) is pixels  # type: ignore[arg-type]


@pytest.mark.parametrize("pipeline", ["dalle1", "dalle2"])
def test_the_command_draws_training_scenes(
    pipeline: str,
    run: Run,  # noqa: F811
    tiny_folder: Path,
    tmp_path: Path,
) -> None:
    file = tmp_path / "new" / "drawn.safetensors"
    done = run("data", "draw", tiny_folder, "--out", file, "--pipeline", pipeline, "--count", 3, "--seed", 7)
    assert done.code == 0 and str(file) in done.out
    settings, drawn = load_drawn(file)
    assert settings.seed == 7 and drawn.shape == (3, 3, settings.size, settings.size)
    assert len({picture.tobytes() for picture in drawn}) == 3
    assert [path.name for path in file.parent.iterdir()] == [file.name] and file.stat().st_mode & 0o044
    before = file.read_bytes()
    assert "name another one" in refused(run("data", "draw", tiny_folder, "--out", file, "--count", 1))
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["drawn.png"], "must end in .safetensors"),
        (["a.safetensors", "--count", "0"], "The number of pictures"),
        (["a.safetensors", "--objects", "few"], "The objects must be one of"),
        (["a.safetensors", "--pipeline", "dalle3"], "dalle3"),
        (["/proc/nowhere/a.safetensors"], "cannot be written"),
        ([f"{__file__}/a.safetensors"], "cannot be written"),
    ],
)
def test_the_command_refuses(options: list[str], message: str, run: Run, tiny_folder: Path) -> None:  # noqa: F811
    assert message in refused(run("data", "draw", tiny_folder, "--out", *options))
