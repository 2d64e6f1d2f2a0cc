"""The one denoising loop of prior, decoder and upsamplers (2204.06125, 2; 2006.11239; 2010.02502).

Legend: R rows, each one candidate; a row is a picture (C, H, W) or an embedding (D,); T training steps, n denoising
steps. alpha_bar is 1 where clean and 0 where noise.
"""

import inspect
import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import SchedulerMixin, UnCLIPScheduler
from torch import Tensor

from genpipe.dalle2 import guidance
from genpipe.dalle2.losses import PREDICTION_TYPES, per_row, predicted_x_0, training_target
from genpipe.dalle2.schedulers import (
    SCHEDULERS,
    alpha_bars_of,
    draws_noise,
    ends_at_x_0,
    make_scheduler,
    scheduler_for,
    shifts_mean,
    started,
    takes_x_0,
    times_of,
    uses_variance,
    variance_of,
    with_variance,
)
from genpipe.errors import InputError

__all__ = [
    "DECODER", "PRIOR", "SCHEDULERS", "UPSAMPLER", "Step", "denoise", "make_scheduler", "noise_of", "scheduler_for",
    "step_generators",
]  # fmt: skip

# What a candidate's noise is for, beside its seed: the parts must not share it. Later upsamplers: UPSAMPLER + stage.
PRIOR, DECODER, UPSAMPLER = 1, 2, 3

Predict = Callable[[Tensor, Tensor], Tensor]  # x_t (R, C, ...), t () -> (R, C, ...), or (R, 2 C, ...) with the variance


def noise_of(seeds: Sequence[int], shape: Sequence[int], stream: int) -> Tensor:
    """Standard normal noise (R, *shape), float32, on the CPU; a row depends on its own seed and on `stream` alone.

    seeds: whole numbers from 0 on, without an upper limit. Raises InputError for others.
    """
    _check_seeds(seeds)
    rows = [np.random.default_rng((int(seed), stream)).standard_normal(tuple(shape), np.float32) for seed in seeds]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, *shape)


@dataclass(frozen=True)
class Step:
    """What a callback sees after each step. Its tensors are the loop's own: to be read, not to be changed.

    index: from 0 on; num_steps: n; t: the time step, (); x_t: what the model was given (R, ...); x_0: the clean rows
    as they are estimated now (R, ...), after guidance and thresholding.
    """

    index: int
    num_steps: int
    t: Tensor
    x_t: Tensor
    x_0: Tensor


