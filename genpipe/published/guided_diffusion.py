"""The names of guided-diffusion's UNets (2105.05233), as Karlo's originals have them, for the UNets of diffusers.

There all blocks are counted through, a down- or upsampling layer being one more block or the last layer of one, the
projections of an attention are 1x1 convolutions, and queries, keys and values lie head by head in one of them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from functools import reduce

from torch import Tensor

from genpipe.published.fitting import take

# Our name of a tensor -> its name in the file, and what is done to it, in order: see `genpipe.published.fitting.take`.
Rules = Mapping[str, tuple[str, tuple[str, ...]]]

_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ROWS = {"to_q": ("qkv", "0/3"), "to_k": ("qkv", "1/3"), "to_v": ("qkv", "2/3")}
_ROWS |= {"add_k_proj": ("encoder_kv", "0/2"), "add_v_proj": ("encoder_kv", "1/2")}
_WHOLE = {"group_norm": "norm", "to_out.0": "proj_out"}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def unet_rules(
    names: Collection[str], layers: int, head_dim: int, prefix: str
) -> dict[str, tuple[str, tuple[str, ...]]]:
    """The tensors of a UNet of diffusers -> where they are in an original file whose names begin with `prefix`.

    layers: residual blocks of each level, on the way down. head_dim: width of a head of its attentions.
    """
    return {name: _rule(name, names, layers, head_dim, prefix) for name in names}


def _rule(name: str, names: Collection[str], layers: int, head_dim: int, prefix: str) -> tuple[str, tuple[str, ...]]:
    layer, _, kind = name.rpartition(".")  # kind: weight or bias
    if layer in _TOP:
        return f"{prefix}{_TOP[layer]}.{kind}", ()
    place, is_attention, inner = _place(layer, names, layers)
    if not is_attention:
        return f"{prefix}{place}.{_RESNET[inner]}.{kind}", ()
    flat = ("squeeze_last",) if kind == "weight" else ()
    if inner in _ROWS:
        fused, share = _ROWS[inner]
        return f"{prefix}{place}.{fused}.{kind}", (*flat, f"per_head_rows:{share}:{head_dim}")
    return f"{prefix}{place}.{_WHOLE[inner]}.{kind}", flat if inner == "to_out.0" else ()


def _place(layer: str, names: Collection[str], layers: int) -> tuple[str, bool, str]:
    """A layer -> the original name of the block it is in, whether that is an attention, and its name inside it."""
    middle = _MIDDLE.fullmatch(layer)
    if middle is not None:
        kind, number, inner = middle.groups()
        if kind == "attentions":
            return "middle_block.1", True, inner
        attends = any(name.startswith("mid_block.attentions.") for name in names)
        return f"middle_block.{int(number) * (2 if attends else 1)}", False, inner
    match = _BLOCK.fullmatch(layer)
    if match is None:
        raise ValueError(f"a UNet of diffusers has no layer {layer!r}")
    way, text, kind, number, inner = match.groups()
    level = int(text)
    if way == "down":  # block 0 is the first convolution, then `layers` blocks and a downsampling one for each level
        block = 1 + level * (layers + 1) + (layers if kind == "downsamplers" else int(number))
        return f"input_blocks.{block}.{int(kind == 'attentions')}", kind == "attentions", inner
    block = level * (layers + 1) + (layers if kind == "upsamplers" else int(number))
    attends = any(name.startswith(f"up_blocks.{level}.attentions.") for name in names)
    inside = {"resnets": 0, "attentions": 1, "upsamplers": 2 if attends else 1}[kind]
    return f"output_blocks.{block}.{inside}", kind == "attentions", inner


def applied(rules: Rules, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors under our names; what no rule uses keeps its own, and what does not fit its rule its shape.

    So the strict load that follows lists both.
    """
    found: dict[str, Tensor] = {}
    for ours, (theirs, operations) in rules.items():
        if theirs in tensors:
            try:
                found[ours] = reduce(take, operations, tensors[theirs])
            except (ValueError, RuntimeError):
                found[ours] = tensors[theirs]
    return found | unused(tensors, (theirs for theirs, _ in rules.values()))


def unused(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors that `names` does not name."""
    used = set(names)
    return {name: tensor for name, tensor in tensors.items() if name not in used}
