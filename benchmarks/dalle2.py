"""Speed and memory of drawing with DALL-E 2: seconds a picture by stage, and the loop against one written by hand.

    python benchmarks/dalle2.py [FAMILY] [--candidates 4] [--threads 2]

All in one run on the same weights. The hand-written loop is the shortest that diffusers' own parts allow: text states
and projections computed anew at every step; same scheduler and noise, but x_0 is not clamped.
"""

import argparse
import json
import resource
import time

import torch
from sampling import seconds
from torch import Tensor

from genpipe.dalle2.sampling import DECODER, noise_of, scheduler_for
from genpipe.images import signed_to_unit
from pipelines.candidates import blocks
from pipelines.dalle2 import ROWS_TOGETHER, DALLE2Pipeline
from pipelines.family import load_family

PROMPT = "three strawberries on a white background"


@torch.no_grad()
def by_hand(pipeline: DALLE2Pipeline, embedding: Tensor, seeds: list[int]) -> Tensor:
    """Pixels (n, 3, H, W) of image embeddings (n, D): scheduler.step in a loop, everything computed at every step."""
    decoder, clip, sampling = pipeline.decoder, pipeline.clip, pipeline.resolve_sampling()
    scheduler = scheduler_for(sampling.scheduler, decoder)
    scheduler.set_timesteps(sampling.num_inference_steps)
    side = decoder.config.resolution
    x = noise_of(seeds, (3, side, side), DECODER)
    for t in scheduler.timesteps:
        answers = []
        for caption, image in ((PROMPT, embedding), ("", None)):
            text = clip.encode_text([caption] * len(seeds))
            answers.append(decoder(x, t, image, text.embedding, text.states, text.mask)[:, :3])
        prediction = answers[1] + sampling.guidance_scale * (answers[0] - answers[1])
        x = scheduler.step(prediction, t, x, return_dict=False)[0]
    return signed_to_unit(x).clamp(0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed and memory of DALL-E 2 by stage.")
    parser.add_argument("family", nargs="?", default="nano")
    parser.add_argument("--candidates", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    start = time.perf_counter()
    pipeline = load_family(arguments.family).pipeline("dalle2")
    loading = time.perf_counter() - start
    count, sampling = arguments.candidates, pipeline.resolve_sampling()
    encoded = pipeline.encode_prompts([PROMPT], sampling.negative_prompt, None)
    (block,) = blocks(1, count, count, ROWS_TOGETHER)
    with torch.no_grad():
        embedding = pipeline.image_embeddings(encoded, block, 0, sampling)
        pixels = pipeline.decode(encoded, embedding, block, 0, sampling)
        stages = {
            "prior": seconds(lambda: pipeline.image_embeddings(encoded, block, 0, sampling)),
            "decoder": seconds(lambda: pipeline.decode(encoded, embedding, block, 0, sampling)),
            "upsampler": seconds(lambda: pipeline.upsample(pixels, block, 0, sampling)) if sampling.upsample else 0.0,
        }
        assert embedding is not None
        hand = seconds(lambda: by_hand(pipeline, embedding[0], list(range(count))))
        difference = (by_hand(pipeline, embedding[0], list(range(count))) - pixels[0]).abs().mean()
    whole = seconds(lambda: pipeline(PROMPT, num_candidates=count, keep=count))
    print(
        json.dumps(
            {
                "candidates": count,
                "threads": arguments.threads,
                "decoder_steps": sampling.num_inference_steps,
                "prior_steps": sampling.prior_steps,
                "upsampler_steps": sampling.upsampler_steps,
                "loading_s": loading,
                "seconds_a_picture": {stage: value / count for stage, value in stages.items()},
                "whole_call_s": whole,
                "by_hand_over_decoder": hand / stages["decoder"],
                "mean_difference_of_their_pixels": float(difference),
                "peak_memory_MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
