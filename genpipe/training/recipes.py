"""The shipped recipes side by side; each docstring says hardware, time and the number to expect.

`genpipe train NAME --set key=value` changes any field; larger sizes are the same code with other numbers.
"""

from collections.abc import Callable

from genpipe.clip.architecture import nano_architecture
from genpipe.errors import InputError
from genpipe.training.config import DataConfig, OptimizerConfig, Recipe, RunConfig
from genpipe.training.dalle2_recipes import (
    decoder,
    prior,
    prior_paper,
    upsampler,
    upsampler_paper_1,
    upsampler_paper_2,
)
from genpipe.training.large_recipes import clip_64, dalle1_64, decoder_64, dvae_64, prior_64, upsampler_256


def dvae() -> Recipe:
    """The family's dVAE: 32 x 32 pictures, 8 x 8 tokens of 1,024 codes.

    One core: 45 to 130 pictures/s, 10 to 25 minutes. Held-out scenes: 20.9 dB at step 400, 22.4 at 800, 22.9 at 1,200,
    23.1 at 2,000; 127 of the codes unused on 256 scenes. The shipped weights went on from there with
    optimizer.method=muon, optimizer.learning_rate=2e-3, objective.temperature=0.0625, objective.kl_weight=0 and batches
    of 64, for 1,178 steps and then, with data.objects=common, for 1,122: 24.2 dB on common objects, 22.8 before; then
    the decoder alone with objective.freeze_codes=true and objective.contrast_power=1 for 980: 24.9 dB, 17 minutes;
    then, with objective.keep_codes=0.8 and data.faint_share=0.4 in place of frozen codes, 800 steps: 25.1 dB, 32
    minutes, and 8 % of the tokens changed; with keep_codes=0.6, 820 more: 25.3 dB, 35 minutes, 9 %; on a core with
    bf16, 1,400 with data.blended_share=0.35, 1,300 with keep_codes=0.5, 450 of the decoder alone and 1,250 with
    keep_codes=0.8: 26.1 dB, 43 minutes, 19 %; 2,600 with 0.5 and data.emphasis (eight objects): 26.4 dB, 29, 12 %.
    """
    return Recipe(
        name="dvae",
        stage="dvae",
        model={
            "resolution": 32,
            "num_codes": 1024,
            "widths": [192],
            "blocks_per_group": 4,
            "code_width": 32,
            "space_to_depth": 4,
            "first_kernel": 3,
            "head": "distance",
            "bottleneck": 2,
            "branch_gain": 0.5,
        },
        objective={
            "temperature": 1.0,
            "final_temperature": 1 / 16,
            "temperature_steps": 1500,
            "kl_weight": 0.1,
            "kl_steps": 1000,
            "squared_error": 1000.0,
            "contrast_power": 0.0,
            "freeze_codes": False,
            "keep_codes": 0.0,
            "warm_up_steps": 300,
        },
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=50),
        run=RunConfig(steps=2000, batch_size=32),
    )


def clip() -> Recipe:
    """The family's CLIP: ViT over 4 x 4 patches of 32 x 32 pictures, with twins as hard negatives.

    One core: about 60 pictures/s, 90 minutes. Objects and colours come first (retrieval among 100 held-out captions
    above 0.8 within 80,000 pictures), then places within about 30,000 pictures of the curriculum, counts last. The
    shipped weights came from several runs in a row, while this order was being found: 923 steps of 128, then 2,689 of
    64, the curriculum among the last 1,682; then, when turned twins were added, 837 and 900 of 128, the last with most
    twins recounted. Of 1,000 held-out questions each, they answer 96 % about counts and 98 % about places.

    objective.drawn (a folder of `genpipe data draw`) adds drawn pictures as negatives, objective.dvae passes some
    pictures through a dVAE first, objective.freeze_text leaves the texts as prior and decoder know them. What that
    bought is told in the README; the shipped weights were made without.
    """
    return Recipe(
        name="clip",
        stage="clip",
        model={"architecture": nano_architecture(vocab_size=2048)},
        objective={
            "vocab_size": 2048,
            "tokenizer": "",
            "tokenizer_captions": 20000,
            "degrade": 0.3,
            "local_loss": False,
            "twin_weight": 1.0,
            "freeze_text": False,
            "dvae": "",
            "drawn": "",
            "drawn_rows": 32,
            "drawn_weight": 1.0,
        },
        data=DataConfig(hard_negatives=0.8, plain_batches=3000),
        optimizer=OptimizerConfig(learning_rate=1e-3, beta_2=0.98, weight_decay=0.1, warmup_steps=200),
        run=RunConfig(steps=5000, batch_size=64),
    )


