"""`genpipe info`: families, their parts and sizes, versions and devices, read from headers without loading weights."""

import json
import platform
import struct
from importlib import metadata
from math import prod
from pathlib import Path
from typing import Any

import genpipe
from pipelines.family_info import FamilyInfo

LIBRARIES = ("torch", "diffusers", "open_clip_torch", "accelerate", "tokenizers", "safetensors", "gradio")
SHOWN = ("license", "description", "resolution", "trained_on")
HEADER_LIMIT = 100_000_000  # bytes, as in the safetensors library


def describe(families: list[FamilyInfo]) -> dict[str, Any]:
    """Everything that `genpipe info` shows, as JSON values."""
    from pipelines.devices import available_devices

    return {
        "genpipe": genpipe.__version__,
        "families": [_describe_family(family) for family in families],
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}},
        "devices": available_devices(),
    }


def _describe_family(family: FamilyInfo) -> dict[str, Any]:
    parts = {part: _describe_part(family.folder / part, entry["class"]) for part, entry in family.info["parts"].items()}
    return {
        "name": family.name,
        "folder": str(family.folder),
        **{key: family.info[key] for key in SHOWN if key in family.info},
        "defaults": family.defaults,
        "words": len(family.words) if family.words is not None else None,
        "hashes": {pipeline: family.hash_of(pipeline) for pipeline in family.pipelines},
        "bytes": sum(part["bytes"] for part in parts.values()),
        "parts": parts,
    }


def _describe_part(folder: Path, class_name: str) -> dict[str, Any]:
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


def as_text(report: dict[str, Any]) -> str:
    """The report for a person."""
    lines = [f"genpipe {report['genpipe']}"]
    for family in report["families"]:
        lines += ["", f"family {family['name']}  ({family['bytes'] / 1e6:.1f} MB, {family['folder']})"]
        lines += [f"  {key:<12} {' '.join(str(family[key]).split())}" for key in SHOWN if key in family]
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
    if not report["families"]:
        lines += ["", "no family is shipped with this installation"]
    versions = ", ".join(f"{name} {version or 'is missing'}" for name, version in report["versions"].items())
    return "\n".join([*lines, "", f"versions  {versions}", f"devices   {', '.join(report['devices'])}"])
