"""One accelerate loop for every stage: accumulate, clip, average, log, validate, save, resume.

Every random draw is seeded by (seed, step, micro-step, rank) and every learning rate is a function of the step, so the state of a
run is its tensors and one number; on one machine a killed and resumed run equals an uninterrupted one bit for bit.
"""

import csv
import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import broadcast
from diffusers.training_utils import EMAModel
from torch import nn
from tqdm.auto import tqdm

from genpipe.errors import InputError
from genpipe.images import save_png
from genpipe.parts import save_part
from genpipe.training.checkpoint import (
    Checkpoint,
    load_checkpoint,
    newest,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from genpipe.training.config import OptimizerConfig, Recipe
from genpipe.training.data import batches
from genpipe.training.stages import STAGES, Stage


@dataclass
class TrainResult:
    """Where a run stands: steps made, the folder of the averaged part, and the last figures that were logged."""

    step: int
    part: Path
    figures: dict[str, float]


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of update `step` (from 0) of `steps`: linear warm-up, then decay to final_fraction of the peak."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = min((step - config.warmup_steps) / max(steps - config.warmup_steps, 1), 1.0)
    kept = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[config.decay]
    floor = 1.0 if config.decay == "constant" else config.final_fraction
    return config.learning_rate * (floor + (1 - floor) * kept)


def resolve_precision(precision: str, device: torch.device) -> str:
    """"auto" -> "bf16" where matrix products in bf16 are native, else "no"."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return "bf16" if device.type == "cpu" and native else "no"


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices and kernels only, not on gains, biases, embeddings and single numbers (2103.00020, 2.5)."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim >= 2 and id(p) not in tables]
    others = [p for p in trained if p.ndim < 2 or id(p) in tables]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def step_seed(seed: int, step: int, micro: int, rank: int) -> int:
    """One 63-bit seed per (seed, step, micro-step, rank), mixed so that neighbours share nothing."""
    value = 0x9E3779B97F4A7C15
    for number in (seed, step, micro, rank):
        value = (value ^ (number + 1)) * 0xBF58476D1CE4E5B9 % 2**64
        value ^= value >> 31
    return value >> 1


@contextmanager
def stop_on_interrupt() -> Iterator[list[bool]]:
    """A flag that the first Ctrl-C or SIGTERM sets, so that the running step ends and is saved; the second one interrupts."""
    flag: list[bool] = []

    def handle(number: int, frame: Any) -> None:
        if flag:
            raise KeyboardInterrupt
        flag.append(True)

    try:
        previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: interrupts are the caller's
        previous = {}
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Trainer:
    """One run of a recipe in a folder.

    Args:
        recipe: what to train; folder: where logs, samples, checkpoints and the part go.
        minutes: stop after this many minutes with a checkpoint; resume: go on from the newest checkpoint of the folder.
    Raises InputError when the folder belongs to another recipe, or cannot be written.
    """

    def __init__(self, recipe: Recipe, folder: Path, minutes: float | None = None, resume: bool = True) -> None:
        if recipe.run.threads:
            torch.set_num_threads(recipe.run.threads)
        self.recipe, self.folder, self.minutes = recipe, folder, minutes
        kwargs = DistributedDataParallelKwargs(broadcast_buffers=False)
        device = PartialState().device
        self.accelerator = Accelerator(
            mixed_precision=resolve_precision(recipe.run.precision, device),
            gradient_accumulation_steps=recipe.run.accumulate,
            kwargs_handlers=[kwargs],
        )
        start = newest(folder / "checkpoints") if resume else None
        if self.main:
            self._claim_folder(fresh=start is None)
        self.accelerator.wait_for_everyone()

        torch.manual_seed(recipe.run.seed)
        self.stage: Stage = STAGES[recipe.stage](recipe, folder)
        for module in self.stage.frozen():
            module.to(self.accelerator.device)
        config = recipe.optimizer
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.stage.model, config.weight_decay),
            lr=config.learning_rate,
            betas=(config.beta_1, config.beta_2),
            eps=config.epsilon,
            fused=True,
        )
        self.model, self.prepared = self.accelerator.prepare(self.stage.model.train(), self.optimizer)
        self.ema = EMAModel(self.stage.model.parameters(), decay=recipe.run.ema_decay)
        self.step = 0
        self.figures: dict[str, float] = {}
        if start is not None:
            self._restore(load_checkpoint(start))

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process

    def _claim_folder(self, fresh: bool) -> None:
        """Write recipe.json, or check that the folder's is this one (the number of steps and the logging may change)."""
        file = self.folder / "recipe.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not fresh and file.is_file():
                old, new = json.loads(file.read_text()), self.recipe.to_dict()
                changed = [k for k in ("stage", "model", "objective", "data") if old.get(k) != new[k]]
                if changed:
                    raise InputError(
                        f"{self.folder} holds a run with other settings ({', '.join(changed)}); choose another --out folder "
                        "or start anew with --no-resume"
                    )
            elif fresh:
                for name in ("log.csv", "tokenizer.json"):
                    (self.folder / name).unlink(missing_ok=True)
            file.write_text(json.dumps(self.recipe.to_dict(), indent=1))
        except (OSError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"the training folder {self.folder} cannot be used ({error}); choose another --out folder") from error

    # state ------------------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Checkpoint for resuming, and the averaged weights as the pipelines load them."""
        if self.main:
            tensors = {f"model.{name}": p for name, p in self.stage.model.state_dict().items()}
            tensors |= {f"ema.{i}": p for i, p in enumerate(self.ema.shadow_params)}
            tensors |= optimizer_tensors(self.optimizer)
            record = {"recipe": self.recipe.to_dict(), "ema_step": self.ema.optimization_step, "figures": self.figures}
            save_checkpoint(self.folder / "checkpoints", Checkpoint(self.step, tensors, record))
            with self._averaged_weights():
                save_part(self.stage.model, self.folder / self.stage.part)
        self.accelerator.wait_for_everyone()

    def _restore(self, checkpoint: Checkpoint) -> None:
        tensors = checkpoint.tensors
        weights = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
        self.stage.model.load_state_dict(weights)
        for i, shadow in enumerate(self.ema.shadow_params):
            shadow.copy_(tensors[f"ema.{i}"])
        self.ema.optimization_step = checkpoint.record["ema_step"]
        restore_optimizer(self.optimizer, tensors)
        self.step = checkpoint.step

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        """The model in eval mode with the averaged weights, the trained ones afterwards."""
        parameters = list(self.stage.model.parameters())
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        self.stage.model.eval()
        try:
            yield
        finally:
            self.ema.restore(parameters)
            self.stage.model.train()

    # the loop ---------------------------------------------------------------------------------------------------------

    def run(self) -> TrainResult:
        """Train until run.steps, the time budget or an interrupt, and save. Raises FloatingPointError for a loss that is
        not finite."""
        run, world = self.recipe.run, self.accelerator.num_processes
        rank = self.accelerator.process_index
        started = saved = time.monotonic()
        stream = batches(self.recipe, self.stage.collate, self.step, rank, world)
        bar = tqdm(total=run.steps, initial=self.step, desc=self.recipe.name, disable=not self.main, file=sys.stderr, mininterval=1.0)
        with Log(self.folder, self.step, enabled=self.main) as log, stop_on_interrupt() as interrupted, bar:
            while self.step < run.steps:
                losses = self._update(stream, rank)
                self.step += 1
                bar.update()
                log.count(run.batch_size * run.accumulate * world)
                if self.step % run.log_every == 0:
                    self._log(log, losses, bar)
                if self.step % run.validate_every == 0 or self.step == run.steps:
                    self._validate(log)
                now = time.monotonic()
                out_of_time = self.minutes is not None and now - started >= 60 * self.minutes
                stop = self._agreed(bool(interrupted) or out_of_time)
                due = self._agreed(now - saved >= 60 * run.save_minutes)
                if stop or due or self.step == run.steps or (run.save_every and self.step % run.save_every == 0):
                    self._save()
                    saved = time.monotonic()
                if stop:
                    break
        return TrainResult(self.step, self.folder / self.stage.part, dict(self.figures))

    def _agreed(self, flag: bool) -> bool:
        """The main process's word, so that all ranks stop and save in the same step."""
        if self.accelerator.num_processes == 1:
            return flag
        return bool(broadcast(torch.tensor([float(flag)], device=self.accelerator.device)).item())

    def _update(self, stream: Iterator[dict[str, torch.Tensor]], rank: int) -> dict[str, torch.Tensor]:
        """One optimiser update of run.accumulate batches."""
        run, figures = self.recipe.run, {}
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe.optimizer, self.step, run.steps)
        for micro in range(run.accumulate):
            seed = step_seed(run.seed, self.step, micro, rank)
            torch.manual_seed(seed)  # dropout
            generator = torch.Generator().manual_seed(seed)
            batch = {name: tensor.to(self.accelerator.device) for name, tensor in next(stream).items()}
            if micro == 0:
                self.stage.before_step(batch, self.step, generator)
            with self.accelerator.accumulate(self.model):
                loss, figures = self.stage.loss(self.model, batch, self.step, generator)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    figures["gradient_norm"] = self.accelerator.clip_grad_norm_(
                        self.model.parameters(), self.recipe.optimizer.clip_norm
                    )
                self.prepared.step()
                self.prepared.zero_grad()
        self.ema.step(self.stage.model.parameters())
        return {"loss": loss.detach(), **figures}

    def _log(self, log: "Log", losses: dict[str, torch.Tensor], bar: Any) -> None:
        values = {name: float(value) for name, value in losses.items()}
        if not math.isfinite(values["loss"]):
            raise FloatingPointError(
                f"the {self.recipe.stage} loss is {values['loss']} at step {self.step}; the last checkpoint is kept, resume "
                "from it with a lower --set optimizer.learning_rate"
            )
        values["learning_rate"] = learning_rate(self.recipe.optimizer, self.step, self.recipe.run.steps)
        values["pictures_per_second"] = log.rate()
        self.figures |= values
        log.write(self.step, values)
        bar.set_postfix(loss=f"{values['loss']:.4f}", pictures_per_s=f"{values['pictures_per_second']:.0f}")

    def _validate(self, log: "Log") -> None:
        """Held-out figures and a sample picture, with the averaged weights."""
        if self.main:
            with self._averaged_weights():
                figures = self.stage.validate()
                if figures:
                    self.figures |= figures
                    log.write(self.step, figures)
                    save_png(self.stage.sample(), self.folder / "samples" / f"{self.step:08d}.png", {"step": self.step})
                    tqdm.write(f"step {self.step}: " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items()), file=sys.stderr)
        self.accelerator.wait_for_everyone()


