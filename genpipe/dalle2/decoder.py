"""The decoder of DALL-E 2 (2204.06125, 2.1): a GLIDE-like diffusion UNet that draws the picture of a CLIP embedding.

Legend: B pictures, C channels, H W pixels, D CLIP width, W width of CLIP's text states, L text positions, K extra
context tokens, X width of the context, E width of the time embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from einops import rearrange
from torch import Tensor, nn

from genpipe.dalle2.losses import PREDICTION_TYPES
from genpipe.errors import InputError
from genpipe.images import signed_to_unit

EMBEDDING_SCALES = ("unit", "raw")


@dataclass(frozen=True)
class DecoderCondition:
    """What the UNet is conditioned on, constant over the steps of a drawing: see `Decoder.condition`.

    time: added to the time embedding (B, E); context (B, K + L, X); mask of the context, True where it counts.
    """

    time: Tensor
    context: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return len(self.time)


class Decoder(ModelMixin, ConfigMixin):
    """Noised pictures and CLIP's embeddings in, a prediction of the noise, of x_0 or of v out.

    The image embedding enters twice: projected and added to the time embedding, and projected to K extra tokens beside
    the text states (2.1). CLIP's own text states and pooled text embedding stand in for GLIDE's text encoder.

    Arguments (all stored in config.json):
        resolution: side of the square pictures in pixels.
        clip_width: D; text_width: W, of the CLIP whose embeddings the decoder reads.
        unet_config: arguments of diffusers' UNet2DConditionModel; channels, context width and the kind of time
            conditioning are filled in.
        num_context_tokens: K, 4 in the paper.
        patch_size: pixels are folded into channels by blocks of this side before the UNet (1 in the paper).
        context_width: X; None is W.
        prediction_type: "epsilon" (as in the paper), "sample" or "v_prediction".
        learned_variance: the UNet also answers the variance's place in its range (2102.09672, 3.1; as in the paper).
        beta_schedule, num_train_timesteps: diffusers' names; "squaredcos_cap_v2" is the cosine schedule.
        embedding_scale: what is done to CLIP's embeddings: "unit" brings every vector to length sqrt(D), "raw" leaves
            them as CLIP gives them.
        clip_identity: `genpipe.identity.weights_identity` of the CLIP it was trained beside; None: unknown.
    Raises InputError for sizes that do not fit.
    """

    # What a pipeline asks of any decoder, see pipelines.protocols.
    reads_image, null_picture, fills = True, False, False

    @register_to_config
    def __init__(
        self,
        resolution: int,
        clip_width: int,
        text_width: int,
        unet_config: dict[str, Any],
        num_context_tokens: int = 4,
        patch_size: int = 1,
        context_width: int | None = None,
        prediction_type: str = "epsilon",
        learned_variance: bool = False,
        beta_schedule: str = "squaredcos_cap_v2",
        num_train_timesteps: int = 1000,
        embedding_scale: str = "unit",
        clip_identity: str | None = None,
    ) -> None:
        super().__init__()
        if prediction_type not in PREDICTION_TYPES or embedding_scale not in EMBEDDING_SCALES:
            raise InputError(
                f"prediction_type must be one of {PREDICTION_TYPES} and embedding_scale one of {EMBEDDING_SCALES}, "
                f"not {prediction_type!r} and {embedding_scale!r}."
            )
        halvings = len(unet_config["block_out_channels"]) - 1
        if resolution % (patch_size * 2**halvings):
            raise InputError(
                f"a decoder of {halvings + 1} levels and patch size {patch_size} needs a resolution that is a multiple "
                f"of {patch_size * 2**halvings}, not {resolution}."
            )
        channels, context_width = 3 * patch_size**2, context_width or text_width
        self.unet = UNet2DConditionModel(
            **unet_config,
            sample_size=resolution // patch_size,
            in_channels=channels,
            out_channels=channels * (2 if learned_variance else 1),
            cross_attention_dim=context_width,
            class_embed_type="identity",
        )
        time_width = self.unet.time_embedding.linear_2.out_features
        self.image_to_time = nn.Linear(clip_width, time_width)
        self.text_to_time = nn.Linear(clip_width, time_width)
        self.image_to_context = nn.Linear(clip_width, num_context_tokens * context_width)
        self.text_to_context = nn.Linear(text_width, context_width)
        self.text_norm = nn.LayerNorm(context_width)
        self.null_image_embedding = nn.Parameter(torch.zeros(clip_width))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of what is denoised: the picture itself."""
        return (3, self.config.resolution, self.config.resolution)

    @property
    def resolution_of_pixels(self) -> int:
        """Side of the drawn pictures."""
        return self.config.resolution

    @property
    def clamp(self) -> float:
        """Largest absolute value of x_0."""
        return 1.0

    def to_pixels(self, x_0: Tensor) -> Tensor:
        """What was denoised (R, 3, H, W) -> pixels (R, 3, H, W) in [0, 1]."""
        return signed_to_unit(x_0).clamp(0, 1)

    def scaled(self, embedding: Tensor) -> Tensor:
        """CLIP's embedding (B, D) as this decoder takes it, see `embedding_scale`."""
        if self.config.embedding_scale == "raw":
            return embedding
        return F.normalize(embedding.float(), dim=-1) * self.config.clip_width**0.5

    @apply_forward_hook
    def condition(
        self,
        image_embedding: Tensor | None,
        text_embedding: Tensor,
        text_states: Tensor,
        text_mask: Tensor,
        image_kept: Tensor | None = None,
    ) -> DecoderCondition:
        """Embeddings and text states -> what the UNet is conditioned on.

        Args:
            image_embedding: (B, D) as CLIP or the prior gives it; None: the null embedding for every row.
            text_embedding (B, D), text_states (B, L, W), text_mask (B, L): of the captions; those of the empty caption
                where the text is dropped.
            image_kept: (B,) bool, False where the image embedding is dropped; None keeps all of them.
        """
        rows, dtype = len(text_embedding), self.image_to_time.weight.dtype
        null = self.null_image_embedding.expand(rows, -1)
        image = null if image_embedding is None else self.scaled(image_embedding).to(dtype)
        if image_embedding is not None and image_kept is not None:
            image = torch.where(image_kept[:, None], image, null)
        time = self.image_to_time(image) + self.text_to_time(self.scaled(text_embedding).to(dtype))  # B, E
        # Width first, tokens last: the order in which Karlo's weights have it.
        extra = rearrange(self.image_to_context(image), "b (x k) -> b k x", k=self.config.num_context_tokens)
        text = self.text_norm(self.text_to_context(text_states.to(dtype)))  # B, L, X
        mask = F.pad(text_mask.bool(), (self.config.num_context_tokens, 0), value=True)  # B, K + L
        return DecoderCondition(time, torch.cat([extra, text], dim=1), mask)

    @apply_forward_hook
    def denoise(self, x_t: Tensor, t: Tensor, condition: DecoderCondition) -> Tensor:
        """x_t (B, 3, H, W), t (B,) or scalar -> prediction (B, 3, H, W), or (B, 6, H, W) with learned variance."""
        patch = self.config.patch_size
        x = rearrange(x_t, "b c (h p) (w q) -> b (c p q) h w", p=patch, q=patch)
        context, mask = self._unambiguous(condition, *x.shape[-2:])
        output = self.unet(
            x.to(self.dtype),
            t,
            encoder_hidden_states=context,
            class_labels=condition.time,
            attention_mask=mask,
            return_dict=False,
        )[0]
        return rearrange(output, "b (c p q) h w -> b c (h p) (w q)", p=patch, q=patch)

    def _unambiguous(self, condition: DecoderCondition, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Context and mask, one masked position longer where they would be as long as some level has pixels.

        diffusers completes the mask of the context by the pixels of each level, but takes a mask that is as long as
        those for a complete one.
        """
        context, mask = condition.context, condition.mask
        pixels = {-(-height // 2**level) * -(-width // 2**level) for level in range(len(self.unet.down_blocks))}
        while mask.shape[1] in pixels:
            context, mask = F.pad(context, (0, 0, 0, 1)), F.pad(mask, (0, 1), value=False)
        return context, mask

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        image_embedding: Tensor | None,
        text_embedding: Tensor,
        text_states: Tensor,
        text_mask: Tensor,
        image_kept: Tensor | None = None,
    ) -> Tensor:
        """One training pass: see `condition` and `denoise`."""
        condition = self.condition(image_embedding, text_embedding, text_states, text_mask, image_kept)
        return self.denoise(x_t, t, condition)
