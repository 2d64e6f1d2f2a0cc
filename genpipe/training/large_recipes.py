"""Recipes for one GPU: 64 x 64 pictures, 256 x 256 out, all objects, with styles; none of them has been run.

Costs are computed, not run: FLOPs of one training step (forward and backward, the frozen parts' forward passes among
them) by torch's counter, with texts of full length, times pictures and steps, at an assumed 100 TFLOP/s of bf16, as a
card of the A100's class may give. Scenes are drawn on the CPU: with too few `data.workers` the GPU waits, and the small
parts take longer than that. The parts need one another as the small ones do: objective.dvae, objective.clip.
"""

from genpipe.clip.architecture import nano_architecture
from genpipe.training.config import DataConfig, OptimizerConfig, Recipe, RunConfig

_TEXT_LENGTH = 48


def _scenes(size: int = 64, hard_negatives: float = 0.0, plain_batches: int = 0) -> DataConfig:
    return DataConfig(size=size, styles=True, workers=12, hard_negatives=hard_negatives, plain_batches=plain_batches)


def clip_64() -> Recipe:
    """CLIP, ViT over 8 x 8 patches of 64 x 64 pictures, width 384: 29.6 million parameters.

    Hardware: one GPU with 40 GB. Computed, not run: 10.2 GFLOP per picture, 0.87 GPU-hours.
    """
    shape = {"image_size": 64, "patch_size": 8, "width": 384, "vision_layers": 10, "text_layers": 6}
    return Recipe(
        name="clip-64",
        stage="clip",
        model={"architecture": nano_architecture(2048, context_length=_TEXT_LENGTH, embed_dim=384, **shape)},
        objective={
            "vocab_size": 2048,
            "tokenizer": "",
            "tokenizer_captions": 50_000,
            "degrade": 0.3,
            "local_loss": False,
            "twin_weight": 1.0,
            "freeze_text": False,
            "dvae": "",
            "drawn": "",
            "drawn_rows": 32,
            "drawn_weight": 1.0,
        },
        data=_scenes(hard_negatives=0.8, plain_batches=2000),
        optimizer=OptimizerConfig(method="muon", learning_rate=5e-4, beta_2=0.98, weight_decay=0.1, warmup_steps=1000),
        run=RunConfig(steps=30_000, batch_size=1024, precision="bf16", validate_every=2000),
    )


def dvae_64() -> Recipe:
    """The dVAE, 64 x 64 pictures, 16 x 16 tokens of 4,096 codes: 10.3 million parameters.

    Hardware: one GPU with 24 GB. Computed, not run: 39.2 GFLOP per picture, 0.28 GPU-hours.
    """
    return Recipe(
        name="dvae-64",
        stage="dvae",
        model={
            "resolution": 64,
            "num_codes": 4096,
            "widths": [256, 256],
            "blocks_per_group": 4,
            "code_width": 64,
            "space_to_depth": 2,
            "first_kernel": 3,
            "head": "distance",
            "bottleneck": 2,
            "branch_gain": 0.35,
        },
        objective={
            "temperature": 1.0,
            "final_temperature": 1 / 16,
            "temperature_steps": 12_000,
            "kl_weight": 0.1,
            "kl_steps": 5000,
            "squared_error": 1000.0,
            "contrast_power": 0.0,
            "freeze_codes": False,
            "keep_codes": 0.0,
            "warm_up_steps": 1000,
        },
        data=_scenes(),
        optimizer=OptimizerConfig(method="muon", learning_rate=1e-3, warmup_steps=500),
        run=RunConfig(steps=20_000, batch_size=128, precision="bf16", validate_every=1000),
    )


def dalle1_64() -> Recipe:
    """DALL-E 1's transformer, 48 text positions and 256 image tokens of `dvae-64`: 44.2 million parameters.

    Hardware: one GPU with 40 GB. Computed, not run: 85.8 GFLOP per picture, 1.83 GPU-hours.
    """
    return Recipe(
        name="dalle1-64",
        stage="dalle1",
        model={
            "text_length": _TEXT_LENGTH,
            "width": 512,
            "num_layers": 12,
            "num_heads": 8,
            "attention": "causal",
            "kernel": 11,
            "dropout": 0.0,
        },
        objective={
            "dvae": "",
            "vocab_size": 2048,
            "tokenizer": "",
            "tokenizer_captions": 50_000,
            "caption_dropout": 0.1,
            "bpe_dropout": 0.1,
            "text_weight": 1 / 8,
            "codebook_init": True,
        },
        data=_scenes(),
        optimizer=OptimizerConfig(
            method="muon", learning_rate=6e-4, beta_2=0.96, weight_decay=4.5e-2, warmup_steps=1000
        ),
        run=RunConfig(steps=60_000, batch_size=128, precision="bf16", validate_every=2000),
    )


