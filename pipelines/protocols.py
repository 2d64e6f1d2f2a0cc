"""What the pipelines ask of parts that come in several classes, whose table stands in pipelines.family_info.

DALL-E 1's transformers share a base class instead, genpipe.dalle1.cached.CachedTransformer.

Legend: B prompts, R rows, L text positions, D CLIP width, N image tokens, C h w of what is denoised, H W pixels. Every
part is a ModelMixin with a config as well. What is named here is all that a pipeline uses.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from pipelines.request import Tokenizer


class TextEncoding(Protocol):
    """Of B texts: embedding (B, D), states (B, L, W), mask (B, L), True where there is text."""

    embedding: Tensor
    mask: Tensor

    @property
    def states(self) -> Tensor: ...


class TextReader(Protocol):
    """A part with a text encoder and a tokenizer of its own: CLIP, GLIDE's decoder and upsampler."""

    @property
    def context_length(self) -> int:
        """L, start and end included."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    def encode_text(self, texts: Sequence[str]) -> TextEncoding: ...


class PictureDecoder(Protocol):
    """DALL-E 2's decoder: Decoder, LatentDecoder, GLIDE. One with `encode_text` is a TextReader: CLIP is not asked.

    reads_image: whether an image embedding conditions it; False: the mode "caption" is its only one.
    null_picture: its null image embedding is CLIP's embedding of a mean-coloured picture, and it reads no text: the
        pipeline hands that to `condition`, which is never given None.
    fills: whether it can be told what to keep of a picture; then `condition` also takes `kept_pixels` and `kept`.
    """

    config: Any
    reads_image: bool
    null_picture: bool
    fills: bool

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the noise that a drawing starts from."""

    @property
    def resolution_of_pixels(self) -> int:
        """Side of the drawn pictures."""

    @property
    def clamp(self) -> float | None:
        """Limit of x_0 at every step: 1 for pixels, None for latents."""

    def condition(
        self, image_embedding: Tensor | None, text_embedding: Tensor, text_states: Tensor, text_mask: Tensor
    ) -> Any:
        """Constant over the steps of a drawing. image_embedding (R, D); None: without one."""

    def denoise(self, x_t: Tensor, t: Tensor, condition: Any) -> Tensor:
        """x_t (R, C, h, w) -> prediction (R, C, h, w), or (R, 2 C, h, w) with a learned variance."""

    def to_pixels(self, x_0: Tensor) -> Tensor:
        """(R, C, h, w) -> pixels (R, 3, H, W) in [0, 1]."""


class Enlarger(Protocol):
    """An upsampler: Upsampler, GLIDEUpsampler.

    reads_text: whether it is a TextReader that wants the prompt in its own encoding; then it has a method `upsample`
        (pixels, seeds, num_inference_steps, scheduler, callback, text), otherwise `genpipe.dalle2.upsampler.upsample`
        runs it; where it `fills`, its `upsample` takes `kept_pixels` and `kept` of the large picture too.
    config.num_inference_steps: if a drawing names none.
    """

    config: Any
    reads_text: bool

    @property
    def device(self) -> torch.device: ...


class ImageTokenizer(Protocol):
    """DALL-E 1's first stage: DVAE, VQGAN. config.resolution: side of its native pictures."""

    config: Any

    @property
    def num_codes(self) -> int: ...

    @property
    def grid_size(self) -> int:
        """Tokens per side of a picture of the native resolution."""

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (R, 3, H, W) in [0, 1] -> image tokens (R, N)."""

    def decode(self, image_tokens: Tensor) -> Tensor:
        """Image tokens (R, N) -> pixels (R, 3, H, W) in [0, 1]."""
