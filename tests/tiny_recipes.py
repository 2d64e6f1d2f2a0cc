"""Recipes of seconds for the tests of training, and processes that train them, forked from one that imported all."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import tarfile
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from genpipe.clip.architecture import nano_architecture
from genpipe.training.config import DataConfig, OptimizerConfig, Recipe, RunConfig

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["genpipe.training.loop"])
WORDS = {"vocab_size": 300, "tokenizer": "", "tokenizer_captions": 100}
CLIP_SHAPE: dict[str, Any] = {"image_size": 16, "width": 48, "vision_layers": 1, "text_layers": 1, "embed_dim": 16}


def tiny_recipe(stage: str, dvae: Path | None = None, **run: Any) -> Recipe:
    """16 x 16 pixels, 4 x 4 tokens, fp32 on one thread; `dvae` is needed by dalle1, `run` changes the RunConfig."""
    model: dict[str, Any] = {
        "dvae": {"resolution": 16, "num_codes": 16, "widths": [16], "blocks_per_group": 1, "code_width": 8},
        "clip": {"architecture": nano_architecture(300, **CLIP_SHAPE)},
        "dalle1": {"text_length": 24, "width": 32, "num_layers": 2, "num_heads": 2},
    }[stage]
    schedules = {"temperature": 1.0, "final_temperature": 0.5, "temperature_steps": 4, "kl_weight": 0.1, "kl_steps": 4}
    objective: dict[str, Any] = {
        "dvae": {**schedules, "squared_error": 100.0, "warm_up_steps": 2, "contrast_power": 0.0, "freeze_codes": False,
                 "keep_codes": 0.0},
        "clip": {**WORDS, "degrade": 0.3, "local_loss": False, "twin_weight": 1.0, "freeze_text": False, "dvae": "",
                 "drawn": "", "drawn_rows": 2, "drawn_weight": 1.0},
        "dalle1": {
            **WORDS, "dvae": str(dvae), "caption_dropout": 0.1, "bpe_dropout": 0.1, "text_weight": 1 / 8,
            "codebook_init": True,
        },
    }[stage]  # fmt: skip
    settings = {"steps": 7, "batch_size": 4, "precision": "no", "log_every": 2, "threads": 1, "validate_every": 1000}
    return Recipe(
        name=f"tiny {stage}",
        stage=stage,
        model=model,
        objective=objective,
        data=DataConfig(size=16, hard_negatives=0.5 if stage == "clip" else 0.0),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2),
        run=RunConfig(**{**settings, **run}),
    )


def state_of(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a run's checkpoint: weights, averaged weights, optimiser."""
    return load_file(folder / "checkpoints" / f"step-{step:08d}" / "state.safetensors")


def record_of(folder: Path, step: int) -> dict[str, Any]:
    return json.loads((folder / "checkpoints" / f"step-{step:08d}" / "state.json").read_text())


def write_pictures(folder: Path, count: int = 6) -> Path:
    """A folder of small captioned pictures of one colour each: 00.png, 00.txt, ..."""
    folder.mkdir()
    for i in range(count):
        colour = np.random.default_rng(i).integers(0, 256, size=3).tolist()
        Image.new("RGB", (20, 24), tuple(colour)).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(f"picture number {i} of one colour")
    return folder


def write_shards(folder: Path, pictures: Path, count: int = 2) -> Path:
    """A folder of webdataset shards that hold the pictures of a folder in turn."""
    folder.mkdir()
    for shard in range(count):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
            for path in sorted(pictures.iterdir()):
                if int(path.stem) % count == shard:
                    tar.add(path, arcname=path.name)
    return folder


def start(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    process = PROCESSES.Process(target=target, args=arguments, daemon=False)
    process.start()
    return process


def exit_code(process: BaseProcess, seconds: float = 300) -> int | None:
    """Wait for the end of a process, which must come; minus the signal's number where a signal ended it."""
    process.join(seconds)
    hung = process.is_alive()
    if hung:
        process.kill()
        process.join()
    assert not hung, "the process hangs"
    return process.exitcode


# What runs in such processes ------------------------------------------------------------------------------------------


def quiet(log: Path | None = None) -> None:
    """Progress bars and errors go to a file, or nowhere."""
    sys.stdout = sys.stderr = open(log or os.devnull, "w", buffering=1)


def train_alone(recipe: Recipe, folder: Path) -> None:
    from genpipe.training.loop import Trainer

    quiet()
    Trainer(recipe, folder).run()


def train_and_die(recipe: Recipe, folder: Path, step: int, moment: str) -> None:
    """Train until SIGKILL: in the middle of update `step`, or at a checkpoint of that step written but not in place."""
    from genpipe.training import checkpoint
    from genpipe.training.loop import Trainer

    quiet()
    trainer = Trainer(recipe, folder)
    if moment == "update":
        loss = trainer.stage.loss

        def fatal_loss(model: Any, batch: Any, now: int, generator: Any) -> Any:
            if now == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return loss(model, batch, now, generator)

        trainer.stage.loss = fatal_loss  # type: ignore[method-assign]
    else:
        replace = os.replace

        def fatal_replace(source: Any, target: Any) -> None:
            if Path(target).name == f"step-{step:08d}":
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        checkpoint.os.replace = fatal_replace  # type: ignore[attr-defined]
    trainer.run()


def train_on_full_disk(recipe: Recipe, folder: Path, step: int, limit: int) -> None:
    """Train; from update `step` on no file can grow beyond `limit` bytes. The error's words go to folder/error.txt."""
    import resource

    from genpipe.errors import InputError
    from genpipe.training.loop import Trainer

    quiet()
    trainer = Trainer(recipe, folder)
    loss = trainer.stage.loss

    def filling_loss(model: Any, batch: Any, now: int, generator: Any) -> Any:
        if now == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return loss(model, batch, now, generator)

    trainer.stage.loss = filling_loss  # type: ignore[method-assign]
    try:
        trainer.run()
    except InputError as error:
        (folder / "error.txt").write_text(str(error))
        sys.exit(2)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def join_group(rank: int, port: int, log: Path) -> None:
    """The environment that `torchrun --nproc_per_node 2` gives to its processes."""
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in group.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"})
    quiet(log)


def train_in_group(jobs: list[tuple[Recipe, Path]], rank: int, port: int, log: Path) -> None:
    """One of two processes that train recipes one after the other."""
    join_group(rank, port, log)
    from genpipe.training.loop import Trainer

    try:
        for recipe, folder in jobs:
            trainer = Trainer(recipe, folder)
            trainer.run()
        trainer.accelerator.end_training()
    except Exception:
        traceback.print_exc()
        os._exit(1)


def command_in_group(arguments: list[str], rank: int, port: int, log: Path) -> None:
    """One of two processes of `torchrun -m genpipe.training ...`."""
    join_group(rank, port, log)
    from genpipe.training.__main__ import main

    sys.argv = ["genpipe.training", *arguments]
    main()
