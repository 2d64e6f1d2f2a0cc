"""A decoder of DALL-E 2 (2204.06125, 2.1) that draws in the latent space of an autoencoder (2112.10752): Kandinsky's.

Legend: B pictures, D CLIP width, C h w of the latents, H W pixels, f = H / h the autoencoder's stride.
"""

from __future__ import annotations

from typing import Any

from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel, VQModel
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from genpipe.dalle2.losses import PREDICTION_TYPES
from genpipe.errors import InputError
from genpipe.images import signed_to_unit


class LatentDecoder(ModelMixin, ConfigMixin):
    """Noised latents and a CLIP image embedding in, a prediction and the variance's place in its range out.

    The image embedding enters twice, as in the paper: added to the time embedding, and as extra tokens that are the
    UNet's whole context; it reads no text. What guidance leads away from is the embedding of a mean-coloured picture.

    Arguments (all stored in config.json):
        resolution: side of the square pictures in pixels.
        clip_width: D, of the CLIP whose embeddings the decoder reads, as they come from it.
        unet_config: arguments of diffusers' UNet2DConditionModel; sizes, channels and conditioning are filled in.
        movq_config: arguments of diffusers' VQModel, whose latents are drawn and not quantised (MoVQ, 2209.09002).
        prediction_type: "epsilon" (Kandinsky's), "sample" or "v_prediction".
        learned_variance: whether the second half of the UNet's answer is used by stochastic schedulers.
        beta_schedule, beta_start, beta_end, num_train_timesteps: of the noise, by diffusers' names.
        clip_identity: `genpipe.identity.weights_identity` of the CLIP it was trained beside; None: unknown.
    Raises InputError for sizes that do not fit.
    """

    reads_image = True  # these three: see pipelines.protocols
    null_picture = True
    fills = False

    @register_to_config
    def __init__(
        self,
        resolution: int,
        clip_width: int,
        unet_config: dict[str, Any],
        movq_config: dict[str, Any],
        prediction_type: str = "epsilon",
        learned_variance: bool = False,
        beta_schedule: str = "linear",
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        num_train_timesteps: int = 1000,
        clip_identity: str | None = None,
    ) -> None:
        super().__init__()
        if prediction_type not in PREDICTION_TYPES:
            raise InputError(f"prediction_type must be one of {PREDICTION_TYPES}, not {prediction_type!r}.")
        self.movq = VQModel(**movq_config)
        multiple = self.stride * 2 ** (len(unet_config["block_out_channels"]) - 1)
        if resolution < 1 or resolution % multiple:
            raise InputError(
                f"this latent decoder needs a resolution that is a multiple of {multiple}, not {resolution}."
            )
        channels = self.movq.config.latent_channels
        self.unet = UNet2DConditionModel(
            **unet_config,
            sample_size=resolution // self.stride,
            in_channels=channels,
            out_channels=2 * channels,
            encoder_hid_dim=clip_width,
            encoder_hid_dim_type="image_proj",
            addition_embed_type="image",
        )

    @property
    def stride(self) -> int:
        """f."""
        return 2 ** (len(self.movq.config.block_out_channels) - 1)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of what is denoised."""
        side = self.config.resolution // self.stride
        return (self.movq.config.latent_channels, side, side)

    @property
    def resolution_of_pixels(self) -> int:
        """Side of the drawn pictures."""
        return self.config.resolution

    @property
    def clamp(self) -> None:
        """Latents have no limit."""
        return None

    @apply_forward_hook
    def to_pixels(self, x_0: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> pixels (B, 3, H, W) in [0, 1], float32."""
        drawn = self.movq.decode(x_0.to(self.dtype), force_not_quantize=True, return_dict=False)[0]
        return signed_to_unit(drawn.float()).clamp(0, 1)

    @apply_forward_hook
    def condition(
        self, image_embedding: Tensor | None, text_embedding: Tensor, text_states: Tensor, text_mask: Tensor
    ) -> Tensor:
        """Image embeddings (B, D), as CLIP or the prior gives them -> what `denoise` takes; texts are not looked at.

        Raises InputError without image embeddings.
        """
        if image_embedding is None:
            raise InputError(
                "this decoder draws from image embeddings alone; where there is none, give it CLIP's embedding of a "
                "mean-coloured picture."
            )
        return image_embedding.to(self.dtype)

    @apply_forward_hook
    def denoise(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """x_t (B, C, h, w), t (B,) or scalar -> (B, 2 C, h, w): the prediction, and the variance's place."""
        return self.unet(
            x_t.to(self.dtype),
            t,
            encoder_hidden_states=None,
            added_cond_kwargs={"image_embeds": condition},
            return_dict=False,
        )[0]

    def forward(self, x_t: Tensor, t: Tensor, image_embedding: Tensor) -> Tensor:
        """One training pass: see `denoise`."""
        return self.denoise(x_t, t, image_embedding.to(self.dtype))
