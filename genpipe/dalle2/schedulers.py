"""diffusers' schedulers as the denoising loop uses them: by name or object, with their quirks evened out.

Legend: T training steps, n denoising steps. alpha_bar is 1 where clean and 0 where noise.
"""

import copy
import inspect
from fractions import Fraction
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    SchedulerMixin,
    UnCLIPScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from genpipe.errors import InputError


class EvenDDIMScheduler(DDIMScheduler):
    """DDIM that goes from each time step of its schedule to the next, from the last one to the clean x_0, with any eta.

    diffusers' own goes T // n down, which is not where the schedule's next step lies when n does not divide T; and with
    eta = 1 rounding can make the share of the noise that it keeps negative, and the root of that no number.
    """

    num_inference_steps: Any

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Any = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """As DDIMScheduler's."""
        later = self.timesteps[self.timesteps < timestep]
        down = int(timestep) - (int(later[0]) if len(later) else -1)
        steps = self.num_inference_steps
        self.num_inference_steps = Fraction(self.config.num_train_timesteps, down)  # T // this is `down` exactly
        try:
            return super().step(
                model_output,
                timestep,
                sample,
                eta=eta,
                use_clipped_model_output=use_clipped_model_output,
                generator=generator,
                variance_noise=variance_noise,
                return_dict=return_dict,
            )
        finally:
            self.num_inference_steps = steps

    def _get_variance(self, timestep: int, prev_timestep: int) -> Tensor:
        """Of the noise that is added with eta = 1: all the noise there is after the step, at most."""
        variance = super()._get_variance(timestep, prev_timestep)
        most = 1 - (self.alphas_cumprod[prev_timestep] if prev_timestep >= 0 else self.final_alpha_cumprod)
        while (variance**0.5) ** 2 > most:
            variance = torch.nextafter(variance, torch.zeros_like(variance))
        return variance


def fast27_timesteps(num_train_timesteps: int) -> list[int]:
    """GLIDE's 27 time steps, noisiest first: 10, 10, 3, 2 and 2 of five equal sections from clean to noise.

    Each section is walked evenly from its first to its last step; the very last one is drawn in by two, which keeps
    DDIM from artefacts of the noisiest steps (released code of 2112.10741).
    """
    size = num_train_timesteps // 5
    chosen = [section * size + round(i * (size - 1) / (n - 1)) for section, n in enumerate(_FAST27) for i in range(n)]
    chosen[-1] -= 2
    return chosen[::-1]


_FAST27 = (10, 10, 3, 2, 2)


class _Fast27:
    """Mixin: 27 steps are those of `fast27_timesteps`; other numbers are spaced as the config says."""

    config: Any
    timesteps: Tensor

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """As diffusers'."""
        super().set_timesteps(num_inference_steps, device=device)  # type: ignore[misc]
        total = self.config.num_train_timesteps
        if num_inference_steps == sum(_FAST27) and total % 5 == 0 and total >= 5 * max(_FAST27):
            self.timesteps = torch.tensor(fast27_timesteps(total), device=device)


class Fast27DDIMScheduler(_Fast27, EvenDDIMScheduler):
    """DDIM through GLIDE's list of 27 time steps."""


class Fast27DDPMScheduler(_Fast27, DDPMScheduler):
    """DDPM through GLIDE's list of 27 time steps."""


_SHIFT = 0.1


class ShiftedDDIMScheduler(EvenDDIMScheduler):
    """DDIM through n time steps T s u / (1 + (s - 1) u), u = i / n and s = 0.1, dense where there is little noise.

    Shifted as in 2403.03206, 5.3.2, but the other way: an upsampler is given nearly all of the picture, and what it has
    to find lies below most steps' noise.
    """

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """As diffusers'."""
        super().set_timesteps(num_inference_steps, device=device)
        total, n = self.config.num_train_timesteps, num_inference_steps
        times = [max(round(total * _SHIFT * i / (n + (_SHIFT - 1) * i)), i) - 1 for i in range(n, 0, -1)]
        self.timesteps = torch.tensor(times, device=device)


