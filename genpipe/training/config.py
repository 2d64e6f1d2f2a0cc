"""Recipes as dataclasses, and the overrides `--set key=value` that change them."""

import copy
import dataclasses
import difflib
import json
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any

from genpipe.errors import InputError


@dataclass
class DataConfig:
    """Where captioned pictures come from.

    source: "scenes" (emoji scenes drawn on the fly), a folder / CSV / JSONL of pictures with captions, or webdataset
        shards (a path with brace expansion that ends in .tar, or a folder of tars). Several sources of shards are
        joined by "::", each with its weight, 1 if none is given: "laion/{00000..00099}.tar=3::cc12m=1" takes three
        pairs of four from the first, however large either is, and reads the smaller one more often.
    size: side of the training picture in pixels.
    objects: of emoji scenes, "all", the "common" ones alone, which the small models have time to learn, or
        "mixed": all, and half of the time common ones.
    emphasis: names of objects of emoji scenes, separated by commas, that are drawn three times as often as others:
        those that are hard to learn.
    faint_share: of emoji scenes, those in which an object has nearly the colours of its background; 0 leaves that to
        chance.
    blended_share: of emoji scenes, those on a blend of two named background colours, which captions leave out.
    unplaced_share: of captions of two objects, those that do not say where they are ("a cat and a dog").
    styles: of emoji scenes: half of the objects are a sketch, a silhouette, pixel art or of another colour.
    split: "train" leaves the held-out combinations of emoji scenes out; other sources ignore it.
    seed: of the data order.
    workers: processes that prepare batches; 0 prepares them in the training process.
    hard_negatives: share of a CLIP batch that comes as scenes with their twins, which are swapped, recounted,
        recoloured, turned or renamed (another object); other sources have no twins and ignore it.
    twin_shares: how often a twin is of each of these kinds; places are what CLIP learns last.
    plain_batches: number of batches at the start whose twins tell places by "left of" and "above" nearly always.
    crop: of pictures from a folder or shards: "centre", "stage_1" (the dVAE's random crops and flips) or "stage_2" (the
        transformer's near-centre crops without flips, since captions mention sides; 2102.12092, A.2 and B.2).
    embeddings: where `genpipe embed` wrote the CLIP embeddings of the shards' pictures: "beside" the shards, or a
        folder. Empty: embeddings are computed during training. They are those of the pictures' centre, so the crop must
        be "centre" too.
    validation: source of the pictures that figures and samples are made of. Empty: held-out scenes for emoji scenes,
        and for other sources the training source's own first pictures (the figures are then called seen, not heldout).
    """

    source: str = "scenes"
    size: int = 32
    objects: str = "all"
    emphasis: str = ""
    faint_share: float = 0.0
    blended_share: float = 0.0
    unplaced_share: float = 0.08
    styles: bool = False
    split: str = "train"
    seed: int = 0
    workers: int = 0
    hard_negatives: float = 0.0
    twin_shares: list[float] = field(default_factory=lambda: [0.35, 0.3, 0.1, 0.25, 0.0])
    plain_batches: int = 0
    crop: str = "centre"
    embeddings: str = ""
    validation: str = ""


@dataclass
class OptimizerConfig:
    """AdamW, alone or beside Muon, with warm-up and decay.

    method: "adamw", or "muon" for the matrices and kernels of layers, AdamW for the rest, at the same learning rate.
    learning_rate: at the peak; warmup_steps: linear from 0; decay: "cosine" or "linear" to final_fraction of the peak
    at the last step, or "constant". clip_norm: largest gradient norm. weight_decay spares gains, biases and embeddings.
    """

    method: str = "adamw"
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

    steps: optimiser updates in all; batch_size: pictures per process and forward pass; accumulate: batches per update.
    CLIP compares the pictures of all batches of an update, on all processes, with one another: accumulating equals a
    larger batch, in the memory of a small one and the time of a second forward pass (2101.06983).
    precision: "auto" (bf16 where the hardware has it), "bf16" or "no". ema_decay: of the averaged weights.
    log_every, validate_every: in steps. save_minutes: between two checkpoints; save_every: in steps, on top (0: none).
    seed: of weights, noise and dropout. threads: CPU threads of each process, 0 leaves torch's choice.
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

    model: constructor arguments of the part. objective: knobs of the stage's loss. init: folder of a part to start
    from; its shape then counts, and `model` does not.
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


def flat(recipe: dict[str, Any]) -> dict[str, Any]:
    """Recipe.to_dict() with the dotted keys of `--set`: {"init": ..., "run.steps": ...}."""
    settings: dict[str, Any] = {}
    for key, value in recipe.items():
        settings |= {f"{key}.{name}": v for name, v in value.items()} if isinstance(value, dict) else {key: value}
    return settings


def keys_of(recipe: Recipe) -> list[str]:
    """All dotted keys that `--set` accepts for this recipe."""
    return [key for key in flat(recipe.to_dict()) if key not in ("name", "stage")]