@torch.no_grad()
def denoise(
    predict: Predict,
    scheduler: SchedulerMixin,
    noise: Tensor,
    num_inference_steps: int,
    *,
    null_predict: Predict | None = None,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    dynamic_threshold: float | None = None,
    clamp: float | None = None,
    eta: float = 0.0,
    gradient: Predict | None = None,
    known: Tensor | None = None,
    seeds: Sequence[int] | None = None,
    stream: int,
    callback: Callable[[Step], None] | None = None,
    stage: str = "decoder",
) -> Tensor:
    """Noise (R, ...) -> clean rows (R, ...), float32 or better. What is constant over the steps belongs into `predict`.

    Args:
        predict: the model with its condition: x_t (R, C, ...), t () -> its prediction, of the scheduler's type.
        scheduler: from `make_scheduler` or `scheduler_for`; not changed.
        noise: see `noise_of`, on the model's device; not changed.
        num_inference_steps: from 1 to the number of training steps.
        null_predict: the same under the null condition, or under a negative prompt; needed unless guidance_scale is 1.
        guidance_scale: 1 is the conditional prediction alone, 0 the other, see `guidance.classifier_free`.
        guidance_interval: the share of the steps, [from, to), that is guided; outside `predict` stands alone.
        dynamic_threshold: percentile in (0, 1] of `guidance.dynamic_threshold`; None: off.
        clamp: largest absolute value of x_0, 1 for pixels; None: unlimited. A model that predicts the noise needs one
            of the two: at the noisiest step its smallest error would be magnified some 20,000 times.
        eta: share of the noise that DDIM replaces, in [0, 1]; other schedulers take 0 only.
        gradient: of what the rows are led towards, at x_t, scaled; see `guidance.clip_gradient` and `toward`.
        known: (R, C + 1, ...), x_0 where it is known and a last channel that is 1 there and 0 elsewhere, where the
            others are ignored: estimates of x_0 are corrected by it at every step (2112.10741, 2.4).
        seeds: one per row; needed by schedulers that add noise. stream: as for `noise_of`.
        callback: called after every step; what it raises ends the loop.
        stage: whose loop it is, for messages.
    Raises InputError for arguments outside these limits, FloatingPointError when a prediction is not finite.
    """
    _check_options(scheduler, num_inference_steps, guidance_interval, dynamic_threshold, clamp)
    if not math.isfinite(guidance_scale) or (guidance_scale != 1 and null_predict is None):
        raise InputError(
            f"a guidance scale is a number, and {guidance_scale} needs a null prediction; only 1 does without."
        )
    scheduler = started(scheduler, num_inference_steps, noise.device)
    options = _step_options(scheduler, eta, seeds, len(noise), stream)
    alpha_bars, times = alpha_bars_of(scheduler), times_of(scheduler)
    n, channels, kind = len(times), noise.shape[1], scheduler.config.prediction_type
    corrects = not (gradient is known is dynamic_threshold is clamp is None)
    if corrects and takes_x_0(scheduler):
        # Said as noise, a corrected x_0 would come back at the noisiest step with some 0.003 of rounding.
        scheduler.register_to_config(prediction_type="sample")
    x = noise.to(torch.promote_types(noise.dtype, torch.float32)) * scheduler.init_noise_sigma
    for i, timestep in enumerate(scheduler.timesteps):
        x_t, t = scheduler.scale_model_input(x, timestep), times[i]
        scale = guidance_scale if guidance_interval[0] <= i / n < guidance_interval[1] else 1.0
        answer = _guided(predict, null_predict or predict, scale, x_t, t, (stage, i, n))
        prediction, variance = answer[:, :channels], answer[:, channels:]
        alpha_bar = alpha_bars[i].expand(len(x))
        x_0 = predicted_x_0(x_t, prediction, alpha_bar, kind)
        slope = None if gradient is None else gradient(x_t, t)
        if slope is not None and not shifts_mean(scheduler):
            x_0 = guidance.toward(x_0, slope, alpha_bar)
        if corrects:
            x_0 = _limited(x_0 if known is None else _corrected(x_0, known), dynamic_threshold, clamp)
            prediction = _prediction_of(x_0, x_t, alpha_bar, scheduler.config.prediction_type)
        if i == n - 1 and ends_at_x_0(scheduler):
            x = x_0
        else:
            if uses_variance(scheduler):
                prediction = with_variance(prediction, variance)
            if isinstance(scheduler, UnCLIPScheduler):  # the only one that does not look it up itself
                options["prev_timestep"] = int(times[i + 1])
            x = scheduler.step(prediction, timestep, x, **options, return_dict=False)[0]
            if slope is not None and shifts_mean(scheduler):  # 2112.10741, 2.2
                x = x + variance_of(scheduler, timestep, variance) * slope
        if callback is not None:
            callback(Step(i, n, t, x_t, x_0))
    return x


def _guided(
    predict: Predict, null_predict: Predict, scale: float, x_t: Tensor, t: Tensor, place: tuple[str, int, int]
) -> Tensor:
    """The guided prediction, and the variance channels, if any, of the conditional one. place: stage, step, steps."""
    if scale == 0:
        return _checked(null_predict(x_t, t), x_t, place)
    conditional = _checked(predict(x_t, t), x_t, place)
    if scale == 1:
        return conditional
    null, channels = _checked(null_predict(x_t, t), x_t, place), x_t.shape[1]
    prediction = guidance.classifier_free(conditional[:, :channels], null[:, :channels], scale)
    return torch.cat([prediction, conditional[:, channels:]], dim=1)


def _checked(answer: Tensor, x_t: Tensor, place: tuple[str, int, int]) -> Tensor:
    """`answer` in the precision of x_t, after a look at its shape and its numbers."""
    stage, i, n = place
    rows, channels, *rest = x_t.shape
    if tuple(answer.shape) not in ((rows, channels, *rest), (rows, 2 * channels, *rest)):
        raise InputError(
            f"the {stage} answers {list(answer.shape)} for {list(x_t.shape)}; the same shape was expected, or twice "
            "the channels with a learned variance."
        )
    if not bool(torch.isfinite(answer).all()):
        raise FloatingPointError(
            f"the {stage}'s output is not finite at step {i + 1} of {n}; its weights are damaged, or its numbers are "
            "too large for this precision: try float32."
        )
    return answer.to(x_t.dtype)


