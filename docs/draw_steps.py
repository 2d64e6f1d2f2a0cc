"""Draws docs/steps.png: the same candidates of DALL-E 2 in 5, 10, 25 and 50 steps of the decoder, with CLIP's scores.

python docs/draw_steps.py [FAMILY] [--scores 40]

Printed: the mean score of one candidate for each of so many held-out prompts, and the seconds that the decoder took for
a candidate.
"""

import argparse
import time
from pathlib import Path

import numpy as np
from draw_heldout import CELL, held_out_prompts

from genpipe.data.scenes import EmojiScenes
from genpipe.images import make_grid
from pipelines.family import load_family

STEPS = (5, 10, 25, 50)


def main() -> None:
    parser = argparse.ArgumentParser(description="Quality against steps.")
    parser.add_argument("family", nargs="?", default="nano")
    parser.add_argument("--scores", type=int, default=40, help="held-out prompts for the mean score; 0: none")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "steps.png")
    arguments = parser.parse_args()
    pipeline = load_family(arguments.family).pipeline("dalle2")
    prompts = held_out_prompts()
    pictures, labels = [], []
    for steps in STEPS:
        drawn = pipeline(prompts, num_candidates=1, keep=1, num_inference_steps=steps)
        pictures += [images[0] for images in drawn.images]
        labels += [f"{steps} steps: {p}" for p in prompts]
    make_grid(pictures, columns=len(prompts), labels=labels, scale=max(1, CELL // pictures[0].width)).save(
        arguments.out
    )
    if arguments.scores:
        scenes = EmojiScenes(split="heldout", objects="common")
        captions = [
            scenes.caption(scenes.scene(i), np.random.default_rng(i), True)
            for i in range(1000, 1000 + arguments.scores)
        ]
        small = pipeline.resolve_sampling({"upsample": False})
        for steps in STEPS:
            start = time.perf_counter()
            drawn = pipeline(captions, num_candidates=1, keep=1, num_inference_steps=steps, sampling=small)
            seconds = (time.perf_counter() - start) / len(captions)
            scores = np.array([row[0] for row in drawn.scores])
            print(
                f"{steps:3d} steps: score {scores.mean():.4f} +- {scores.std() / len(scores) ** 0.5:.4f}, "
                f"{seconds:.2f} s a candidate, alone"
            )


if __name__ == "__main__":
    main()
