"""open_clip's towers built from an architecture, whole or one of the two, and how a text tower pools its states."""

from __future__ import annotations

from typing import Any

import open_clip
import torch
from torch import nn

from genpipe.errors import InputError

HALVES = ("both", "text", "image")
# Stand-ins for the tower that is left out, which is built and dropped: as small as open_clip can build one.
_NO_IMAGE = {"image_size": 8, "patch_size": 8, "width": 8, "head_width": 8, "layers": 1}
_NO_TEXT = {"context_length": 3, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}
_TEXT_MODULES = ("transformer", "token_embedding", "positional_embedding", "ln_final", "text_projection", "attn_mask")


def build_towers(architecture: dict[str, Any], halves: str) -> Any:
    """open_clip's CLIP for an explicit architecture, without the modules of the half that `halves` leaves out.

    Raises InputError for halves other than both, text and image, and for what open_clip cannot build.
    """
    if halves not in HALVES:
        raise InputError(f"the halves of a CLIP must be one of {HALVES}, not {halves!r}.")
    arguments = {key: value for key, value in architecture.items() if key != "custom_text"}
    if halves == "text":
        arguments["vision_cfg"] = _NO_IMAGE
    if halves == "image":
        arguments["text_cfg"] = _NO_TEXT
    kind = open_clip.CustomTextCLIP if architecture["custom_text"] else open_clip.CLIP
    try:
        towers = kind(**arguments)
    except (TypeError, AssertionError, ValueError, ImportError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"open_clip cannot build this CLIP architecture ({reason}).") from error
    if halves == "text":
        del towers.visual
    if halves == "image":
        for name in ("text",) if architecture["custom_text"] else _TEXT_MODULES:
            delattr(towers, name)
    return towers


def pool_text(states: torch.Tensor, ids: torch.Tensor, text: nn.Module) -> torch.Tensor:
    """States (B, L, W) -> the state that stands for the text (B, W), as the architecture's pool_type says."""
    pool = getattr(text, "text_pool_type", getattr(text, "pool_type", "argmax"))
    rows = torch.arange(len(states), device=states.device)
    if pool == "argmax":  # the end token has the largest id, in open_clip's vocabulary and in ours
        return states[rows, ids.argmax(dim=-1)]
    if pool == "eos":
        end_id = int(getattr(text, "text_eos_id", getattr(text, "eos_id", 2)))
        return states[rows, ids.eq(end_id).int().argmax(dim=-1)]
    if pool in ("first", "last"):
        return states[:, 0 if pool == "first" else -1]
    raise InputError(f"CLIP cannot pool text states by {pool!r}; argmax, eos, first and last are known.")
