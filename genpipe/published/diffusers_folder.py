"""Folders as diffusers writes them: model_index.json, and for each component a config.json and weights.

Class names in them are looked up in a table of the reader and otherwise refused; nothing that they name is imported.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genpipe.errors import InputError

if TYPE_CHECKING:  # torch takes seconds to import, and a folder is recognised without it
    import torch
    from diffusers import ModelMixin

INDEX = "model_index.json"
STEMS = ("diffusion_pytorch_model", "diffusion_pytorch_model.fp16")  # of the weights files of diffusers' own classes
JSON_LIMIT = 10_000_000  # bytes; published configs have a few thousand, an index of weights some hundred thousand

Classes = Mapping[str, Collection[str]]  # name of a component -> its known classes


def pipeline_class(source: Path) -> str | None:
    """The pipeline that a folder's model_index.json was written for; None where it has none. Never raises."""
    try:
        return str(read_json(source / INDEX)["_class_name"])
    except (InputError, LookupError):
        return None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises InputError, one sentence that names it, for anything else."""
    try:
        if path.stat().st_size > JSON_LIMIT:
            raise InputError(f"{path} is larger than {JSON_LIMIT:,} bytes; it is no config.")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}); get the folder again.") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not valid JSON; get the folder again.") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object; get the folder again.")
    return value


def components(source: Path, classes: Classes) -> set[str]:
    """The components that model_index.json lists, every class checked against `classes`.

    Raises InputError for a component or class that the table does not have.
    """
    found = set()
    for name, entry in read_json(source / INDEX).items():
        if name.startswith("_") or not isinstance(entry, list) or entry[-1:] == [None]:
            continue  # settings of the pipeline, and components that were left out
        if name not in classes or len(entry) != 2 or entry[1] not in classes[name]:
            raise InputError(
                f"{source / INDEX} names the class {str(entry[-1])[:60]!r} for {name[:40]!r}, which this family does "
                "not have; nothing of it was loaded."
            )
        found.add(name)
    return found


def component_config(source: Path, name: str, classes: Classes, file: str = "config.json") -> dict[str, Any]:
    """A component's config without the keys that begin with "_". Raises InputError for another class."""
    config = read_json(source / name / file)
    if config.get("_class_name") not in classes[name]:
        raise InputError(
            f"{source / name / file} describes a {str(config.get('_class_name'))[:60]!r}, not a "
            f"{' or '.join(sorted(classes[name]))}."
        )
    return {key: value for key, value in config.items() if not key.startswith("_")}


def weights_files(folder: Path, stems: Sequence[str] = STEMS) -> list[Path]:
    """A component's weights: the one file, or an index and the files it names; safetensors before pickles.

    Empty where there are none, and without those that an index names but that are not there.
    """
    for suffix in (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json"):
        for stem in stems:
            file = folder / (stem + suffix)
            if file.is_file():
                named = read_json(file).get("weight_map", {}).values() if suffix.endswith(".json") else ()
                shards = sorted({Path(str(name)).name for name in named})
                return [file, *(folder / name for name in shards if (folder / name).is_file())]
    return []


def clip_builder(towers: Sequence[Path], instead: Path | None, dtype: torch.dtype | None) -> Callable[[], ModelMixin]:
    """Builds CLIP from its own towers (text first), or from the one given in their place.

    One that is only an image tower, as a folder of transformers, is joined to the text tower.
    """

    def built() -> ModelMixin:
        from genpipe.published.clip import read_clip

        if instead is None:
            return read_clip(towers[0] if len(towers) == 1 else (towers[0], towers[1]), dtype)
        return read_clip((towers[0], instead) if towers and _is_image_tower(instead) else instead, dtype)

    return built


def clip_files(instead: Path | None) -> list[Path]:
    """The files of a CLIP that was given beside the folder."""
    if instead is None or instead.is_file():
        return [] if instead is None else [instead]
    return sorted(path for path in instead.iterdir() if path.is_file()) if instead.is_dir() else []


def _is_image_tower(folder: Path) -> bool:
    try:
        return read_json(folder / "config.json").get("model_type") == "clip_vision_model"
    except InputError:
        return False


def expect(config: Mapping[str, Any], wanted: Mapping[str, Any], where: Path) -> None:
    """Raises InputError where a config has another value than the one these weights are run with; absent is right."""
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise InputError(f"{where} has {key} {str(config[key])[:60]!r}; genpipe runs these weights with {value!r}.")


def arguments(config: Mapping[str, Any], network: type, filled: Collection[str], where: Path) -> dict[str, Any]:
    """What a network is built with: its config without what is `filled` in elsewhere.

    Raises InputError listing entries that the installed class does not know, or that are missing.
    """
    known = inspect.signature(network.__init__).parameters  # type: ignore[misc]
    unknown = sorted(key for key in config if key not in known)
    if unknown:
        raise InputError(f"{where} has entries that {network.__name__} does not know: {', '.join(unknown)[:200]}.")
    return {key: value for key, value in config.items() if key not in filled}


def needed(config: Mapping[str, Any], key: str, where: Path) -> int:
    """A size from a config. Raises InputError unless it is a whole number above 0."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{where} has {key} {str(value)[:60]!r}; a whole number above 0 is needed.")
    return value