def dalle1() -> Recipe:
    """The family's transformer: 24 text positions and 64 image tokens.

    One core: about 36 pictures/s, two: about 60; 80 minutes. Held-out image loss in nats per token: 2.77 at step 500,
    2.54 at 1,000, 2.32 at 2,000, 2.19 at 3,000, 2.12 at 4,000, 2.09 at 4,900, 2.03 at 6,400 (the learning rate was
    raised once more after 4,900). It was still falling at the end. The shipped weights went on from there beside the
    dVAE that had been trained on, with optimizer.method=muon, optimizer.learning_rate=1.2e-3, data.objects=common and
    batches of 64: 2.24 at step 250, 2.03 at 500, 1.80 at 1,000, 1.69 at 1,850, 62 minutes of one core; then with
    data.unplaced_share=0.3 for 550 steps: 1.65, on such captions, 45 minutes of a core without bf16; then, with
    data.emphasis naming the ten objects that failed most often, 322 and, on two processes with batches of 32 each, 700:
    1.64 to 1.55 on other such captions, 30 minutes of one such core and 33 of two; then 1,010 with another ten objects,
    1.47, 78 minutes of one; then 960 on two processes, 1.43, 49 minutes of two; then 251, 486 with
    data.faint_share=0.35 and 630 beside the dVAE that had gone on: 1.41, 106 minutes of one; then
    560 and 410 in the same way: 1.410 on the new tokens, 77 minutes; the mean of four such states (`genpipe average`):
    1.365; from there 740 in the same way, 69 minutes, 1.376, and the mean of that and its start: 1.346, or 1.407 on
    other scenes. Beside the dVAE that had gone on, with data.blended_share=0.2, on a core with bf16: 1,300 steps, the
    mean of start and end (0.3 and 0.7), 1,150 with dropout 0.1, the mean again (halves), 800 without, the mean again
    (0.4 and 0.6): 1.362 on the new tokens and those scenes, where 1.479 was the start; 60 minutes. Beside the dVAE that
    had gone on again, 2,300 and the mean of start and end (1 to 2): 1.391 to 1.325; 40 minutes.
    """
    return Recipe(
        name="dalle1",
        stage="dalle1",
        model={
            "text_length": 24,
            "width": 256,
            "num_layers": 6,
            "num_heads": 4,
            "attention": "causal",
            "kernel": 11,
            "dropout": 0.0,
        },
        objective={
            "dvae": "",
            "vocab_size": 2048,
            "tokenizer": "",
            "tokenizer_captions": 20000,
            "caption_dropout": 0.1,
            "bpe_dropout": 0.1,
            "text_weight": 1 / 8,
            "codebook_init": True,
        },
        optimizer=OptimizerConfig(learning_rate=1e-3, beta_2=0.96, weight_decay=4.5e-2, warmup_steps=200),
        run=RunConfig(steps=6400, batch_size=32),
    )


def image_text() -> Recipe:
    """A label for a picture and a text together, from a few thousand labelled pairs: head over a frozen CLIP.

    objective.head: sum, mlp or transformer; objective.tune=true trains the CLIP with it. Name your pairs with --data.
    One core, nano's CLIP, 4,000 pairs of emoji scenes: under a minute, mlp. Whether a text fits its picture or the
    picture's twin: mlp 0.95, transformer (3,000 steps, ten minutes) 0.73; which parts of a text are true of its
    picture: 0.96 and 0.77. See docs/image_text_heads.py. A transformer learns nothing for hundreds of steps: give it
    patience=0.
    """
    return Recipe(
        name="image-text",
        stage="image_text",
        model={"linear": True, "width": 128, "num_layers": 2, "num_heads": 4, "dropout": 0.1},
        objective={
            "clip": "nano",
            "head": "mlp",
            "tune": False,
            "tower_rate": 0.3,
            "layer_decay": 0.8,
            "class_weights": "none",
            "validation_share": 0.1,
            "patience": 5,
            "cache_megabytes": 2000,
        },
        optimizer=OptimizerConfig(learning_rate=1e-3, beta_2=0.98, weight_decay=5e-2, warmup_steps=50),
        run=RunConfig(steps=2000, batch_size=32, ema_decay=0.99, validate_every=200),
    )


