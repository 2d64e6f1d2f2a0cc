"""Draws docs/modes.png: DALL-E 2 with and without its prior (2204.06125, 5.1 and figure 8), and prints what it costs.

python docs/draw_modes.py [FAMILY] [--count 100]

Columns are held-out prompts, rows where the image embedding came from: the prior; the text embedding in its place;
nowhere (the caption alone). Printed for `count` more prompts, one candidate each: CLIP's score of what was drawn, and
how often it fits its own caption better than its twin's (objects swapped, another count, another background), which
shows whether the composition came out.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from draw_heldout import CELL, held_out_prompts

from genpipe.data.scenes import EmojiScenes, Twins
from genpipe.images import make_grid, stack_levels, to_unit
from pipelines.dalle2 import DALLE2Pipeline
from pipelines.family import load_family

MODES = ("prior", "text", "caption")
KINDS = ("swapped", "recounted", "recoloured")


@torch.no_grad()
def fits_its_caption(pipeline: DALLE2Pipeline, twins: list[Twins], mode: str) -> tuple[float, float]:
    """Mean score of one drawn picture per caption, and the share that scores its own caption above the twin's."""
    sampling = pipeline.resolve_sampling({"upsample": False, "mode": mode})
    drawn = pipeline([t.caption for t in twins], num_candidates=1, keep=1, sampling=sampling)
    pixels = to_unit(stack_levels([np.asarray(images[0]) for images in drawn.images]))
    picture = pipeline.clip.encode_image(pixels).normalized
    own, other = (
        (picture * pipeline.clip.encode_text(captions).normalized).sum(dim=1)
        for captions in ([t.caption for t in twins], [t.twin_caption for t in twins])
    )
    return float(own.mean()), float((own > other).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description="DALL-E 2 with and without its prior.")
    parser.add_argument("family", nargs="?", default="nano")
    parser.add_argument("--count", type=int, default=100, help="prompts for each kind of twin")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "modes.png")
    arguments = parser.parse_args()
    pipeline = load_family(arguments.family).pipeline("dalle2")
    prompts = held_out_prompts()
    pictures, labels = [], []
    for mode in MODES:
        drawn = pipeline(prompts, num_candidates=4, keep=1, mode=mode)
        pictures += [images[0] for images in drawn.images]
        labels += [f"{mode}: {prompt}" for prompt in prompts]
    make_grid(pictures, columns=len(prompts), labels=labels, scale=max(1, CELL // pictures[0].width)).save(
        arguments.out
    )
    scenes = EmojiScenes(split="heldout", objects="common")
    for mode in MODES:
        for kind in KINDS if arguments.count else ():
            twins = [scenes.twins(2000 + i, kind=kind) for i in range(arguments.count)]
            score, share = fits_its_caption(pipeline, twins, mode)
            print(f"{mode:8s} {kind:11s} score {score:.4f}, own caption above its twin's {100 * share:.1f} %")


if __name__ == "__main__":
    main()