# Name -> class and options. "trailing" spacing starts at the noisiest time step and makes even strides from there.
# "leading" starts below it (5 steps of 1,000 at 800), where the model expects to see something of the picture, but is
# given noise alone (2305.08891, 3.3). Nothing is clipped here: `denoise` clamps, as each part needs.
SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddpm": (DDPMScheduler, {"timestep_spacing": "trailing", "clip_sample": False, "variance_type": "fixed_small"}),
    "ddim": (EvenDDIMScheduler, {"timestep_spacing": "trailing", "clip_sample": False}),
    "ddim-shifted": (ShiftedDDIMScheduler, {"timestep_spacing": "trailing", "clip_sample": False}),
    # Second order from two predictions on, first order where it is safer with few steps: in the last one.
    "dpm-solver++": (
        DPMSolverMultistepScheduler,
        {"timestep_spacing": "trailing", "solver_order": 2, "lower_order_final": True, "final_sigmas_type": "zero"},
    ),
    "unipc": (
        UniPCMultistepScheduler,
        {"timestep_spacing": "trailing", "solver_order": 2, "lower_order_final": True, "final_sigmas_type": "zero"},
    ),
    "euler": (EulerDiscreteScheduler, {"timestep_spacing": "trailing", "final_sigmas_type": "zero"}),
    # As published unCLIP weights are used: evenly from T - 1 to 0, both included. diffusers' UnCLIPScheduler gives the
    # same numbers, but knows neither v nor other noise schedules, and advises to use DDPMScheduler in its place.
    "unclip": (
        DDPMScheduler,
        {"timestep_spacing": "linspace", "clip_sample": False, "variance_type": "fixed_small_log"},
    ),
    # As published latent decoders are used, for all that is said of "leading" above: even whole strides, from t = 1 on.
    "ddpm-leading": (
        DDPMScheduler,
        {
            "timestep_spacing": "leading",
            "steps_offset": 1,
            "clip_sample": False,
            "variance_type": "fixed_small",
        },
    ),
}


def make_scheduler(
    name: str | SchedulerMixin,
    *,
    beta_schedule: str,
    num_train_timesteps: int,
    prediction_type: str,
    learned_variance: bool = False,
    beta_start: float | None = None,
    beta_end: float | None = None,
) -> SchedulerMixin:
    """A fresh scheduler, by name (see SCHEDULERS) or as a copy of a given object, which is used as it is configured.

    beta_schedule, num_train_timesteps, prediction_type: those that the model was trained with, in diffusers' names;
    beta_start, beta_end too, which the cosine schedule does not have: None is diffusers' own, 0.0001 and 0.02.
    learned_variance: the model answers the variance too; the stochastic schedulers made by name use it.
    Raises InputError for an unknown name, and for an object that was made for another training.
    """
    trained: dict[str, Any] = {
        "beta_schedule": beta_schedule,
        "num_train_timesteps": num_train_timesteps,
        "prediction_type": prediction_type,
    }
    ends = {"beta_start": beta_start, "beta_end": beta_end}
    trained |= {name: value for name, value in ends.items() if value is not None}
    if not isinstance(name, str):
        _check_object(name, trained)
        return copy.deepcopy(name)
    if name not in SCHEDULERS:
        raise InputError(f"there is no scheduler {name!r}; choose one of {', '.join(SCHEDULERS)}.")
    scheduler, options = SCHEDULERS[name]
    if learned_variance and "variance_type" in options:
        options = {**options, "variance_type": "learned_range"}
    try:
        return scheduler(**trained, **options)
    except NotImplementedError as error:
        raise InputError(f"the scheduler {name!r} does not know the noise schedule {beta_schedule!r}.") from error


def scheduler_for(name: str | SchedulerMixin, part: Any) -> SchedulerMixin:
    """`make_scheduler` for a trained part: prior, decoder or upsampler."""
    config = part.config
    return make_scheduler(
        name,
        beta_schedule=config.beta_schedule,
        num_train_timesteps=config.num_train_timesteps,
        prediction_type=config.prediction_type,
        learned_variance=config.get("learned_variance", False),
        beta_start=config.get("beta_start"),
        beta_end=config.get("beta_end"),
    )


def started(scheduler: Any, num_inference_steps: int, device: torch.device) -> Any:
    """A copy of `scheduler` with its time steps set: num_inference_steps of them for all that are of first order."""
    scheduler = copy.deepcopy(scheduler)
    if num_inference_steps == 1 and isinstance(scheduler, UnCLIPScheduler):  # which would divide by n - 1
        scheduler.num_inference_steps = 1
        scheduler.timesteps = torch.tensor([scheduler.config.num_train_timesteps - 1], device=device)
        return scheduler
    if num_inference_steps == 1 and "timestep_spacing" in scheduler.config:
        # The only step of the other spacings is t = 0 for some classes, where noise would be taken for a picture.
        scheduler.register_to_config(timestep_spacing="trailing")
    scheduler.set_timesteps(num_inference_steps, device=device)
    beyond = int(scheduler.timesteps[0]) - (scheduler.config.num_train_timesteps - 1)
    if beyond > 0:  # with all T steps there is no room for an offset
        scheduler.timesteps = scheduler.timesteps - beyond
    if int(scheduler.timesteps[-1]) < 0:
        # For some n (61 of 1,000) the rounding of a stride gives diffusers' trailing spacing one step too many, t = -1.
        scheduler.timesteps = scheduler.timesteps[:-1]
        scheduler.num_inference_steps = num_inference_steps
        if hasattr(scheduler, "sigmas"):
            scheduler.sigmas = torch.cat([scheduler.sigmas[:-2], scheduler.sigmas[-1:]])
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # told, because it looks for the first time step, which some spacings have twice
    return scheduler


