"""DALL-E 1's decoder-only transformer over text and image tokens (2102.12092, 2.2 and B), with a preallocated cache.

The sequence: text ids (start, words, end, then a learned padding embedding per text position), start-of-image, image
tokens. Text and image have separate output heads, which is the joint vocabulary with the impossible half masked out.

Legend: B rows, L text positions, P = L + 1 prefix (text, start-of-image), N image tokens, T = P + N - 1 sequence (the
last image token is never an input), W width, H heads, D = W / H, V codes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from genpipe.dalle1.masks import causal_mask, layer_masks
from genpipe.errors import InputError
from genpipe.parts import OwnsTokenizer
from genpipe.tokenizer import CaptionTokenizer


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


class Attention(nn.Module):
    """Multi-head self-attention; with a cache it appends its keys and values and looks at all that is there."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
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

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(width)
        self.attention = Attention(width, num_heads)
        self.norm_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None, cache: KeyValueCache | None = None, layer: int = 0) -> Tensor:
        x = x + self.dropout(self.attention(self.norm_1(x), mask, cache, layer))
        return x + self.dropout(self.mlp(self.norm_2(x)))


class DALLE1Transformer(OwnsTokenizer, ModelMixin, ConfigMixin):
    """Text ids and image tokens -> logits of the next text and image token.

    Args:
        vocab_size: entries of the text tokenizer.
        text_length: L; longer captions are truncated by the tokenizer.
        num_image_tokens: V, the dVAE's codes.
        grid_size: image tokens per side, N = grid_size^2.
        width, num_layers, num_heads: shape of the transformer (3,968 / 64 / 62 in the paper).
        attention: "causal" everywhere, or "sparse": the paper's row / column / convolutional order.
        kernel: side of the convolutional mask (11 in the paper).
        dropout: on residual branches.

    The tokenizer belongs to the model: `transformer.tokenizer`, saved as tokenizer.json beside the weights.
    """

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 2048,
        text_length: int = 24,
        num_image_tokens: int = 1024,
        grid_size: int = 8,
        width: int = 256,
        num_layers: int = 8,
        num_heads: int = 4,
        attention: str = "causal",
        kernel: int = 11,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if attention not in ("causal", "sparse"):
            raise InputError(f'attention is "{attention}"; it must be "causal" or "sparse".')
        if width % num_heads:
            raise InputError(f"width {width} is not a multiple of num_heads {num_heads}.")
        if kernel % 2 == 0:
            raise InputError(f"kernel is {kernel}; it must be odd, as the window has a middle.")
        self.text_embedding = nn.Embedding(vocab_size, width)
        self.padding_embedding = nn.Embedding(text_length, width)
        self.text_position = nn.Embedding(text_length, width)
        self.start_of_image = nn.Parameter(torch.zeros(width))
        self.image_embedding = nn.Embedding(num_image_tokens, width)
        self.row_position = nn.Embedding(grid_size, width)
        self.column_position = nn.Embedding(grid_size, width)
        self.blocks = nn.ModuleList(Block(width, num_heads, dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.text_head = nn.Linear(width, vocab_size)
        self.image_head = nn.Linear(width, num_image_tokens)
        self.apply(self._initialise)
        for name, parameter in self.blocks.named_parameters():
            if name.endswith(("attention.out.weight", "mlp.2.weight")):  # ends of the residual branches
                nn.init.normal_(
                    parameter, std=0.02 / (2 * num_layers) ** 0.5
                )  # keeps their sum's variance at any depth
        self._masks: list[Tensor] | None = None

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    @property
    def prefix_length(self) -> int:
        """P: text positions and the start-of-image token."""
        return self.config.text_length + 1

    @property
    def image_length(self) -> int:
        """N, image tokens of a picture."""
        return self.config.grid_size**2

    @property
    def sequence_length(self) -> int:
        """T: the positions that a whole picture takes, all but its last token."""
        return self.prefix_length + self.image_length - 1

    def check_tokenizer(self, tokenizer: CaptionTokenizer) -> None:
        """Raise InputError if the tokenizer's vocabulary is not the one that the text embedding was built for."""
        if tokenizer.vocab_size != self.config.vocab_size:
            raise InputError(
                f"the tokenizer has {tokenizer.vocab_size} entries, this transformer's text table has "
                f"{self.config.vocab_size}; train the transformer with the tokenizer it is used with."
            )

    def _layer_masks(self, device: torch.device) -> list[Tensor]:
        """Boolean masks (T, T) of all layers, built once per device; layers with equal masks share one tensor."""
        if self._masks is None or self._masks[0].device != device:
            length, layers = self.sequence_length, self.config.num_layers
            if self.config.attention == "sparse":
                masks = layer_masks(layers, self.prefix_length, self.config.grid_size, self.config.kernel)
            else:
                masks = [causal_mask(self.prefix_length + self.image_length)] * layers
            moved = {id(mask): mask[:length, :length].to(device) for mask in masks}
            self._masks = [moved[id(mask)] for mask in masks]
        return self._masks

    @torch.no_grad()
    def initialise_image_tokens(self, code_vectors: Tensor, generator: torch.Generator) -> None:
        """Let codes with similar vectors (V, D) start with similar embeddings and output rows: random projections.

        A departure from the paper, which starts from noise: a model trained for an hour has no time to find out which
        of its codes look alike.
        """
        vectors = code_vectors.detach().float()
        codes = (vectors - vectors.mean(dim=0)) / vectors.std(dim=0).clamp(min=1e-6)  # V, D
        for table in (self.image_embedding.weight, self.image_head.weight):
            projection = torch.randn(codes.shape[1], table.shape[1], generator=generator, device=generator.device)
            table.copy_(0.02 * codes @ projection.to(codes.device) / codes.shape[1] ** 0.5)

    def embed_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask (B, L) -> (B, P, W): words, a padding embedding for each unused position, start-of-image."""
        if ids.shape[1] != self.config.text_length:
            raise InputError(f"ids have {ids.shape[1]} positions, this transformer reads {self.config.text_length}.")
        words = torch.where(mask[..., None], self.text_embedding(ids), self.padding_embedding.weight)
        words = words + self.text_position.weight
        start = self.start_of_image.expand(len(ids), 1, -1)
        return torch.cat([words, start], dim=1)

    def embed_image(self, image_tokens: Tensor, first: int = 0) -> Tensor:
        """Image tokens (B, n) that stand at raster positions first ... first + n - 1 -> (B, n, W)."""
        position = torch.arange(first, first + image_tokens.shape[1], device=image_tokens.device)
        grid = self.config.grid_size
        place = self.row_position(position // grid) + self.column_position(position % grid)
        return self.image_embedding(image_tokens) + place

    def forward(self, ids: Tensor, mask: Tensor, image_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of every next token, for training (2102.12092, 2.2).

        Args: ids, mask (B, L), mask True on real tokens; image_tokens (B, N).
        Returns: text logits (B, L - 1, vocab_size) for ids[:, 1:], image logits (B, N, V) for image_tokens.
        """
        x = torch.cat([self.embed_text(ids, mask), self.embed_image(image_tokens[:, :-1])], dim=1)  # B, T, W
        sparse = self.config.attention == "sparse"
        masks: Sequence[Tensor | None] = self._layer_masks(x.device) if sparse else [None] * len(self.blocks)
        for block, layer_mask in zip(self.blocks, masks, strict=True):
            x = block(x, layer_mask)
        x = self.norm(x)
        text, image = x[:, : self.config.text_length - 1], x[:, self.config.text_length :]
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

    def decode_next(self, image_tokens: Tensor, cache: KeyValueCache) -> Tensor:
        """Append one image token per row (B,) to the cache, which it fills -> logits (B, V) of the token after it."""
        position = cache.length - self.prefix_length
        return self._advance(self.embed_image(image_tokens[:, None], position), cache)
