"""One accelerate loop for every stage: accumulate, clip, average, log, validate, save, resume.

Every random draw is seeded by the number of its batch, counted over all processes, and every learning rate is a
function of the step. So the state of a run is its tensors and two numbers; on one machine, with the same number of
threads, a killed and resumed run equals an uninterrupted one bit for bit, and two processes see what one process sees
that accumulates twice.
"""

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env
from tqdm.auto import tqdm

from genpipe.data.samples import Report
from genpipe.errors import InputError
from genpipe.images import save_png
from genpipe.parts import save_part
from genpipe.training.batches import BatchStream
from genpipe.training.checkpoint import Checkpoint, load_checkpoint, newest, save_checkpoint
from genpipe.training.config import Recipe, check
from genpipe.training.data import check_source
from genpipe.training.interrupts import stop_on_interrupt
from genpipe.training.log import Log
from genpipe.training.optimizer import learning_rate, make_optimizer
from genpipe.training.precision import resolve_precision
from genpipe.training.run_folder import CHECKPOINTS, check_same_run, claim, fingerprint
from genpipe.training.stage import MicroBatch, Stage
from genpipe.training.stages import STAGES
from genpipe.training.state import State, batches_of


@dataclass
class TrainResult:
    """Where a run stands.

    step: updates made; part: folder of the averaged part; checkpoint: to resume from; figures: those logged last;
    interrupted: whether Ctrl-C or SIGTERM ended it before its last step; stopped_early: whether validation did.
    report: pairs read by all processes since the run began, and each broken sample that they met, once; emoji scenes
    are not counted.
    """

    step: int
    part: Path
    checkpoint: Path | None
    figures: dict[str, float]
    interrupted: bool
    stopped_early: bool = False
    report: Report = field(default_factory=Report)


def batch_seed(seed: int, number: int, stream: int) -> int:
    """One 63-bit seed per (run's seed, batch number, stream), mixed so that neighbours share nothing."""
    value = 0x9E3779B97F4A7C15
    for part in (seed, number, stream):
        value = (value ^ (part + 1)) * 0xBF58476D1CE4E5B9 % 2**64
        value ^= value >> 31
    return value >> 1


