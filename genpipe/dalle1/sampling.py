"""Drawing image tokens: each prompt is read once, its candidates are continued token by token (2102.12092, 2.6).

Legend: B prompts, n candidates per prompt, R rows in a chunk, m given image tokens, N image tokens, V codes.
"""

import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from genpipe.dalle1.cached import CachedTransformer, KeyValueCache
from genpipe.errors import InputError

# Tokens drawn so far: callback(chunk's row indices into the flat B * n candidates, tokens (R, t), t of N)
TokenCallback = Callable[[Sequence[int], Tensor], None]

DEFAULT_CACHE_BYTES = 512 * 2**20

# Matrix products round a batch of one differently from a larger one. A chunk is therefore filled up to a multiple of
# this many rows, and prompts are read one by one: a candidate is the same whatever was drawn beside it.
ROWS_TOGETHER = 4


@dataclass
class Branch:
    """A side of guidance, conditional or not: its own cache, and its logits (R, V) of the next image token."""

    cache: KeyValueCache
    logits: Tensor

    def rows(self, index: Tensor, room: int) -> "Branch":
        """A new branch of the given rows, with room for `room` positions."""
        return Branch(self.cache.rows(index, room), self.logits[index])


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance on logits: u + s (c - u); s = 1 is the conditional prediction alone, s = 0 the other."""
    return unconditional + scale * (conditional - unconditional)


def filter_logits(logits: Tensor, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Logits (R, V) with everything outside the top k, or outside the smallest set of mass top_p, at minus infinity.

    k counts image tokens, the only ones in these logits; among equals the lower token comes first. top_p is a share of
    what top_k leaves. The most likely token always stays.
    """
    if top_k is None and top_p is None:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    outside = torch.zeros_like(ordered, dtype=torch.bool)
    if top_k is not None:
        outside[..., top_k:] = True
    if top_p is not None and top_p < 1:
        mass = ordered.masked_fill(outside, float("-inf")).softmax(dim=-1)
        outside |= mass.cumsum(dim=-1) - mass >= top_p  # mass before the token: the first one is never outside
    return logits.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), float("-inf"))


