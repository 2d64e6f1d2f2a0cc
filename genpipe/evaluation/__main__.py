"""`python -m genpipe.evaluation FAMILY_FOLDER --out FOLDER`: figures for a family's model card, on held-out scenes."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

from genpipe.clip.model import CLIP
from genpipe.clip.rerank import score
from genpipe.dalle1.dvae import DVAE
from genpipe.dalle1.sampling import generate_tokens
from genpipe.dalle1.transformer import DALLE1Transformer
from genpipe.dalle2.prior import Prior
from genpipe.dalle2.upsampler import Upsampler
from genpipe.data.scenes import EmojiScenes, find_font
from genpipe.errors import InputError
from genpipe.evaluation.best_of_n import best_of_n_curve, check_matplotlib, plot_curve
from genpipe.evaluation.clip import TWIN_KINDS, embed_pairs, retrieval_accuracy, twin_accuracy
from genpipe.evaluation.composition import load_detector
from genpipe.evaluation.detector import SceneDetector
from genpipe.evaluation.prior import prior_figures
from genpipe.evaluation.reconstruction import reconstruction_figures
from genpipe.evaluation.upsampling import upsampling_figures
from genpipe.images import to_unit
from genpipe.parts import load_part


def dvae_figures(
    dvae: DVAE, scenes: EmojiScenes, count: int, detector: SceneDetector | None = None
) -> dict[str, float]:
    """Reconstruction of `count` held-out scenes, as the detector sees it too, and the use of the code book."""
    pictures, _ = scenes.batch(0, count)
    return reconstruction_figures(dvae, to_unit(pictures), detector=detector)


def clip_figures(clip: CLIP, scenes: EmojiScenes, count: int) -> dict[str, float]:
    """Retrieval among 100 held-out captions, and the share of scenes told from each kind of twin."""
    figures = {f"twin_{kind}": twin_accuracy(clip, scenes, kind, count) for kind in TWIN_KINDS}
    return {"retrieval_top1_of_100": retrieval_accuracy(clip, scenes, 100, max(1, count // 100)), **figures}


@torch.no_grad()
def best_of_figures(
    clip: CLIP,
    dvae: DVAE,
    transformer: DALLE1Transformer,
    scenes: EmojiScenes,
    prompts: int,
    candidates: int,
    guidance_scale: float,
) -> tuple[list[dict[str, float]], float]:
    """The best-of-N curve of DALL-E 1 on held-out captions, and the score of the real scenes."""
    examples = [scenes.scene(i) for i in range(prompts)]
    captions = [scenes.caption(s, np.random.default_rng(i), mention_background=True) for i, s in enumerate(examples)]
    pictures = np.stack([scenes.draw(scene) for scene in examples]).transpose(0, 3, 1, 2)
    real = (torch.mul(*embed_pairs(clip, pictures, captions))).sum(dim=1).mean()
    null = transformer.tokenizer([""], transformer.config.text_length)
    rows = []
    for caption in captions:
        batch = transformer.tokenizer([caption], transformer.config.text_length)
        tokens = generate_tokens(
            transformer,
            batch.ids,
            batch.mask,
            [list(range(candidates))],
            guidance_scale=guidance_scale,
            null_text=(null.ids, null.mask),
        )
        rows.append(score(clip, dvae.decode(tokens[0]), caption))
    return best_of_n_curve(torch.stack(rows)), float(real)


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """All figures, written to figures.json and best_of_n.png. Raises InputError for bad input."""
    for name in ("count", "prompts", "candidates", "prior_steps"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; it must be at least 1.")
    check_matplotlib()  # what is missing shows before the work, not after it
    find_font()
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the folder {arguments.out} cannot be used ({error}); choose another --out.") from error
    detector = load_detector()
    clip = load_part(CLIP, arguments.family / "clip")
    dvae = load_part(DVAE, arguments.family / "dvae")
    transformer = load_part(DALLE1Transformer, arguments.family / "transformer")
    scenes = EmojiScenes(size=dvae.config.resolution, split="heldout", objects=arguments.objects)
    curve, real = best_of_figures(
        clip, dvae, transformer, scenes, arguments.prompts, arguments.candidates, arguments.guidance
    )
    figures: dict[str, object] = {
        "dvae": dvae_figures(dvae, scenes, arguments.count, detector),
        "clip": clip_figures(clip, scenes, arguments.count),
        "best_of_n": {"guidance": arguments.guidance, "real_scenes": real, "curve": curve},
    }
    if (arguments.family / "prior").is_dir():
        prior = load_part(Prior, arguments.family / "prior")
        settings = {"num_inference_steps": arguments.prior_steps, "guidance_scale": arguments.prior_guidance}
        figures["prior"] = {**settings, **prior_figures(prior, clip, scenes, arguments.count, **settings)}
    if (arguments.family / "upsampler").is_dir():
        upsampler = load_part(Upsampler, arguments.family / "upsampler")
        side, count = scenes.size * upsampler.config.factor, min(arguments.count, 100)
        large = to_unit(EmojiScenes(size=side, split="heldout", objects=arguments.objects).batch(0, count)[0])
        figures["upsampler"] = upsampling_figures(upsampler, large, range(count), detector=detector)
    try:
        (arguments.out / "figures.json").write_text(json.dumps(figures, indent=1))
        plot_curve(curve, arguments.out / "best_of_n.png", real)
    except OSError as error:
        raise InputError(f"the figures cannot be written to {arguments.out} ({error}).") from error
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(prog="genpipe.evaluation", description="Measure a family on held-out scenes.")
    parser.add_argument("family", type=Path, help="folder with clip/, dvae/, transformer/; and prior/, upsampler/")
    parser.add_argument("--out", type=Path, default=Path("figures"), help="folder for figures.json and best_of_n.png")
    parser.add_argument("--objects", choices=("common", "all"), default="common", help="of the scenes")
    parser.add_argument("--count", type=int, default=1000, help="held-out scenes for reconstruction and CLIP")
    parser.add_argument("--prompts", type=int, default=40, help="held-out prompts for the best-of-N curve")
    parser.add_argument("--candidates", type=int, default=64, help="candidates per prompt for the curve")
    parser.add_argument("--guidance", type=float, default=2.0, help="guidance scale of the drawn candidates")
    parser.add_argument("--prior-steps", type=int, default=10, help="steps of the prior")
    parser.add_argument("--prior-guidance", type=float, default=2.0, help="guidance scale of the prior")
    try:
        figures = measure(parser.parse_args())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
