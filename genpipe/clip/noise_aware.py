"""The CLIP that knows how noisy a picture is, for guiding diffusion by its gradient (GLIDE, 2112.10741, 2.3 and 3.4).

Legend: B pictures or texts, D embedding width, L context length, W width of a tower, P patches, T training steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from einops import rearrange
from torch import Tensor, nn

from genpipe.clip.model import ImageEncoding, TextEncoding
from genpipe.clip.tokenizer import OpenClipTokenizer
from genpipe.errors import InputError
from genpipe.parts import OwnsTokenizer
from genpipe.tokenizer import TokenBatch

# Of 0..255, as the published one was trained; 255 times CLIP's own.
GLIDE_MEAN = (122.77093945, 116.74601272, 104.09373519)
GLIDE_STD = (68.50053285, 66.63215831, 70.32316309)


class NoiseAwareCLIP(OwnsTokenizer, ModelMixin, ConfigMixin):
    """Noised pictures with their time step, and texts -> embeddings to be compared by their cosine.

    Arguments (all stored in config.json); as they stand here those of the published one:
        image_size, patch_size: sides in pixels. image_width, image_layers, text_width, text_layers: of the towers.
        head_width: of every attention head. embed_dim: D. vocab_size, context_length: of the texts.
        num_train_timesteps, beta_schedule: of the diffusion whose pictures it sees; t are steps of it.
        image_mean, image_std: per channel, on the 0..255 scale.
        logit_scale: factor of the cosine, fixed.
        tokenizer_name: open_clip's name of a model with the same tokenizer; its ids are less than vocab_size.
    """

    @register_to_config
    def __init__(
        self,
        image_size: int = 64,
        patch_size: int = 4,
        image_width: int = 768,
        image_layers: int = 12,
        text_width: int = 512,
        text_layers: int = 12,
        head_width: int = 64,
        embed_dim: int = 512,
        vocab_size: int = 65536,
        context_length: int = 77,
        num_train_timesteps: int = 1000,
        beta_schedule: str = "squaredcos_cap_v2",
        image_mean: Sequence[float] = GLIDE_MEAN,
        image_std: Sequence[float] = GLIDE_STD,
        logit_scale: float = 100.0,
        tokenizer_name: str = "ViT-B-32",
    ) -> None:
        super().__init__()
        if image_size % patch_size or image_width % head_width or text_width % head_width:
            raise InputError(
                f"a picture of {image_size} pixels must be whole patches of {patch_size}, and the widths {image_width} "
                f"and {text_width} whole heads of {head_width}."
            )
        self.register_to_config(image_mean=list(image_mean), image_std=list(image_std))
        self.image = _ImageTower(
            num_train_timesteps, (image_size // patch_size) ** 2, patch_size, image_width, image_layers, head_width,
            embed_dim,
        )  # fmt: skip
        self.text = _TextTower(vocab_size, context_length, text_width, text_layers, head_width, embed_dim)

    @property
    def embedding_dim(self) -> int:
        """D."""
        return int(self.config.embed_dim)

    @property
    def context_length(self) -> int:
        """L, start and end token included."""
        return int(self.config.context_length)

    def named_tokenizer(self, name: str) -> OpenClipTokenizer:
        """open_clip's tokenizer for the model `name`."""
        return OpenClipTokenizer(name)

    def tokenize(self, texts: str | Sequence[str]) -> TokenBatch:
        """Texts -> ids and mask (B, L); that a text is too long is said once."""
        return self.tokenizer(texts, self.context_length)

    @apply_forward_hook
    def encode_text(self, texts: str | Sequence[str] | TokenBatch) -> TextEncoding:
        """Texts, or ids made by `tokenize`, -> TextEncoding on the model's device."""
        batch = (texts if isinstance(texts, TokenBatch) else self.tokenize(texts)).to(self.device)
        embedding, states = self.text(batch.ids, batch.mask.sum(dim=1) - 1)
        return TextEncoding(embedding, states, batch.mask)

    @apply_forward_hook
    def encode_image(self, pixels: Tensor, t: Tensor | int = 0) -> ImageEncoding:
        """Noised pixels (B, 3, H, W), [0, 1] when clean, t (B,) or scalar -> ImageEncoding without states.

        Differentiable in the pixels, which may lie far outside [0, 1]: they are x_t, moved from [-1, 1]. t: whole
        steps of the training; others are rounded. Raises InputError for another size and for steps out of range.
        """
        size, last = self.config.image_size, self.config.num_train_timesteps - 1
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, size, size):
            raise InputError(f"this CLIP sees pixels (B, 3, {size}, {size}), got {list(pixels.shape)}.")
        steps = torch.as_tensor(t, device=self.device).round().long().expand(len(pixels))
        if bool(((steps < 0) | (steps > last)).any()):
            raise InputError(f"a time step of this CLIP lies in 0 to {last}, got {steps.tolist()}.")
        x = pixels.to(self.device) * 255
        mean, std = (x.new_tensor(values)[:, None, None] for values in (self.config.image_mean, self.config.image_std))
        return ImageEncoding(self.image(((x - mean) / std).to(self.dtype), steps), None)

    def forward(self, pixels: Tensor, t: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One training pass -> image embedding (B, D), text embedding (B, D), both of length 1, and the logit scale."""
        image = self.encode_image(pixels, t).normalized
        return image, self.encode_text(TokenBatch(ids, mask)).normalized, image.new_tensor(self.config.logit_scale)


class _ImageTower(nn.Module):
    """A ViT whose first position is not a class token but the embedding of the time step; the answer is read there."""

    def __init__(
        self, steps: int, patches: int, patch_size: int, width: int, layers: int, head_width: int, embed_dim: int
    ) -> None:
        super().__init__()
        self.time_embedding = nn.Embedding(steps, width)
        self.patches = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.positional_embedding = nn.Parameter(torch.randn(1 + patches, width) / width**0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.layers = nn.ModuleList(_Layer(width, head_width, causal=False) for _ in range(layers))
        self.ln_post = nn.LayerNorm(width)
        self.projection = nn.Linear(width, embed_dim, bias=False)

    def forward(self, x: Tensor, steps: Tensor) -> Tensor:
        """x (B, 3, H, W) standardised, steps (B,) -> (B, D)."""
        patches = rearrange(self.patches(x), "b w rows columns -> b (rows columns) w")
        h = torch.cat([self.time_embedding(steps)[:, None], patches], dim=1) + self.positional_embedding  # B, 1 + P, W
        h = self.ln_pre(h)
        for layer in self.layers:
            h = layer(h)
        return self.projection(self.ln_post(h[:, 0]))


class _TextTower(nn.Module):
    """CLIP's causal text transformer (2103.00020, 2.4); the answer is read at the end token."""

    def __init__(
        self, vocab_size: int, context_length: int, width: int, layers: int, head_width: int, embed_dim: int
    ) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(context_length, width))
        self.layers = nn.ModuleList(_Layer(width, head_width, causal=True) for _ in range(layers))
        self.ln_post = nn.LayerNorm(width)
        self.projection = nn.Linear(width, embed_dim, bias=False)

    def forward(self, ids: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        """ids (B, L), place of the end token (B,) -> embedding (B, D), states (B, L, W)."""
        h = self.token_embedding(ids) + self.positional_embedding
        for layer in self.layers:
            h = layer(h)
        states = self.ln_post(h)
        return self.projection(states[torch.arange(len(ids), device=ids.device), ends]), states


class _Layer(nn.Module):
    """Attention without a bias of the keys, and MLP, each behind a layer norm and beside a path around it."""

    def __init__(self, width: int, head_width: int, causal: bool) -> None:
        super().__init__()
        self.head_width, self.causal = head_width, causal
        self.ln_1 = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        x = self.ln_1(h)
        q, k, v = (
            rearrange(projection(x), "b l (heads d) -> b heads l d", d=self.head_width)
            for projection in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        h = h + self.out(rearrange(attended, "b heads l d -> b l (heads d)"))
        return h + self.mlp_out(F.gelu(self.mlp_in(self.ln_2(h))))
