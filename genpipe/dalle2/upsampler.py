"""The upsamplers of DALL-E 2 (2204.06125, 2.1): diffusion UNets of convolutions only that enlarge a picture.

Legend: R pictures, H W sides of the large picture, h w those of the small one, f the factor between them, p patch size.
Pixels are signed for the network, [-1, 1], and in [0, 1] for `upsample`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin, SchedulerMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from einops import rearrange
from torch import Tensor, nn

from genpipe.dalle2.corruption import make_corruption
from genpipe.dalle2.losses import PREDICTION_TYPES
from genpipe.dalle2.sampling import SCHEDULERS, UPSAMPLER, Predict, Step, denoise, noise_of, scheduler_for
from genpipe.dalle2.schedulers import started, times_of
from genpipe.dalle2.sharpening import check_amount, sharpened
from genpipe.errors import InputError
from genpipe.images import resize, signed_to_unit, unit_to_signed

_RESIZES = ("bicubic", "bilinear")  # the modes that can enlarge as well as shrink
_ROUNDS = 8  # of moving the mean colour: what is cut at black and white moves it back a little


class Upsampler(ModelMixin, ConfigMixin):
    """A noised large picture beside a small one, enlarged -> a prediction of the noise, of x_0 or of v.

    No attention, no text: it runs at any size and is trained on crops.

    Arguments (all stored in config.json):
        unet_config: arguments of diffusers' UNet2DModel; size and channels are filled in, attention is switched off.
        factor: f; 4 in the paper.
        patch_size: p; pixels are folded into channels by blocks of this side before the UNet (1 in the paper).
        prediction_type: "epsilon" (as in the paper), "sample" or "v_prediction".
        beta_schedule, num_train_timesteps: diffusers' names; "squaredcos_cap_v2" is the cosine schedule.
        corruption: what training did to the small pictures, see `genpipe.dalle2.corruption`; None: nothing.
        resize_mode: of the one resize function, for shrinking in training and for enlarging, then and when drawing.
        residual: the UNet answers what is missing in the enlarged picture, which is added to it; needs "sample".
        num_inference_steps: steps if a drawing names none; the paper's stages take 27 and 15 of DDIM.
        scheduler: name of the one it was made for, see `genpipe.dalle2.sampling`; used if a drawing names none.
        last_step_network: a second UNet of the same shape takes the last step of every drawing (Karlo's weights).
        corrects_colour: what is drawn gets the mean colour of the small picture, see `keep_mean_colour`.
        sharpening: amount of it that every drawing ends with, 0 is none, see `genpipe.dalle2.sharpening`.
    Raises InputError for settings that do not fit.
    """

    reads_text = False  # see pipelines.protocols

    @register_to_config
    def __init__(
        self,
        unet_config: dict[str, Any],
        factor: int = 4,
        patch_size: int = 1,
        prediction_type: str = "epsilon",
        beta_schedule: str = "squaredcos_cap_v2",
        num_train_timesteps: int = 1000,
        corruption: dict[str, Any] | None = None,
        resize_mode: str = "bicubic",
        residual: bool = False,
        num_inference_steps: int = 27,
        scheduler: str = "ddim",
        last_step_network: bool = False,
        corrects_colour: bool = True,
        sharpening: float = 0.0,
    ) -> None:
        super().__init__()
        check_amount(sharpening)
        if prediction_type not in PREDICTION_TYPES or resize_mode not in _RESIZES:
            raise InputError(
                f"prediction_type must be one of {PREDICTION_TYPES} and resize_mode one of {_RESIZES}, not "
                f"{prediction_type!r} and {resize_mode!r}."
            )
        if residual and prediction_type != "sample":
            raise InputError(f'residual needs the prediction_type "sample", not {prediction_type!r}.')
        if min(factor, patch_size, num_inference_steps) < 1:
            raise InputError("factor, patch_size and num_inference_steps of an upsampler must be at least 1.")
        if scheduler not in SCHEDULERS:
            raise InputError(f"an upsampler's scheduler must be one of {', '.join(SCHEDULERS)}, not {scheduler!r}.")
        blocks = [*unet_config["down_block_types"], *unet_config["up_block_types"]]
        attending = [block for block in blocks if "attn" in block.lower()]
        if attending:
            raise InputError(f"an upsampler has no attention, so it cannot have the block {attending[0]}.")
        self.degradation = make_corruption(corruption or {"kind": "none"})
        channels = {"in_channels": 6 * patch_size**2, "out_channels": 3 * patch_size**2}
        self.unet = UNet2DModel(**unet_config, **channels, add_attention=False)
        for parameter in self.unet.conv_out.parameters():  # so that training begins at the enlarged picture, or at grey
            nn.init.zeros_(parameter)
        self.last_unet = UNet2DModel(**unet_config, **channels, add_attention=False) if last_step_network else None

    @property
    def multiple(self) -> int:
        """Sides of the large picture must be multiples of this; `upsample` pads to them."""
        halvings = len(self.config.unet_config["block_out_channels"]) - 1
        return math.lcm(self.config.patch_size * 2**halvings, self.config.factor)

    def enlarge(self, low: Tensor) -> Tensor:
        """(R, 3, h, w) -> (R, 3, f h, f w) by the one resize, not cut to any range."""
        height, width = (side * self.config.factor for side in low.shape[-2:])
        return resize(low, (height, width), mode=self.config.resize_mode)

    @apply_forward_hook
    def denoise(self, x_t: Tensor, t: Tensor, low: Tensor, last_step: bool = False) -> Tensor:
        """x_t (R, 3, H, W) and low, both signed, t (R,) or scalar -> prediction (R, 3, H, W).

        low: the small picture (R, 3, h, w), or what `enlarge` made of it, which is the same at all steps. last_step: by
        the network for the last step, where there is one. Raises InputError where the sizes do not fit each other or
        are no multiples of `multiple`.
        """
        if low.shape[-2:] != x_t.shape[-2:]:
            low = self.enlarge(low)
        if low.shape != x_t.shape or any(side % self.multiple for side in x_t.shape[-2:]):
            raise InputError(
                f"a picture {list(x_t.shape)} and an enlarged one {list(low.shape)} do not fit; both must have the "
                f"same sides, multiples of {self.multiple}."
            )
        p = self.config.patch_size
        # The noised picture first: the order in which published weights have the two.
        x = torch.cat([_folded(x_t, p), _folded(low, p)], dim=1)  # R, 6 p^2, H / p, W / p
        unet = self.last_unet if last_step and self.last_unet is not None else self.unet
        output = unet(x.to(self.dtype), t, return_dict=False)[0]
        output = rearrange(output, "r (c p q) h w -> r c (h p) (w q)", p=p, q=p)
        return output + low if self.config.residual else output

    def forward(self, x_t: Tensor, t: Tensor, low: Tensor, last_step: bool = False) -> Tensor:
        """One training pass: see `denoise`."""
        return self.denoise(x_t, t, low, last_step)


def _folded(pixels: Tensor, patch: int) -> Tensor:
    return rearrange(pixels, "r c (h p) (w q) -> r (c p q) h w", p=patch, q=patch)


def keep_mean_colour(pixels: Tensor, low: Tensor) -> Tensor:
    """Pixels (R, 3, H, W), moved as a whole so that each channel's mean is that of low (R, 3, h, w), cut to [0, 1].

    Diffusion drifts in colour, most of all with few steps; the small picture knows its mean.
    """
    wanted = low.mean(dim=(2, 3), keepdim=True)
    for _ in range(_ROUNDS):
        pixels = (pixels + wanted - pixels.mean(dim=(2, 3), keepdim=True)).clamp(0, 1)
    return pixels


@torch.no_grad()
def upsample(
    model: Upsampler,
    pixels: Tensor,
    seeds: Sequence[int],
    num_inference_steps: int | None = None,
    scheduler: str | SchedulerMixin | None = None,
    callback: Callable[[Step], None] | None = None,
    rows_at_a_time: int = 8,
    stage_number: int = 0,
) -> Tensor:
    """Small pictures (R, 3, h, w) in [0, 1] -> (R, 3, f h, f w) in [0, 1], of any size.

    Args:
        model: in eval mode, on the device of `pixels`.
        seeds: one per picture: a picture depends on its own seed, whatever stands beside it.
        num_inference_steps: None: the number stored with the model.
        scheduler: name or object, see `genpipe.dalle2.sampling`; None: the one stored with the model.
        callback: called after every step of every `rows_at_a_time` pictures, which are drawn together. Sides that the
            network cannot take are padded by repeating the border, so its x_t and x_0 may be larger than the result.
        stage_number: 0 for the first upsampler of a cascade, 1 for the next: they do not share their noise.
    The small picture is corrupted no further than by the lightest blur of training. What is drawn is sharpened by the
    model's `sharpening`, and gets the small picture's mean colour if its `corrects_colour` says so. Raises InputError
    for other shapes or another number of seeds, FloatingPointError when a prediction is not finite.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point() or min(pixels.shape[-2:]) < 1:
        raise InputError(f"float pixels (R, 3, h, w) are needed, got {pixels.dtype} {list(pixels.shape)}.")
    if len(seeds) != len(pixels) or rows_at_a_time < 1:
        raise InputError(
            f"{len(pixels)} pictures need as many seeds, got {len(seeds)}, and at least one row at a time."
        )
    steps = model.config.num_inference_steps if num_inference_steps is None else num_inference_steps
    made = scheduler_for(model.config.scheduler if scheduler is None else scheduler, model)
    stream, stage = UPSAMPLER + stage_number, f"upsampler {stage_number + 1}"
    height, width = (side * model.config.factor for side in pixels.shape[-2:])
    done = [pixels.new_empty(0, 3, height, width, dtype=torch.float32)]
    for start in range(0, len(pixels), rows_at_a_time):
        given = pixels[start : start + rows_at_a_time].float()
        own = seeds[start : start + rows_at_a_time]
        low = model.enlarge(unit_to_signed(model.degradation.lightest(_padded(given, model))))
        noise = noise_of(own, low.shape[1:], stream).to(low)
        x_0 = denoise(
            _predictor(model, low, made, steps),
            made,
            noise,
            steps,
            clamp=1.0,
            seeds=own,
            stream=stream,
            callback=callback,
            stage=stage,
        )
        drawn = sharpened(signed_to_unit(x_0[..., :height, :width]), model.config.sharpening)
        done.append(keep_mean_colour(drawn, given) if model.config.corrects_colour else drawn.clamp(0, 1))
    return torch.cat(done)


def _predictor(model: Upsampler, low: Tensor, scheduler: SchedulerMixin, steps: int) -> Predict:
    """The model beside an enlarged picture, as the denoising loop calls it; the last step may be another network's."""
    if model.last_unet is None:
        return lambda x_t, t: model.denoise(x_t, t, low)
    last = times_of(started(scheduler, steps, low.device))[-1]
    return lambda x_t, t: model.denoise(x_t, t, low, last_step=bool(t == last))


def _padded(pixels: Tensor, model: Upsampler) -> Tensor:
    """Small pictures with their right and lower border repeated until their enlarged sides fit the network."""
    multiple = model.multiple // model.config.factor
    height, width = pixels.shape[-2:]
    return F.pad(pixels, (0, -width % multiple, 0, -height % multiple), mode="replicate")
