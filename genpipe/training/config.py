"""Recipes as dataclasses, and the overrides `--set key=value` that change them."""

import dataclasses
import difflib
import json
import types
import typing
from dataclasses import dataclass, field
from typing import Any

from genpipe.errors import InputError


@dataclass
class DataConfig:
    """Where captioned pictures come from.

    source: "scenes" (emoji scenes drawn on the fly), a folder / CSV / JSONL of pictures with captions, or webdataset shards
        (a path or URL with brace expansion that ends in .tar).
    size: side of the training picture in pixels.
    split: "train" leaves the held-out combinations of emoji scenes out; other sources ignore it.
    seed: of the data order.
    workers: processes that prepare batches; 0 prepares them in the training process.
    hard_negatives: share of a CLIP batch that comes as scenes with their twins (swapped, recounted, recoloured).
    crop: of pictures from a folder or shards: "centre", "stage_1" (the dVAE's random crops and flips) or "stage_2" (the
        transformer's near-centre crops without flips, since captions mention sides; 2102.12092, A.2 and B.2).
    """

    source: str = "scenes"
    size: int = 32
    split: str = "train"
    seed: int = 0
    workers: int = 0
    hard_negatives: float = 0.0
    crop: str = "centre"


@dataclass
class OptimizerConfig:
    """AdamW with warm-up and decay.

    learning_rate: at the peak; warmup_steps: linear from 0; decay: "cosine" or "linear" to final_fraction of the peak at the
    last step, or "constant". clip_norm: largest gradient norm. weight_decay spares gains, biases and embeddings.
    """

    learning_rate: float = 1e-3
    beta_1: float = 0.9
    beta_2: float = 0.99
    epsilon: float = 1e-8
    weight_decay: float = 1e-2
    warmup_steps: int = 100
    decay: str = "cosine"
    final_fraction: float = 0.02
    clip_norm: float = 1.0


@dataclass
class RunConfig:
    """One run.

    steps: optimiser updates in all; batch_size: pictures per process and forward pass; accumulate: passes per update.
    precision: "auto" (bf16 where the hardware has it), "bf16" or "no". ema_decay: of the averaged weights.
    log_every, validate_every: in steps; save_minutes: between two checkpoints. seed: of weights, noise and dropout.
    threads: CPU threads of each process, 0 leaves torch's choice.
    """

    steps: int = 2000
    batch_size: int = 64
    accumulate: int = 1
    precision: str = "auto"
    ema_decay: float = 0.999
    log_every: int = 20
    validate_every: int = 500
    save_minutes: float = 3.0
    save_every: int = 0
    seed: int = 0
    threads: int = 0


@dataclass
class Recipe:
    """Everything that determines a run; printed at the start and saved as recipe.json.

    model: constructor arguments of the part. objective: knobs of the stage's loss. init: folder of a part to start from.
    """

    name: str
    stage: str
    model: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, Any] = field(default_factory=dict)
    init: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def keys_of(recipe: Recipe) -> list[str]:
    """All dotted keys that `--set` accepts for this recipe."""
    keys = ["init"]
    for group in ("model", "objective"):
        keys += [f"{group}.{name}" for name in getattr(recipe, group)]
    for group in ("data", "optimizer", "run"):
        keys += [f"{group}.{f.name}" for f in dataclasses.fields(getattr(recipe, group))]
    return keys


def apply_overrides(recipe: Recipe, overrides: list[str]) -> Recipe:
    """A new recipe with `key=value` overrides; keys are dotted (`run.steps=100`), values have the type of what they replace.

    Raises InputError for an unknown key (with the nearest ones) or a value of another type.
    """
    result = Recipe(**{f.name: _copied(getattr(recipe, f.name)) for f in dataclasses.fields(recipe)})
    known = keys_of(recipe)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise InputError(f'"--set {override}" has no "="; write --set key=value, for example --set run.steps=100')
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known keys: {', '.join(known)}"
            raise InputError(f'recipe "{recipe.name}" has no setting "{key}"; {hint}')
        group, _, name = key.partition(".")
        if not name:
            setattr(result, group, text)
        elif isinstance(getattr(result, group), dict):
            values = getattr(result, group)
            values[name] = _parsed(key, text, type(values[name]))
        else:
            target = getattr(result, group)
            setattr(target, name, _parsed(key, text, _field_type(target, name)))
    _check(result)
    return result


def _copied(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value)
    return json.loads(json.dumps(value)) if isinstance(value, dict) else value


def _field_type(target: Any, name: str) -> type:
    hint = typing.get_type_hints(type(target))[name]
    return typing.get_args(hint)[0] if isinstance(hint, types.UnionType) else hint


def _parsed(key: str, text: str, kind: type) -> Any:
    """`text` as a bool, int, float, str, list or dict; JSON for the last two."""
    try:
        if kind is bool:
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        if kind in (list, tuple, dict):
            value = json.loads(text)
            if not isinstance(value, list if kind is tuple else kind):
                raise ValueError(text)
            return value
        return text if kind is type(None) else kind(text)
    except (ValueError, KeyError) as error:
        raise InputError(f'"{text}" is no {kind.__name__} for the setting "{key}"') from error


def _check(recipe: Recipe) -> None:
    """Refuse values that cannot run, before anything is built."""
    positive = {
        "run.steps": recipe.run.steps,
        "run.batch_size": recipe.run.batch_size,
        "run.accumulate": recipe.run.accumulate,
        "run.log_every": recipe.run.log_every,
        "run.validate_every": recipe.run.validate_every,
        "data.size": recipe.data.size,
        "optimizer.learning_rate": recipe.optimizer.learning_rate,
        "optimizer.clip_norm": recipe.optimizer.clip_norm,
    }
    for key, value in positive.items():
        if not value > 0:
            raise InputError(f"{key} is {value}; it must be above 0")
    choices = {
        "run.precision": (recipe.run.precision, ("auto", "bf16", "no")),
        "optimizer.decay": (recipe.optimizer.decay, ("cosine", "linear", "constant")),
        "data.crop": (recipe.data.crop, ("centre", "stage_1", "stage_2")),
        "data.split": (recipe.data.split, ("train", "heldout", "all")),
    }
    for key, (value, allowed) in choices.items():
        if value not in allowed:
            raise InputError(f'{key} is "{value}"; it must be one of {", ".join(allowed)}')
    if not 0 <= recipe.run.ema_decay < 1:
        raise InputError(f"run.ema_decay is {recipe.run.ema_decay}; it must be at least 0 and below 1")
