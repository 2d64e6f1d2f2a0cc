"""A CLIP of the Hub by its id: what it is first, from its small files, then its weights, safetensors if it has them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from genpipe.errors import InputError
from genpipe.published.weight_names import clip_stems, in_order, pieces_of


def fetch_clip(hub_id: str) -> Path | None:
    """The folder of a CLIP on the Hub, downloaded or from its cache, for `read_clip`; None if it is something else.

    Raises InputError if it cannot be had.
    """
    folder = _fetch(hub_id, ["*.json"])
    stems = clip_stems(folder)
    if not stems:
        return None
    for path in (folder / name for name in in_order(stems)):
        indexed = path.suffix == ".json"  # indices came with the configs, the files that they name did not
        if not indexed:
            _fetch(hub_id, [path.name])
        if path.is_file():
            if indexed:
                _fetch(hub_id, pieces_of(path))
            break
    return folder


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