def times_of(scheduler: Any) -> Tensor:
    """The time steps (n,) for the model: whole numbers where they are whole, although Euler's are stored as floats."""
    times = scheduler.timesteps
    return times.long() if torch.equal(times.float(), times.float().round()) else times


def alpha_bars_of(scheduler: Any) -> Tensor:
    """alpha_bar (n,) at each time step, from the scheduler's own noise levels where it has them."""
    n, sigmas = len(scheduler.timesteps), getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) == n + 1:
        return (1 / (1 + sigmas[:n].double().square())).float()
    return scheduler.alphas_cumprod[scheduler.timesteps.long().to(scheduler.alphas_cumprod.device)]


def uses_variance(scheduler: Any) -> bool:
    """Whether its step splits the variance's place in its range off the prediction (2102.09672, 3.1)."""
    return isinstance(scheduler, DDPMScheduler | UnCLIPScheduler) and scheduler.config.variance_type == "learned_range"


def shifts_mean(scheduler: Any) -> bool:
    """Whether its steps are draws of a Gaussian whose mean a gradient can shift: see `variance_of`."""
    return isinstance(scheduler, DDPMScheduler)


def variance_of(scheduler: DDPMScheduler, timestep: int, fraction: Tensor) -> Tensor:
    """Variance of the Gaussian that a step of DDPM draws from, of a shape that spreads over x.

    fraction: the model's answer to where it lies in its range (2102.09672, 3.1), empty where it has none.
    """
    kind = scheduler.config.variance_type
    if kind == "learned_range":
        return scheduler._get_variance(timestep, predicted_variance=fraction).exp()
    return scheduler._get_variance(timestep, variance_type="fixed_large" if "large" in kind else "fixed_small")


def with_variance(prediction: Tensor, fraction: Tensor) -> Tensor:
    """(R, C, ...) and the variance's place in its range -> (R, 2 C, ...), as diffusers' schedulers split it again."""
    if fraction.shape != prediction.shape:
        raise InputError(
            "this scheduler needs a learned variance, which the model does not answer; choose another one."
        )
    return torch.cat([prediction, fraction], dim=1)


def ends_at_x_0(scheduler: Any) -> bool:
    """Whether the last step leads to the x_0 estimated in it, whatever x is.

    Such a step need not be computed. That spares its rounding (Euler at 20,000 times the noise) and what diffusers adds
    to it unless it starts at t = 0: noise of the learned variance. Unknown classes may mix several estimates.
    """
    if isinstance(scheduler, EvenDDIMScheduler | DDPMScheduler | UnCLIPScheduler):
        return True
    by_sigma = EulerDiscreteScheduler | DPMSolverMultistepScheduler | UniPCMultistepScheduler
    return isinstance(scheduler, by_sigma) and float(scheduler.sigmas[-1]) == 0


def takes_x_0(scheduler: Any) -> bool:
    """Whether its step can be told x_0 itself, as the prediction type "sample"; some of diffusers' cannot."""
    by_sigma = EulerDiscreteScheduler | DPMSolverMultistepScheduler | UniPCMultistepScheduler
    return isinstance(scheduler, DDIMScheduler | DDPMScheduler | UnCLIPScheduler | by_sigma)


def draws_noise(scheduler: Any, eta: float) -> bool:
    """Whether `scheduler.step` draws noise: all of diffusers' that take a generator do, with these exceptions."""
    if isinstance(scheduler, DDIMScheduler):
        return eta > 0
    if isinstance(scheduler, EulerDiscreteScheduler):
        return False
    if "algorithm_type" in scheduler.config:  # DPM-Solver and its relatives
        return "sde" in scheduler.config.algorithm_type
    return "generator" in inspect.signature(scheduler.step).parameters


def _check_object(scheduler: Any, trained: dict[str, Any]) -> None:
    """Raise InputError for what is no scheduler, or one made for another training than that of the model."""
    if not isinstance(scheduler, SchedulerMixin):
        raise InputError(
            f"a scheduler is one of {', '.join(SCHEDULERS)}, or an object of diffusers, not {scheduler!r}."
        )
    if scheduler.config.get("trained_betas") is not None:  # they take the place of the schedule's name
        trained = {key: value for key, value in trained.items() if not key.startswith("beta_")}
    for key, value in trained.items():
        if scheduler.config.get(key) != value:
            raise InputError(
                f"the {type(scheduler).__name__} has {key}={scheduler.config.get(key)!r}, the model was trained with "
                f"{value!r}; make the scheduler with {key}={value!r}."
            )
