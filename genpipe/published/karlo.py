"""Karlo v1 alpha: unCLIP (2204.06125) trained by Kakao Brain, read from its two folders in diffusers' layout, for texts
and for variations of pictures, and from the original checkpoints.

Light: a folder is recognised without torch; karlo_parts.py builds the networks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genpipe.errors import InputError
from genpipe.published.diffusers_folder import (
    INDEX,
    clip_builder,
    clip_files,
    component_config,
    components,
    needed,
    pipeline_class,
    stems_of,
)
from genpipe.published.registry import Licence, Published
from genpipe.published.weight_names import weights_files

if TYPE_CHECKING:
    import torch
    from diffusers import ModelMixin

LICENCE = Licence(
    "CreativeML Open RAIL-M",
    "https://huggingface.co/spaces/CompVis/stable-diffusion-license",
    "commercial use is allowed; whoever passes the weights or their use on must pass on the use restrictions of the "
    "licence's attachment A",
)
PIPELINES = {"UnCLIPPipeline": "karlo-v1-alpha", "UnCLIPImageVariationPipeline": "karlo-v1-alpha-image-variations"}
CLASSES = {
    "prior": {"PriorTransformer"},
    "decoder": {"UNet2DConditionModel"},
    "text_proj": {"UnCLIPTextProjModel"},
    "super_res_first": {"UNet2DModel"},
    "super_res_last": {"UNet2DModel"},
    "text_encoder": {"CLIPTextModelWithProjection"},
    "image_encoder": {"CLIPVisionModelWithProjection"},
    "tokenizer": {"CLIPTokenizer", "CLIPTokenizerFast"},
    "feature_extractor": {"CLIPImageProcessor", "CLIPFeatureExtractor"},
    "prior_scheduler": {"UnCLIPScheduler"},
    "decoder_scheduler": {"UnCLIPScheduler"},
    "super_res_scheduler": {"UnCLIPScheduler"},
}
NETWORKS = ("decoder", "text_proj", "super_res_first", "super_res_last", "text_encoder")
ORIGINALS = {
    "prior": "prior-ckpt-step=01000000-of-01000000.ckpt",
    "decoder": "decoder-ckpt-step=01000000-of-01000000.ckpt",
    "super_res": "improved-sr-ckpt-step=1.2M.ckpt",
    "clip_stats": "ViT-L-14_stats.th",
    "clip": "ViT-L-14.pt",
}
# What the original checkpoints do not say: the sizes of their networks, as diffusers' classes take them.
_UNET = {"block_out_channels": [320, 640, 960, 1280], "layers_per_block": 3}
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "prior": {
        "num_attention_heads": 32,
        "attention_head_dim": 64,
        "num_layers": 20,
        "embedding_dim": 768,
        "num_embeddings": 77,
    },
    "decoder": {
        **_UNET,
        "sample_size": 64,
        "in_channels": 3,
        "out_channels": 6,
        "attention_head_dim": 64,
        "cross_attention_dim": 1536,
        "class_embed_type": "identity",
        "resnet_time_scale_shift": "scale_shift",
        "down_block_types": ["ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3],
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": [*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"],
    },
    "text_proj": {
        "clip_embeddings_dim": 768,
        "clip_extra_context_tokens": 4,
        "cross_attention_dim": 1536,
        "time_embed_dim": 1280,
    },
    "super_res_first": {
        **_UNET,
        "sample_size": 256,
        "in_channels": 6,
        "out_channels": 3,
        "add_attention": False,
        "resnet_time_scale_shift": "default",
        "down_block_types": ["ResnetDownsampleBlock2D"] * 4,
        "up_block_types": ["ResnetUpsampleBlock2D"] * 4,
    },
}
ORIGINAL_CLAMP = 10.0  # of the prior's x_0 in the original sampler; diffusers' scheduler says its own
SAMPLING = {
    "guidance_scale": 8.0,
    "num_inference_steps": 25,
    "scheduler": "unclip",
    "prior_guidance_scale": 4.0,
    "prior_steps": 25,
    "prior_draws": 1,
    "prior_scheduler": "unclip",
    "upsampler_steps": 7,
}
DESCRIPTION = "unCLIP by Kakao Brain: pictures of any subject from English texts, 64 pixels enlarged to 256"


def recognises(source: Path) -> bool:
    """A folder of diffusers' unCLIP pipelines, or one with the original checkpoints under their names."""
    if pipeline_class(source) in PIPELINES:
        return True
    return any(_original(source, name) is not None for name in ("prior", "decoder", "super_res"))


def missing(source: Path) -> list[str]:
    """Files that are needed and not there, by their names in the folder."""
    if pipeline_class(source) not in PIPELINES:
        return [file for name, file in ORIGINALS.items() if _original(source, name) is None]
    lacking = []
    for name in _networks(source):
        config = source / name / "config.json"
        lacking += [] if config.is_file() else [f"{name}/config.json"]
        if not weights_files(source / name, stems_of(name)):
            lacking.append(f"{name}/{stems_of(name)[0]}.safetensors")
    schedulers = [name for name in _schedulers(source) if not (source / name / "scheduler_config.json").is_file()]
    return lacking + [f"{name}/scheduler_config.json" for name in schedulers]


