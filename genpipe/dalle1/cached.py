"""What DALL-E 1's transformers share: blocks, a preallocated key/value cache, reading a prompt, one token more.

Legend: B rows, L text positions, P prefix (all positions before the first image token), N image tokens, T = P + N - 1
sequence (the last image token is never an input), W width, H heads, D = W / H, V codes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.utils.accelerate_utils import apply_forward_hook
from einops import rearrange
from torch import Tensor, nn

from genpipe.dalle1.masks import causal_mask
from genpipe.errors import InputError
from genpipe.parts import OwnsTokenizer


@dataclass
class KeyValueCache:
    """Keys and values of all layers, (layers, B, H, room, D), filled up to `length` positions."""

    keys: Tensor
    values: Tensor
    length: int

    @property
    def room(self) -> int:
        """Positions that were allocated."""
        return self.keys.shape[3]

    def rows(self, index: Tensor, room: int) -> "KeyValueCache":
        """A new cache with the given rows and room for `room` positions: a prompt's prefill serves all its candidates.

        Only what is filled is copied.
        """
        layers, _, heads, _, head_width = self.keys.shape
        shape = (layers, len(index), heads, room, head_width)
        copy = KeyValueCache(self.keys.new_empty(shape), self.values.new_empty(shape), self.length)
        for layer in range(layers):
            copy.keys[layer, :, :, : self.length] = self.keys[layer, index, :, : self.length]
            copy.values[layer, :, :, : self.length] = self.values[layer, index, :, : self.length]
        return copy


class SeparateQKV(nn.Module):
    """Queries, keys and values by three layers in place of one: weights that were published so stay as they lie."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, W) -> (B, T, 3 W), as a layer of three times the width has it."""
        return torch.cat([self.query(x), self.key(x), self.value(x)], dim=-1)


class Attention(nn.Module):
    """Multi-head self-attention; with a cache it appends its keys and values and looks at all that is there."""

    def __init__(self, width: int, num_heads: int, separate_qkv: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = SeparateQKV(width) if separate_qkv else nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None, cache: KeyValueCache | None = None, layer: int = 0) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b t (three h d) -> three b h t d", three=3, h=self.num_heads)
        if cache is not None:
            start, end = cache.length, cache.length + x.shape[1]
            cache.keys[layer, :, :, start:end] = k
            cache.values[layer, :, :, start:end] = v
            k, v = cache.keys[layer, :, :, :end], cache.values[layer, :, :, :end]
        # mask None: plain causal over a full sequence, for which torch has its fastest kernel
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.out(rearrange(y, "b h t d -> b t (h d)"))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, num_heads: int, dropout: float, separate_qkv: bool = False) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(width)
        self.attention = Attention(width, num_heads, separate_qkv)
        self.norm_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None, cache: KeyValueCache | None = None, layer: int = 0) -> Tensor:
        x = x + self.dropout(self.attention(self.norm_1(x), mask, cache, layer))
        return x + self.dropout(self.mlp(self.norm_2(x)))