def draw(
    logits: Tensor, uniform: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Tokens (R,) from logits (R, V) by inversion of the cumulative distribution at uniform (R,) in [0, 1), float64.

    Temperature 0 takes the most likely token. In float64, so that the rounding of a batched product practically never
    moves a draw across a border: a candidate must not depend on the batch that it ran in.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.to(uniform.device).double()
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # at most 0: no temperature is too small
    cumulative = filter_logits(scaled, top_k, top_p).softmax(dim=-1).cumsum(dim=-1)
    target = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


def rows_within(transformer: CachedTransformer, guided: bool, budget: int = DEFAULT_CACHE_BYTES) -> int:
    """How many candidates at once keep the key/value caches below `budget` bytes (at least one).

    Each candidate is counted with the cache of a prompt of its own.
    """
    config = transformer.config
    length = transformer.prefix_length + transformer.sequence_length
    row = 2 * config.num_layers * length * config.width * transformer.image_head.weight.element_size()
    return max(1, budget // (row * (2 if guided else 1)))


@torch.no_grad()
def generate_tokens(
    transformer: CachedTransformer,
    ids: Tensor,
    mask: Tensor,
    seeds: Sequence[Sequence[int]],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance_scale: float = 1.0,
    null_text: tuple[Tensor, Tensor] | None = None,
    image_prefix: Tensor | None = None,
    chunk_size: int | None = None,
    callback: TokenCallback | None = None,
) -> Tensor:
    """Draw image tokens for B prompts, n candidates each.

    Args:
        ids, mask: (B, L) of the prompts.
        seeds: B lists of n seeds, whole numbers from 0 on without an upper limit; n may be 0. A candidate's draws
            depend on its seed alone, not on its neighbours.
        temperature, top_k, top_p: of the draw, see :func:`draw` and :func:`filter_logits`; temperature 0 is greedy.
        guidance_scale: 1 is the conditional prediction alone, 0 the unconditional one; any other value than 1 needs
            null_text and doubles the work.
        null_text: ids, mask (1, L) of the empty caption.
        image_prefix: (B, m) image tokens that are given, m < N: the upper rows of a picture to be continued.
        chunk_size: candidates at once; None keeps the caches below 512 MiB.
        callback: called after every token with the chunk's rows and tokens so far, the given ones among them.
    Returns: (B, n, N) int64 on the device of ids. Raises InputError for numbers out of range and shapes that do not
        fit, FloatingPointError for logits that are not finite.
    """
    _check_numbers(temperature, top_k, top_p, guidance_scale, chunk_size)
    per_prompt = _check_rows(transformer, ids, seeds, image_prefix)
    texts = [(ids, mask)]
    if guidance_scale != 1.0:
        if null_text is None:
            raise InputError(f"guidance_scale {guidance_scale} needs null_text, the ids and mask of the empty caption.")
        texts.append((null_text[0].expand_as(ids), null_text[1].expand_as(mask)))

    prefix = ids.new_zeros(len(ids), 0, dtype=torch.long) if image_prefix is None else image_prefix.long()
    drawn = [ids.new_zeros(0, transformer.image_length, dtype=torch.long)]
    pick = partial(draw, temperature=temperature, top_k=top_k, top_p=top_p)
    for prompts, chunks in _groups(len(ids), per_prompt, chunk_size or rows_within(transformer, len(texts) == 2)):
        given = prefix[prompts]
        read = [_read(transformer, words[prompts], real[prompts], given) for words, real in texts]
        for rows in chunks:
            filled = [*rows, *[rows[0]] * (-len(rows) % ROWS_TOGETHER)]
            owner = torch.tensor([row // per_prompt - prompts.start for row in filled], device=ids.device)
            uniform = _uniforms(
                [seeds[row // per_prompt][row % per_prompt] for row in filled], transformer.image_length, ids.device
            )
            chunk = _continue(
                transformer,
                [branch.rows(owner, transformer.sequence_length) for branch in read],  # no name keeps them alive after
                given[owner],
                uniform,
                guidance_scale,
                pick,
                None if callback is None else partial(_report, callback, rows),
            )
            drawn.append(chunk[: len(rows)])
    return torch.cat(drawn).view(len(ids), per_prompt, transformer.image_length)


def _read(transformer: CachedTransformer, ids: Tensor, mask: Tensor, given: Tensor) -> Branch:
    """Prefill prompts (B, L) with their given tokens (B, m), one by one."""
    caches, logits = zip(
        *(transformer.prefill(ids[i : i + 1], mask[i : i + 1], given[i : i + 1]) for i in range(len(ids))), strict=True
    )
    keys, values = (torch.cat([getattr(cache, name) for cache in caches], dim=1) for name in ("keys", "values"))
    return Branch(KeyValueCache(keys, values, caches[0].length), torch.cat(logits))


def _report(callback: TokenCallback, rows: Sequence[int], tokens: Tensor) -> None:
    """Tell the callback about the rows that were asked for, without those that fill the chunk up."""
    callback(rows, tokens[: len(rows)])


def _continue(
    transformer: CachedTransformer,
    branches: Sequence[Branch],
    given: Tensor,
    uniform: Tensor,
    guidance_scale: float,
    pick: Callable[[Tensor, Tensor], Tensor],
    report: Callable[[Tensor], None] | None,
) -> Tensor:
    """Continue a chunk's given tokens (R, m) to (R, N); the branches' caches are filled on the way.

    The logits, in float32, are guided where there are two branches, and `pick` takes them and uniform draws (R,).
    """
    first, count = given.shape[1], transformer.image_length
    tokens = F.pad(given, (0, count - first))
    for t in range(first, count):
        logits = branches[0].logits.float()
        if len(branches) == 2:
            logits = guide(logits, branches[1].logits.float(), guidance_scale)
        if not torch.isfinite(logits).all():
            raise FloatingPointError(f"the transformer's logits are not finite at image token {t}")
        tokens[:, t] = pick(logits, uniform[:, t])
        if report is not None:
            report(tokens[:, : t + 1])
        if t + 1 < count:
            for branch in branches:
                branch.logits = transformer.decode_next(tokens[:, t], branch.cache)
    return tokens


def _groups(prompts: int, per_prompt: int, rows: int) -> Iterator[tuple[slice, list[range]]]:
    """Prompts that are read together, and chunks of at most `rows` of the B n candidates, drawn one after the other.

    A group is one prompt, or as many as fit into one chunk: each prompt is read once, and few caches exist at once.
    """
    together = max(1, rows // max(1, per_prompt))
    for first in range(0, prompts, together):
        last = min(first + together, prompts)
        candidates = range(first * per_prompt, last * per_prompt)
        if candidates:
            yield slice(first, last), [candidates[start : start + rows] for start in range(0, len(candidates), rows)]


def _uniforms(seeds: Sequence[int], count: int, device: torch.device) -> Tensor:
    """(R, count) uniform draws in [0, 1), float64, each row from a generator of its own, which takes any seed.

    NumPy's, because torch's generator for main memory uses only the lower 32 bits of a seed.
    """
    drawn = torch.from_numpy(np.stack([np.random.default_rng(int(seed)).random(count) for seed in seeds]))
    try:
        return drawn.to(device)
    except TypeError:  # a device without float64: tokens are then drawn in main memory
        return drawn


def _check_numbers(
    temperature: float, top_k: int | None, top_p: float | None, guidance_scale: float, chunk_size: int | None
) -> None:
    if not 0 <= temperature < math.inf:
        raise InputError(f"temperature is {temperature}; it must be a number from 0 on.")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p}; it must be above 0 and at most 1.")
    if not math.isfinite(guidance_scale):
        raise InputError(f"guidance_scale is {guidance_scale}; it must be a finite number.")
    for name, count in (("top_k", top_k), ("chunk_size", chunk_size)):
        if count is not None and count < 1:
            raise InputError(f"{name} is {count}; it must be at least 1, or None.")


def _check_rows(
    transformer: CachedTransformer, ids: Tensor, seeds: Sequence[Sequence[int]], image_prefix: Tensor | None
) -> int:
    """n, the candidates of each prompt. Raises InputError where seeds or image_prefix do not belong to the prompts."""
    if transformer.training and transformer.config.dropout > 0:
        raise InputError(
            "the transformer is in training mode, where dropout would spoil the pictures; call eval() first."
        )
    if len(seeds) != len(ids) or len({len(row) for row in seeds}) > 1:
        raise InputError(f"{len(ids)} prompts need as many lists of seeds, all of one length.")
    for seed in (seed for row in seeds for seed in row):
        if not isinstance(seed, numbers.Integral) or seed < 0:
            raise InputError(f"a seed is {seed!r}; it must be a whole number from 0 on.")
    if image_prefix is not None:
        if image_prefix.ndim != 2 or len(image_prefix) != len(ids) or image_prefix.shape[1] >= transformer.image_length:
            raise InputError(
                f"image_prefix has shape {tuple(image_prefix.shape)}; {len(ids)} rows of less than "
                f"{transformer.image_length} tokens are needed."
            )
        if ((image_prefix < 0) | (image_prefix >= transformer.config.num_image_tokens)).any():
            raise InputError(f"image_prefix has tokens outside [0, {transformer.config.num_image_tokens}).")
    return len(seeds[0]) if len(seeds) else 0
