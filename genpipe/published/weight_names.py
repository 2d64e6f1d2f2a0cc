"""What published weights are called in a folder, and which of them is read: one order for all readers.

Light: what a folder holds is told without torch.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from genpipe.json_files import peek_json, read_json

SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
DIFFUSERS_STEMS = ("diffusion_pytorch_model", "diffusion_pytorch_model.fp16")  # of diffusers' own classes
HUGGING_FACE_STEMS = ("model", "pytorch_model", "model.fp16")  # of the classes of transformers
OPEN_CLIP_STEMS = ("open_clip_model", "open_clip_pytorch_model")
OPEN_CLIP_CONFIG = "open_clip_config.json"
CLIP_TYPES = ("clip", "clip_text_model", "clip_vision_model")  # transformers' names of CLIP and its halves


def in_order(stems: Sequence[str]) -> Iterator[str]:
    """All names of weights, the first that is there wins: safetensors before pickles, then by stem."""
    return (stem + suffix for suffix in SUFFIXES for stem in stems)


def weights_file(folder: Path, stems: Sequence[str]) -> Path | None:
    """The file to read, or the index of several; None where there is none."""
    return next((folder / name for name in in_order(stems) if (folder / name).is_file()), None)


def weights_files(folder: Path, stems: Sequence[str]) -> list[Path]:
    """`weights_file`, and where it is an index the files that it names, as far as they are there.

    Raises InputError for an index that is no JSON object.
    """
    file = weights_file(folder, stems)
    if file is None:
        return []
    pieces = pieces_of(file) if file.suffix == ".json" else []
    return [file, *(folder / name for name in pieces if (folder / name).is_file())]


def pieces_of(index: Path) -> list[str]:
    """The names of the files, beside it, that an index of weights lists. Raises InputError if it is no JSON object."""
    places = read_json(index).get("weight_map")
    return sorted({Path(str(name)).name for name in places.values()}) if isinstance(places, dict) else []


def clip_type(folder: Path) -> str | None:
    """Which of CLIP_TYPES a folder's config.json is of; None for others and where there is none. Never raises."""
    kind = peek_json(folder / "config.json").get("model_type")
    return kind if kind in CLIP_TYPES else None


def clip_stems(folder: Path) -> tuple[str, ...]:
    """What the weights of a CLIP may be called by the configs that are there, open_clip's first; empty for no CLIP."""
    described = (folder / OPEN_CLIP_CONFIG).is_file()
    return (OPEN_CLIP_STEMS if described else ()) + (() if clip_type(folder) is None else HUGGING_FACE_STEMS)
