"""CLIP (arXiv 2103.00020, section 2): open_clip's two towers, the tokenizer, and everything needed to use them rightly.

Legend: B pictures or texts, D embedding width, L context length, W tower width, P patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from einops import rearrange
from torch import nn

from genpipe.clip.architecture import explicit_architecture, pretrained_entry, published_config
from genpipe.clip.tokenizer import OpenClipTokenizer
from genpipe.clip.towers import build_towers, pool_text
from genpipe.errors import InputError
from genpipe.images import resize
from genpipe.parts import OwnsTokenizer
from genpipe.tokenizer import CaptionTokenizer, TokenBatch

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
RESIZE_MODES = ("shortest", "squash")
INTERPOLATIONS = ("bicubic", "bilinear")


@dataclass(frozen=True)
class _Encoding:
    embedding: torch.Tensor
    token_states: torch.Tensor | None

    @property
    def normalized(self) -> torch.Tensor:
        """The embedding (B, D) in float32, divided by its L2 norm."""
        return F.normalize(self.embedding.float(), dim=-1)

    @property
    def states(self) -> torch.Tensor:
        """The states of every token or patch; InputError if this kind of tower has none."""
        if self.token_states is None:
            raise InputError("this CLIP's tower has no token states; choose a model with a transformer tower.")
        return self.token_states


@dataclass(frozen=True)
class TextEncoding(_Encoding):
    """embedding (B, D), projected, NOT normalised; states (B, L, W) after the last layer norm; mask (B, L).

    The mask is True from the start token to the end token; the embedding is read at the end token.
    """

    mask: torch.Tensor


@dataclass(frozen=True)
class ImageEncoding(_Encoding):
    """embedding (B, D), projected, NOT normalised; states (B, P, W), row by row, without the class token.

    For a ViT the states have passed the last layer norm, for a ModifiedResNet they are the last stage's feature map.
    """


class CLIP(OwnsTokenizer, ModelMixin, ConfigMixin):
    """The CLIP of the project: pixels in [0, 1] and texts in, embeddings and states out.

    Arguments (all stored in config.json; nothing is inferred from a name):
        architecture: open_clip model config; image size, activation (quick_gelu) and initial logit scale are inside.
        image_mean, image_std: per channel, on the [0, 1] scale, applied inside encode_image.
        interpolation: bicubic or bilinear, antialiased, for pictures of another size than the architecture's.
        resize_mode: "shortest" (shorter side to size, centre crop) or "squash" (both sides to size).
        max_logit_scale: the learned scale is clipped here (100 in section 2.3).
        tokenizer_name: open_clip's name for the tokenizer; None: the part owns a CaptionTokenizer (tokenizer.json).
        halves: "both", or "text" or "image" for a CLIP with that tower only, as published beside some decoders; the
            other one's config is not looked at, and what needs it raises InputError.

    Raises InputError for a config that open_clip cannot build.
    """

    @register_to_config
    def __init__(
        self,
        architecture: dict[str, Any],
        image_mean: Sequence[float] = OPENAI_MEAN,
        image_std: Sequence[float] = OPENAI_STD,
        interpolation: str = "bicubic",
        resize_mode: str = "shortest",
        max_logit_scale: float = 100.0,
        tokenizer_name: str | None = None,
        halves: str = "both",
    ) -> None:
        super().__init__()
        if resize_mode not in RESIZE_MODES or interpolation not in INTERPOLATIONS:
            raise InputError(
                f"resize_mode must be one of {RESIZE_MODES} and interpolation one of {INTERPOLATIONS}, "
                f"not {resize_mode!r} and {interpolation!r}."
            )
        explicit = explicit_architecture(architecture)
        self.register_to_config(architecture=explicit, image_mean=list(image_mean), image_std=list(image_std))
        self.towers = build_towers(explicit, halves)

    @classmethod
    def from_open_clip(cls, model_name: str, pretrained: str | None = None) -> CLIP:
        """A published architecture, untrained; with `pretrained` (an open_clip tag) its weights, downloaded or cached.

        In eval mode. Raises InputError for unknown names (with near matches) and when the weights cannot be had.
        """
        config = published_config(model_name, pretrained)
        if pretrained is None:
            return cls(**config).eval()
        entry = pretrained_entry(config["tokenizer_name"], pretrained)
        try:
            path = open_clip.download_pretrained(entry)
        except Exception as error:  # network, disk and hub errors have no common base
            reason = " ".join(str(error).split())
            raise InputError(
                f"the weights {pretrained!r} of {model_name!r} could not be downloaded ({reason}); "
                "connect to the network once, or use a family that is on this disk."
            ) from error
        model = cls(**config).eval()
        open_clip.load_checkpoint(model.towers, path, strict=True, weights_only=True)
        return model

    @staticmethod
    def default_config(model_name: str, pretrained: str | None = None) -> dict[str, Any]:
        """The constructor's arguments for an open_clip model name (and weights tag)."""
        return published_config(model_name, pretrained)

    @property
    def logit_scale(self) -> nn.Parameter:
        """Log of the inverse temperature, learned."""
        return self.towers.logit_scale

    @property
    def has_text(self) -> bool:
        """Whether it can embed texts."""
        return self.config["halves"] != "image"

    @property
    def has_image(self) -> bool:
        """Whether it can embed pictures."""
        return self.config["halves"] != "text"

    def _need(self, half: str) -> None:
        """Raise InputError if the tower `half` is left out of this CLIP."""
        if self.config["halves"] not in ("both", half):
            raise InputError(f"this CLIP has no {half} tower; use one that has both, such as ViT-L-14:openai.")

    @property
    def embedding_dim(self) -> int:
        """D."""
        return int(self.config["architecture"]["embed_dim"])

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) that the image tower sees."""
        self._need("image")
        size = self.config["architecture"]["vision_cfg"]["image_size"]
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    @property
    def context_length(self) -> int:
        """L, start and end token included."""
        self._need("text")
        return int(self.config["architecture"]["text_cfg"]["context_length"])

    def check_tokenizer(self, tokenizer: CaptionTokenizer) -> None:
        """Raise InputError if the tokenizer's vocabulary is not the one that the text tower was built for."""
        expected = self.config["architecture"]["text_cfg"]["vocab_size"]
        if tokenizer.vocab_size != expected:
            raise InputError(f"the tokenizer has {tokenizer.vocab_size} entries, this CLIP's text tower {expected}.")

    def named_tokenizer(self, name: str) -> OpenClipTokenizer:
        """open_clip's tokenizer for the model `name`."""
        return OpenClipTokenizer(name)

    def tokenize(self, texts: str | Sequence[str]) -> TokenBatch:
        """Texts -> ids and mask (B, L) with this CLIP's own tokenizer; that a text is too long is said once."""
        return self.tokenizer(texts, self.context_length)

    @apply_forward_hook
    def encode_text(self, texts: str | Sequence[str] | TokenBatch) -> TextEncoding:
        """Texts, or ids made by `tokenize`, -> TextEncoding on the model's device."""
        batch = texts if isinstance(texts, TokenBatch) else self.tokenize(texts)
        embedding, states = self._text(batch.ids)
        return TextEncoding(embedding, states, batch.mask.to(self.device))

    @apply_forward_hook
    def encode_image(self, pixels: torch.Tensor) -> ImageEncoding:
        """Pixels (B, 3, H, W) in [0, 1], any size -> ImageEncoding; differentiable in the pixels."""
        self.check_range(pixels)
        x = self._normalized_pixels(pixels)
        visual = self.towers.visual
        if not hasattr(getattr(visual, "trunk", visual), "forward_intermediates"):
            return ImageEncoding(visual(x), None)
        # The last block's states; the pooled embedding is computed exactly as in visual(x).
        convolutional = isinstance(visual, open_clip.model.ModifiedResNet)
        outputs = visual.forward_intermediates(x, indices=1, normalize_intermediates=not convolutional)
        states = rearrange(outputs["image_intermediates"][-1], "b w rows columns -> b (rows columns) w")
        return ImageEncoding(outputs["image_features"], states)

    @apply_forward_hook
    def embed_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) in [0, 1] -> embedding (B, D), not normalised: encode_image without the states."""
        x = self._normalized_pixels(pixels)
        return self.towers.visual(x)

    @staticmethod
    def check_range(pixels: torch.Tensor) -> None:
        """Raise InputError if pixels lie outside [0, 1], which would give wrong embeddings without another sign."""
        low, high = (float(bound) for bound in pixels.detach().aminmax()) if pixels.numel() else (0.0, 0.0)
        if low < -1e-3 or high > 1 + 1e-3:
            raise InputError(f"CLIP needs pixels in [0, 1], not {low:.3g} to {high:.3g}; convert with genpipe.images.")

    def fit_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) in [0, 1] of any size -> the image tower's size, as the config says; no-op if it fits."""
        if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point() or 0 in pixels.shape[2:]:
            raise InputError(
                f"CLIP needs float pixels (B, 3, H, W) in [0, 1], got {pixels.dtype} of shape {tuple(pixels.shape)}."
            )
        target = self.image_size
        if tuple(pixels.shape[-2:]) == target:
            return pixels
        if self.config["resize_mode"] == "squash":
            return resize(pixels, target, mode=self.config["interpolation"], antialias=True, clamp=True)
        height, width = _cover(pixels.shape[-2], pixels.shape[-1], *target)
        covering = resize(pixels, (height, width), mode=self.config["interpolation"], antialias=True, clamp=True)
        top, left = round((height - target[0]) / 2), round((width - target[1]) / 2)
        return covering[:, :, top : top + target[0], left : left + target[1]]

    def forward(
        self, pixels: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One training pass: pixels (B, 3, H, W) in [0, 1], ids and mask (B, L) from the tokenizer.

        Returns image embedding (B, D), text embedding (B, D), both float32 and normalised, and the logit scale: the
        exponential of the parameter, clipped. With a mask, positions that are padding in every text are not computed.
        """
        if mask is not None and self._may_shorten():
            ids = ids[:, : int(mask.any(dim=0).sum())]
        image_embedding = F.normalize(self.embed_image(pixels).float(), dim=-1)
        text_embedding = F.normalize(self._text(ids)[0].float(), dim=-1)
        return image_embedding, text_embedding, self.clipped_logit_scale()

    def clipped_logit_scale(self) -> torch.Tensor:
        """exp(logit_scale), at most max_logit_scale: a scalar in float32.

        At the limit the gradient passes only if it lowers the scale, so the parameter neither runs away nor gets stuck.
        """
        scale = self.logit_scale.float().exp().reshape(())
        return _AtMost.apply(scale, self.config["max_logit_scale"])

    def _may_shorten(self) -> bool:
        """Whether ids may be shorter than the context: causal attention, and pooling that does not look at the end."""
        text = getattr(self.towers, "text", self.towers)
        pool = getattr(text, "text_pool_type", getattr(text, "pool_type", None))
        plain = hasattr(text, "token_embedding") and getattr(text, "cls_emb", None) is None
        return plain and text.attn_mask is not None and pool in ("argmax", "eos")

    def _text(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Ids (B, L) -> embedding (B, D), states (B, L, W): open_clip's encode_text, keeping what it throws away."""
        self._need("text")
        ids, text = ids.to(self.device), getattr(self.towers, "text", self.towers)
        if not hasattr(text, "token_embedding") or getattr(text, "cls_emb", None) is not None:
            return text(ids), None
        length = ids.shape[1]
        if length != self.context_length and not (length < self.context_length and self._may_shorten()):
            raise InputError(f"CLIP's context has {self.context_length} positions, the ids have {length}.")
        dtype = text.transformer.get_cast_dtype()
        x = text.token_embedding(ids).to(dtype)
        x = x + text.positional_embedding[:length].to(dtype)  # B, L, W
        causal = None if text.attn_mask is None else text.attn_mask[:length, :length]
        states = text.ln_final(text.transformer(x, attn_mask=causal))  # B, L, W
        pooled = pool_text(states, ids, text)  # B, W
        projection = text.text_projection
        if isinstance(projection, nn.Linear):
            return projection(pooled), states
        return (pooled if projection is None else pooled @ projection), states  # B, D

    def _normalized_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels in [0, 1], any size -> what the image tower was trained on, in the weights' type."""
        x = self.fit_pixels(pixels.to(self.device)).float()
        mean = x.new_tensor(self.config["image_mean"])[:, None, None]
        std = x.new_tensor(self.config["image_std"])[:, None, None]
        return ((x - mean) / std).to(self.dtype)


def _cover(height: int, width: int, target_height: int, target_width: int) -> tuple[int, int]:
    """The smallest size of the same aspect that covers the target; rounded down, as torchvision does."""
    if height * target_width <= width * target_height:
        return target_height, max(target_width, width * target_height // height)
    return max(target_height, height * target_width // width), target_width


class _AtMost(torch.autograd.Function):
    """min(value, limit) whose gradient is zero only where it would push the value further above the limit."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, limit: float) -> torch.Tensor:
        ctx.above = value >= limit
        return value.clamp(max=limit)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = gradients
        return torch.where(ctx.above, gradient.clamp(min=0), gradient), None
