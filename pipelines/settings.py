"""How each pipeline draws: one frozen dataclass per pipeline, whose fields are what a recipe and family.json store.

Light on purpose (no torch): settings are checked before weights are loaded.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from genpipe.errors import InputError
from pipelines import request

MODES = ("prior", "caption", "text")  # where DALL-E 2's image embedding comes from (2204.06125, 3 and figure 8)
PICTURE_MODE = "image"  # and where a picture is given

Sampling = TypeVar("Sampling", bound="DALLE1Sampling | DALLE2Sampling")


@dataclass(frozen=True)
class DALLE1Sampling:
    """How DALL-E 1 draws.

    temperature, top_k, top_p: of the drawing of image tokens. guidance_scale: 1 is the conditional prediction alone.
    decoder_weight: of the decoder's say in the ranking, see genpipe.dalle2.critic: this times the log of its error is
        taken from CLIP's score; 0: CLIP ranks alone, as in the paper.
    upsample: whether kept pictures are enlarged; None: where there is an upsampler.
    upsampler_steps, upsampler_scheduler: of its denoising; None: those that it was made for.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance_scale: float = 1.0
    upsample: bool | None = None
    upsampler_steps: int | None = None
    upsampler_scheduler: str | None = None
    decoder_weight: float = 0.0

    def check(self) -> None:
        """Raises InputError for numbers out of range."""
        request.check_sampling(self.temperature, self.top_k, self.top_p, self.guidance_scale)
        if not (request.is_finite(self.decoder_weight) and self.decoder_weight >= 0):
            raise InputError(f"The decoder's weight in the ranking must be 0 or above, got {self.decoder_weight!r}.")
        _check_upsampling(self.upsample, self.upsampler_steps)


@dataclass(frozen=True)
class DALLE2Sampling:
    """How DALL-E 2 draws; as it stands here where neither a call nor its family says otherwise.

    guidance_scale (GLIDE's 3), num_inference_steps, scheduler (a name of genpipe.dalle2.sampling), eta (of DDIM): the
        decoder's. guidance_interval: share of its steps, [from, to), that is guided. dynamic_threshold: percentile in
        (0, 1], None: off.
    clip_guidance_scale: of the gradient of a CLIP that knows noise (GLIDE's 3, with a guidance_scale of 1); 0: off.
    negative_prompt: takes the place of the empty caption in the guidance of prior and decoder.
    mode: where the image embedding comes from: "prior"; "caption": nowhere, the decoder sees the caption alone; "text":
        the text embedding stands in for it; "image": a given picture's. None: "image" with a given picture, else
        "prior", or "text" where there is no prior.
    prior_guidance_scale, prior_steps, prior_draws, prior_scheduler: the prior's; of its draws the closest is kept.
    upsample, upsampler_steps, upsampler_scheduler: as in DALLE1Sampling.
    """

    guidance_scale: float = 3.0
    num_inference_steps: int = 25
    scheduler: str = "dpm-solver++"
    eta: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    dynamic_threshold: float | None = None
    clip_guidance_scale: float = 0.0
    negative_prompt: str = ""
    mode: str | None = None
    prior_guidance_scale: float = 1.0
    prior_steps: int = 25
    prior_draws: int = 2
    prior_scheduler: str = "ddim"
    upsample: bool | None = None
    upsampler_steps: int | None = None
    upsampler_scheduler: str | None = None

    def check(self) -> None:
        """Raises InputError for numbers out of range and names that are not known."""
        for scale in (self.guidance_scale, self.prior_guidance_scale, self.clip_guidance_scale):
            request.check_sampling(guidance_scale=scale)
        request.check_positive("The number of steps", self.num_inference_steps)
        request.check_positive("The number of steps of the prior", self.prior_steps)
        request.check_positive("The number of draws of the prior", self.prior_draws)
        if not (request.is_finite(self.eta) and 0 <= self.eta <= 1):
            raise InputError(f"Eta must be a number from 0 to 1, got {self.eta!r}.")
        if self.eta and self.scheduler != "ddim":
            raise InputError(f"Eta belongs to the scheduler 'ddim', not to {self.scheduler!r}; leave it at 0.")
        _check_interval(self.guidance_interval)
        share = self.dynamic_threshold
        if share is not None and not (request.is_finite(share) and 0 < share <= 1):
            raise InputError(f"The percentile of dynamic thresholding must be a share in (0, 1], got {share!r}.")
        if not isinstance(self.negative_prompt, str):
            raise InputError(f"A negative prompt must be a string, got {type(self.negative_prompt).__name__}.")
        if self.mode not in (None, *MODES, PICTURE_MODE):
            raise InputError(f"There is no mode {str(self.mode)[:40]!r}; choose from {', '.join(MODES)}.")
        _check_upsampling(self.upsample, self.upsampler_steps)


