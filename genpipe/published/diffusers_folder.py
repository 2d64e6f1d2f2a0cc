"""Folders as diffusers writes them: model_index.json, and for each component a config.json and weights.

Class names in them are looked up in a table of the reader and otherwise refused; nothing that they name is imported.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genpipe.errors import InputError
from genpipe.json_files import peek_json, read_json
from genpipe.published.weight_names import DIFFUSERS_STEMS, HUGGING_FACE_STEMS, clip_type

if TYPE_CHECKING:  # torch takes seconds to import, and a folder is recognised without it
    import torch
    from diffusers import ModelMixin

INDEX = "model_index.json"

Classes = Mapping[str, Collection[str]]  # name of a component -> its known classes


def pipeline_class(source: Path) -> str | None:
    """The pipeline that a folder's model_index.json was written for; None where it has none. Never raises."""
    name = peek_json(source / INDEX).get("_class_name")
    return None if name is None else str(name)


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


def stems_of(name: str) -> tuple[str, ...]:
    """What the weights of a component are called: the towers of CLIP are of transformers, all others of diffusers."""
    return HUGGING_FACE_STEMS if name.endswith("_encoder") else DIFFUSERS_STEMS


def clip_builder(towers: Sequence[Path], instead: Path | None, dtype: torch.dtype | None) -> Callable[[], ModelMixin]:
    """Builds CLIP from its own towers (text first), or from the one given in their place.

    One that is only an image tower, as a folder of transformers, is joined to the text tower.
    """

    def built() -> ModelMixin:
        from genpipe.published.clip import read_clip

        if instead is None:
            return read_clip(towers[0] if len(towers) == 1 else (towers[0], towers[1]), dtype)
        return read_clip(
            (towers[0], instead) if towers and clip_type(instead) == "clip_vision_model" else instead, dtype
        )

    return built


def clip_files(instead: Path | None) -> list[Path]:
    """The files of a CLIP that was given beside the folder."""
    if instead is None or instead.is_file():
        return [] if instead is None else [instead]
    return sorted(path for path in instead.iterdir() if path.is_file()) if instead.is_dir() else []


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
