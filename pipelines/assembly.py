"""From training runs to a family: the averaged parts of the runs, the words they know, where they come from."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from genpipe.errors import InputError
from genpipe.json_files import peek_json
from pipelines.family import save_family
from pipelines.family_info import INFO_FILE, PIPELINE_PARTS, check_pipeline, class_of, pipelines_of
from pipelines.folder_info import RECIPE_NAME
from pipelines.settings import sampling_of

RECIPE_OF_PART = {
    "clip": "clip",
    "dvae": "dvae",
    "transformer": "dalle1",
    "prior": "prior",
    "decoder": "decoder",
    "upsampler": "upsampler",
}
READERS = ("clip", "transformer", "prior", "decoder")  # parts that read captions


def part_folders(runs: Path, given: Mapping[str, Path | None]) -> dict[str, Path]:
    """The folder of every part: as given, else runs/RECIPE/PART where that is there.

    Raises InputError for a given one that is not there, and where the others make no pipeline.
    """
    folders = {part: given.get(part) or runs / RECIPE_OF_PART[part] / part for part in RECIPE_OF_PART}
    there = {part: folder for part, folder in folders.items() if folder.is_dir()}
    for part, folder in given.items():
        if folder is not None and part not in there:
            raise InputError(f"There is no trained {part} in {str(folder)!r}; name another folder with --{part}.")
    if not pipelines_of(there) or "clip" not in there:
        needed = [("clip", *used.required) for used in PIPELINE_PARTS.values()]  # what is trained here is ranked
        lacking = min(([part for part in parts if part not in there] for parts in needed), key=len)
        part = lacking[0]
        raise InputError(
            f"There is no trained {part} in {str(folders[part])!r}; train one with `genpipe train "
            f"{RECIPE_OF_PART[part]}` or name its folder with --{part}."
        )
    return there


def parsed_defaults(changes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """PIPELINE.SETTING=VALUE -> pipeline -> settings; values are numbers, true, false or text.

    Raises InputError for texts of another form, and for settings that the pipeline does not have.
    """
    defaults: dict[str, dict[str, Any]] = {}
    for change in changes:
        match = re.fullmatch(r"(\w+)\.(\w+)=(.*)", change)
        if match is None:
            raise InputError(f"{change[:60]!r} is no default; write PIPELINE.SETTING=VALUE, as in dalle2.mode=prior.")
        pipeline, setting, text = match.groups()
        check_pipeline(pipeline)
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        defaults.setdefault(pipeline, {})[setting] = value
    for pipeline, settings in defaults.items():
        sampling_of(pipeline, settings)
    return defaults


def recorded_data(folder: Path) -> dict[str, Any]:
    """The settings of the data that a part was trained on: of the recipe beside its weights, else of its run's.

    Where neither is there, `source` alone: what the family that it lies in was trained on, or "unknown".
    """
    for recipe in (folder / RECIPE_NAME, folder.parent / RECIPE_NAME):
        found = peek_json(recipe).get("data")
        if isinstance(found, dict):
            return found
    return {"source": peek_json(folder.parent / INFO_FILE).get("trained_on", "unknown")}


def sources_in(data: Iterable[Mapping[str, Any]]) -> list[str]:
    """The sources that several such settings name, each once, in order; one of an average or a family may name many."""
    return sorted({name for each in data for name in str(each.get("source", "unknown")).split(", ")})


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
        info: name, license, description, defaults by pipeline; the native size, the data and the known words are added.
    Raises InputError for parts that cannot be loaded or do not fit one another, and as `save_family` does.
    """
    from genpipe.data.scenes import known_words
    from genpipe.parts import load_part
    from pipelines.dalle1 import DALLE1Pipeline
    from pipelines.dalle2 import DALLE2Pipeline

    classes: dict[str, Any] = {"dalle1": DALLE1Pipeline, "dalle2": DALLE2Pipeline}
    parts = {}
    for part in folders:
        parts[part] = load_part(class_of(part), folders[part])
    for name in pipelines_of(parts):  # refuses parts that do not fit one another, and defaults that cannot be used
        used = PIPELINE_PARTS[name]
        mine = {part: model for part, model in parts.items() if part in used.required + used.optional}
        classes[name](**mine, defaults=info.get("defaults", {}).get(name))
    data = {part: recorded_data(path) for part, path in folders.items()}
    sources = sources_in(data.values())
    drawing = parts.get("dvae") or parts["decoder"]
    whole = {**info, "resolution": drawing.config.resolution, "trained_on": ", ".join(sources)}
    if sources == ["scenes"]:
        whole["words"] = known_words(styles=all(bool(data[part].get("styles")) for part in READERS if part in data))
    save_family(folder, parts, whole, card=card, replace=replace)
