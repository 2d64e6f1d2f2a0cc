"""From training runs to a family: the averaged parts of three runs, the words they know, where they come from."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genpipe.errors import InputError
from pipelines.family import PART_CLASSES, save_family
from pipelines.request import check_sampling

RECIPE_OF_PART = {"clip": "clip", "dvae": "dvae", "transformer": "dalle1"}


def part_folders(runs: Path, given: Mapping[str, Path | None]) -> dict[str, Path]:
    """The folder of every part: as given, else runs/RECIPE/PART. Raises InputError for one that is not there."""
    folders = {part: given.get(part) or runs / RECIPE_OF_PART[part] / part for part in PART_CLASSES}
    for part, folder in folders.items():
        if not folder.is_dir():
            raise InputError(
                f"There is no trained {part} in {str(folder)!r}; train one with `genpipe train {RECIPE_OF_PART[part]}` "
                f"or name its folder with --{part}."
            )
    return folders


def _run_of(folder: Path) -> dict[str, Any]:
    """recipe.json of the run that a part lies in, or an empty dictionary."""
    try:
        recipe = json.loads((folder.parent / "recipe.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return recipe if isinstance(recipe, dict) else {}


def assemble(
    folder: Path,
    folders: Mapping[str, Path],
    info: Mapping[str, Any],
    card: str = "",
    replace: bool = False,
) -> None:
    """Write a family folder from trained parts.

    Args:
        folder: where the family goes. folders: part -> folder, see :func:`part_folders`.
        info: name, license, description, defaults; the native size, the data and the known words are added.
    Raises InputError for parts that cannot be loaded or do not fit one another, and as `save_family` does.
    """
    import importlib

    from genpipe.data.scenes import known_words
    from genpipe.parts import load_part
    from pipelines.dalle1 import DALLE1Pipeline

    check_sampling(**info.get("defaults", {}))
    parts = {}
    for part, path in PART_CLASSES.items():
        module, _, class_name = path.rpartition(".")
        parts[part] = load_part(getattr(importlib.import_module(module), class_name), folders[part])
    DALLE1Pipeline(**parts)  # refuses parts that do not fit one another
    sources = sorted({str(_run_of(path).get("data", {}).get("source", "unknown")) for path in folders.values()})
    whole = {**info, "resolution": parts["dvae"].config.resolution, "trained_on": ", ".join(sources)}
    if sources == ["scenes"]:
        whole["words"] = known_words()
    save_family(folder, parts, whole, card=card, replace=replace)
