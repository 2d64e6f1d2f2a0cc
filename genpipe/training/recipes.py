"""The shipped recipes side by side; each docstring says hardware, time and the number to expect.

`genpipe train NAME --set key=value` changes any field; larger sizes are the same code with other numbers.
"""

from collections.abc import Callable

from genpipe.clip.architecture import nano_architecture
from genpipe.errors import InputError
from genpipe.training.config import DataConfig, OptimizerConfig, Recipe, RunConfig


def dvae() -> Recipe:
    """The family's dVAE: 32 x 32 pictures, 8 x 8 tokens."""
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
            "warm_up_steps": 300,
        },
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=50),
        run=RunConfig(steps=4000, batch_size=32),
    )


def clip() -> Recipe:
    """The family's CLIP: ViT over 4 x 4 patches of 32 x 32 pictures, with twins as hard negatives."""
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
        },
        data=DataConfig(hard_negatives=0.8, plain_batches=3000),
        optimizer=OptimizerConfig(learning_rate=1e-3, beta_2=0.98, weight_decay=0.1, warmup_steps=200),
        run=RunConfig(steps=5000, batch_size=64),
    )


def dalle1() -> Recipe:
    """The family's transformer: 24 text positions and 64 image tokens."""
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
        run=RunConfig(steps=7000, batch_size=32),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {"dvae": dvae, "clip": clip, "dalle1": dalle1}


def recipe(name: str) -> Recipe:
    """A fresh copy of a shipped recipe. Raises InputError for an unknown name."""
    if name not in RECIPES:
        raise InputError(f'there is no recipe "{name}"; choose one of {", ".join(sorted(RECIPES))}')
    return RECIPES[name]()