class CachedTransformer(OwnsTokenizer):
    """Mixin, placed before ModelMixin, for transformers that continue a text by the image tokens of a picture.

    A subclass has the entries vocab_size, text_length, num_image_tokens, grid_size, width, num_layers and num_heads in
    its config, the modules below, and its own `prefix_length`, `embed_text` and `embed_image`.
    """

    blocks: nn.ModuleList  # of Block
    norm: nn.LayerNorm
    text_head: nn.Linear
    image_head: nn.Linear
    training: bool
    _masks: list[Tensor] | None = None

    @property
    def prefix_length(self) -> int:
        """P: positions before the first image token; at the last of them that token is predicted."""
        raise NotImplementedError

    def embed_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask (B, L) -> (B, P, W)."""
        raise NotImplementedError

    def embed_image(self, image_tokens: Tensor, first: int = 0) -> Tensor:
        """Image tokens (B, n) that stand at raster positions first ... first + n - 1 -> (B, n, W)."""
        raise NotImplementedError

    @property
    def image_length(self) -> int:
        """N, image tokens of a picture."""
        return self.config.grid_size**2

    @property
    def sequence_length(self) -> int:
        """T: the positions that a whole picture takes, all but its last token."""
        return self.prefix_length + self.image_length - 1

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raise InputError if the tokenizer's vocabulary is not the one that the text embedding was built for."""
        if tokenizer.vocab_size != self.config.vocab_size:
            raise InputError(
                f"the tokenizer has {tokenizer.vocab_size} entries, this transformer's text table has "
                f"{self.config.vocab_size}; train the transformer with the tokenizer it is used with."
            )

    def check_ids(self, ids: Tensor) -> None:
        """Raise InputError for ids (B, L) of another length than the one that this transformer reads."""
        if ids.shape[1] != self.config.text_length:
            raise InputError(f"ids have {ids.shape[1]} positions, this transformer reads {self.config.text_length}.")

    def _causal_masks(self) -> list[Tensor]:
        """Boolean masks (T, T) of all layers; layers with equal masks share one tensor."""
        return [causal_mask(self.sequence_length)] * self.config.num_layers

    def _whole_masks(self, device: torch.device) -> Sequence[Tensor | None]:
        """What the blocks take over a full sequence: None, which is plain causal, in every layer."""
        return [None] * len(self.blocks)

    def _layer_masks(self, device: torch.device) -> list[Tensor]:
        """`_causal_masks` on a device, built once for each."""
        if self._masks is None or self._masks[0].device != device:
            masks = self._causal_masks()
            moved = {id(mask): mask.to(device) for mask in masks}
            self._masks = [moved[id(mask)] for mask in masks]
        return self._masks

    def forward(self, ids: Tensor, mask: Tensor, image_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of every next token, for training (2102.12092, 2.2).

        Args: ids, mask (B, L), mask True on real tokens; image_tokens (B, N).
        Returns: text logits (B, L - 1, vocab_size) for ids[:, 1:], image logits (B, N, V) for image_tokens.
        """
        x = torch.cat([self.embed_text(ids, mask), self.embed_image(image_tokens[:, :-1])], dim=1)  # B, T, W
        for block, layer_mask in zip(self.blocks, self._whole_masks(x.device), strict=True):
            x = block(x, layer_mask)
        x = self.norm(x)
        text, image = x[:, : self.config.text_length - 1], x[:, self.prefix_length - 1 :]
        return self.text_head(text), self.image_head(image)

    def empty_cache(self, rows: int, room: int) -> KeyValueCache:
        """A cache of `rows` rows for `room` positions, nothing in it, on the model's device and in its dtype."""
        weight = self.image_head.weight
        heads = self.config.num_heads
        shape = (self.config.num_layers, rows, heads, room, self.config.width // heads)
        return KeyValueCache(weight.new_empty(shape), weight.new_empty(shape), 0)

    def _advance(self, x: Tensor, cache: KeyValueCache) -> Tensor:
        """Run new positions (B, n, W) through all layers and the cache -> image logits after the last one (B, V)."""
        start, end = cache.length, cache.length + x.shape[1]
        if end > min(cache.room, self.sequence_length):
            raise InputError(
                f"position {end} does not fit: the cache has room for {cache.room} (KeyValueCache.rows makes more), a "
                f"whole sequence has {self.sequence_length}."
            )
        for layer, (block, mask) in enumerate(zip(self.blocks, self._layer_masks(x.device), strict=True)):
            x = block(x, mask[start:end, :end], cache, layer)
        cache.length = end
        return self.image_head(self.norm(x[:, -1]))

    @apply_forward_hook
    def prefill(self, ids: Tensor, mask: Tensor, image_prefix: Tensor | None = None) -> tuple[KeyValueCache, Tensor]:
        """Read prompts (B, L), and optionally the first image tokens (B, m) of a given picture, m < N.

        Returns: a cache with room for no more than this, from which `KeyValueCache.rows` makes those of the candidates,
        and the logits (B, V) of the next image token.
        """
        x = self.embed_text(ids, mask)
        if image_prefix is not None:
            x = torch.cat([x, self.embed_image(image_prefix)], dim=1)
        cache = self.empty_cache(len(ids), x.shape[1])
        return cache, self._advance(x, cache)

    @apply_forward_hook
    def decode_next(self, image_tokens: Tensor, cache: KeyValueCache) -> Tensor:
        """Append one image token per row (B,) to the cache, which it fills -> logits (B, V) of the token after it."""
        position = cache.length - self.prefix_length
        return self._advance(self.embed_image(image_tokens[:, None], position), cache)
