"""minDALL-E's transformer (Kakao Brain 2021, the 1.3B shape): text, then image tokens, in one causal sequence.

As in DALL-E 1 (2102.12092, 2.2), but: no start-of-image token, the first image token is predicted at the last text
position; padding is a word like any other, with no embedding and no mask of its own; positions of the image are counted
along the raster; the output heads have no bias.

Legend: B rows, L text positions (the whole prefix), N image tokens, W width, V codes.
"""

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from genpipe.dalle1.cached import Block, CachedTransformer
from genpipe.dalle1.character_tokenizer import CharacterTokenizer
from genpipe.errors import InputError


class MinDALLETransformer(CachedTransformer, ModelMixin, ConfigMixin):
    """Text ids and image tokens -> logits of the next text and image token.

    Args:
        vocab_size: entries of the text tokenizer, [PAD] among them.
        text_length: L; texts are cut and filled up to it by the tokenizer.
        num_image_tokens: V, the VQGAN's codes.
        grid_size: image tokens per side, N = grid_size^2.
        width, num_layers, num_heads: shape of the transformer.
        dropout: on residual branches, for fine-tuning.

    The tokenizer, a CharacterTokenizer, is saved as tokenizer.json beside the weights. The `mask` that the methods take
    stands for their common interface: nothing is masked.
    """

    tokenizer_class = CharacterTokenizer

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 16384,
        text_length: int = 64,
        num_image_tokens: int = 16384,
        grid_size: int = 16,
        width: int = 1536,
        num_layers: int = 42,
        num_heads: int = 24,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise InputError(f"width {width} is not a multiple of num_heads {num_heads}.")
        self.text_embedding = nn.Embedding(vocab_size, width)
        self.text_position = nn.Embedding(text_length, width)
        self.image_embedding = nn.Embedding(num_image_tokens, width)
        self.image_position = nn.Embedding(grid_size**2, width)
        self.blocks = nn.ModuleList(Block(width, num_heads, dropout, separate_qkv=True) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.text_head = nn.Linear(width, vocab_size, bias=False)
        self.image_head = nn.Linear(width, num_image_tokens, bias=False)

    @property
    def prefix_length(self) -> int:
        """P: the text positions."""
        return self.config.text_length

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raise InputError for a tokenizer of another kind or with another number of entries."""
        if not isinstance(tokenizer, CharacterTokenizer):
            raise InputError(f"minDALL-E's transformer needs a CharacterTokenizer, not a {type(tokenizer).__name__}.")
        super().check_tokenizer(tokenizer)

    def embed_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids (B, L), padding among them -> (B, L, W)."""
        self.check_ids(ids)
        return self.text_embedding(ids) + self.text_position.weight

    def embed_image(self, image_tokens: Tensor, first: int = 0) -> Tensor:
        """Image tokens (B, n) that stand at raster positions first ... first + n - 1 -> (B, n, W)."""
        position = torch.arange(first, first + image_tokens.shape[1], device=image_tokens.device)
        return self.image_embedding(image_tokens) + self.image_position(position)
