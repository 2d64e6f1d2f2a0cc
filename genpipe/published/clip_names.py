"""Names and configs of published CLIPs in open_clip's terms: Hugging Face's, and what OpenAI's shapes say."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from genpipe.errors import InputError
from genpipe.published.fitting import give_back

ACTIVATIONS = {"quick_gelu": True, "gelu": False}  # Hugging Face's hidden_act -> open_clip's quick_gelu

_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)")
_IN_LAYER = {
    "self_attn.out_proj.": "attn.out_proj.",
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
}
_TEXT = {
    "embeddings.token_embedding.": "token_embedding.",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.": "ln_final.",
}
_IMAGE = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.": "conv1.",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm.": "ln_pre.",
    "post_layernorm.": "ln_post.",
}
_PROJECTIONS = {"text_projection.weight": "text_projection", "visual_projection.weight": "visual.proj"}


def half_of(name: str, model_type: str = "clip") -> str | None:
    """Whether a Hugging Face name belongs to the "text" or the "image" tower; None if it says nothing."""
    if name == "logit_scale" or name.endswith("position_ids"):
        return None
    image = name.startswith(("vision_model.", "visual_projection.")) or model_type == "clip_vision_model"
    return "image" if image else "text"


def open_clip_name(name: str, model_type: str = "clip") -> tuple[str, str]:
    """A Hugging Face name -> (open_clip's name, operation of fitting.take that makes the former from the latter).

    A half's names may lack "text_model." or "vision_model." in front; then `model_type` says which it is. Names that
    the rule does not know stay what they are.
    """
    if name in _PROJECTIONS:
        return _PROJECTIONS[name], "transpose"
    image = half_of(name, model_type) == "image"
    inner = name.removeprefix("vision_model." if image else "text_model.")
    prefix, names = ("visual.", _IMAGE) if image else ("", _TEXT)
    layer = _LAYER.fullmatch(inner)
    if layer:
        prefix, names, inner = f"{prefix}transformer.resblocks.{layer[1]}.", _IN_LAYER, layer[2]
        attention = re.fullmatch(r"self_attn\.([qkv])_proj\.(weight|bias)", inner)
        if attention:
            return f"{prefix}attn.in_proj_{attention[2]}", f"rows:{'qkv'.index(attention[1])}/3"
    for theirs, ours in names.items():
        if inner.startswith(theirs):
            return prefix + ours + inner.removeprefix(theirs), "copy"
    return name, "copy"


def from_hugging_face(tensors: dict[str, torch.Tensor], model_type: str = "clip") -> dict[str, torch.Tensor]:
    """Hugging Face's tensors under open_clip's names: q, k and v stacked, projections transposed.

    Three blocks that do not make up a whole keep their names, and so end up in the list of what does not fit.
    """
    groups: dict[str, list[tuple[str, str]]] = {}
    for name in tensors:
        target, operation = open_clip_name(name, model_type)
        groups.setdefault(target, []).append((operation, name))
    left = dict(tensors)
    renamed: dict[str, torch.Tensor] = {}
    for target, group in groups.items():
        parts = [(operation, left.pop(name)) for operation, name in group]  # popped: stacked ones are copies
        try:
            renamed[target] = give_back(parts)
        except (ValueError, RuntimeError):
            renamed |= {name: part for (_, name), (_, part) in zip(group, parts, strict=True)}
    return renamed


def text_cfg(config: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], int, str]:
    """A Hugging Face config -> (open_clip's text_cfg, embedding width, activation). Raises InputError."""
    said: dict[str, Any] = {
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "hidden_size": 512,
        "intermediate_size": 2048,
    }
    said |= {"num_hidden_layers": 12, "num_attention_heads": 8}
    said, common = _tower(config, "text", said, path)
    heads = {"heads": said["num_attention_heads"]}
    sizes = {"context_length": said["max_position_embeddings"], "vocab_size": said["vocab_size"]}
    return {**sizes, **heads, **common}, said["projection_dim"], said["hidden_act"]


def vision_cfg(config: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], int, str]:
    """A Hugging Face config -> (open_clip's vision_cfg, embedding width, activation). Raises InputError."""
    said: dict[str, Any] = {"image_size": 224, "patch_size": 32, "hidden_size": 768, "intermediate_size": 3072}
    said |= {"num_hidden_layers": 12, "num_attention_heads": 12}
    said, common = _tower(config, "vision", said, path)
    width, heads = said["hidden_size"], said["num_attention_heads"]
    sizes = {"image_size": said["image_size"], "patch_size": said["patch_size"], "head_width": width // heads}
    return {**sizes, **common}, said["projection_dim"], said["hidden_act"]


def _tower(
    config: Mapping[str, Any], kind: str, defaults: dict[str, Any], path: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a config says of one tower, with the defaults that it leaves out; and the part both towers have alike.

    Old configs repeat a tower under <kind>_config_dict, which then counts.
    """
    nested = config.get(f"{kind}_config_dict") or config.get(f"{kind}_config")
    own = nested if nested is not None else config
    if not isinstance(own, Mapping):
        raise InputError(f"{path} is damaged: its {kind}_config is no table.")
    said = {"projection_dim": 512, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, **defaults, **own}
    if nested is not None and config.get("projection_dim") is not None:
        said["projection_dim"] = config["projection_dim"]  # the two towers' is above them both
    wrong = [key for key in (*defaults, "projection_dim") if type(said[key]) is not int or said[key] < 1]
    if wrong:
        raise InputError(f"{path} is damaged: {kind} {wrong[0]} is {said[wrong[0]]!r}, not a positive number.")
    if said["hidden_act"] not in ACTIVATIONS:
        raise InputError(
            f"{path} names the activation {said['hidden_act']!r}, only {', '.join(ACTIVATIONS)} are known."
        )
    if said["hidden_size"] % said["num_attention_heads"]:
        raise InputError(f"{path} is damaged: {said['hidden_size']} channels in {said['num_attention_heads']} heads.")
    width, inner = said["hidden_size"], said["intermediate_size"]
    ratio = inner / width if int(width * (inner / width)) == inner else (inner + 0.25) / width  # open_clip rounds down
    common = {"width": width, "layers": said["num_hidden_layers"], "mlp_ratio": ratio}
    if said["layer_norm_eps"] != 1e-5:
        common["norm_kwargs"] = {"eps": said["layer_norm_eps"]}
    return said, common


def openai_architecture(tensors: Mapping[str, torch.Tensor], path: Path) -> dict[str, Any]:
    """The architecture of one of OpenAI's archives from its shapes: heads of 64 channels, quick GELU.

    Raises InputError if the shapes it is read from are not there.
    """

    def layers(pattern: str) -> int:
        return len({match[1] for name in tensors if (match := re.match(pattern, name))})

    try:
        context_length, width = tensors["positional_embedding"].shape
        embed_dim = tensors["text_projection"].shape[1]
        text = {"context_length": context_length, "vocab_size": tensors["token_embedding.weight"].shape[0]}
        text |= {"width": width, "heads": width // 64, "layers": layers(r"transformer\.resblocks\.(\d+)\.")}
        vision: dict[str, Any]
        if "visual.proj" in tensors:
            kernel = tensors["visual.conv1.weight"].shape
            grid = math.isqrt(tensors["visual.positional_embedding"].shape[0] - 1)
            vision = {"image_size": grid * kernel[-1], "patch_size": kernel[-1], "width": kernel[0]}
            vision["layers"] = layers(r"visual\.transformer\.resblocks\.(\d+)\.")
        else:
            grid = math.isqrt(tensors["visual.attnpool.positional_embedding"].shape[0] - 1)
            stages = [layers(rf"visual\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4)]
            width = tensors["visual.layer1.0.conv1.weight"].shape[0]
            vision = {"image_size": grid * 32, "width": width, "layers": stages}
    except (KeyError, ValueError, IndexError) as error:
        raise InputError(f"{path} is a TorchScript archive, but none of OpenAI's CLIP ({error} is missing).") from error
    return {"embed_dim": embed_dim, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
