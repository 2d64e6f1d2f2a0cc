"""DALL-E 1 put together (2102.12092, 2.6): caption -> image tokens -> dVAE -> pictures, the best of many by CLIP.

Legend: B prompts, n candidates per prompt, N image tokens, H W pixels, D CLIP width.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from genpipe.clip.model import CLIP
from genpipe.clip.rerank import TopK, is_out_of_memory, score
from genpipe.dalle1.dvae import DVAE
from genpipe.dalle1.sampling import generate_tokens, rows_within
from genpipe.dalle1.transformer import DALLE1Transformer
from genpipe.errors import InputError
from genpipe.images import to_pil
from genpipe.tokenizer import TokenBatch
from pipelines import request
from pipelines.request import Callback, GenerationOutput, Progress, Stopped


@dataclass(frozen=True)
class EncodedPrompts:
    """`tokens` (B, L) for the transformer, `text_embedding` (B, D) of CLIP for reranking."""

    tokens: TokenBatch
    text_embedding: Tensor


@dataclass(frozen=True)
class Sampling:
    """How image tokens are drawn, resolved: see `DALLE1Pipeline.__call__`."""

    temperature: float
    top_k: int | None
    top_p: float | None
    guidance_scale: float


@dataclass(frozen=True)
class Block:
    """Candidates that are drawn together: a range of prompts, and the same range of candidates for each of them."""

    prompts: range
    candidates: range

    def __len__(self) -> int:
        return len(self.prompts) * len(self.candidates)

    def halves(self) -> list["Block"]:
        """The same candidates in two blocks, split between prompts where there are several."""
        if len(self.prompts) > 1:
            middle = len(self.prompts) // 2
            return [Block(self.prompts[:middle], self.candidates), Block(self.prompts[middle:], self.candidates)]
        middle = len(self.candidates) // 2
        return [Block(self.prompts, self.candidates[:middle]), Block(self.prompts, self.candidates[middle:])]


class DALLE1Pipeline(DiffusionPipeline):
    """Prompts -> pictures, best first.

    Args:
        clip, dvae, transformer: the learned parts; the transformer's codes and grid must be the dVAE's.
        defaults: temperature, top_k, top_p and guidance_scale to use where a call leaves them out.
        family: name of the family the parts belong to, for messages.
        known_words: all words, lower case, of the captions that the parts were trained on; words of a prompt that are
            not among them are warned about. None: no warning.

    Raises InputError where the parts do not fit one another.
    """

    def __init__(
        self,
        clip: CLIP,
        dvae: DVAE,
        transformer: DALLE1Transformer,
        defaults: Mapping[str, Any] | None = None,
        family: str = "",
        known_words: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        codes, grid = transformer.config.num_image_tokens, transformer.config.grid_size
        if (codes, grid) != (dvae.num_codes, dvae.grid_size):
            raise InputError(
                f"The transformer was made for {codes} codes on a grid of {grid}x{grid}, the dVAE has {dvae.num_codes} "
                f"on {dvae.grid_size}x{dvae.grid_size}; take both from one family."
            )
        request.check_sampling(**(defaults or {}))
        self.register_modules(clip=clip, dvae=dvae, transformer=transformer)
        self.register_to_config(
            defaults=dict(defaults or {}),
            family=family,
            known_words=None if known_words is None else list(known_words),
        )

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
            chunk_size: candidates drawn at once; None keeps the caches below 512 MiB. Halved when memory runs out.
            callback: called with a `Progress` after every token; stops the call by returning True.
        Raises InputError for empty prompts and numbers out of range.
        """
        request.check_counts(num_candidates, keep, seed, chunk_size)
        sampling = self.resolve_sampling(temperature, top_k, top_p, guidance_scale)
        prompts = request.check_prompts(prompts)
        self.warn(prompts)
        encoded = self.encode_prompts(prompts)

        best = [TopK(keep) for _ in prompts]
        finished, total, complete = 0, len(prompts) * num_candidates, True
        rows = chunk_size or rows_within(self.transformer, sampling.guidance_scale != 1.0)
        pending = list(blocks(len(prompts), num_candidates, rows))[::-1]
        while pending:
            block = pending.pop()
            report = self._reporter(callback, finished, total)
            try:
                tokens = self.sample_tokens(encoded, block, seed, sampling, report)  # B, n, N
                self.rank(encoded, block, tokens, best)
            except Stopped:
                complete = False
                break
            except RuntimeError as error:
                if len(block) == 1 or not is_out_of_memory(error):
                    raise
                pending += block.halves()[::-1]
                continue
            finished += len(block)

        ranked = [top.result() for top in best]  # (score, index, picture), best first
        return GenerationOutput(
            images=[[picture for _, _, picture in entries] for entries in ranked],
            scores=[[float(value) for value, _, _ in entries] for entries in ranked],
            seeds=[[seed + index for _, index, _ in entries] for entries in ranked],
            prompts=prompts,
            complete=complete,
        )

    def resolve_sampling(
        self,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance_scale: float | None = None,
    ) -> Sampling:
        """What a call with these arguments uses: the argument, else the pipeline's default, else the plain draw.

        Raises InputError for numbers out of range.
        """
        request.check_sampling(temperature, top_k, top_p, guidance_scale)
        defaults = self.config.defaults
        default_temperature = defaults.get("temperature") or 1.0
        default_scale = defaults.get("guidance_scale")
        return Sampling(
            temperature=default_temperature if temperature is None else temperature,
            top_k=defaults.get("top_k") if top_k is None else top_k,
            top_p=defaults.get("top_p") if top_p is None else top_p,
            guidance_scale=guidance_scale
            if guidance_scale is not None
            else 1.0
            if default_scale is None
            else default_scale,
        )

    def warn(self, prompts: Sequence[str]) -> None:
        """Say what will keep the pictures from showing what was asked for: untrained parts, words never seen."""
        untrained = [name for name, part in self.components.items() if not part.config.get("_name_or_path")]
        if untrained:
            warnings.warn(
                f"The weights of {', '.join(untrained)} were not loaded from a folder; "
                "unless they were trained in this process, the pictures will be noise.",
                stacklevel=4,
            )
        if self.config.known_words is not None:
            request.warn_of_unknown_words(prompts, frozenset(self.config.known_words), self.config.family)

    def encode_prompts(self, prompts: Sequence[str]) -> EncodedPrompts:
        """Clean prompts -> ids for the transformer and CLIP's text embeddings; warns of prompts that are too long."""
        tokenizer, length = self.transformer.tokenizer, self.transformer.config.text_length
        if tokenizer is None:
            raise InputError("The transformer has no tokenizer; set transformer.tokenizer or load it from its folder.")
        read = [request.shorten(prompt, tokenizer, length) for prompt in prompts]
        ranked = [request.shorten(prompt, self.clip.tokenizer, self.clip.context_length) for prompt in prompts]
        for prompt, beginning, compared in zip(prompts, read, ranked, strict=True):
            if beginning != prompt or compared != prompt:
                warnings.warn(
                    f"The prompt has {len(prompt):,} characters and only its beginning was read: "
                    f"{request.brief(min(beginning, compared, key=len))}.",
                    stacklevel=4,
                )
        tokens = tokenizer(read, length).to(self.transformer.device)
        return EncodedPrompts(tokens, self.clip.encode_text(ranked).embedding)

    def sample_tokens(
        self,
        encoded: EncodedPrompts,
        block: Block,
        seed: int,
        sampling: Sampling,
        report: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Image tokens (B, n, N) of one block; `report` is called with the tokens so far (R, t) after each token."""
        first, last = block.prompts.start, block.prompts.stop
        null = None
        if sampling.guidance_scale != 1.0:
            empty = self.transformer.tokenizer([""], self.transformer.config.text_length).to(self.transformer.device)
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

    def rank(self, encoded: EncodedPrompts, block: Block, tokens: Tensor, best: Sequence[TopK]) -> None:
        """Decode a block's tokens (B, n, N), score the pictures against their prompts and keep the best in `best`."""
        ranked = []
        for prompt, prompt_tokens in zip(block.prompts, tokens, strict=True):
            pixels = self.decode(prompt_tokens)  # n, 3, H, W
            ranked.append((score(self.clip, pixels, encoded.text_embedding[prompt]), to_pil(pixels)))
        # Only now, so that a block that ran out of memory half-way leaves nothing behind and can be drawn again.
        for prompt, (scores, pictures) in zip(block.prompts, ranked, strict=True):
            best[prompt].update(scores, pictures, block.candidates.start)

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

    def _reporter(self, callback: Callback | None, finished: int, total: int) -> Callable[[Tensor], None] | None:
        if callback is None:
            return None

        def report(tokens: Tensor) -> None:
            running, step = tokens.shape
            so_far = tokens.clone()  # the sampler goes on writing into its own
            progress = Progress(
                finished, total, running, step, self.transformer.image_length, lambda: self.preview(so_far)
            )
            if callback(progress):
                raise Stopped

        return report


def blocks(num_prompts: int, num_candidates: int, rows: int) -> Iterator[Block]:
    """All candidates of all prompts in blocks of at most `rows`, prompts in order."""
    together = max(1, rows // num_candidates)  # prompts whose candidates fit in one block
    for first in range(0, num_prompts, together):
        prompts = range(first, min(first + together, num_prompts))
        for start in range(0, num_candidates, rows):
            yield Block(prompts, range(start, min(start + rows, num_candidates)))
