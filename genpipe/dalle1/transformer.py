"""DALL-E 1's decoder-only transformer over text and image tokens (2102.12092, 2.2 and B).

The sequence: text ids (start, words, end, then a learned padding embedding per text position), start-of-image, image
tokens. Text and image have separate output heads, which is the joint vocabulary with the impossible half masked out.

Legend: B rows, L text positions, P = L + 1 prefix (text, start-of-image), N image tokens, T = P + N - 1 sequence (the
last image token is never an input), W width, H heads, D = W / H, V codes.
"""

from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from genpipe.dalle1.cached import Block, CachedTransformer
from genpipe.dalle1.masks import layer_masks
from genpipe.errors import InputError


class DALLE1Transformer(CachedTransformer, ModelMixin, ConfigMixin):
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

    def _causal_masks(self) -> list[Tensor]:
        """Boolean masks (T, T) of all layers; layers with equal masks share one tensor."""
        if self.config.attention == "causal":
            return super()._causal_masks()
        layers, length = self.config.num_layers, self.sequence_length
        masks = layer_masks(layers, self.prefix_length, self.config.grid_size, self.config.kernel)
        cut = {id(mask): mask[:length, :length] for mask in masks}  # the last image token is never an input
        return [cut[id(mask)] for mask in masks]

    def _whole_masks(self, device: torch.device) -> Sequence[Tensor | None]:
        """What the blocks take over a full sequence; None stands for plain causal."""
        return super()._whole_masks(device) if self.config.attention == "causal" else self._layer_masks(device)

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
        self.check_ids(ids)
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
