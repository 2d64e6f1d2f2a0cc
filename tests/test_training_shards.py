"""CLIP learns from webdataset shards as they are: broken samples, workers, resumed runs, unequal shards."""

import io
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_training_loop import column
from tiny_recipes import exit_code, free_port, record_of, start, tiny_recipe, train_in_group

from genpipe.data.check import check_shards
from genpipe.training.__main__ import main
from genpipe.training.config import Recipe
from genpipe.training.loop import Trainer

BREAKS = ("picture cannot be read", "no caption", "caption is not UTF-8", "duplicate key")


def write_samples(folder: Path, sizes: list[int], every: int = 0) -> Path:
    """Shards of captioned JPEG files; one sample of `every` is broken, each in another way than the one before."""
    folder.mkdir()
    number = broken = 0
    for shard, size in enumerate(sizes):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
            for place in range(size):
                key, caption = f"{number:06}", f"picture {number}".encode()
                colours = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
                buffer = io.BytesIO()
                Image.fromarray(colours).resize((16, 16)).save(buffer, "JPEG")
                files = {"jpg": buffer.getvalue(), "txt": caption}
                if every and place % every == every // 2:
                    kind = BREAKS[broken % len(BREAKS)]
                    broken += 1
                    if kind == "picture cannot be read":
                        files["jpg"] = files["jpg"][: len(files["jpg"]) // 2]
                    elif kind == "no caption":
                        del files["txt"]
                    elif kind == "caption is not UTF-8":
                        files["txt"] = b"caf\xe9"
                    else:
                        key = f"{number - place:06}"  # as the first of this shard
                for suffix, data in files.items():
                    header = tarfile.TarInfo(f"{key}.{suffix}")
                    header.size = len(data)
                    tar.addfile(header, io.BytesIO(data))
                number += 1
    return folder


def shards_recipe(source: Path, workers: int = 0, **run: int) -> Recipe:
    recipe = tiny_recipe("clip", **run)
    recipe.data.source, recipe.data.workers = str(source), workers
    return recipe


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_over_broken_samples_ends_with_their_count(tmp_path: Path, workers: int) -> None:
    shards = write_samples(tmp_path / "shards", [20, 20, 20, 20], every=10)
    found = check_shards(shards)
    assert found.report.skipped == dict.fromkeys(BREAKS, 2) and found.report.read == 72
    recipe = shards_recipe(shards, workers, steps=20, batch_size=10, log_every=5)
    result = Trainer(recipe, tmp_path / "run").run()  # more than two epochs
    assert (result.step, result.report.read, result.report.skipped) == (20, 200, found.report.skipped)
    assert column(tmp_path / "run", "skipped")[-1] == 8 and len(column(tmp_path / "run", "pictures_per_second")) == 4

    shutil.rmtree(tmp_path / "run")
    recipe.run.steps = 3
    first = Trainer(recipe, tmp_path / "run").run().report
    assert first.read == 30 and sum(first.skipped.values()) < 8
    recipe.run.steps = 20
    for _ in range(2):  # the second time, nothing is left to do
        report = Trainer(recipe, tmp_path / "run").run().report
        assert (report.read, report.skipped) == (200, found.report.skipped)


def test_the_command_says_what_it_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = write_samples(tmp_path / "shards", [30], every=10)
    small = ["model.resolution=16", "model.num_codes=16", "model.widths=[16]", "model.code_width=8", "data.size=16"]
    small += ["run.batch_size=10", "run.steps=3", "run.precision=no", "run.threads=1", f"data.source={shards}=2"]
    arguments = [word for change in small for word in ("--set", change)]
    monkeypatch.setattr(sys, "argv", ["genpipe.training", "dvae", *arguments, "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as end:
        main()
    shown = capsys.readouterr().err
    assert end.value.code == 0 and "data: 30 pairs read, 3 skipped: 1 caption is not UTF-8 (first: 00000.tar " in shown


@pytest.mark.slow
def test_processes_of_unequal_shards_end_together(tmp_path: Path) -> None:
    jobs = []
    for name, sizes, every in (("unequal", [200, 3], 0), ("alone", [9], 0), ("broken", [60, 2, 2, 20], 10)):
        source = write_samples(tmp_path / name, sizes, every)
        recipe = shards_recipe(source, steps=30, batch_size=8, accumulate=2 if name == "alone" else 1)
        jobs.append((recipe, tmp_path / f"{name}-run"))
    port, logs = free_port(), [tmp_path / f"{rank}.log" for rank in range(2)]
    processes = [start(train_in_group, jobs, rank, port, log) for rank, log in enumerate(logs)]
    assert [exit_code(process) for process in processes] == [0, 0], logs[0].read_text() + logs[1].read_text()
    for recipe, folder in jobs:
        record = record_of(folder, 30)
        batches = 2 * 30 * recipe.run.accumulate
        assert record["batches"] == batches and record["data"]["read"] == 8 * batches
        assert record["data"]["skipped"] == check_shards(recipe.data.source).report.skipped
