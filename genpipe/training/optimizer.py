"""The optimiser that OptimizerConfig asks for: learning rate by step number, weight decay by kind of parameter."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from genpipe.training.config import OptimizerConfig
from genpipe.training.muon import NARROWEST, MuonAdamW


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of update `step` (from 0) of `steps`: linear warm-up, then decay to final_fraction of the peak."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = min((step - config.warmup_steps) / max(steps - config.warmup_steps, 1), 1.0)
    kept = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[config.decay]
    floor = 1.0 if config.decay == "constant" else config.final_fraction
    return config.learning_rate * (floor + (1 - floor) * kept)


def parameter_groups(
    model: nn.Module, weight_decay: float, rates: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Weight decay on matrices and kernels only, not on gains, biases, embeddings and numbers (2103.00020, 2.5).

    `rates`: parameter name -> its share of the learning rate, 1 where none is given; a group holds it as "rate".
    """
    tables = _tables(model)
    trained = [(rates.get(name, 1.0) if rates else 1.0, p) for name, p in model.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = []
    for share in sorted({share for share, _ in trained}, reverse=True):
        own = [p for other, p in trained if other == share]
        decayed = [p for p in own if p.ndim >= 2 and id(p) not in tables]
        others = [p for p in own if p.ndim < 2 or id(p) in tables]
        groups += [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        groups[-2]["rate"] = groups[-1]["rate"] = share
    return groups


def _tables(model: nn.Module) -> set[int]:
    return {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}


def make_optimizer(
    model: nn.Module, config: OptimizerConfig, rates: Mapping[str, float] | None = None
) -> torch.optim.AdamW:
    """AdamW, or Muon beside it, over the trained parameters; the loop sets the learning rates before each update."""
    groups = parameter_groups(model, config.weight_decay, rates)
    settings: dict[str, Any] = {
        "lr": config.learning_rate, "betas": (config.beta_1, config.beta_2), "eps": config.epsilon, "fused": True,
    }  # fmt: skip
    if config.method == "muon":
        return MuonAdamW(_with_muon(model, groups), **settings)
    return torch.optim.AdamW(groups, **settings)


def _with_muon(model: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups, each in two: matrices and kernels of layers, which Muon steps, and the rest."""
    hidden = {
        id(p)
        for name, p in model.named_parameters()
        if name.endswith("weight") and p.ndim >= 2 and min(len(p), p[0].numel()) >= NARROWEST
    } - _tables(model)
    split: list[dict[str, Any]] = []
    for group in groups:
        for muon in (True, False):
            own = [p for p in group["params"] if (id(p) in hidden) == muon]
            split.append({**group, "params": own, "muon": muon})
    return split
