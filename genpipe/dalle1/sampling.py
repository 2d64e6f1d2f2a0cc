"""Drawing image tokens: each prompt is read once, its candidates are continued token by token (2102.12092, 2.6).

Legend: B prompts, n candidates per prompt, R rows in a chunk, N image tokens, V codes.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from genpipe.dalle1.transformer import DALLE1Transformer, KeyValueCache

# Tokens drawn so far: callback(chunk's row indices into the flat B * n candidates, tokens (R, t), t of N)
TokenCallback = Callable[[Sequence[int], Tensor], None]

DEFAULT_CACHE_BYTES = 512 * 2**20


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance on logits: u + s (c - u); s = 1 is the conditional prediction alone, s = 0 the other."""
    return unconditional + scale * (conditional - unconditional)


def filter_logits(logits: Tensor, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Logits (R, V) with everything outside the top k, or outside the smallest set of mass top_p, at minus infinity.

    k counts image tokens, the only ones in these logits. The most likely token always stays.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        mass = ordered.softmax(dim=-1)
        outside = mass.cumsum(dim=-1) - mass >= top_p  # mass before the token: the first one is never outside
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), float("-inf"))
    return logits


def draw(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Tokens (R,) from logits (R, V) by inversion of the cumulative distribution at uniform (R,) in [0, 1).

    Temperature 0 takes the most likely token. In float64, so that the rounding of a batched product practically never
    moves a draw across a border: a candidate must not depend on the batch that it ran in.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    cumulative = (logits.double() / temperature).softmax(dim=-1).cumsum(dim=-1)
    target = uniform.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


def rows_within(transformer: DALLE1Transformer, guided: bool, budget: int = DEFAULT_CACHE_BYTES) -> int:
    """How many candidates at once keep the key/value caches below `budget` bytes (at least one)."""
    config = transformer.config
    length = transformer.prefix_length + transformer.image_length
    row = 2 * config.num_layers * length * config.width * transformer.image_head.weight.element_size()
    return max(1, budget // (row * (2 if guided else 1)))


@torch.no_grad()
def generate_tokens(
    transformer: DALLE1Transformer,
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
        seeds: B lists of n seeds; a candidate's draws depend on its seed alone, not on its neighbours.
        temperature, top_k, top_p: of the draw; temperature 0 is greedy.
        guidance_scale: 1 is the conditional prediction alone; any other value needs null_text and doubles the work.
        null_text: ids, mask (1, L) of the empty caption.
        image_prefix: (B, m) image tokens that are given, m < N: the upper rows of a picture to be continued.
        chunk_size: candidates at once; None keeps the caches below 512 MiB.
        callback: called after every token with the chunk's rows and tokens so far.
    Returns: (B, n, N) int64. Raises ValueError for guidance without null_text, FloatingPointError for logits that are not finite.
    """
    guided = guidance_scale != 1.0
    if guided and null_text is None:
        raise ValueError(f"guidance_scale {guidance_scale} needs null_text, the ids and mask of the empty caption")
    prompts = transformer.prefill(ids, mask, image_prefix)
    null = None
    if guided and null_text is not None:
        null_ids, null_mask = (x.expand(len(ids), -1) for x in null_text)
        null = transformer.prefill(null_ids, null_mask, image_prefix)

    per_prompt = len(seeds[0])
    owner = torch.arange(len(ids), device=ids.device).repeat_interleave(per_prompt)  # B n: whose candidate a row is
    flat_seeds = [seed for row in seeds for seed in row]
    step = chunk_size or rows_within(transformer, guided)
    chunks = []
    for start in range(0, len(flat_seeds), step):
        rows = list(range(start, min(start + step, len(flat_seeds))))
        uniform = _uniforms([flat_seeds[r] for r in rows], transformer.image_length).to(ids.device)
        given = None if image_prefix is None else image_prefix[owner[rows]]

        def choose(logits: Tensor, t: int, uniform: Tensor = uniform) -> Tensor:
            if not torch.isfinite(logits).all():
                raise FloatingPointError(f"the transformer's logits are not finite at image token {t}")
            return draw(filter_logits(logits / (temperature or 1.0), top_k, top_p), uniform[:, t], 1.0 if temperature else 0)

        branch = _select(prompts, owner[rows])
        null_branch = _select(null, owner[rows]) if null is not None else None
        chunks.append(_continue(transformer, branch, null_branch, given, guidance_scale, choose, rows, callback))
    return torch.cat(chunks).view(len(ids), per_prompt, transformer.image_length)


def _uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """(R, count) uniform draws, each row from a generator of its own."""
    return torch.stack([torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds])


def _select(prefilled: tuple[KeyValueCache, Tensor], rows: Tensor) -> tuple[KeyValueCache, Tensor]:
    cache, logits = prefilled
    return cache.rows(rows), logits[rows]


def _continue(
    transformer: DALLE1Transformer,
    branch: tuple[KeyValueCache, Tensor],
    null_branch: tuple[KeyValueCache, Tensor] | None,
    given: Tensor | None,
    scale: float,
    choose: Callable[[Tensor, int], Tensor],
    rows: Sequence[int],
    callback: TokenCallback | None,
) -> Tensor:
    """Decode one chunk of candidates to the end; the two branches of guidance keep two caches."""
    cache, logits = branch
    first = 0 if given is None else given.shape[1]
    tokens = torch.zeros(len(rows), transformer.image_length, dtype=torch.long, device=logits.device)
    if given is not None:
        tokens[:, :first] = given
    null_cache, null_logits = null_branch if null_branch is not None else (None, None)
    for t in range(first, transformer.image_length):
        guided = logits if null_logits is None else guide(logits, null_logits, scale)
        tokens[:, t] = choose(guided.float(), t)
        if callback is not None:
            callback(rows, tokens[:, : t + 1])
        if t + 1 < transformer.image_length:
            logits = transformer.decode_next(tokens[:, t], cache)
            if null_cache is not None:
                null_logits = transformer.decode_next(tokens[:, t], null_cache)
    return tokens
