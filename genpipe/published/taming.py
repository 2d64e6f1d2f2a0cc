"""VQGANs in the names of taming-transformers (Esser et al., arXiv 2012.09841) into VQGAN, named as in diffusers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch takes seconds to import
    import torch

_LEVEL = re.compile(r"(encoder\.down|decoder\.up)\.(\d+)\.(block\.\d+|attn\.\d+|downsample|upsample)\.(.+)")
_MIDDLE = re.compile(r"(encoder|decoder)\.mid\.(block_1|block_2|attn_1)\.(.+)")
_MIDDLE_PARTS = {"block_1": "resnets.0", "block_2": "resnets.1", "attn_1": "attentions.0"}
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def vqgan_tensors(tensors: Mapping[str, torch.Tensor], levels: int) -> dict[str, torch.Tensor]:
    """Published tensors -> those of a VQGAN with so many levels; names that are not known stay as they are.

    The 1x1 convolutions of the attention, 4-D, become matrices: views.
    """
    ours: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        renamed = vqgan_name(name, levels)
        if re.search(r"attentions\.\d+\.to_\w+(\.0)?\.weight$", renamed) and tensor.shape[2:] == (1, 1):
            tensor = tensor[:, :, 0, 0]
        ours[renamed if renamed not in ours else f"{name} (twice)"] = tensor
    return ours


def vqgan_name(name: str, levels: int) -> str:
    """With five levels: decoder.up.4.attn.0.q.bias -> autoencoder.decoder.up_blocks.0.attentions.0.to_q.bias.

    taming counts the decoder's levels from the picture down, diffusers in the order in which they run.
    """
    level, middle = _LEVEL.fullmatch(name), _MIDDLE.fullmatch(name)
    if level is not None:
        half, number, part, rest = level.groups()
        place = int(number) if half == "encoder.down" else levels - 1 - int(number)
        kind, _, index = part.partition(".")
        if kind in ("downsample", "upsample"):
            inner = f"{kind}rs.0.{rest}"
        elif kind == "attn":
            inner = f"attentions.{index}.{_in_attention(rest)}"
        else:
            inner = f"resnets.{index}.{_in_block(rest)}"
        return f"autoencoder.{half}_blocks.{place}.{inner}"
    if middle is not None:
        half, part, rest = middle.groups()
        inside = _in_attention(rest) if part == "attn_1" else _in_block(rest)
        return f"autoencoder.{half}.mid_block.{_MIDDLE_PARTS[part]}.{inside}"
    return "autoencoder." + re.sub(r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out.", name)


def _in_block(rest: str) -> str:
    return rest.replace("nin_shortcut.", "conv_shortcut.")


def _in_attention(rest: str) -> str:
    layer, _, kind = rest.rpartition(".")
    return f"{_ATTENTION.get(layer, layer)}.{kind}"
