"""VQGAN: pictures <-> grids of code-book indices, a dVAE's place taken by vector quantisation (Esser et al. 2021,
arXiv 2012.09841, 3.1 and A; the f16 shape). Only for running and for training a transformer on its codes: its own
training needs a discriminator and a perceptual loss, which are not here.

Legend: B pictures, H W pixels, h w token grid, N = h w tokens, V codes, D width of a code vector.
"""

import math
from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin, VQModel
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from einops import rearrange
from torch import Tensor

from genpipe.errors import InputError
from genpipe.images import signed_to_unit, unit_to_signed


class VQGAN(ModelMixin, ConfigMixin):
    """Image tokenizer with the interface of DVAE: `encode`, `decode`, `factor`, `grid_size`, `num_codes`, `codebook`.

    Args:
        resolution: side of the native picture in pixels; other multiples of the factor work too.
        num_codes: V.
        code_width: D.
        latent_channels: channels of the encoder's output, before the 1x1 convolution to D.
        widths: feature widths of the levels; the sides are halved between two levels.
        blocks_per_level: residual blocks in each level of the encoder; the decoder has one more.
        attention_resolutions: sides, of a native picture's features, at which the levels have self-attention (the
            middle always has).
        norm_groups: of the group norms.

    The encoder pads right and bottom only before it halves the sides (torch convolutions of stride 2 without padding).
    Raises InputError for sizes that do not fit.
    """

    @register_to_config
    def __init__(
        self,
        resolution: int = 256,
        num_codes: int = 16384,
        code_width: int = 256,
        latent_channels: int = 256,
        widths: Sequence[int] = (128, 128, 256, 256, 512),
        blocks_per_level: int = 2,
        attention_resolutions: Sequence[int] = (16,),
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        widths = tuple(widths)
        self.factor = 2 ** (len(widths) - 1)
        if resolution % self.factor:
            raise InputError(f"resolution {resolution} is not a multiple of the factor {self.factor}.")
        if any(width % norm_groups for width in widths):
            raise InputError(f"widths {list(widths)} are not all multiples of norm_groups {norm_groups}.")
        attends = [resolution // 2**level in attention_resolutions for level in range(len(widths))]
        self.autoencoder = VQModel(
            down_block_types=tuple("AttnDownEncoderBlock2D" if here else "DownEncoderBlock2D" for here in attends),
            up_block_types=tuple("AttnUpDecoderBlock2D" if here else "UpDecoderBlock2D" for here in attends[::-1]),
            block_out_channels=widths,
            layers_per_block=blocks_per_level,
            latent_channels=latent_channels,
            num_vq_embeddings=num_codes,
            vq_embed_dim=code_width,
            norm_num_groups=norm_groups,
        )

    @property
    def grid_size(self) -> int:
        """Tokens per side of a picture at the native resolution."""
        return self.config.resolution // self.factor

    @property
    def num_codes(self) -> int:
        return self.config.num_codes

    @property
    def codebook(self) -> Tensor:
        """Code vectors e (V, D)."""
        return self.autoencoder.quantize.embedding.weight

    @apply_forward_hook
    def encode_features(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [0, 1] -> z (B, D, h, w), what is compared with the code vectors."""
        if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.shape[2] % self.factor or pixels.shape[3] % self.factor:
            raise InputError(
                f"pixels have shape {tuple(pixels.shape)}; (B, 3, H, W), sides divisible by {self.factor}, is needed."
            )
        return self.autoencoder.encode(unit_to_signed(pixels).to(self.codebook.dtype)).latents

    @apply_forward_hook
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [0, 1] -> image tokens (B, N) int64: argmin_v |z - e_v| of each cell, raster order."""
        z = rearrange(self.encode_features(pixels), "b d h w -> b (h w) d")
        return nearest_codes(z, self.codebook)

    @apply_forward_hook
    def decode(self, image_tokens: Tensor) -> Tensor:
        """Image tokens (B, N) in [0, V) of a square grid -> pixels (B, 3, H, W) in [0, 1].

        Raises InputError where the tokens form no square grid.
        """
        side = math.isqrt(image_tokens.shape[-1])
        if image_tokens.ndim != 2 or side * side != image_tokens.shape[1]:
            raise InputError(f"image tokens of shape {tuple(image_tokens.shape)} do not form square grids (B, N).")
        vectors = rearrange(self.codebook[image_tokens], "b (h w) d -> b d h w", h=side)
        signed = self.autoencoder.decode(vectors, force_not_quantize=True).sample
        return signed_to_unit(signed.float()).clamp(0, 1)


def nearest_codes(z: Tensor, codebook: Tensor) -> Tensor:
    """argmin_v |z - e_v|^2 over the code book e (V, D), for z (B, N, D) -> (B, N) int64 (2012.09841, equation 2).

    In float32 whatever the autocast and the weights' type; |z|^2 is left out, as it moves no minimum.
    """
    with torch.autocast(z.device.type, enabled=False):
        z, e = z.float(), codebook.float()
        distance = e.square().sum(dim=1) - 2 * z @ e.T  # B, N, V
        return distance.argmin(dim=-1)
