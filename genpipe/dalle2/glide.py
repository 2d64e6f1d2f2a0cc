"""GLIDE (2112.10741): text-conditioned diffusion in pixels, its upsampler, and both of them for filling holes (2.4).

Legend: B pictures, H W pixels, h w those of the small picture, L text positions, W width of the text transformer, E
width of the time embedding. Pixels are signed for the network, [-1, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin, SchedulerMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from genpipe.dalle2.decoder import DecoderCondition
from genpipe.dalle2.glide_text import ByteBPE, GLIDEText, TextTransformer
from genpipe.dalle2.sampling import UPSAMPLER, Step, denoise, noise_of, scheduler_for
from genpipe.dalle2.schedulers import Fast27DDIMScheduler, Fast27DDPMScheduler
from genpipe.errors import InputError
from genpipe.images import resize, signed_to_unit, unit_to_signed
from genpipe.parts import OwnsTokenizer
from genpipe.tokenizer import TokenBatch


@dataclass(frozen=True)
class GLIDECondition(DecoderCondition):
    """As the decoder's, with the pixels to keep of pictures whose holes are to be filled.

    known: (B, 4, H, W), signed pixels that are 0 in the holes, and a channel that is 0 in the holes and 1 elsewhere;
    None: nothing is known. `genpipe.dalle2.sampling.denoise` takes it under the same name.
    """

    known: Tensor | None = None


class _TextConditioned(OwnsTokenizer, ModelMixin, ConfigMixin):
    """What GLIDE and its upsampler share: tokenizer, text transformer, and a UNet that attends to the text.

    The text tokens join keys and values of every attention; no mask: padding has learned states (2.3).
    """

    tokenizer_class = ByteBPE

    def _build(self, text_config: dict[str, Any], unet_config: dict[str, Any], channels: int, side: int) -> None:
        expected = {"vocab_size", "context_length", "width", "layers", "heads"}
        if set(text_config) != expected:
            raise InputError(f"text_config needs the entries {', '.join(sorted(expected))}, not {sorted(text_config)}.")
        self.unet = UNet2DConditionModel(
            **unet_config,
            sample_size=side,
            in_channels=channels,
            out_channels=6 if self.config.learned_variance else 3,
            cross_attention_dim=text_config["width"],
            class_embed_type="identity",
        )
        self.text = TextTransformer(**text_config, time_width=self.unet.time_embedding.linear_2.out_features)

    @property
    def fills(self) -> bool:
        """Whether it can be told which pixels of the picture are known."""
        return bool(self.config.inpaint)

    @property
    def context_length(self) -> int:
        """L."""
        return int(self.config.text_config["context_length"])

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raise InputError if the tokenizer's vocabulary is not the one that the text transformer was built for."""
        expected = self.config.text_config["vocab_size"]
        if not isinstance(tokenizer, ByteBPE) or tokenizer.vocab_size != expected:
            raise InputError(f"{type(self).__name__} takes a ByteBPE of {expected} tokens, not {tokenizer!r}.")

    def tokenize(self, texts: str | Sequence[str]) -> TokenBatch:
        """Texts -> ids and mask (B, L); that a text is too long is said once."""
        return self.tokenizer(texts, self.context_length)

    @apply_forward_hook
    def encode_text(self, texts: str | Sequence[str] | TokenBatch) -> GLIDEText:
        """Texts, or ids made by `tokenize`, -> embedding (B, E), states (B, L, W) and mask (B, L)."""
        batch = (texts if isinstance(texts, TokenBatch) else self.tokenize(texts)).to(self.device)
        return self.text(batch.ids, batch.mask)

    @apply_forward_hook
    def condition(
        self,
        image_embedding: Tensor | None,
        text_embedding: Tensor,
        text_states: Tensor,
        text_mask: Tensor,
        kept_pixels: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> GLIDECondition:
        """What `encode_text` said, and for filling holes a picture -> what the UNet is conditioned on.

        Args:
            image_embedding: must be None; a place in the protocol of decoders.
            text_embedding (B, E), text_states (B, L, W), text_mask (B, L): of the captions; of "" for the null.
            kept_pixels, kept: pixels in [0, 1] (B, 3, H, W), or one picture for all rows, and (B, 1, H, W) bool, True
                where they are to stay as they are. Only where it `fills`.
        Raises InputError for an image embedding, and for kept pixels where it cannot fill the others.
        """
        if image_embedding is not None:
            raise InputError("GLIDE draws from captions alone; choose the mode 'caption'.")
        seen = None
        if kept_pixels is not None and kept is not None:
            if not self.fills:
                raise InputError("these weights of GLIDE cannot fill holes; take the inpainting ones.")
            share = kept.to(kept_pixels)
            both = torch.cat([unit_to_signed(kept_pixels) * share, share], dim=1)
            seen = both.expand(len(text_embedding), -1, -1, -1)  # B, 4, H, W
        mask = torch.ones_like(text_mask, dtype=torch.bool)
        return GLIDECondition(text_embedding, text_states, mask, seen)

    def _answer(self, x_t: Tensor, t: Tensor, condition: DecoderCondition, *more: Tensor) -> Tensor:
        """The UNet's answer to x_t beside what is known, if it can fill holes, and `more` channels."""
        beside = list(more)
        if self.fills:
            known = getattr(condition, "known", None)
            beside.insert(0, x_t.new_zeros(len(x_t), 4, *x_t.shape[2:]) if known is None else known)
        return self.unet(
            torch.cat([x_t, *(each.to(x_t) for each in beside)], dim=1).to(self.dtype),
            t,
            encoder_hidden_states=condition.context.to(self.dtype),
            class_labels=condition.time.to(self.dtype),
            return_dict=False,
        )[0]


class GLIDE(_TextConditioned):
    """Noised pictures and captions in, a prediction of the noise out: a decoder without CLIP (2.3).

    Arguments (all stored in config.json):
        resolution: side of the square pictures in pixels.
        unet_config: arguments of diffusers' UNet2DConditionModel; channels, context width and the kind of time
            conditioning are filled in.
        text_config: vocab_size, context_length, width, layers and heads of the text transformer.
        inpaint: four more input channels show the known part of a picture whose holes are to be filled (2.4).
        learned_variance: it also answers the variance's place in its range (2102.09672, 3.1).
        prediction_type, beta_schedule, num_train_timesteps: diffusers' names.
    """

    reads_image = False  # a protocol of decoders: no image embedding, so no prior and no mode but "caption"
    null_picture = False
    clamp = 1.0

    @register_to_config
    def __init__(
        self,
        resolution: int,
        unet_config: dict[str, Any],
        text_config: dict[str, Any],
        inpaint: bool = False,
        learned_variance: bool = True,
        prediction_type: str = "epsilon",
        beta_schedule: str = "squaredcos_cap_v2",
        num_train_timesteps: int = 1000,
    ) -> None:
        super().__init__()
        self._build(text_config, unet_config, 7 if inpaint else 3, resolution)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the noise that a drawing begins with: the picture's own."""
        return 3, self.config.resolution, self.config.resolution

    @property
    def resolution_of_pixels(self) -> int:
        """Side of the drawn picture in pixels."""
        return int(self.config.resolution)

    def to_pixels(self, x_0: Tensor) -> Tensor:
        """x_0 (B, 3, H, W) -> pixels (B, 3, H, W) in [0, 1]."""
        return signed_to_unit(x_0).clamp(0, 1)

    @apply_forward_hook
    def denoise(self, x_t: Tensor, t: Tensor, condition: DecoderCondition) -> Tensor:
        """x_t (B, 3, H, W), t (B,) or scalar -> the noise (B, 3, H, W), or (B, 6, H, W) with learned variance."""
        return self._answer(x_t, t, condition)

    def forward(self, x_t: Tensor, t: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """One training pass: ids and mask (B, L) from `tokenize`."""
        text = self.text(ids, mask)
        return self.denoise(x_t, t, self.condition(None, text.embedding, text.states, text.mask))


class GLIDEUpsampler(_TextConditioned):
    """A noised large picture beside a small one, and the caption -> a prediction of the noise (2112.10741, 4).

    Arguments as GLIDE's, and:
        factor: between the sides of the large picture and the small one.
        num_inference_steps: 27, for which the reference has a list of its own (see `Fast27DDIMScheduler`).
        noise_temperature: factor of the noise that a drawing begins with; 1 is sharper and grainier.
    """

    reads_text = True

    @register_to_config
    def __init__(
        self,
        resolution: int,
        unet_config: dict[str, Any],
        text_config: dict[str, Any],
        inpaint: bool = False,
        factor: int = 4,
        learned_variance: bool = True,
        prediction_type: str = "epsilon",
        beta_schedule: str = "linear",
        num_train_timesteps: int = 1000,
        num_inference_steps: int = 27,
        noise_temperature: float = 0.997,
    ) -> None:
        super().__init__()
        self._build(text_config, unet_config, 10 if inpaint else 6, resolution)

    @property
    def multiple(self) -> int:
        """Sides of the large picture must be multiples of this."""
        halvings = len(self.config.unet_config["block_out_channels"]) - 1
        return math.lcm(2**halvings, self.config.factor)

    def scheduler(self) -> SchedulerMixin:
        """The reference's: DDIM, or for filling holes DDPM, through the time steps that it calls "fast27"."""
        kind = Fast27DDPMScheduler if self.fills else Fast27DDIMScheduler
        variance = {"variance_type": "learned_range" if self.config.learned_variance else "fixed_small"}
        return kind(
            num_train_timesteps=self.config.num_train_timesteps,
            beta_schedule=self.config.beta_schedule,
            prediction_type=self.config.prediction_type,
            clip_sample=False,
            timestep_spacing="linspace",
            **(variance if self.fills else {}),
        )

    def enlarge(self, low: Tensor) -> Tensor:
        """(B, 3, h, w) -> (B, 3, f h, f w), bilinear."""
        height, width = (side * self.config.factor for side in low.shape[-2:])
        return resize(low, (height, width), mode="bilinear")

    def shown(self, low: Tensor) -> Tensor:
        """A small picture (B, 3, h, w) in [0, 1] as the network was trained to see it: in steps of 8 bits."""
        return (low * 255).round() / 255

    @apply_forward_hook
    def denoise(self, x_t: Tensor, t: Tensor, low: Tensor, condition: DecoderCondition) -> Tensor:
        """x_t (B, 3, H, W) and low, both signed, t (B,) or scalar -> prediction (B, 6, H, W).

        low: the small picture (B, 3, h, w), or what `enlarge` made of it, which is the same at all steps.
        """
        if low.shape[-2:] != x_t.shape[-2:]:
            low = self.enlarge(low)
        if low.shape != x_t.shape or any(side % self.multiple for side in x_t.shape[-2:]):
            raise InputError(
                f"a picture {list(x_t.shape)} and an enlarged one {list(low.shape)} do not fit; both must have the "
                f"same sides, multiples of {self.multiple}."
            )
        return self._answer(x_t, t, condition, low)

    @torch.no_grad()
    def upsample(
        self,
        pixels: Tensor,
        seeds: Sequence[int],
        num_inference_steps: int | None = None,
        scheduler: str | SchedulerMixin | None = None,
        callback: Callable[[Step], None] | None = None,
        text: GLIDEText | None = None,
        kept_pixels: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> Tensor:
        """Small pictures (R, 3, h, w) in [0, 1] -> (R, 3, f h, f w) in [0, 1].

        Args:
            seeds: one per picture, which depends on its own alone.
            num_inference_steps, scheduler: None: those that it was made for. callback: called after every step.
            text: what `encode_text` says of the captions, R rows or one for all; None: the empty caption.
            kept_pixels, kept: as `condition` takes them, of the large picture.
        Raises InputError for other shapes or another number of seeds, FloatingPointError where a prediction is not
        finite.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
            raise InputError(f"float pixels (R, 3, h, w) are needed, got {pixels.dtype} {list(pixels.shape)}.")
        if len(seeds) != len(pixels):
            raise InputError(f"{len(pixels)} pictures need as many seeds, got {len(seeds)}.")
        said = self.encode_text([""]) if text is None else text
        rows = [each.expand(len(pixels), *each.shape[1:]) for each in (said.embedding, said.states, said.mask)]
        condition = self.condition(None, *rows, kept_pixels=kept_pixels, kept=kept)
        low = self.enlarge(unit_to_signed(self.shown(pixels.float())))
        noise = noise_of(seeds, low.shape[1:], UPSAMPLER).to(low) * self.config.noise_temperature
        x_0 = denoise(
            lambda x_t, t: self.denoise(x_t, t, low, condition),
            scheduler_for(self.scheduler() if scheduler is None else scheduler, self),
            noise,
            self.config.num_inference_steps if num_inference_steps is None else num_inference_steps,
            clamp=1.0,
            known=condition.known,
            seeds=seeds,
            stream=UPSAMPLER,
            callback=callback,
            stage="upsampler 1",
        )
        return signed_to_unit(x_0)

    def forward(self, x_t: Tensor, t: Tensor, low: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """One training pass: ids and mask (B, L) from `tokenize`."""
        text = self.text(ids, mask)
        return self.denoise(x_t, t, low, self.condition(None, text.embedding, text.states, text.mask))
