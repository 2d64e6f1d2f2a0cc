"""GLIDE's networks from OpenAI's files: their names, and the strict load."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from genpipe.clip.noise_aware import NoiseAwareCLIP
from genpipe.dalle2.glide import GLIDE, GLIDEUpsampler
from genpipe.dalle2.glide_text import ByteBPE
from genpipe.published.containers import read_tensors
from genpipe.published.fitting import assign, on_meta
from genpipe.published.glide import read_merges
from genpipe.published.guided_diffusion import applied, unet_rules

_TOWER = {
    "input.w_voc": "token_embedding.weight",
    "input.w_t": "time_embedding.weight",
    "input.patch_proj": "patches.weight",
    "input.w_pos": "positional_embedding",
    "input.ln": "ln_pre",
    "output.ln": "ln_post",
    "output.f": "projection",
}
_LAYER = {
    "f_attn.ln": "ln_1",
    "f_attn.f_q": "query",
    "f_attn.f_k": "key",
    "f_attn.f_v": "value",
    "f_attn.f_c": "out",
    "f_mlp.ln": "ln_2",
    "f_mlp.f_1": "mlp_in",
    "f_mlp.f_2": "mlp_out",
}


def decoder(file: Path, merges: Path, config: Mapping[str, Any], dtype: torch.dtype | None) -> GLIDE:
    """base.pt or base_inpaint.pt as GLIDE, in eval mode. merges: the file with GPT-2's merges."""
    return _unet(GLIDE, file, merges, config, 7, dtype)


def upsampler(file: Path, merges: Path, config: Mapping[str, Any], dtype: torch.dtype | None) -> GLIDEUpsampler:
    """upsample.pt or upsample_inpaint.pt as GLIDEUpsampler, in eval mode."""
    return _unet(GLIDEUpsampler, file, merges, config, 10, dtype)


def guide(image: Path, text: Path, config: Mapping[str, Any], dtype: torch.dtype | None) -> NoiseAwareCLIP:
    """clip_image_enc.pt and clip_text_enc.pt as one NoiseAwareCLIP, in eval mode."""
    model = on_meta(lambda: NoiseAwareCLIP(**config)).eval()
    for tower, file in ((model.image, image), (model.text, text)):
        assign(tower, applied(tower_rules(tower), read_tensors(file, dtype=dtype)), str(file))
    return model


def tower_rules(tower: nn.Module) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Our name of every tensor of one of the guide's towers -> its name in the file, and that nothing is done to it."""
    return {name: (_published_name(name), ()) for name in tower.state_dict()}


def rules_of(model: GLIDE | GLIDEUpsampler) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Our name of every tensor -> its name in the file, and what is done to it."""
    names: Collection[str] = [name.removeprefix("unet.") for name in model.state_dict() if name.startswith("unet.")]
    config = model.config.unet_config
    unet = unet_rules(names, config["layers_per_block"], config["attention_head_dim"], "")
    text = [name for name in model.state_dict() if name.startswith("text.")]
    return {
        **{f"unet.{name}": rule for name, rule in unet.items()},
        **{name: (name.removeprefix("text."), ()) for name in text},
    }


def _unet(kind: Any, file: Path, merges: Path, config: Mapping[str, Any], inpaint_channels: int, dtype: Any) -> Any:
    """The file's network; whether it fills holes is what its first convolution says."""
    tensors = read_tensors(file, dtype=dtype)
    first = tensors.get("input_blocks.0.0.weight")
    fills = first is not None and first.ndim == 4 and first.shape[1] == inpaint_channels
    model = on_meta(lambda: kind(**config, inpaint=fills)).eval()
    assign(model, applied(rules_of(model), tensors), str(file))
    model.tokenizer = ByteBPE.from_merges(read_merges(merges))
    return model


def _published_name(name: str) -> str:
    """Our name of a tensor of a tower -> its name in the file."""
    for theirs, ours in _TOWER.items():
        if name == ours:
            return f"blocks.{theirs}"
        if name.startswith(f"{ours}."):
            kind = name.removeprefix(f"{ours}.")
            return f"blocks.{theirs}.{_letter(theirs, kind)}"
    match = re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if match is None:
        raise ValueError(f"the guide's towers have no tensor {name!r}")
    number, layer, kind = match.groups()
    theirs = next(theirs for theirs, ours in _LAYER.items() if ours == layer)
    return f"blocks.block_{number}.{theirs}.{_letter(theirs, kind)}"


def _letter(layer: str, kind: str) -> str:
    """The file's word for a weight or bias: norms have a gain, g."""
    if kind == "bias":
        return "b"
    return "g" if layer.endswith("ln") else "w"
