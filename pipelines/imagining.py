"""Where DALL-E 2's image embeddings come from (2204.06125, 2.2, 3 and figure 8): the prior, the caption, a picture.

Legend: P prompts of a block, n candidates of each, D CLIP width.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from genpipe.dalle2.prior import Prior, sample
from genpipe.dalle2.sampling import Step
from pipelines.candidates import Block
from pipelines.encoding import EncodedPrompts, TextEncoding
from pipelines.settings import PICTURE_MODE, DALLE2Sampling


def image_embeddings(
    prior: Prior | None,
    encoded: EncodedPrompts,
    block: Block,
    seed: int,
    sampling: DALLE2Sampling,
    report: Callable[[float, float, Step], Any] | None = None,
) -> Tensor | None:
    """The image embeddings (P, n, D) that a block is drawn from, as the mode says; None for the mode "caption".

    report: called after each step of the prior with the share of the prior's work that its prompt is, from and to.
    """
    prompts, count = len(block.prompts), len(block.candidates)
    if sampling.mode == "caption":
        return None
    if sampling.mode == "text":
        return encoded.text.embedding[list(block.prompts), None].expand(-1, count, -1)
    if sampling.mode == PICTURE_MODE:
        assert encoded.picture is not None
        return encoded.picture[None].expand(prompts, count, -1)
    assert prior is not None
    drawn = []
    for number, prompt in enumerate(block.prompts):
        tell = None if report is None else partial(report, number / prompts, (number + 1) / prompts)
        drawn.append(_imagine(prior, encoded.text, prompt, encoded.null, block, seed, sampling, tell))
    return torch.stack(drawn)


def null_embeddings(
    prior: Prior | None, encoded: EncodedPrompts, block: Block, seed: int, sampling: DALLE2Sampling
) -> Tensor | None:
    """The image embeddings (P, n, D) that guidance leads away from; None where the decoder has one of its own.

    CLIP's embedding of a mean-coloured picture; with a negative prompt and a prior, what the prior imagines of that.
    """
    if encoded.null_picture is None:
        return None
    prompts, count = len(block.prompts), len(block.candidates)
    if sampling.negative_prompt and sampling.mode == "prior" and prior is not None:
        return _imagine(prior, encoded.null, 0, encoded.null, block, seed, sampling, None).expand(prompts, -1, -1)
    return encoded.null_picture[None].expand(prompts, count, -1)


def _imagine(
    prior: Prior,
    texts: TextEncoding,
    prompt: int,
    null: TextEncoding,
    block: Block,
    seed: int,
    sampling: DALLE2Sampling,
    callback: Callable[[Step], None] | None,
) -> Tensor:
    """The prior's image embeddings (n, D) of one of the texts, for the candidates of a block."""
    seeds = filled_up([seed + index for index in block.candidates], block.together)
    # A row for each candidate: side by side in one row, they would round differently from place to place.
    drawn = sample(
        prior,
        *texts.rows([prompt] * len(seeds)),
        [[each] for each in seeds],
        null_text=null.rows([0]),
        num_inference_steps=sampling.prior_steps,
        guidance_scale=sampling.prior_guidance_scale,
        draws=sampling.prior_draws,
        scheduler=sampling.prior_scheduler,
        callback=callback,
    )
    return drawn[: len(block.candidates), 0]


def filled_up(rows: list[int], together: int) -> list[int]:
    """The rows, and the first of them again until their number is a multiple of `together`."""
    return rows + rows[:1] * (-len(rows) % together)