def prior_64() -> Recipe:
    """DALL-E 2's prior over the embeddings of `clip-64`, eight layers of width 512: 26.6 million parameters.

    Hardware: one GPU with 24 GB. Computed, not run: 13.1 GFLOP per picture, 0.37 GPU-hours.
    """
    return Recipe(
        name="prior-64",
        stage="prior",
        model={"num_layers": 8, "num_heads": 8, "head_dim": 64, "dropout": 0.0, "embedding_scale": "unit"},
        objective={"clip": "", "new_clip": False, "text_dropout": 0.1, "repeats": 8, "statistics_pairs": 8192},
        data=_scenes(),
        optimizer=OptimizerConfig(
            method="muon", learning_rate=5e-4, beta_2=0.96, weight_decay=6e-2, epsilon=1e-6, warmup_steps=1000
        ),
        run=RunConfig(steps=40_000, batch_size=256, precision="bf16", ema_decay=0.9995, validate_every=2000),
    )


def decoder_64() -> Recipe:
    """DALL-E 2's decoder beside `clip-64`, 64 x 64 pictures folded to 32 x 32: 108.4 million parameters.

    Hardware: one GPU with 80 GB, or run.accumulate=2 with half of the batch size and 40 GB. Computed, not run:
    102 GFLOP per picture, 5.45 GPU-hours.
    """
    return Recipe(
        name="decoder-64",
        stage="decoder",
        model={
            "unet_config": {
                "block_out_channels": [192, 384, 384, 384],
                "layers_per_block": 2,
                "down_block_types": ["ResnetDownsampleBlock2D"] + ["SimpleCrossAttnDownBlock2D"] * 3,
                "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
                "up_block_types": ["SimpleCrossAttnUpBlock2D"] * 3 + ["ResnetUpsampleBlock2D"],
                "attention_head_dim": 64,
                "resnet_time_scale_shift": "scale_shift",
            },
            "patch_size": 2,
            "prediction_type": "v_prediction",
        },
        objective={
            "clip": "",
            "new_clip": False,
            "image_dropout": 0.1,
            "text_dropout": 0.3,
            "min_snr_gamma": 0.0,
            "contrast_power": 0.0,
            "timestep_shift": 4.0,
            "bound_weight": 0.001,
        },
        data=_scenes(),
        optimizer=OptimizerConfig(method="muon", learning_rate=4e-4, weight_decay=1e-2, warmup_steps=2000),
        run=RunConfig(steps=150_000, batch_size=128, precision="bf16", ema_decay=0.9998, validate_every=5000),
    )


def upsampler_256() -> Recipe:
    """The upsampler, 64 to 256 pixels: crops of 128, folded to 64 x 64: 10.5 million parameters.

    Hardware: one GPU with 24 GB. Computed, not run: 49.2 GFLOP per picture, 0.26 GPU-hours.
    The font's own pictures have about 128 pixels a side, so that larger objects are as soft as that.
    """
    return Recipe(
        name="upsampler-256",
        stage="upsampler",
        model={
            "unet_config": {
                "block_out_channels": [96, 96, 192],
                "layers_per_block": 2,
                "down_block_types": ["DownBlock2D"] * 3,
                "up_block_types": ["UpBlock2D"] * 3,
                "resnet_time_scale_shift": "scale_shift",
            },
            "patch_size": 2,
            "prediction_type": "sample",
            "residual": True,
            "corruption": {"kind": "blur", "kernel": 5, "sigma": [0.0, 1.0], "noise": [0.0, 0.03]},
            "num_inference_steps": 5,
        },
        objective={"crop": 128, "min_snr_gamma": 0.0, "contrast_power": 0.0, "dvae": "", "dvae_share": 0.5},
        data=_scenes(size=256),
        optimizer=OptimizerConfig(method="muon", learning_rate=5e-4, weight_decay=1e-2, warmup_steps=500),
        run=RunConfig(steps=30_000, batch_size=64, precision="bf16", ema_decay=0.9995, validate_every=2000),
    )
