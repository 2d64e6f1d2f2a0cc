"""CLIP configurations as plain data: our small family's, and open_clip's published ones with nothing left implicit.

An *architecture* is open_clip's model config (embed_dim, vision_cfg, text_cfg, quick_gelu, ...); a *config* is the
keyword arguments of genpipe.clip.model.CLIP.
"""

from __future__ import annotations

import copy
import difflib
import math
from typing import Any

import open_clip

from genpipe.errors import InputError

INIT_LOGIT_SCALE = math.log(1 / 0.07)  # CLIP, section 2.5: the temperature starts at 0.07

# What open_clip assumes where a config is silent. Written out, so that a saved part does not change with the library.
TOP_DEFAULTS: dict[str, Any] = {"quick_gelu": False, "custom_text": False, "init_logit_scale": INIT_LOGIT_SCALE}
VISION_DEFAULTS: dict[str, Any] = {"image_size": 224}
TEXT_DEFAULTS: dict[str, Any] = {"context_length": 77, "vocab_size": 49408}
KNOWN_KEYS = {"embed_dim", "vision_cfg", "text_cfg", "init_logit_bias", "nonscalar_logit_scale", *TOP_DEFAULTS}


def explicit_architecture(architecture: dict[str, Any]) -> dict[str, Any]:
    """A copy of an open_clip model config in which the activation, sizes and initial logit scale are written out.

    Raises InputError for captioning models (multimodal_cfg), for missing parts and for unknown keys.
    """
    if "multimodal_cfg" in architecture:
        raise InputError("the architecture is a captioning model (CoCa), genpipe's CLIP has two towers only.")
    missing = {"embed_dim", "vision_cfg", "text_cfg"} - set(architecture)
    unknown = set(architecture) - KNOWN_KEYS
    if missing or unknown:
        raise InputError(
            f"the CLIP architecture lacks {sorted(missing)} and has unknown keys {sorted(unknown)}; "
            "it must be an open_clip model config with embed_dim, vision_cfg and text_cfg."
        )
    explicit = copy.deepcopy({**TOP_DEFAULTS, **dict(architecture)})
    explicit["vision_cfg"] = {**VISION_DEFAULTS, **explicit["vision_cfg"]}
    explicit["text_cfg"] = {**TEXT_DEFAULTS, **explicit["text_cfg"]}
    # Weights come from the part's own folder or from a named tag, never as a side effect of building a tower.
    if explicit["vision_cfg"].get("timm_model_name"):
        explicit["vision_cfg"]["timm_model_pretrained"] = False
    if explicit["text_cfg"].get("hf_model_name"):
        explicit["text_cfg"]["hf_model_pretrained"] = False
        explicit["custom_text"] = True
    return explicit


def nano_architecture(
    vocab_size: int,
    image_size: int = 32,
    patch_size: int = 4,
    width: int = 192,
    vision_layers: int = 6,
    text_layers: int = 4,
    context_length: int = 32,
    embed_dim: int = 192,
) -> dict[str, Any]:
    """The small family's towers: a ViT with heads of 48 channels and a causal text transformer with heads of 48.

    `vocab_size` is the caption tokenizer's, `width` (a multiple of 48) that of both towers. By default 32 px in patches
    of 4 px, so 8 x 8 patch states, and about 5 million parameters with 2,048 tokens.
    """
    return explicit_architecture(
        {
            "embed_dim": embed_dim,
            "vision_cfg": {
                "image_size": image_size,
                "patch_size": patch_size,
                "width": width,
                "layers": vision_layers,
                "head_width": 48,
            },
            "text_cfg": {
                "context_length": context_length,
                "vocab_size": vocab_size,
                "width": width,
                "heads": width // 48,
                "layers": text_layers,
            },
        }
    )


def published_config(model_name: str, pretrained: str | None = None) -> dict[str, Any]:
    """The full config of an open_clip model name and, if given, of the weights tag `pretrained`.

    The activation is the one that the tag names for its *weights*: open_clip only warns when "ViT-L-14" is loaded with
    "openai" weights and then computes the wrong GELU. Raises InputError for unknown names and tags (with near matches).
    """
    model_name = model_name.replace("/", "-")
    architecture = open_clip.get_model_config(model_name) if model_name in open_clip.list_models() else None
    if architecture is None:
        near = difflib.get_close_matches(model_name, open_clip.list_models(), n=4, cutoff=0.4)
        raise InputError(f"open_clip has no model {model_name!r}; near matches: {', '.join(near) or 'none'}.")
    weights: dict[str, Any] = {}
    if pretrained is not None:
        weights = pretrained_entry(model_name, pretrained)
        if "quick_gelu" in weights:
            architecture["quick_gelu"] = bool(weights["quick_gelu"])
    preprocess = {**open_clip.transform.PreprocessCfg().__dict__, **weights}
    return {
        "architecture": explicit_architecture(architecture),
        "image_mean": list(preprocess["mean"]),
        "image_std": list(preprocess["std"]),
        "interpolation": preprocess["interpolation"],
        "resize_mode": preprocess["resize_mode"],
        "tokenizer_name": model_name,
    }


def pretrained_entry(model_name: str, pretrained: str) -> dict[str, Any]:
    """open_clip's record of a weights tag: where it lies, mean, std, resize, activation. InputError if unknown."""
    entry = open_clip.get_pretrained_cfg(model_name, pretrained)
    if not entry:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model_name)) or "none"
        raise InputError(f"open_clip has no weights {pretrained!r} for {model_name!r}; it has {tags}.")
    return dict(entry)