class Log:
    """log.csv (step, seconds, name, value) and TensorBoard events of a run; rows past a resumed step are dropped."""

    def __init__(self, folder: Path, step: int, enabled: bool) -> None:
        self.folder, self.step, self.enabled = folder, step, enabled
        self.pictures, self.since = 0, time.monotonic()
        self.started = time.monotonic()

    def __enter__(self) -> "Log":
        if self.enabled:
            from torch.utils.tensorboard import SummaryWriter  # heavy, and only the writing process needs it

            path = self.folder / "log.csv"
            rows = [row for row in _read_rows(path) if int(row[0]) <= self.step]
            self.handle = open(path, "w", newline="")
            self.writer = csv.writer(self.handle)
            self.writer.writerows([["step", "seconds", "name", "value"], *rows])
            self.events = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.step + 1)
        return self

    def __exit__(self, *exception: object) -> None:
        if self.enabled:
            self.handle.close()
            self.events.close()

    def count(self, pictures: int) -> None:
        self.pictures += pictures

    def rate(self) -> float:
        """Pictures per second since the last call."""
        now = time.monotonic()
        rate = self.pictures / max(now - self.since, 1e-9)
        self.pictures, self.since = 0, now
        return rate

    def write(self, step: int, values: dict[str, float]) -> None:
        if self.enabled:
            seconds = round(time.monotonic() - self.started, 1)
            self.writer.writerows([step, seconds, name, value] for name, value in values.items())
            self.handle.flush()
            for name, value in values.items():
                self.events.add_scalar(name, value, step)


def _read_rows(path: Path) -> list[list[str]]:
    if not path.is_file():
        return []
    with open(path, newline="") as handle:
        return [row for row in csv.reader(handle) if row and row[0].isdigit()]
