"""What leads a drawing of DALL-E 2 beside its caption: a CLIP that knows noise, and the part of a picture that is kept.

(GLIDE, 2112.10741, 2.3 and 2.4.) Legend: B prompts, R rows, D width of that CLIP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from genpipe.clip.noise_aware import NoiseAwareCLIP
from genpipe.dalle2.guidance import clip_gradient
from genpipe.errors import InputError
from genpipe.images import resize, signed_to_unit, to_unit
from pipelines.encoding import read_texts
from pipelines.protocols import PictureDecoder


@dataclass(frozen=True)
class Filling:
    """A picture, cut to the square in its middle, whose holes are filled.

    pixels: (1, 3, S, S) in [0, 1]. kept: (1, 1, s, s) bool at the decoder's resolution, False in the holes.
    """

    pixels: Tensor
    kept: Tensor

    @classmethod
    def of(cls, image: Image.Image, fill: Image.Image, side: int) -> Filling:
        """The picture and its mask, white where it is to be drawn anew, for a decoder of this resolution.

        A pixel of the decoder is kept where it lies wholly outside the holes. Raises InputError for a mask of another
        size than the picture's, and for one without holes.
        """
        if image.size != fill.size:
            raise InputError(
                f"The mask has {fill.width}x{fill.height} pixels, the picture {image.width}x{image.height}; both need "
                "the same size."
            )
        holes = to_unit([_squared(fill.convert("L").convert("RGB"))])[:, :1] >= 0.5
        touched = F.adaptive_max_pool2d(holes.float(), side) > 0
        if not bool(touched.any()):
            raise InputError("The mask is nowhere white, so nothing of the picture is to be filled; paint the holes.")
        return cls(to_unit([_squared(image.convert("RGB"))]), ~touched)

    def at(self, side: int, device: torch.device) -> dict[str, Tensor]:
        """What `condition` of a decoder or an upsampler takes, for pictures of this side."""
        kept = F.interpolate(self.kept.float(), size=(side, side), mode="nearest") > 0
        pixels = resize(self.pixels, side, clamp=True)
        return {"kept_pixels": pixels.to(device), "kept": kept.to(device)}


@dataclass(frozen=True)
class Steering:
    """filling: None where a whole picture is drawn. texts: (B, D) of the guide, None where it does not guide."""

    filling: Filling | None = None
    guide: NoiseAwareCLIP | None = None
    texts: Tensor | None = None
    scale: float = 0.0

    @classmethod
    def of(
        cls, guide: NoiseAwareCLIP | None, prompts: Sequence[str], scale: float, filling: Filling | None
    ) -> Steering:
        """What leads a call. scale: of the guide's gradient, 0: it is not asked."""
        if guide is None or scale == 0:
            return cls(filling)
        return cls(filling, guide, read_texts(guide, prompts).embedding, scale)

    def gradient(self, prompts: Sequence[int]) -> Callable[[Tensor, Tensor], Tensor] | None:
        """For the rows of a block, each of one of the prompts; see `genpipe.dalle2.sampling.denoise`."""
        if self.guide is None or self.texts is None:
            return None
        guide: Any = self.guide
        return clip_gradient(
            lambda x_t, t: guide.encode_image(signed_to_unit(x_t), t).embedding,
            self.texts[list(prompts)],
            self.scale * guide.config.logit_scale,
        )


def check_guide(guide: NoiseAwareCLIP, decoder: PictureDecoder) -> None:
    """Raises InputError for a guide that was trained on other pictures or other noise than the decoder draws with."""
    side = guide.config.image_size
    if decoder.latent_shape != (3, side, side):
        raise InputError(f"The guide sees pixels {side}x{side}, the decoder denoises {list(decoder.latent_shape)}.")
    for name in ("num_train_timesteps", "beta_schedule"):
        if guide.config[name] != decoder.config[name]:
            raise InputError(
                f"The guide was trained with {name} {guide.config[name]!r}, the decoder with {decoder.config[name]!r}; "
                "take both from one family."
            )


def check_filling(image: Any, fill: Any, decoder: PictureDecoder) -> None:
    """Raises InputError for a mask without a picture, or for a decoder that cannot fill holes."""
    if not isinstance(image, Image.Image) or not isinstance(fill, Image.Image):
        raise InputError("To fill holes takes a picture, and a mask that is white where it is to be drawn anew.")
    if not decoder.fills:
        raise InputError("These weights cannot fill holes of a picture; take those of GLIDE for inpainting.")


def _squared(picture: Image.Image) -> Image.Image:
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side))