def _limited(x_0: Tensor, percentile: float | None, clamp: float | None) -> Tensor:
    """x_0 after dynamic thresholding, then clamping, each if asked for."""
    if percentile is not None:
        x_0 = guidance.dynamic_threshold(x_0, percentile)
    return x_0 if clamp is None else x_0.clamp(-clamp, clamp)


def _corrected(x_0: Tensor, known: Tensor) -> Tensor:
    """x_0 where nothing is known, what is known elsewhere."""
    share = known[:, -1:].to(x_0)
    return x_0 * (1 - share) + known[:, :-1].to(x_0) * share


def _prediction_of(x_0: Tensor, x_t: Tensor, alpha_bar: Tensor, prediction_type: str) -> Tensor:
    """What a network that saw x_t would have answered to mean this x_0: the inverse of `predicted_x_0`."""
    a = per_row(alpha_bar, x_t)
    return training_target(x_0, (x_t - a.sqrt() * x_0) / (1 - a).sqrt(), alpha_bar, prediction_type)


def step_generators(seeds: Sequence[int], stream: int) -> list[torch.Generator]:
    """One generator per row for the noise that a stochastic scheduler adds; other numbers than those of `noise_of`."""
    _check_seeds(seeds)
    sequences = [np.random.SeedSequence(int(seed), spawn_key=(stream,)) for seed in seeds]
    return [torch.Generator().manual_seed(int(s.generate_state(1, np.uint64)[0]) >> 1) for s in sequences]


def _step_options(scheduler: Any, eta: float, seeds: Sequence[int] | None, rows: int, stream: int) -> dict[str, Any]:
    """What `scheduler.step` takes beside prediction, time and x: eta, and one generator per row if it draws noise."""
    takes_eta = "eta" in inspect.signature(scheduler.step).parameters
    if not 0 <= eta <= 1 or (eta and not takes_eta):
        raise InputError(f"eta is {eta}: DDIM takes a number from 0 to 1, the other schedulers 0 only.")
    options: dict[str, Any] = {"eta": eta} if takes_eta else {}
    if draws_noise(scheduler, eta):
        if seeds is None or len(seeds) != rows:
            raise InputError(f"{type(scheduler).__name__} adds noise at every step and needs a seed for each row.")
        options["generator"] = step_generators(seeds, stream)
    return options


def _check_seeds(seeds: Sequence[int]) -> None:
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or seed < 0:
            raise InputError(f"a seed is a whole number from 0 on, not {seed!r}.")


def _check_options(
    scheduler: Any,
    num_inference_steps: int,
    interval: tuple[float, float],
    percentile: float | None,
    clamp: float | None,
) -> None:
    """Raise InputError for numbers outside their limits and for schedulers of another kind of diffusion."""
    if not isinstance(scheduler, SchedulerMixin):
        raise InputError(f"denoise takes a scheduler object, not {scheduler!r}; make it with scheduler_for.")
    if scheduler.config.get("prediction_type") not in PREDICTION_TYPES or not hasattr(scheduler, "alphas_cumprod"):
        raise InputError(f"{type(scheduler).__name__}, as configured, is not a scheduler for these models.")
    most = scheduler.config.num_train_timesteps
    if not isinstance(num_inference_steps, numbers.Integral) or not 1 <= num_inference_steps <= most:
        raise InputError(f"the number of steps must be a whole number from 1 to {most}, not {num_inference_steps!r}.")
    if not 0 <= interval[0] <= interval[1] <= 1:
        raise InputError(f"the guidance interval must be two shares, 0 <= from <= to <= 1, not {interval!r}.")
    if percentile is not None and not 0 < percentile <= 1:
        raise InputError(f"the percentile of dynamic thresholding must be a share in (0, 1], not {percentile!r}.")
    if clamp is not None and not clamp > 0:
        raise InputError(f"the clamp of x_0 must be above 0, not {clamp!r}.")
