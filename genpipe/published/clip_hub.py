"""A CLIP of the Hub by its id: what it is first, from its small files, then its weights, safetensors if it has them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from genpipe.errors import InputError
from genpipe.published.clip import HF_STEMS, OPEN_CLIP_CONFIG, OPEN_CLIP_STEMS


def fetch_clip(hub_id: str) -> Path | None:
    """The folder of a CLIP on the Hub, downloaded or from its cache, for `read_clip`; None if it is something else.

    Raises InputError if it cannot be had.
    """
    folder = _fetch(hub_id, ["*.json"])
    if (folder / OPEN_CLIP_CONFIG).is_file():
        stems = OPEN_CLIP_STEMS
    elif _is_hugging_face_clip(folder / "config.json"):
        stems = HF_STEMS[:2]
    else:
        return None
    for ending in (".safetensors", "-*.safetensors", ".bin", "-*.bin"):  # whole or in pieces, pickles last
        patterns = [stem + ending for stem in stems]
        _fetch(hub_id, patterns)
        if any(found for pattern in patterns for found in folder.glob(pattern)):
            break
    return folder


def _is_hugging_face_clip(path: Path) -> bool:
    try:
        kind = json.loads(path.read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
    return kind in ("clip", "clip_text_model", "clip_vision_model")


def _fetch(hub_id: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(patterns)))
    except Exception as error:  # the client's own classes, httpx's and the system's, differing between its versions
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")
        raise InputError(
            f"There is no folder {hub_id!r}, and what has that name could not be fetched from the Hub ({reason}); "
            "connect to the network once, or give a folder on this disk."
        ) from error