def read(
    source: Path,
    dtype: torch.dtype | None = None,
    clip: Path | None = None,
    configs: Mapping[str, Mapping[str, Any]] = CONFIGS,
) -> Published:
    """The parts of a Karlo folder.

    clip: a CLIP in place of its own; one with an image tower alone is joined to the folder's text tower. configs: of
    the networks in the original checkpoints. Raises InputError for what is missing, and for classes that are not
    Karlo's.
    """
    lacking = [file for file in missing(source) if clip is None or file != ORIGINALS["clip"]]
    if lacking:
        raise InputError(f"{str(source)!r} is incomplete, it lacks {', '.join(lacking)}; get the rest of the folder.")
    if pipeline_class(source) not in PIPELINES:
        return _read_originals(source, dtype, clip, configs)
    present = components(source, CLASSES)
    absent = [name for name in (*_networks(source), *_schedulers(source)) if name not in present]
    if absent:
        raise InputError(f"{source / INDEX} does not list {', '.join(absent)}; get the folder again.")
    return _read_folder(source, dtype, clip)


def _read_folder(source: Path, dtype: torch.dtype | None, clip: Path | None) -> Published:
    name = PIPELINES[str(pipeline_class(source))]
    networks = _networks(source)

    def build(part: str) -> Callable[[], ModelMixin]:
        def built() -> ModelMixin:
            from genpipe.published import karlo_parts

            return getattr(karlo_parts, f"{part}_of_folder")(source, dtype)

        return built

    parts = {part: build(part) for part in ("prior", "decoder", "upsampler") if part != "prior" or "prior" in networks}
    files = [source / INDEX, *(source / each / "scheduler_config.json" for each in _schedulers(source))]
    for each in networks:
        files += [source / each / "config.json"]
        files += weights_files(source / each, stems_of(each))
    towers = [source / each for each in ("text_encoder", "image_encoder") if each in networks]
    config = component_config(source, "decoder", CLASSES)
    return Published(
        name=name,
        family="karlo",
        licence=LICENCE,
        description=DESCRIPTION,
        parts={"clip": clip_builder(towers, clip, dtype), **parts},
        defaults={"dalle2": SAMPLING},
        files=[*files, *clip_files(clip)],
        resolution=needed(config, "sample_size", source / "decoder" / "config.json"),
        notes=_notes(clip is not None or "image_encoder" in networks, "prior" in networks),
    )


def _read_originals(
    source: Path, dtype: torch.dtype | None, clip: Path | None, configs: Mapping[str, Mapping[str, Any]]
) -> Published:
    found = {name: _original(source, name) for name in ORIGINALS}
    files = {name: file for name, file in found.items() if file is not None}

    def build(part: str) -> Callable[[], ModelMixin]:
        def built() -> ModelMixin:
            from genpipe.published import karlo_parts

            return getattr(karlo_parts, f"{part}_of_originals")(files, configs, dtype)

        return built

    return Published(
        name="karlo-v1-alpha",
        family="karlo",
        licence=LICENCE,
        description=DESCRIPTION,
        parts={
            "clip": clip_builder([files["clip"]] if "clip" in files else [], clip, dtype),
            **{part: build(part) for part in ("prior", "decoder", "upsampler")},
        },
        defaults={"dalle2": SAMPLING},
        files=[*files.values(), *clip_files(clip)],
        resolution=int(configs["decoder"]["sample_size"]),
        notes=_notes(True, True),
    )


def _notes(ranked: bool, prior: bool) -> list[str]:
    notes = []
    if not ranked:
        notes.append(
            "The folder has no image tower of CLIP, so pictures are not ranked and none can be given; import it again "
            "together with OpenAI's ViT-L/14."
        )
    if not prior:
        notes.append("It has no prior and draws variations of a given picture.")
    return notes


def _networks(source: Path) -> tuple[str, ...]:
    """The components with weights that a folder of this pipeline needs."""
    if pipeline_class(source) == "UnCLIPPipeline":
        towers = ("image_encoder",) if (source / "image_encoder").is_dir() else ()
        return ("prior", *NETWORKS, *towers)
    return (*NETWORKS, "image_encoder")


def _schedulers(source: Path) -> tuple[str, ...]:
    prior = ("prior_scheduler",) if pipeline_class(source) == "UnCLIPPipeline" else ()
    return (*prior, "decoder_scheduler", "super_res_scheduler")


def _original(source: Path, name: str) -> Path | None:
    """One of the original files, in the folder itself or in the folder that its address has it in."""
    try:
        places = [source / ORIGINALS[name], *sorted(source.glob(f"*/{ORIGINALS[name]}"))]
        return next((place for place in places if place.is_file()), None)
    except (OSError, ValueError):
        return None
