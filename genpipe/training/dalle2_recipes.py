"""The shipped recipes of DALL-E 2 (2204.06125); each docstring says hardware, time and the number to expect."""

from genpipe.training.config import DataConfig, OptimizerConfig, Recipe, RunConfig


def decoder() -> Recipe:
    """The family's decoder of DALL-E 2: 32 x 32 pictures, folded to 16 x 16; 13.6 million parameters.

    One core: 25 to 28 pictures/s, 130 minutes. Held-out error of v on even time steps: 0.114 at step 1,200, 0.100 at
    1,800, 0.094 at 2,700, 0.091 at 3,600. The shipped weights came from one run whose settings changed on the way,
    while what layout needs was being found: 1,236 steps with min-SNR weights (gamma 5), which all but ignore the noisy
    steps that decide where things go; then none, with timestep_shift 2 from step 1,735; text_dropout 0.2 and
    timestep_shift 6 from 2,440, 0.1 and 4 from 2,845 to 4,080, with a learning rate raised once and falling to 0; then
    1,800 more beside the CLIP that tells places apart. With optimizer.method=muon, optimizer.learning_rate=1.2e-3 the
    error, everything given, fell from 0.089 to 0.080 in 500 steps; then, with data.objects=common from step 837 and
    timestep_shift 2 from 1,110 on, to 0.063 at 2,450 (on common objects): 95 minutes of one core; 185 steps later
    data.unplaced_share=0.3 for 625: 0.0612, 87 minutes of a core without bf16; then 345 and, with data.emphasis naming
    the ten objects that failed most often, 380: 0.0607, 80 minutes; then, with objective.contrast_power=1 and ten
    others, 420: 0.0633 to 0.0609 on other pictures, 43 minutes; then, with data.faint_share=0.35 and ten others, 480:
    0.0603, 50 minutes; 570 more: 0.0590, 62; the mean of three such states (`genpipe average`) 0.0584, and of that and
    where 345 steps from it led 0.0581, 41; then 3,000 with data.blended_share=0.35, at a rate of 6e-4, on a core with
    bf16: 0.0564 to 0.0513 on other pictures, 73 minutes; 3,200 more: 0.0480, 70 minutes. With the paper's text_dropout
    of 0.5, as here, half of the pictures teach nothing of the words that say left or above.
    """
    return Recipe(
        name="decoder",
        stage="decoder",
        model={
            "unet_config": {
                "block_out_channels": [96, 192, 192],
                "layers_per_block": 1,
                "down_block_types": [
                    "ResnetDownsampleBlock2D",
                    "SimpleCrossAttnDownBlock2D",
                    "SimpleCrossAttnDownBlock2D",
                ],
                "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
                "up_block_types": ["SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
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
            "text_dropout": 0.5,
            "min_snr_gamma": 0.0,
            "contrast_power": 0.0,
            "timestep_shift": 4.0,
            "bound_weight": 0.001,
        },
        optimizer=OptimizerConfig(learning_rate=1e-3, beta_2=0.99, weight_decay=1e-2, warmup_steps=300),
        run=RunConfig(steps=4080, batch_size=48, ema_decay=0.998),
    )


def prior() -> Recipe:
    """The family's prior of DALL-E 2: five layers of width 192; 2.4 million parameters.

    One core, shared with other work: 12 to 29 pictures/s, each with 8 noises; 70 minutes. Cosine of sampled embeddings
    to the true ones, held-out scenes, 10 steps: 0.857 at step 500 and 0.858 at 1,700 without guidance, 0.886 at 1,700
    with guidance 2; the text embedding itself has 0.842. The shipped weights went on for 800 steps beside the present
    CLIP, and then, with optimizer.method=muon, data.objects=common, data.unplaced_share=0.5 and batches of 64, for 900
    (37 minutes of a core without bf16, shared). The last taught DALL-E 2 two objects in no stated place: right in 81 %
    of 48 pictures, 50 to 58 % before, 79 % from the embeddings of true pictures. 750 more: held-out error of x_0 0.0562
    to 0.0544, 25 minutes.
    """
    return Recipe(
        name="prior",
        stage="prior",
        model={"num_layers": 5, "num_heads": 3, "head_dim": 64, "dropout": 0.0, "embedding_scale": "unit"},
        objective={"clip": "", "new_clip": False, "text_dropout": 0.1, "repeats": 8, "statistics_pairs": 2048},
        optimizer=OptimizerConfig(learning_rate=1e-3, beta_2=0.96, weight_decay=6e-2, epsilon=1e-6, warmup_steps=200),
        run=RunConfig(steps=1700, batch_size=32, ema_decay=0.998),
    )


def prior_paper() -> Recipe:
    """The paper's diffusion prior (2204.06125, 2.2 and C): one billion parameters, one scale for all coordinates.

    Its batch was 4,096 pictures, with one noise each, for 600,000 steps; not run here. data.source must name your
    pictures, objective.clip a trained CLIP.
    """
    return Recipe(
        name="prior-paper",
        stage="prior",
        model={"num_layers": 24, "num_heads": 32, "head_dim": 64, "dropout": 0.0, "embedding_scale": "unit"},
        objective={"clip": "", "new_clip": False, "text_dropout": 0.1, "repeats": 1, "statistics_pairs": 0},
        data=DataConfig(size=256),
        optimizer=OptimizerConfig(learning_rate=1.1e-4, beta_2=0.96, weight_decay=6e-2, epsilon=1e-6, warmup_steps=0),
        run=RunConfig(steps=600_000, batch_size=64, accumulate=64, ema_decay=0.9999, validate_every=5000),
    )


def upsampler() -> Recipe:
    """The family's upsampler, 32 to 128 pixels: crops of 64, folded to 32 x 32; 0.8 million parameters.

    One core: about 100 crops/s, 15 minutes. Held-out scenes: 25.5 dB at step 600, 26.0 at 1,200, 26.3 at 2,400, where
    bicubic has 25.0; gradient energy, as a share of the true one, 0.62 where bicubic has 0.15. The shipped weights went
    on with whole pictures, eight at a time, half of them through the dVAE as it was then (objective.dvae,
    objective.crop=128), data.objects=common, optimizer.method=muon: 302 steps, and 1,100 with
    objective.contrast_power=1, 25 minutes: plain backgrounds stay plainer, sharpness is a little less; then 1,800 with
    data.faint_share=0.35, 37 minutes: 27.2 to 27.6 dB on common objects, energy 0.67; then 2,600 with
    objective.dvae_share=0.65 beside the dVAE that had gone on, 10 minutes of a core with bf16: what went through it
    from 21.8 to 22.1 dB. These figures but the last are of drawings before sharpening, which costs 0.5 dB and brings
    the energy to 0.94.
    """
    return Recipe(
        name="upsampler",
        stage="upsampler",
        model={
            "unet_config": {
                "block_out_channels": [32, 32, 64],
                "layers_per_block": 1,
                "down_block_types": ["DownBlock2D"] * 3,
                "up_block_types": ["UpBlock2D"] * 3,
                "resnet_time_scale_shift": "scale_shift",
            },
            "patch_size": 2,
            "prediction_type": "sample",
            "residual": True,
            # What it will enlarge was drawn by a decoder or a dVAE: now softer than a true picture, now noisier.
            "corruption": {"kind": "blur", "kernel": 5, "sigma": [0.0, 1.0], "noise": [0.0, 0.03]},
            "num_inference_steps": 5,
            "sharpening": 1.0,
        },
        objective={"crop": 64, "min_snr_gamma": 0.0, "contrast_power": 0.0, "dvae": "", "dvae_share": 0.5},
        data=DataConfig(size=128),
        optimizer=OptimizerConfig(learning_rate=2e-3, beta_2=0.99, weight_decay=1e-2, warmup_steps=200),
        run=RunConfig(steps=2400, batch_size=32, ema_decay=0.998, validate_every=600),
    )


def upsampler_paper_1() -> Recipe:
    """The paper's first upsampler (2204.06125, C): 64 to 256 pixels, 692 million parameters, Gaussian blur.

    Its batch was 1,024 crops for a million steps; not run here. data.source must name your pictures.
    """
    return Recipe(
        name="upsampler-paper-1",
        stage="upsampler",
        model={
            "unet_config": {
                "block_out_channels": [320, 640, 960, 1280],
                "layers_per_block": 3,
                "down_block_types": ["ResnetDownsampleBlock2D"] * 4,
                "up_block_types": ["ResnetUpsampleBlock2D"] * 4,
                "dropout": 0.1,
            },
            "corruption": {"kind": "blur", "kernel": 3, "sigma": [0.6, 0.6], "noise": [0.0, 0.0]},
            "num_inference_steps": 27,
        },
        objective={"crop": 64, "min_snr_gamma": 0.0, "contrast_power": 0.0, "dvae": "", "dvae_share": 0.5},
        data=DataConfig(size=256),
        optimizer=OptimizerConfig(learning_rate=1.2e-4, beta_2=0.999, weight_decay=0.0, warmup_steps=0),
        run=RunConfig(steps=1_000_000, batch_size=32, accumulate=32, ema_decay=0.9999, validate_every=5000),
    )


def upsampler_paper_2() -> Recipe:
    """The paper's second upsampler (2204.06125, C): 256 to 1,024 pixels, the BSR chain, a linear noise schedule.

    Its batch was 512 crops for a million steps; not run here. data.source must name your pictures.
    """
    return Recipe(
        name="upsampler-paper-2",
        stage="upsampler",
        model={
            "unet_config": {
                "block_out_channels": [192, 192, 384, 384, 768, 768],
                "layers_per_block": 2,
                "down_block_types": ["ResnetDownsampleBlock2D"] * 6,
                "up_block_types": ["ResnetUpsampleBlock2D"] * 6,
                "dropout": 0.1,
            },
            "beta_schedule": "linear",
            "corruption": {
                "kind": "bsr",
                "kernel": 15,
                "isotropic": [0.1, 2.8],
                "anisotropic": [0.5, 4.0],
                "factor": [0.25, 1.25],
                "filters": ["area", "bilinear", "bicubic"],
                "noise": [0.004, 0.1],
                "grey": 0.5,
                "quality": [30, 95],
                "probability": 0.75,
            },
            "num_inference_steps": 15,
        },
        objective={"crop": 256, "min_snr_gamma": 0.0, "contrast_power": 0.0, "dvae": "", "dvae_share": 0.5},
        data=DataConfig(size=1024),
        optimizer=OptimizerConfig(learning_rate=1e-4, beta_2=0.999, weight_decay=0.0, warmup_steps=0),
        run=RunConfig(steps=1_000_000, batch_size=8, accumulate=64, ema_decay=0.9999, validate_every=5000),
    )
