"""AdamW as OptimizerConfig asks for it: learning rate by step number, weight decay by kind of parameter."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from genpipe.training.config import OptimizerConfig


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
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    trained = [(rates.get(name, 1.0) if rates else 1.0, p) for name, p in model.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = []
    for share in sorted({share for share, _ in trained}, reverse=True):
        own = [p for other, p in trained if other == share]
        decayed = [p for p in own if p.ndim >= 2 and id(p) not in tables]
        others = [p for p in own if p.ndim < 2 or id(p) in tables]
        groups += [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        groups[-2]["rate"] = groups[-1]["rate"] = share
    return groups


def adamw(model: nn.Module, config: OptimizerConfig, rates: Mapping[str, float] | None = None) -> torch.optim.AdamW:
    """AdamW over the trained parameters of `model`; the loop sets the learning rates before each update."""
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay, rates),
        lr=config.learning_rate,
        betas=(config.beta_1, config.beta_2),
        eps=config.epsilon,
        fused=True,
    )
