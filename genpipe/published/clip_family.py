"""Any published CLIP (2103.00020) as a family of one part, to be described and converted like the others."""

from __future__ import annotations

import re
import zipfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from genpipe.errors import InputError
from genpipe.published.registry import Licence, Published
from genpipe.published.weight_names import clip_stems, weights_file, weights_files

if TYPE_CHECKING:  # torch takes seconds to import, and files are recognised without it
    import torch

LICENCE = Licence(
    "As its publisher says (OpenAI's and LAION's: MIT)",
    "https://github.com/openai/CLIP/blob/main/LICENSE",
    "Weights of this kind come from many publishers; the licence is the one that stands where they were fetched.",
)


def recognises(source: Path) -> bool:
    """Whether `source` is a CLIP's folder of open_clip or Hugging Face, or an archive of OpenAI's."""
    if source.is_dir():
        return bool(clip_stems(source))
    return source.is_file() and _is_archive(source)


def missing(source: Path) -> list[str]:
    """The weights, where only their description is there."""
    if source.is_file():
        return []
    stems = clip_stems(source)
    return [] if weights_file(source, stems) is not None else [f"{stems[0]}.safetensors"]


def read(source: Path, dtype: torch.dtype | None = None, clip: Path | None = None) -> Published:
    """The CLIP as a family of one part: for ranking, searching, classifying, and to train a prior and decoder beside.

    Raises InputError where `clip` is given: it would take the place of all there is.
    """
    from genpipe.published.clip import read_clip

    if clip is not None:
        raise InputError(f"{source} is a CLIP itself; leave the other one out.")
    if source.is_dir():
        described = (path for path in sorted(source.glob("*.json")) if not path.name.endswith(".index.json"))
        files = [*(path for path in described if path.is_file()), *weights_files(source, clip_stems(source))]
    else:
        files = [source]
    name = re.sub(r"[^\w.-]+", "-", source.stem if source.is_file() else source.resolve().name).strip("-.") or "clip"
    return Published(
        name=name[:96],
        family="clip_family",
        licence=LICENCE,
        description="A CLIP: it ranks, searches and classifies pictures; it draws none.",
        parts={"clip": partial(read_clip, source, dtype)},
        defaults={},
        files=files,
        resolution=0,
    )


def _is_archive(path: Path) -> bool:
    """Whether a file is a TorchScript archive, as OpenAI's CLIPs are: a zip file that holds constants beside data."""
    try:
        with zipfile.ZipFile(path) as file:
            names = [name.rpartition("/")[2] for name in file.namelist() if name.count("/") == 1]
        return "constants.pkl" in names and "data.pkl" in names
    except (OSError, ValueError, zipfile.BadZipFile):
        return False
