"""Draws docs/heldout_*.png: the first held-out scenes of each kind, best 4 of 16 candidates each, nothing picked.

python docs/draw_heldout.py [FAMILY] [--pipeline dalle1 | dalle2] [--seed 0]
"""

import argparse
from pathlib import Path

import numpy as np

from genpipe.data.scenes import EmojiScenes
from genpipe.images import make_grid
from pipelines.family import load_family

KINDS = ("single", "single", "count", "count", "left of", "right of", "above", "below")
CELL = 128  # pixels of a picture in the grid


def held_out_prompts() -> list[str]:
    """One prompt for each entry of KINDS: the first held-out scene of that kind or relation that was not used yet."""
    scenes = EmojiScenes(split="heldout", objects="common")
    wanted, prompts, index = list(KINDS), {}, 0
    while wanted:
        scene = scenes.scene(index)
        kind = scene.relation or scene.kind
        if kind in wanted and (scene.kind != "single" or scene.size is None):
            wanted.remove(kind)
            prompts.setdefault(kind, []).append(scenes.caption(scene, np.random.default_rng(index), True))
        index += 1
    return [prompts[kind].pop(0) for kind in KINDS]


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the picture of held-out prompts.")
    parser.add_argument("family", nargs="?", default="nano")
    parser.add_argument("--pipeline", choices=("dalle1", "dalle2"), default="dalle1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: docs/heldout_PIPELINE.png")
    arguments = parser.parse_args()
    out = arguments.out or Path(__file__).parent / f"heldout_{arguments.pipeline}.png"
    pipeline = load_family(arguments.family).pipeline(arguments.pipeline)
    drawn = pipeline(held_out_prompts(), num_candidates=16, keep=4, seed=arguments.seed)
    pictures = [image for images in drawn.images for image in images]
    labels = [f"{prompt} ({s:.2f})" for prompt, row in zip(drawn.prompts, drawn.scores, strict=True) for s in row]
    make_grid(pictures, columns=8, labels=labels, scale=max(1, CELL // pictures[0].width)).save(out)
    print("\n".join(drawn.prompts))


if __name__ == "__main__":
    main()