def apply_overrides(recipe: Recipe, overrides: list[str]) -> Recipe:
    """A new recipe with `key=value` overrides: keys are dotted (`run.steps=100`), values typed as what they replace.

    Raises InputError for an unknown key (with the nearest ones), a value of another type or outside its limits.
    """
    result = copy.deepcopy(recipe)
    known = keys_of(recipe)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise InputError(f'"--set {override}" has no "="; write --set key=value, for example --set run.steps=100.')
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known keys: {', '.join(known)}."
            raise InputError(f'recipe "{recipe.name}" has no setting "{key}"; {hint}')
        group, _, name = key.partition(".")
        target = getattr(result, group)
        if not name:
            setattr(result, group, text)
        elif isinstance(target, dict):
            target[name] = None if text == "null" else _parsed(key, text, type(target[name]))
        else:
            setattr(target, name, _parsed(key, text, _field_type(target, name)))
    check(result)
    return result


def _field_type(target: Any, name: str) -> type:
    hint = typing.get_type_hints(type(target))[name]
    if isinstance(hint, types.UnionType):
        return typing.get_args(hint)[0]
    return typing.get_origin(hint) or hint


_KINDS = {type(None): "number or JSON"}


def _parsed(key: str, text: str, kind: type) -> Any:
    """`text` as a bool, int, float, str, list or dict; JSON for the last two, and for what was null."""
    try:
        if kind is bool:
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        if kind in (list, tuple, dict):
            value = json.loads(text)
            if not isinstance(value, list if kind is tuple else kind):
                raise ValueError(text)
            return value
        return json.loads(text) if kind is type(None) else kind(text)
    except (ValueError, KeyError) as error:
        raise InputError(f'"{text}" is no {_KINDS.get(kind, kind.__name__)} for the setting "{key}".') from error


# Limits by dotted key. Settings that only some stages have are checked where they exist.
_ABOVE_0 = (
    "run.steps", "run.batch_size", "run.accumulate", "run.log_every", "run.validate_every", "data.size",
    "optimizer.learning_rate", "optimizer.clip_norm", "optimizer.epsilon", "objective.temperature",
    "objective.final_temperature", "objective.tokenizer_captions", "objective.repeats", "objective.crop",
    "objective.timestep_shift", "objective.layer_decay", "objective.drawn_rows",
)  # fmt: skip
_NOT_BELOW_0 = (
    "run.save_minutes", "run.save_every", "run.seed", "run.threads", "data.seed", "data.workers", "data.plain_batches",
    "optimizer.weight_decay", "optimizer.warmup_steps", "objective.temperature_steps", "objective.kl_weight",
    "objective.kl_steps", "objective.squared_error", "objective.warm_up_steps", "objective.twin_weight",
    "objective.drawn_weight", "objective.statistics_pairs", "objective.min_snr_gamma", "objective.bound_weight",
    "objective.patience", "objective.tower_rate", "objective.cache_megabytes", "objective.contrast_power",
    "objective.keep_codes",
)  # fmt: skip
_FROM_0_TO_1 = (
    "data.hard_negatives", "data.unplaced_share", "data.faint_share", "data.blended_share", "optimizer.final_fraction",
    "objective.caption_dropout", "objective.degrade", "objective.text_weight", "objective.text_dropout",
    "objective.image_dropout", "objective.scrambled", "objective.layer_decay", "objective.dvae_share",
)  # fmt: skip
_FROM_0_BELOW_1 = (
    "run.ema_decay", "optimizer.beta_1", "optimizer.beta_2", "objective.bpe_dropout", "objective.validation_share",
)  # fmt: skip
_CHOICES = {
    "run.precision": ("auto", "bf16", "no"),
    "optimizer.method": ("adamw", "muon"),
    "optimizer.decay": ("cosine", "linear", "constant"),
    "data.crop": ("centre", "stage_1", "stage_2"),
    "data.objects": ("all", "common", "mixed"),
    "data.split": ("train", "heldout", "all"),
    "objective.head": ("sum", "mlp", "transformer"),
    "objective.class_weights": ("none", "inverse_frequency"),
}
_READ_EMBEDDINGS = ("decoder", "prior")  # stages that can do with stored embeddings of the pictures


def check(recipe: Recipe) -> None:
    """Raise InputError, naming the setting and its limit, for values that cannot run."""
    settings = flat(recipe.to_dict())
    limits = (
        (_ABOVE_0, "above 0", lambda value: value > 0),
        (_NOT_BELOW_0, "0 or above", lambda value: value >= 0),
        (_FROM_0_TO_1, "from 0 to 1", lambda value: 0 <= value <= 1),
        (_FROM_0_BELOW_1, "at least 0 and below 1", lambda value: 0 <= value < 1),
    )
    for keys, words, holds in limits:
        for key in keys:
            if key in settings and not (math.isfinite(settings[key]) and holds(settings[key])):
                raise InputError(f"{key} is {settings[key]}; it must be {words}.")
    for key, allowed in _CHOICES.items():
        if key in settings and settings[key] not in allowed:
            raise InputError(f'{key} is "{settings[key]}"; it must be one of {", ".join(allowed)}.')
    if recipe.data.embeddings and recipe.stage not in _READ_EMBEDDINGS:
        raise InputError(
            f'data.embeddings is "{recipe.data.embeddings}", but the stage {recipe.stage} reads none; leave it empty.'
        )
    shares = recipe.data.twin_shares
    numbers = len(shares) == 5 and all(isinstance(share, int | float) and 0 <= share < math.inf for share in shares)
    if not numbers or sum(shares) <= 0:
        raise InputError(f"data.twin_shares is {shares}; it must be five numbers, 0 or above and not all 0.")
