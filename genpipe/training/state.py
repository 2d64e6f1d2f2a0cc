"""What a run has learned so far: weights, their moving average, the optimiser's moments, and two numbers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel

from genpipe.errors import InputError
from genpipe.training.checkpoint import Checkpoint, optimizer_tensors, restore_optimizer


class State:
    """A model on its way, in memory and as a checkpoint.

    step: updates made. seen: batches used, by all processes together. The averaged weights are
    EMAModel's: decay min(ema_decay, (1 + t) / (10 + t)) after update t + 1.
    """

    def __init__(self, model: Any, optimizer: torch.optim.Optimizer, ema_decay: float) -> None:
        self.model, self.optimizer = model, optimizer
        self.ema = EMAModel(model.parameters(), decay=ema_decay)
        self.step = self.seen = 0

    def advance(self, batches: int) -> None:
        """After an update that used so many batches."""
        self.ema.step(self.model.parameters())
        self.step += 1
        self.seen += batches

    def checkpoint(self, record: dict[str, Any]) -> Checkpoint:
        """Everything needed to go on, and the given record."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"ema.{i}": tensor for i, tensor in enumerate(self.ema.shadow_params)}
        tensors |= optimizer_tensors(self.optimizer)
        return Checkpoint(self.step, tensors, {**record, "batches": self.seen, "ema_step": self.ema.optimization_step})

    def restore(self, kept: Checkpoint) -> None:
        """Take over a checkpoint. Raises InputError when it does not fit the model."""
        weights = {name.removeprefix("model."): t for name, t in kept.tensors.items() if name.startswith("model.")}
        try:
            self.model.load_state_dict(weights)
            for i, shadow in enumerate(self.ema.shadow_params):
                shadow.copy_(kept.tensors[f"ema.{i}"])
            self.ema.optimization_step = kept.record["ema_step"]
            restore_optimizer(self.optimizer, kept.tensors)
        except (RuntimeError, KeyError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"the checkpoint of step {kept.step} does not fit this model ({reason}).") from error
        self.step, self.seen = kept.step, batches_of(kept)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The model in eval mode with the averaged weights, the trained ones in training mode afterwards."""
        parameters = list(self.model.parameters())
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        self.model.eval()
        try:
            yield
        finally:
            self.ema.restore(parameters)
            self.model.train()


def batches_of(kept: Checkpoint | None) -> int:
    """Batches that a run has used; checkpoints without this number come from one process."""
    if kept is None:
        return 0
    return int(kept.record.get("batches", kept.step * kept.record["recipe"]["run"]["accumulate"]))
