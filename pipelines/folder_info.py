"""What a folder or file holds that is no family of ours: published weights, one part, a training run.

No weights are read for it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from genpipe.errors import InputError
from genpipe.json_files import peek_json
from pipelines.family_info import part_of
from pipelines.published_source import sizes_of
from pipelines.report import describe_part

RECIPE_NAME = "recipe.json"

Found = dict[str, Any]


def describe_folder(path: Path) -> Found:
    """What is there: `kind`, whether it is `complete`, what is `missing`, and what the kind has beside these.

    Raises InputError for what is nothing that genpipe knows, and with the reason for weights that it does not read.
    """
    looks: tuple[Callable[[Path], Found | None], ...] = (_training_run, _part, _published)
    for look in looks:
        found = look(path)
        if found is not None:
            return {"path": str(path), **found}
    from genpipe.published.refused import reason

    raise InputError(
        reason(path)
        or f"{str(path)!r} is no family, no published weights that genpipe knows, no part and no training run."
    )


def _published(path: Path) -> Found | None:
    from genpipe.published.registry import recognised

    found = recognised(path)
    if found is None:
        return None
    family, reader = found
    missing = reader.missing(path)
    about: Found = {
        "kind": "published weights",
        "family": family,
        "license": reader.LICENCE.name,
        "license_url": reader.LICENCE.url,
        "conditions": reader.LICENCE.conditions,
        "complete": not missing,
        "missing": missing,
    }
    if path.is_dir() and not missing:  # an archive would be unpacked for this
        published = reader.read(path)
        sizes = sizes_of(published.files, path)
        about |= {
            "name": published.name,
            "description": published.description,
            "parts": list(published.parts),
            "notes": list(published.notes),
            "bytes": sum(sizes.values()),
            "files": dict(sizes),
        }
    return {**about, "use": f"genpipe import {path} FOLDER"}


def _part(path: Path) -> Found | None:
    name = peek_json(path / "config.json").get("_class_name")
    part = part_of(name)
    if part is None:
        return None
    from genpipe.weight_files import weight_table

    missing = []
    try:
        weight_table(path)  # the headers of its files
    except InputError as error:
        missing.append(str(error))
    return {
        "kind": "part",
        "part": part,
        **describe_part(path, str(name)),
        "complete": not missing,
        "missing": missing,
        "use": f"genpipe assemble FAMILY --{part} {path}",
    }


def _training_run(path: Path) -> Found | None:
    recipe = peek_json(path / RECIPE_NAME)
    if not {"stage", "run"} <= recipe.keys():
        return None
    checkpoints = sorted(found.name for found in path.glob("checkpoints/step-*") if found.is_dir())
    parts = [found.name for found in sorted(path.iterdir()) if (found / "config.json").is_file()]
    steps = recipe["run"].get("steps") if isinstance(recipe["run"], dict) else None
    done = int(checkpoints[-1].removeprefix("step-")) if checkpoints else 0
    return {
        "kind": "training run",
        "recipe": str(recipe.get("name", ""))[:60],
        "stage": str(recipe["stage"])[:60],
        "steps_done": done,
        "steps": steps,
        "parts": parts,
        "complete": bool(parts) and done == steps,
        "missing": [] if parts else ["the trained part"],
        "use": "genpipe assemble FAMILY" if parts else f"genpipe train {str(recipe.get('name', ''))[:60]} --out {path}",
    }
