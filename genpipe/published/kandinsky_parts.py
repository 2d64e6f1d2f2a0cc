"""Kandinsky 2.2's networks as genpipe's parts: a prior of Karlo's kind, and UNet and MoVQ as one latent decoder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel, VQModel
from torch import Tensor

from genpipe.dalle2.latent_decoder import LatentDecoder
from genpipe.dalle2.prior import Prior
from genpipe.published.containers import find_weights, read_tensors
from genpipe.published.diffusers_folder import arguments, component_config, expect, needed
from genpipe.published.fitting import on_meta
from genpipe.published.kandinsky import CLASSES
from genpipe.published.karlo_parts import empty_prior, filled, filled_prior, unclip_clamp
from genpipe.published.weight_names import DIFFUSERS_STEMS

Config = Mapping[str, Any]

# The way through the steps that the scheduler "ddpm-leading" takes; the rest is in the decoder's config.
WALK = {
    "clip_sample": False,
    "thresholding": False,
    "trained_betas": None,
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "rescale_betas_zero_snr": False,
}
# Attentions of autoencoders as they were spelt before May 2023.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD = re.compile(r"(.*\.attentions\.\d+\.)(query|key|value|proj_attn)(\.(?:weight|bias))")


def prior_of_folder(folder: Path, dtype: torch.dtype | None) -> Prior:
    """The prior from a checked folder. Raises InputError where config or weights do not fit."""
    classes = CLASSES["prior"]
    wanted = {"prediction_type": "sample", "variance_type": "fixed_small_log"}
    clamp = unclip_clamp(folder, "scheduler", classes, wanted)
    model = empty_prior(component_config(folder, "prior", classes), clamp, folder / "prior" / "config.json")
    return filled_prior(
        model, read_tensors(find_weights(folder / "prior", *DIFFUSERS_STEMS), dtype=dtype), str(folder / "prior")
    )


def decoder_of_folder(folder: Path, dtype: torch.dtype | None) -> LatentDecoder:
    """The latent decoder from a checked folder. Raises InputError where configs or weights do not fit."""
    unet, movq = (component_config(folder, name, CLASSES["decoder"]) for name in ("unet", "movq"))
    scheduler = component_config(folder, "scheduler", CLASSES["decoder"], "scheduler_config.json")
    model = empty_decoder(unet, movq, scheduler, folder)
    tensors = [read_tensors(find_weights(folder / name, *DIFFUSERS_STEMS), dtype=dtype) for name in ("unet", "movq")]
    return filled_decoder(model, tensors[0], tensors[1], str(folder))


def empty_decoder(unet: Config, movq: Config, scheduler: Config, folder: Path) -> LatentDecoder:
    """A LatentDecoder for the weights of a UNet2DConditionModel and a VQModel of these configs."""
    where = folder / "unet" / "config.json"
    channels = needed(movq, "latent_channels", folder / "movq" / "config.json")
    conditioning = {"encoder_hid_dim_type": "image_proj", "addition_embed_type": "image"}
    expect(unet, {"in_channels": channels, "out_channels": 2 * channels, **conditioning}, where)
    expect(scheduler, WALK, folder / "scheduler" / "scheduler_config.json")
    filled_in = ("sample_size", "in_channels", "out_channels", "encoder_hid_dim", *conditioning)
    stride = 2 ** (len(movq["block_out_channels"]) - 1)
    ends = {name: float(scheduler[name]) for name in ("beta_start", "beta_end") if name in scheduler}
    return on_meta(
        lambda: LatentDecoder(
            needed(unet, "sample_size", where) * stride,
            clip_width=needed(unet, "encoder_hid_dim", where),
            unet_config=arguments(unet, UNet2DConditionModel, filled_in, where),
            movq_config=arguments(movq, VQModel, (), folder / "movq" / "config.json"),
            prediction_type=str(scheduler.get("prediction_type", "epsilon")),
            learned_variance=scheduler.get("variance_type") == "learned_range",
            beta_schedule=str(scheduler.get("beta_schedule", "linear")),
            num_train_timesteps=int(scheduler.get("num_train_timesteps", 1000)),
            **ends,
        )
    )


def filled_decoder(
    model: LatentDecoder, unet: Mapping[str, Tensor], movq: Mapping[str, Tensor], where: str
) -> LatentDecoder:
    """An empty latent decoder with the weights of a UNet2DConditionModel and a VQModel, in eval mode."""
    fitting = {f"unet.{name}": tensor for name, tensor in unet.items()}
    return filled(model, fitting | {f"movq.{new_name(name)}": tensor for name, tensor in movq.items()}, where)


def new_name(name: str) -> str:
    """A tensor's name as diffusers spells it now."""
    match = _OLD.fullmatch(name)
    return name if match is None else f"{match[1]}{OLD_ATTENTION[match[2]]}{match[3]}"
