"""`genpipe info`: families, their parts and sizes, versions and devices, read from headers without loading weights."""

import json
import platform
import struct
from collections.abc import Sequence
from importlib import metadata
from math import prod
from pathlib import Path
from typing import Any

import genpipe
from genpipe.errors import InputError
from pipelines.family_info import FamilyInfo

LIBRARIES = ("torch", "diffusers", "open_clip_torch", "accelerate", "tokenizers", "safetensors", "gradio")
SHOWN = ("license", "license_url", "conditions", "description", "resolution", "trained_on")
FOUND = (
    "description", "license", "license_url", "conditions", "recipe", "stage", "part", "class", "parameters",
    "steps_done", "steps", "parts", "notes", "use",
)  # fmt: skip
HEADER_LIMIT = 100_000_000  # bytes, as in the safetensors library


def describe(families: Sequence[FamilyInfo], found: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Everything that `genpipe info` shows, as JSON values; `found`: of folders that are no families of ours."""
    from pipelines.devices import available_devices

    return {
        "genpipe": genpipe.__version__,
        "families": [_describe_family(family) for family in families],
        **({"found": list(found)} if found else {}),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}},
        "devices": available_devices(),
    }


def _describe_family(family: FamilyInfo) -> dict[str, Any]:
    parts = {part: describe_part(family.folder / part, entry["class"]) for part, entry in family.info["parts"].items()}
    missing = _missing(family)
    return {
        "name": family.name,
        "folder": str(family.folder),
        **{key: family.info[key] for key in SHOWN if key in family.info},
        "defaults": family.defaults,
        "words": len(family.words) if family.words is not None else None,
        "hashes": {pipeline: family.hash_of(pipeline) for pipeline in family.pipelines},
        "complete": not missing,
        "missing": missing,
        "bytes": sum(part["bytes"] for part in parts.values()),
        "parts": parts,
    }


def _missing(family: FamilyInfo) -> list[str]:
    """What its parts lack, as far as their files' tables of contents tell."""
    from genpipe.weight_files import weight_table

    missing = []
    for part in family.parts:
        folder = family.folder / part
        if not (folder / "config.json").is_file():
            missing.append(f"{part}/config.json")
            continue
        try:
            weight_table(folder)
        except InputError as error:
            missing.append(str(error))
    return missing


def describe_part(folder: Path, class_name: str) -> dict[str, Any]:
    weights = sorted(folder.glob("*.safetensors"))
    parameters, dtypes = 0, set()
    for file in weights:
        for name, tensor in _header(file).items():
            if name != "__metadata__":
                parameters += prod(tensor["shape"])
                dtypes.add(tensor["dtype"])
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return {"class": class_name, "parameters": parameters, "stored_as": sorted(dtypes), "bytes": size}


def _header(file: Path) -> dict[str, Any]:
    """Names, types and shapes of the tensors in a safetensors file; empty where it has none that can be read."""
    try:
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(length, HEADER_LIMIT)))
        return {
            name: {"dtype": str(entry["dtype"]), "shape": [int(side) for side in entry["shape"]]}
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError, struct.error, RecursionError):
        return {}


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def _complete(found: dict[str, Any]) -> str:
    return "yes" if found["complete"] else f"no: {', '.join(found['missing']) or 'it has not ended'}"


def _value(value: Any) -> str:
    return "; ".join(str(each) for each in value) if isinstance(value, list) else " ".join(str(value).split())


def as_text(report: dict[str, Any]) -> str:
    """The report for a person."""
    lines = [f"genpipe {report['genpipe']}"]
    for family in report["families"]:
        lines += ["", f"family {family['name']}  ({family['bytes'] / 1e6:.1f} MB, {family['folder']})"]
        lines += [f"  {key:<12} {' '.join(str(family[key]).split())}" for key in SHOWN if family.get(key)]
        if family["words"] is not None:
            lines.append(f"  {'words':<12} {family['words']}")
        for pipeline, value in family["hashes"].items():
            settings = ", ".join(f"{key} {entry}" for key, entry in family["defaults"].get(pipeline, {}).items())
            lines += [f"  {pipeline:<12} hash {value}", *([f"  {'':<12} {settings}"] if settings else [])]
        lines += [
            f"  {part:<12} {entry['class']}, {entry['parameters']:,} parameters, "
            f"{'/'.join(entry['stored_as']) or 'no weights'}, {entry['bytes'] / 1e6:.1f} MB"
            for part, entry in family["parts"].items()
        ]
        lines.append(f"  {'complete':<12} {_complete(family)}")
    for found in report.get("found", []):
        size = f"{found['bytes'] / 1e9:.2f} GB, " if "bytes" in found else ""
        what = found.get("name") or found.get("family") or found.get("part") or found.get("recipe") or ""
        lines += ["", f"{found['kind']} {what}  ({size}{found['path']})"]
        lines += [f"  {key:<12} {_value(found[key])}" for key in FOUND if found.get(key)]
        lines.append(f"  {'complete':<12} {_complete(found)}")
    if not report["families"] and "found" not in report:
        lines += ["", "no family is shipped with this installation"]
    versions = ", ".join(f"{name} {version or 'is missing'}" for name, version in report["versions"].items())
    return "\n".join([*lines, "", f"versions  {versions}", f"devices   {', '.join(report['devices'])}"])