def dvae_paper() -> Recipe:
    """The paper's dVAE (2102.12092, A): 256 x 256 pictures, 32 x 32 tokens of 8,192 codes, linear head, its schedules.

    The paper used 64 V100 with 8 pictures each; not run here. data.source must name your pictures.
    """
    return Recipe(
        name="dvae-paper",
        stage="dvae",
        model={
            "resolution": 256,
            "num_codes": 8192,
            "widths": [256, 512, 1024, 2048],
            "blocks_per_group": 2,
            "code_width": 128,
            "space_to_depth": 1,
            "first_kernel": 7,
            "head": "linear",
            "bottleneck": 4,
            "branch_gain": None,
        },
        objective={
            "temperature": 1.0,
            "final_temperature": 1 / 16,
            "temperature_steps": 150_000,
            "kl_weight": 6.6,
            "kl_steps": 5000,
            "squared_error": 0.0,
            "contrast_power": 0.0,
            "freeze_codes": False,
            "keep_codes": 0.0,
            "warm_up_steps": 0,
        },
        data=DataConfig(size=256, crop="stage_1"),
        optimizer=OptimizerConfig(
            learning_rate=1e-4, beta_2=0.999, weight_decay=1e-4, warmup_steps=0, final_fraction=1 / 80
        ),
        run=RunConfig(steps=1_200_000, batch_size=8, validate_every=5000),
    )


def dalle1_paper() -> Recipe:
    """The paper's transformer (2102.12092, 2.2 and B): 12 billion parameters, sparse masks. Its vocabulary was 16,384.

    The paper used 1,024 V100, one picture each, for 430,000 steps; not run here.
    """
    return Recipe(
        name="dalle1-paper",
        stage="dalle1",
        model={
            "text_length": 256,
            "width": 3968,
            "num_layers": 64,
            "num_heads": 62,
            "attention": "sparse",
            "kernel": 11,
            "dropout": 0.0,
        },
        objective={
            "dvae": "",
            "vocab_size": 4096,
            "tokenizer": "",
            "tokenizer_captions": 1_000_000,
            "caption_dropout": 0.0,
            "bpe_dropout": 0.1,
            "text_weight": 1 / 8,
            "codebook_init": False,
        },
        data=DataConfig(size=256, crop="stage_2"),
        optimizer=OptimizerConfig(
            learning_rate=4.5e-4, beta_2=0.96, weight_decay=4.5e-2, warmup_steps=5000, clip_norm=4.0
        ),
        run=RunConfig(steps=430_000, batch_size=1, ema_decay=0.99, validate_every=5000),
    )


def detector() -> Recipe:
    """The judge of the composition score: emoji strewn over 64 x 64 pictures, found by heat maps.

    1.8 million parameters. One core: 45 pictures/s, 100 in bf16. Held-out scenes in which exactly what is there was
    seen, of one object, several of a kind, two kinds: 0.47, 0.81, 0.72 at step 800; 0.75, 0.97, 0.85 at 1,200; 0.87,
    0.99, 0.92 at 1,600. The shipped weights went on with optimizer.method=muon and pictures of noise for 1,300 steps:
    0.91, 0.98, 0.97.
    """
    return Recipe(
        name="detector",
        stage="detector",
        model={"size": 64, "width": 64},
        objective={"scrambled": 0.15},
        data=DataConfig(size=64, seed=11),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=100),
        run=RunConfig(steps=4000, batch_size=32),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "dvae": dvae,
    "clip": clip,
    "dalle1": dalle1,
    "decoder": decoder,
    "prior": prior,
    "upsampler": upsampler,
    "image-text": image_text,
    "detector": detector,
    "dvae-64": dvae_64,
    "clip-64": clip_64,
    "dalle1-64": dalle1_64,
    "decoder-64": decoder_64,
    "prior-64": prior_64,
    "upsampler-256": upsampler_256,
    "dvae-paper": dvae_paper,
    "dalle1-paper": dalle1_paper,
    "prior-paper": prior_paper,
    "upsampler-paper-1": upsampler_paper_1,
    "upsampler-paper-2": upsampler_paper_2,
}


def recipe(name: str) -> Recipe:
    """A fresh copy of a shipped recipe. Raises InputError for an unknown name."""
    if name not in RECIPES:
        raise InputError(f'there is no recipe "{name}"; choose one of {", ".join(sorted(RECIPES))}')
    return RECIPES[name]()
