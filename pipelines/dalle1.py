"""DALL-E 1 put together (2102.12092, 2.6): caption -> image tokens -> dVAE -> pictures, the best of many by CLIP.

DALL-E 2's decoder may have a say in that: CLIP sees what is in a picture, the decoder how well it is drawn.

Legend: B prompts, n candidates per prompt, N image tokens, H W pixels, D CLIP width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin
from PIL import Image
from torch import Tensor

from genpipe.clip.model import CLIP
from genpipe.dalle1.cached import CachedTransformer
from genpipe.dalle1.sampling import generate_tokens, rows_within
from genpipe.dalle2.critic import can_judge, denoising_errors
from genpipe.errors import InputError
from genpipe.images import to_pil
from genpipe.tokenizer import TokenBatch
from pipelines import request
from pipelines.base import FamilyPipeline
from pipelines.candidates import Best, Block, Tracker, blocks, in_blocks
from pipelines.encoding import TextEncoding, check_fit
from pipelines.enlarging import Enlarging, upsampled
from pipelines.protocols import Enlarger, ImageTokenizer, PictureDecoder
from pipelines.request import Callback, GenerationOutput
from pipelines.settings import DALLE1Sampling, resolved, sampling_of, upsampling_of


@dataclass(frozen=True)
class EncodedPrompts:
    """`tokens` (B, L) for the transformer, `text` as CLIP encodes it for reranking, None: nothing is ranked."""

    tokens: TokenBatch
    text: TextEncoding | None


class DALLE1Pipeline(FamilyPipeline):
    """Prompts -> pictures, best first.

    Args:
        clip: ranks the pictures; None: they come back in order, and no more are drawn than are kept.
        dvae, transformer: the learned parts, of any class that pipelines.family_info names; the transformer's codes
            and grid must be the dVAE's.
        upsampler: enlarges the pictures that are kept, the same part as DALL-E 2's; None: they stay as they are.
        decoder: DALL-E 2's, beside the same CLIP; helps CLIP to rank where DALLE1Sampling.decoder_weight is not 0.
        defaults: settings by name, fields of DALLE1Sampling, to use where a call leaves them out.
        family: name of the family the parts belong to, for messages.
        known_words: all words, lower case, of the captions that the parts were trained on; words of a prompt that are
            not among them are warned about. None: no warning.

    Raises InputError where the parts do not fit one another.
    """

    dvae: ImageTokenizer
    transformer: CachedTransformer
    upsampler: Enlarger | None
    decoder: PictureDecoder | None

    _optional_components = ["clip", "upsampler", "decoder"]
    model_cpu_offload_seq = "transformer->dvae->clip->decoder->upsampler"

    def __init__(
        self,
        clip: CLIP | None,
        dvae: ModelMixin,
        transformer: ModelMixin,
        upsampler: ModelMixin | None = None,
        defaults: Mapping[str, Any] | None = None,
        family: str = "",
        known_words: Sequence[str] | None = None,
        decoder: ModelMixin | None = None,
    ) -> None:
        super().__init__()
        codes, grid = transformer.config.num_image_tokens, transformer.config.grid_size
        if (codes, grid) != (dvae.num_codes, dvae.grid_size):
            raise InputError(
                f"The transformer was made for {codes} codes on a grid of {grid}x{grid}, the dVAE has {dvae.num_codes} "
                f"on {dvae.grid_size}x{dvae.grid_size}; take both from one family."
            )
        sampling_of("dalle1", defaults or {})
        self.register_modules(clip=clip, dvae=dvae, transformer=transformer, upsampler=upsampler, decoder=decoder)
        self._no_judge = self._why_no_judge()  # now, while no weights have been moved away
        self.register_family(defaults, family, known_words)

    @torch.no_grad()
    def __call__(
        self,
        prompts: str | Sequence[str],
        num_candidates: int = 16,
        keep: int = 4,
        seed: int = 0,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance_scale: float | None = None,
        sampling: DALLE1Sampling | None = None,
        chunk_size: int | None = None,
        callback: Callback | None = None,
    ) -> GenerationOutput:
        """Draw `num_candidates` pictures per prompt and return the best `keep` of each.

        Args:
            prompts: one or several; text beyond what the parts read is cut, with a warning.
            seed: of the first candidate of every prompt; candidate i has seed + i and is the same picture whatever
                was drawn beside it.
            temperature, top_k, top_p, guidance_scale: of the drawing of image tokens; None takes the pipeline's
                default. Guidance 1 is the conditional prediction alone.
            sampling: all settings at once, in place of the defaults; see `resolve_sampling`.
            chunk_size: candidates drawn at once; None keeps the caches below 512 MiB. Halved when memory runs out.
            callback: called with a `Progress` after every token; stops the call by returning True.
        Raises InputError for empty prompts and numbers out of range.
        """
        request.check_counts(num_candidates, keep, seed, chunk_size)
        given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance_scale": guidance_scale}
        sampling = self.resolve_sampling(given, sampling)
        prompts = request.check_prompts(prompts)
        self.warn(prompts)
        encoded = self.encode_prompts(prompts)
        num_candidates = num_candidates if self.ranks else keep

        embedding = None if encoded.text is None else encoded.text.embedding
        best = Best(self.clip, embedding, len(prompts), keep, seed, self.fault_finder(encoded, sampling.decoder_weight))
        enlarging = Enlarging.of(self.upsampler, sampling)
        tracker = Tracker(callback, len(prompts) * num_candidates, enlarging is not None)

        def draw(block: Block, finished: int) -> None:
            report = self.reporter(tracker, finished)
            tokens = self.sample_tokens(encoded, block, seed, sampling, report)  # B, n, N
            best.rank(block, [self.decode(row) for row in tokens])

        rows = chunk_size or rows_within(self.transformer, sampling.guidance_scale != 1.0)
        complete = in_blocks(draw, blocks(len(prompts), num_candidates, rows))
        output = best.output(prompts, complete)
        if enlarging is not None:
            output = upsampled(output, enlarging, tracker, self.computes_on)
        self.maybe_free_model_hooks()
        return output

    def resolve_sampling(
        self, given: Mapping[str, Any] | None = None, sampling: DALLE1Sampling | None = None
    ) -> DALLE1Sampling:
        """What a call uses: settings that are given by name, the rest as in `sampling`, or without one the defaults.

        Raises InputError for numbers out of range, unknown names, and for an upsampler or a decoder that is not there.
        """
        chosen = upsampling_of(resolved("dalle1", given or {}, sampling, self.config.defaults), self.upsampler)
        if chosen.decoder_weight and self._no_judge is not None:
            raise InputError(self._no_judge)
        return chosen

    def _why_no_judge(self) -> str | None:
        """Why the decoder cannot have a say in the ranking; None: it can, or nothing is ranked."""
        if not self.ranks:
            return None
        if self.decoder is None or not can_judge(self.decoder):
            return (
                "These weights have no decoder of pixels that reads CLIP's text, which a decoder_weight needs; set it "
                "to 0."
            )
        try:
            check_fit(self.clip, self.decoder, None)
        except InputError as error:  # which matters only to those who use it
            return str(error)
        return None

    def fault_finder(self, encoded: EncodedPrompts, weight: float) -> Callable[[Tensor, int], Tensor] | None:
        """What is taken from the scores of pictures (n, 3, H, W) of prompt i: `weight` times the log of their errors.

        The errors of `genpipe.dalle2.critic`; None where nothing is taken.
        """
        text = encoded.text
        if not weight or text is None or self.decoder is None:
            return None
        return lambda pixels, i: weight * denoising_errors(self.decoder, pixels, text.rows([i])).log().cpu()

    def encode_prompts(self, prompts: Sequence[str]) -> EncodedPrompts:
        """Clean prompts -> ids for the transformer and CLIP's text embeddings; warns of prompts that are too long."""
        tokenizer, length = self.transformer.tokenizer, self.transformer.config.text_length
        read = [request.shorten(prompt, tokenizer, length) for prompt in prompts]
        ranked, text = read, None
        if self.clip is not None and self.ranks:
            ranked = [request.shorten(prompt, self.clip.tokenizer, self.clip.context_length) for prompt in prompts]
            encoded = self.clip.encode_text(ranked)
            text = TextEncoding(encoded.embedding, encoded.states, encoded.mask)
        for prompt, beginning, compared in zip(prompts, read, ranked, strict=True):
            request.warn_of_cut_prompt(prompt, beginning, compared)
        return EncodedPrompts(tokenizer(read, length).to(self.computes_on), text)

    def sample_tokens(
        self,
        encoded: EncodedPrompts,
        block: Block,
        seed: int,
        sampling: DALLE1Sampling,
        report: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Image tokens (B, n, N) of one block; `report` is called with the tokens so far (R, t) after each token."""
        first, last = block.prompts.start, block.prompts.stop
        null = None
        if sampling.guidance_scale != 1.0:
            empty = self.transformer.tokenizer([""], self.transformer.config.text_length).to(self.computes_on)
            null = (empty.ids, empty.mask)
        return generate_tokens(
            self.transformer,
            encoded.tokens.ids[first:last],
            encoded.tokens.mask[first:last],
            [[seed + index for index in block.candidates]] * len(block.prompts),
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            guidance_scale=sampling.guidance_scale,
            null_text=null,
            chunk_size=len(block),
            callback=None if report is None else lambda rows, tokens: report(tokens),
        )

    def decode(self, tokens: Tensor) -> Tensor:
        """Image tokens (R, N) -> pixels (R, 3, H, W) in [0, 1].

        One at a time: a convolution over a batch may add up in another order, and a candidate's pixels must not depend
        on its neighbours.
        """
        return torch.cat([self.dvae.decode(row[None]) for row in tokens])

    def preview(self, tokens: Tensor) -> list[Image.Image]:
        """The first tokens of some candidates (R, t), 1 <= t <= N -> pictures, grey where nothing is drawn yet."""
        rows, drawn = tokens.shape
        rest = tokens[:, -1:].expand(rows, self.transformer.image_length - drawn)
        pixels = self.decode(torch.cat([tokens, rest], dim=1))
        side, grid = pixels.shape[-1], self.transformer.config.grid_size
        cells = torch.arange(grid * grid, device=pixels.device).view(1, 1, grid, grid) < drawn
        factor = side // grid
        visible = cells.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        return to_pil(torch.where(visible, pixels, 0.5))

    def reporter(self, tracker: Tracker, finished: int) -> Callable[[Tensor], None]:
        """What tells the callback about a block's tokens, after `finished` candidates of earlier blocks."""

        def report(tokens: Tensor) -> None:
            running, step = tokens.shape
            so_far = tokens.clone()  # the sampler goes on writing into its own
            tracker.drawing(
                "transformer", finished, running, (step, self.transformer.image_length), lambda: self.preview(so_far)
            )

        return report