class Trainer:
    """One run of a recipe in a folder.

    Args:
        recipe: what to train; folder: where logs, samples, checkpoints and the part go.
        minutes: stop after this many minutes with a checkpoint; resume: go on from the newest checkpoint of the folder.
    Bad input is refused before anything is written: InputError for settings that cannot run, a folder that belongs to
    another recipe or cannot be written, missing data.
    """

    def __init__(self, recipe: Recipe, folder: Path, minutes: float | None = None, resume: bool = True) -> None:
        check(recipe)
        check_source(recipe.data)
        self.recipe, self.folder, self.minutes = recipe, folder, minutes
        self.checkpoint = newest(folder / CHECKPOINTS) if resume else None
        kept = load_checkpoint(self.checkpoint) if self.checkpoint is not None else None
        self.bent = check_same_run(recipe, kept.record, folder) if kept is not None else []
        self.accelerator = _accelerator(recipe)

        torch.manual_seed(recipe.run.seed)
        self.stage: Stage = STAGES[recipe.stage](recipe, folder if kept is not None else None)
        tokenizer = getattr(self.stage.model, "tokenizer", None)
        own = tokenizer if hasattr(tokenizer, "to_json") else None  # a published CLIP's is known by its name
        self.fingerprint = fingerprint(self.stage.frozen(), own)
        self._check_fingerprint(kept)
        steps_left = max(recipe.run.steps - (kept.step if kept is not None else 0), 0)
        self.stream = BatchStream(
            recipe,
            self.stage.collate,
            seen=batches_of(kept),
            count=steps_left * recipe.run.accumulate,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            own=self.stage.batches(),
        )
        if self.main:
            claim(folder, recipe, self.stage.part, own, fresh=kept is None)
        self.accelerator.wait_for_everyone()

        for module in self.stage.frozen():
            module.to(self.accelerator.device)
        self.optimizer = make_optimizer(self.stage.model, recipe.optimizer, self.stage.rates())
        self.model, self.prepared = self.accelerator.prepare(self.stage.model.train(), self.optimizer)
        self.state = State(self.stage.model, self.optimizer, recipe.run.ema_decay)
        self.stopping = self.stage.early_stopping()
        self.figures: dict[str, float] = {}
        self.finite = torch.ones((), dtype=torch.bool, device=self.accelerator.device)
        self.read_before = Report(**kept.record.get("data", {})) if kept is not None else Report()
        if kept is not None:
            self.state.restore(kept)
            self.figures |= kept.record.get("figures", {})
            if self.stopping is not None:
                self.stopping.restore(kept.record["stopping"])

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process

    # state ------------------------------------------------------------------------------------------------------------

    def _check_fingerprint(self, kept: Checkpoint | None) -> None:
        """What is read but not trained must be the same on all processes, and as it was when the run began."""
        if len(set(gather_object([self.fingerprint]))) > 1:
            raise InputError("the processes read different frozen parts or tokenizers; give all of them the same.")
        if kept is not None and kept.record.get("fingerprint", self.fingerprint) != self.fingerprint:
            raise InputError(
                f"the frozen parts or the tokenizer that the run in {self.folder} began with have changed; bring them "
                "back, choose another --out folder, or start anew with --no-resume."
            )

    def _report(self) -> Report:
        """What all processes have read in this run and in those that it resumes."""
        total = Report()
        for report in (self.read_before, *gather_object([self.stream.report()])):
            total.add(report)
        return total

    def _save(self) -> None:
        """Checkpoint for resuming, and the averaged weights as the pipelines load them."""
        self._check_finite()
        report = asdict(self._report())
        if self.main:
            record = {"recipe": self.recipe.to_dict(), "fingerprint": self.fingerprint, "figures": self.figures}
            record["data"] = report
            if self.stopping is not None:
                record["stopping"] = self.stopping.record()
            self.checkpoint = save_checkpoint(self.folder / CHECKPOINTS, self.state.checkpoint(record))
            if self.stopping is None or self.stopping.step == 0:  # else the part holds the best weights, not these
                self._save_part()
        self.accelerator.wait_for_everyone()

    def _save_part(self) -> None:
        with self.state.averaged_weights():
            save_part(self.stage.model, self.folder / self.stage.part)

    # the loop ---------------------------------------------------------------------------------------------------------

    def run(self) -> TrainResult:
        """Train until run.steps, the time budget or an interrupt, and save.

        Raises FloatingPointError when the loss is not finite (the last checkpoint is from before that), InputError when
        the folder cannot be written any more.
        """
        run, state = self.recipe.run, self.state
        started = saved = time.monotonic()
        interrupted = False
        if state.step >= run.steps and self.main and self.stopping is None:
            self._save_part()  # a kill between the last checkpoint and this has no later chance
        bar = tqdm(
            total=run.steps,
            initial=state.step,
            desc=self.recipe.name,
            disable=not self.main,
            file=sys.stderr,
            mininterval=1.0,
        )
        with Log(self.folder, state.step, enabled=self.main) as log, stop_on_interrupt() as flag, bar:
            while state.step < run.steps and not self._over():
                figures = self._update()
                bar.update()
                log.count(run.batch_size * run.accumulate * self.accelerator.num_processes)
                last = state.step == run.steps
                if state.step % run.log_every == 0:
                    self._log(log, figures, bar)
                if state.step % run.validate_every == 0 or last:
                    self._validate(log)
                last = last or self._over()
                now = time.monotonic()
                interrupted, late, due = self._agreed(
                    bool(flag),
                    self.minutes is not None and now - started >= 60 * self.minutes,
                    now - saved >= 60 * run.save_minutes or (run.save_every > 0 and state.step % run.save_every == 0),
                )
                if interrupted or late or due or last:
                    self._save()
                    saved = time.monotonic()
                if interrupted or late:
                    break
        early = self._over() and state.step < run.steps
        part, interrupted = self.folder / self.stage.part, interrupted and state.step < run.steps and not early
        return TrainResult(state.step, part, self.checkpoint, dict(self.figures), interrupted, early, self._report())

    def _over(self) -> bool:
        return self.stopping is not None and self.stopping.over

    def _agreed(self, *flags: bool) -> list[bool]:
        """Each flag, if any process raises it: all of them stop and save after the same step."""
        if self.accelerator.num_processes == 1:
            return list(flags)
        raised = torch.tensor([float(flag) for flag in flags], device=self.accelerator.device)
        return (self.accelerator.reduce(raised, reduction="sum") > 0).tolist()

    def _update(self) -> dict[str, torch.Tensor]:
        """One optimiser update of run.accumulate batches; figures of the last one, the loss averaged over all."""
        run, accelerator = self.recipe.run, self.accelerator
        losses: list[torch.Tensor] = []
        figures: dict[str, torch.Tensor] = {}
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * learning_rate(self.recipe.optimizer, self.state.step, run.steps)
        to_come = self.stage.losses(self.model, self._micro_batches(), self.state.step)
        for _ in range(run.accumulate):
            with accelerator.accumulate(self.model):
                loss, figures = next(to_come)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    limit = self.recipe.optimizer.clip_norm
                    norm = torch.as_tensor(accelerator.clip_grad_norm_(self.model.parameters(), limit))
                    figures["gradient_norm"] = norm
                    self.finite &= torch.isfinite(norm)
                self.prepared.step()
                self.prepared.zero_grad()
            losses.append(loss.detach())
        self.state.advance(run.accumulate * accelerator.num_processes)
        mean = torch.stack(losses).mean()
        self.finite &= torch.isfinite(mean)
        return {"loss": mean, **figures}

    def _micro_batches(self) -> Iterator[MicroBatch]:
        """This process's batches of one update."""
        run, accelerator = self.recipe.run, self.accelerator
        for micro in range(run.accumulate):
            batch = {name: tensor.to(accelerator.device) for name, tensor in next(self.stream).items()}
            number = self.state.seen + micro * accelerator.num_processes + accelerator.process_index
            dropout, noise, other = (batch_seed(run.seed, number, stream) for stream in range(3))
            if micro == 0:
                torch.manual_seed(dropout)
                self.stage.before_step(batch, self.state.step, torch.Generator().manual_seed(other))
            yield MicroBatch(batch, (dropout, noise))

    def _check_finite(self) -> None:
        """Before anything is saved or shown, so that the last checkpoint is a sound one."""
        if not self.finite.item():
            kept = f"resume from {self.checkpoint}" if self.checkpoint is not None else "start anew"
            raise FloatingPointError(
                f"the {self.recipe.stage} loss or its gradient is not finite at step {self.state.step}; nothing of it "
                f"was saved, {kept} with a lower --set optimizer.learning_rate."
            )

    def _log(self, log: Log, figures: dict[str, torch.Tensor], bar: Any) -> None:
        self._check_finite()
        values = {name: float(value) for name, value in figures.items()}
        values["learning_rate"] = learning_rate(self.recipe.optimizer, self.state.step - 1, self.recipe.run.steps)
        values["pictures_per_second"] = log.rate()
        report = self._report()
        if report.read:
            values["skipped"] = float(sum(report.skipped.values()))
        self.figures |= values
        log.write(self.state.step, values)
        bar.set_postfix(loss=f"{values['loss']:.4f}", pictures_per_s=f"{values['pictures_per_second']:.0f}")

    def _validate(self, log: Log) -> None:
        """Figures on validation pictures and a sample picture, with the averaged weights."""
        self._check_finite()
        if self.main:
            with self.state.averaged_weights():
                figures, sample = self.stage.validate(), self.stage.sample()
            if self.stopping is not None and self.stopping.improved(figures, self.state.step):
                self._save_part()
            self.figures |= figures
            log.write(self.state.step, figures)
            save_png(sample, self.folder / "samples" / f"{self.state.step:08d}.png", {"step": self.state.step})
            tqdm.write(
                f"step {self.state.step}: " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items()), file=sys.stderr
            )
        if self.stopping is not None and self.accelerator.num_processes > 1:
            self.stopping.restore(broadcast_object_list([self.stopping.record()])[0])
        self.accelerator.wait_for_everyone()


def _accelerator(recipe: Recipe) -> Accelerator:
    """The Accelerator of a run, and its threads. Raises InputError for a precision that cannot be changed any more."""
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    # Without this word, accelerate's state takes each of several processes on a CPU for the only one.
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    precision = resolve_precision(recipe.run.precision, PartialState(cpu=on_cpu).device)
    try:
        accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision=precision,
            gradient_accumulation_steps=recipe.run.accumulate,
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
    except ValueError as error:  # accelerate's state is one per process
        raise InputError(f"run.precision {precision} cannot be had in this process ({error}).") from error
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise InputError(f"{launched} processes were launched, but accelerate sees {accelerator.num_processes}.")
    return accelerator
