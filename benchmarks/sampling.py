"""Speed and memory of drawing image tokens: cached against uncached, and against dalle-pytorch where it is installed.

    python benchmarks/sampling.py [FAMILY_FOLDER] [--candidates 16] [--threads 2]

All in one run on the same shapes; the peer has random weights, since no trained ones exist.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from genpipe.dalle1.sampling import generate_tokens
from genpipe.dalle1.transformer import DALLE1Transformer
from genpipe.parts import load_part


def seconds(function: Callable[[], object], repeats: int = 3) -> float:
    """Median wall time after one warm-up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


@torch.no_grad()
def draw_uncached(transformer: DALLE1Transformer, ids: Tensor, mask: Tensor, candidates: int) -> Tensor:
    """Greedy tokens by a full forward pass per token: what sampling costs without a cache."""
    ids, mask = ids.expand(candidates, -1), mask.expand(candidates, -1)
    tokens = torch.zeros(candidates, transformer.image_length, dtype=torch.long)
    for t in range(transformer.image_length):
        _, logits = transformer(ids, mask, tokens)
        tokens[:, t] = logits[:, t].argmax(dim=-1)
    return tokens


def peer(transformer: DALLE1Transformer, candidates: int) -> float | None:
    """Seconds of dalle-pytorch for as many tokens at the same width, depth and heads; None if not installed."""
    try:
        from dalle_pytorch import DALLE, DiscreteVAE
    except ImportError:
        return None
    config = transformer.config
    grid = config.grid_size
    vae = DiscreteVAE(
        image_size=4 * grid, num_tokens=config.num_image_tokens, codebook_dim=32, hidden_dim=64, num_layers=2
    )
    dalle = DALLE(
        dim=config.width,
        vae=vae,
        num_text_tokens=config.vocab_size,
        text_seq_len=config.text_length,
        depth=config.num_layers,
        heads=config.num_heads,
        dim_head=config.width // config.num_heads,
        attn_types=("full",),
        rotary_emb=False,
        shift_tokens=False,
    ).eval()
    text = torch.randint(1, config.vocab_size, (candidates, config.text_length))
    with torch.no_grad():
        return seconds(lambda: dalle.generate_images(text, use_cache=True))


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed and memory of drawing image tokens.")
    default = Path(__file__).parents[1] / "genpipe" / "families" / "nano"
    parser.add_argument("family", type=Path, nargs="?", default=default)
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformer = load_part(DALLE1Transformer, arguments.family / "transformer")
    batch = transformer.tokenizer(["three strawberries on a white background"], transformer.config.text_length)
    seeds = [list(range(arguments.candidates))]
    count = arguments.candidates * transformer.image_length

    greedy = generate_tokens(transformer, batch.ids, batch.mask, seeds, temperature=0)
    same = torch.equal(greedy[0], draw_uncached(transformer, batch.ids, batch.mask, arguments.candidates))
    cached = seconds(lambda: generate_tokens(transformer, batch.ids, batch.mask, seeds, temperature=0))
    uncached = seconds(lambda: draw_uncached(transformer, batch.ids, batch.mask, arguments.candidates))
    other = peer(transformer, arguments.candidates)
    print(
        json.dumps(
            {
                "candidates": arguments.candidates,
                "threads": arguments.threads,
                "same_greedy_tokens": same,
                "cached_tokens_per_s": count / cached,
                "uncached_tokens_per_s": count / uncached,
                "uncached_over_cached": uncached / cached,
                "dalle_pytorch_over_ours": other and other / cached,
                "peak_memory_MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
