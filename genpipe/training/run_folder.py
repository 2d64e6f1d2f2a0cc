"""The folder of a run: whether it is this recipe's, what a fresh start moves aside, what a kill left behind."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from genpipe.errors import InputError
from genpipe.tokenizer import FILE_NAME, CaptionTokenizer
from genpipe.training.checkpoint import newest
from genpipe.training.config import Recipe, flat
from genpipe.training.data import is_shards

CHECKPOINTS = "checkpoints"
RECIPE_NAME = "recipe.json"
PREVIOUS = "previous"
_MOVED = (CHECKPOINTS, "log.csv", "samples", "tensorboard", RECIPE_NAME, FILE_NAME)  # checkpoints first: they decide

# Folders whose contents count, wherever they lie now.
_CONTENT_COUNTS = ("objective.dvae", "objective.clip", "objective.tokenizer")
# These bend the course of a run, and may: a person who changes them on the way knows why.
_MAY_BEND = (
    "run.steps", "run.accumulate", "run.precision", "run.ema_decay", "optimizer.learning_rate", "optimizer.beta_1",
    "optimizer.beta_2", "optimizer.epsilon", "optimizer.weight_decay", "optimizer.warmup_steps", "optimizer.decay",
    "optimizer.final_fraction", "optimizer.clip_norm",
)  # fmt: skip
# These change no weight (threads change only how sums are rounded).
_FREE = (
    "name", "run.log_every", "run.validate_every", "run.save_minutes", "run.save_every", "run.threads", "data.workers",
    "data.validation",
)  # fmt: skip


def check_same_run(recipe: Recipe, record: dict[str, Any], folder: Path) -> list[str]:
    """Compare a recipe with a checkpoint's record; returns what differs and bends the run: "run.steps 100 -> 200".

    Raises InputError when anything else differs: the model, the objective, the data, the batch size and the seed say
    what the weights mean and which batch comes next.
    """
    new = flat(json.loads(json.dumps(recipe.to_dict())))
    defaults = flat(Recipe(name="", stage="").to_dict())  # of settings that are younger than the checkpoint
    old = {**defaults, **flat(record["recipe"])}
    changed = {key: f"{key} {old[key]} -> {new[key]}" for key in new if key in old and old[key] != new[key]}
    free = [*_FREE, *(_CONTENT_COUNTS if "fingerprint" in record else ())]
    if is_shards(recipe.data.source):
        free.remove("data.workers")  # each worker reads shards in an order of its own
    fixed = [text for key, text in changed.items() if key not in (*free, *_MAY_BEND)]
    if fixed:
        raise InputError(
            f"{folder} holds a run with other settings ({', '.join(fixed)}), which cannot change on the way as steps, "
            "optimizer and logging can; choose another --out folder, or start anew with --no-resume."
        )
    younger = [f"{key} {new[key]}, which it had not yet" for key in new if key not in old]
    return [text for key, text in changed.items() if key in _MAY_BEND] + younger


def fingerprint(frozen: list[nn.Module], tokenizer: CaptionTokenizer | None) -> str:
    """SHA-256 of what a run reads but does not train: weights of frozen modules, and the tokenizer's vocabulary."""
    digest = hashlib.sha256()
    for module in frozen:
        for name, tensor in module.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    if tokenizer is not None:
        vocabulary = json.loads(tokenizer.to_json())["model"]["vocab"]
        digest.update(json.dumps(vocabulary, sort_keys=True).encode())
    return digest.hexdigest()


def claim(folder: Path, recipe: Recipe, part: str, tokenizer: CaptionTokenizer | None, fresh: bool) -> None:
    """Make the folder this run's: recipe.json, tokenizer.json; a fresh start moves an earlier run into previous/.

    So a mistaken --no-resume loses nothing, and no later resume can take up the earlier run's checkpoints. Raises
    InputError when the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if fresh and newest(folder / CHECKPOINTS) is not None:
            shutil.rmtree(folder / PREVIOUS, ignore_errors=True)
            (folder / PREVIOUS).mkdir(exist_ok=True)
            for name in _MOVED:
                if (folder / name).exists():
                    os.replace(folder / name, folder / PREVIOUS / name)
        _tidy(folder, part)
        _write(folder / RECIPE_NAME, json.dumps(recipe.to_dict(), indent=1))
        if tokenizer is not None:
            _write(folder / FILE_NAME, tokenizer.to_json())
    except OSError as error:
        raise InputError(
            f"the training folder {folder} cannot be used ({error}); choose another --out folder."
        ) from error


def _tidy(folder: Path, part: str) -> None:
    """Remove, or put in place, what a run killed while it saved its part left behind (see parts.save_part)."""
    aside = sorted(folder.glob(f".{part}.old-*"))
    if aside and not (folder / part).exists():
        aside.pop().rename(folder / part)
    for leftover in [*aside, *folder.glob(f".{part}.new-*")]:
        shutil.rmtree(leftover, ignore_errors=True)


def _write(path: Path, text: str) -> None:
    """All of a file or nothing."""
    fresh = path.with_name(f".{path.name}.new")
    try:
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