SAMPLINGS: dict[str, Any] = {"dalle1": DALLE1Sampling, "dalle2": DALLE2Sampling}


def sampling_of(pipeline: str, settings: Mapping[str, Any]) -> Any:
    """Settings by name -> checked sampling of that pipeline (DALLE1Sampling or DALLE2Sampling).

    What is missing or None is as the dataclass has it. Raises InputError for names that are no settings of the
    pipeline, and for values out of range.
    """
    if not isinstance(settings, Mapping):
        raise InputError(f"The settings of {pipeline} must be an object, got a {type(settings).__name__}.")
    unknown = [str(name)[:40] for name in settings if name not in names_of(pipeline)]
    if unknown:
        raise InputError(f"{pipeline} has no setting {unknown[0]!r}; it has {', '.join(names_of(pipeline))}.")
    values = {name: value for name, value in settings.items() if value is not None}
    if isinstance(values.get("guidance_interval"), list):  # as JSON has it
        values["guidance_interval"] = tuple(values["guidance_interval"])
    plain = SAMPLINGS[pipeline]()
    sampling = dataclasses.replace(plain, **values)
    sampling.check()
    for name in ("scheduler", "prior_scheduler", "upsampler_scheduler"):
        if name in values and values[name] != getattr(plain, name):
            _check_scheduler(values[name])
    return sampling


def resolved(pipeline: str, given: Mapping[str, Any], sampling: Any, defaults: Mapping[str, Any]) -> Any:
    """The sampling of a call: what is `given` (None: not), the rest as in `sampling`, or without one the defaults.

    Raises InputError as `sampling_of`.
    """
    if sampling is not None and not isinstance(sampling, SAMPLINGS[pipeline]):
        raise InputError(f"{pipeline} takes a {SAMPLINGS[pipeline].__name__}, got a {type(sampling).__name__}.")
    base = defaults if sampling is None else dataclasses.asdict(sampling)
    return sampling_of(pipeline, {**base, **{name: value for name, value in given.items() if value is not None}})


def names_of(pipeline: str) -> list[str]:
    """Names of a pipeline's settings."""
    return [each.name for each in dataclasses.fields(SAMPLINGS[pipeline])]


def upsampling_of(sampling: Sampling, upsampler: Any) -> Sampling:
    """The settings with upsampling decided: on where there is an upsampler, with the steps it was made for.

    Raises InputError where upsampling is asked for and there is no upsampler.
    """
    if sampling.upsample and upsampler is None:
        raise InputError("These weights have no upsampler; draw without upsampling, or take a family that has one.")
    on = upsampler is not None and sampling.upsample is not False
    steps = (sampling.upsampler_steps or upsampler.config.num_inference_steps) if on else None
    return dataclasses.replace(sampling, upsample=on, upsampler_steps=steps)


def _check_scheduler(name: object) -> None:
    from genpipe.dalle2.sampling import SCHEDULERS  # takes seconds, and is needed only where one is named

    if not isinstance(name, str) or name not in SCHEDULERS:
        raise InputError(f"There is no scheduler {str(name)[:40]!r}; choose from {', '.join(SCHEDULERS)}.")


def _check_interval(interval: object) -> None:
    numbers = isinstance(interval, tuple) and len(interval) == 2 and all(request.is_finite(side) for side in interval)
    if not numbers or not 0 <= interval[0] <= interval[1] <= 1:  # type: ignore[index]
        raise InputError(f"The guidance interval must be two shares, 0 <= from <= to <= 1, got {interval!r}.")


def _check_upsampling(upsample: object, steps: object) -> None:
    if upsample is not None and not isinstance(upsample, bool):
        raise InputError(f"Whether to upsample must be true or false, got {upsample!r}.")
    if steps is not None:
        request.check_positive("The number of steps of the upsampler", steps)
