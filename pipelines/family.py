"""Families of weights that belong together: find, check and load one by name, folder or Hub id; save one.

A family is a folder: family.json (what it is, the checksum of every part), one folder per part, README.md (model card).
"""

import hashlib
import importlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import genpipe
from genpipe.errors import InputError
from pipelines.request import check_sampling, is_whole

if TYPE_CHECKING:  # torch takes seconds to import, and listing families needs none of it
    import torch
    from diffusers import ModelMixin

    from genpipe.clip.model import CLIP
    from pipelines.dalle1 import DALLE1Pipeline

FORMAT_VERSION = 1
INFO_FILE = "family.json"
INFO_LIMIT = 10_000_000  # bytes; a word list is far smaller

# Part -> dotted path of its class. The paths stand in saved weights: they are frozen.
PART_CLASSES = {
    "clip": "genpipe.clip.model.CLIP",
    "dvae": "genpipe.dalle1.dvae.DVAE",
    "transformer": "genpipe.dalle1.transformer.DALLE1Transformer",
}
PIPELINE_PARTS = {"dalle1": ("clip", "dvae", "transformer")}


@dataclass(frozen=True)
class FamilyInfo:
    """A family as described by its family.json, checked, without its weights."""

    folder: Path
    info: dict[str, Any] = field(repr=False)

    @property
    def name(self) -> str:
        return self.info["name"]

    @property
    def words(self) -> list[str] | None:
        """All words of the captions it was trained on, lower case; None where the family does not say."""
        return self.info.get("words")

    @property
    def defaults(self) -> dict[str, Any]:
        """Settings that suit this family: temperature, top_k, top_p, guidance_scale."""
        return self.info.get("defaults", {})

    def hash_of(self, pipeline: str) -> str:
        """Short hash over the parts that a pipeline draws with: equal hashes draw equal pictures."""
        checksums = [f"{part}:{self.info['parts'][part]['sha256']}" for part in PIPELINE_PARTS[pipeline]]
        return hashlib.sha256("\n".join(checksums).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Family(FamilyInfo):
    """A loaded family: every pipeline uses the same `clip` object."""

    clip: "CLIP" = field(repr=False)
    dalle1: "DALLE1Pipeline" = field(repr=False)

    @property
    def hash(self) -> str:
        """Short hash over all parts."""
        checksums = [f"{part}:{entry['sha256']}" for part, entry in sorted(self.info["parts"].items())]
        return hashlib.sha256("\n".join(checksums).encode()).hexdigest()[:12]

    def pipeline(self, name: str) -> "DALLE1Pipeline":
        """The pipeline of that name. Raises InputError for one that this family does not have."""
        check_pipeline(name)
        return self.dalle1


def check_pipeline(name: str) -> None:
    """Raises InputError for a pipeline that does not exist."""
    if name not in PIPELINE_PARTS:
        raise InputError(f"There is no pipeline {name!r}; choose from {', '.join(PIPELINE_PARTS)}.")


def load_family(
    name: str | os.PathLike[str],
    device: "torch.device | str | None" = None,
    dtype: "torch.dtype | None" = None,
) -> Family:
    """Load a shipped family by name ("nano"), one in a folder, or one on the Hugging Face Hub ("owner/name").

    `device` None leaves the weights in main memory; `dtype` None computes in float32, whatever the files hold.
    Raises InputError for an unknown family, a file that is missing, damaged, pickled, of another class or newer than
    this genpipe, a checksum that does not match, and a Hub that cannot be reached.
    """
    described = describe_family(name)
    parts = {part: load_part_of(described, part, dtype) for part in PART_CLASSES}

    from pipelines.dalle1 import DALLE1Pipeline

    dalle1 = DALLE1Pipeline(
        **{part: parts[part] for part in PIPELINE_PARTS["dalle1"]},
        defaults=described.defaults,
        family=described.name,
        known_words=described.words,
    )
    if device is not None:
        dalle1.to(device)
    return Family(described.folder, described.info, clip=dalle1.clip, dalle1=dalle1)


def load_part_of(described: FamilyInfo, part: str, dtype: "torch.dtype | None" = None) -> Any:
    """Load one part of a family, in eval mode, its files checked. Raises InputError as `load_family` does."""
    import torch

    from genpipe.parts import load_part, sha256_of

    folder = described.folder / part
    module, _, class_name = PART_CLASSES[part].rpartition(".")
    model = load_part(getattr(importlib.import_module(module), class_name), folder, dtype or torch.float32)
    if sha256_of(folder) != described.info["parts"][part]["sha256"]:
        raise InputError(
            f"The files of the part {part!r} in {str(described.folder)!r} are not those that {INFO_FILE} lists (its "
            "checksum differs); get the family again."
        )
    return model


def shipped_families() -> list[str]:
    """Names of the families that come with genpipe."""
    folder = _shipped_folder()
    return sorted(file.parent.name for file in folder.glob(f"*/{INFO_FILE}"))


def _shipped_folder() -> Path:
    return Path(genpipe.__file__).parent / "families"


def describe_family(name: str | os.PathLike[str]) -> FamilyInfo:
    """Find a family and read what it says of itself, without its weights. Raises InputError as `load_family` does."""
    folder = _find(name)
    return FamilyInfo(folder, _read_info(folder))


def _find(name: str | os.PathLike[str]) -> Path:
    text = os.fspath(name)
    if text in shipped_families():
        return _shipped_folder() / text
    try:
        if text and Path(text).is_dir():
            return Path(text)
    except (OSError, ValueError):  # too long for a path, or with a zero byte
        pass
    if re.fullmatch(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", text):
        return _download(text)
    shipped = ", ".join(shipped_families()) or "none"
    raise InputError(
        f"There is no family {text[:100]!r}; give the name of a shipped family ({shipped}), a folder or a Hub id."
    )


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    wanted = [INFO_FILE, "README.md", "*/*.json", "*/*.safetensors"]  # nothing that could be a pickle
    try:
        return Path(snapshot_download(hub_id, allow_patterns=wanted))
    except Exception as error:  # the client's own classes, httpx's and the system's, differing between its versions
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")
        raise InputError(
            f"There is no folder {hub_id!r}, and the family of that name could not be fetched from the Hub ({reason})."
        ) from error


def _read_info(folder: Path) -> dict[str, Any]:
    path = folder / INFO_FILE
    where = repr(str(path))
    try:
        if path.stat().st_size > INFO_LIMIT:
            raise InputError(f"{where} is larger than {INFO_LIMIT:,} bytes; it is no description of a family.")
        info = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"The folder {str(folder)!r} is no family: it has no {INFO_FILE}.") from error
    except OSError as error:
        raise InputError(f"{where} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where} is not valid JSON; get the family again.") from error
    _check_info(info, where)
    return info


def _check_info(info: Any, where: str) -> None:
    """The file may come from a stranger: nothing in it is used before it was looked at here."""

    def refuse(what: str) -> InputError:
        return InputError(f"{where} {what}; get the family again or mend it.")

    if not isinstance(info, dict):
        raise refuse("is not a JSON object")
    version = info.get("genpipe_format")
    if not isinstance(version, int) or not is_whole(version) or version < 1:
        raise refuse("has no format version (genpipe_format)")
    if version > FORMAT_VERSION:
        raise InputError(
            f"{where} has format version {version}, this genpipe reads up to {FORMAT_VERSION}; install a newer genpipe."
        )
    name = info.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w. -]{0,95}", name):
        raise refuse("has no name of up to 96 letters, digits, dots, dashes and spaces")
    parts = info.get("parts")
    if not isinstance(parts, dict):
        raise refuse("lists no parts")
    for part, path in PART_CLASSES.items():
        entry = parts.get(part)
        class_name = path.rpartition(".")[2]
        if not isinstance(entry, dict) or entry.get("class") != class_name:
            raise refuse(f"lists no part {part!r} of the class {class_name}")
    for part, entry in parts.items():
        if not re.fullmatch(r"[0-9a-f]{64}", str(entry.get("sha256") if isinstance(entry, dict) else None)):
            raise refuse(f"has no checksum (sha256) for the part {part!r}")
    words = info.get("words")
    if words is not None and not (isinstance(words, list) and all(isinstance(word, str) for word in words)):
        raise refuse("has words that are not a list of strings")
    _check_defaults(info.get("defaults", {}), where)


def _check_defaults(defaults: Any, where: str) -> None:
    try:
        check_sampling(**defaults)
    except (TypeError, InputError) as error:  # TypeError: not an object, or keys that are no settings
        raise InputError(f"{where} has defaults that cannot be used ({error}).") from error


def save_family(
    folder: str | os.PathLike[str],
    parts: "Mapping[str, ModelMixin]",
    info: Mapping[str, Any],
    card: str = "",
    replace: bool = False,
    dtype: "torch.dtype | None" = None,
) -> None:
    """Write a family folder as `load_family` reads it; whole or not at all.

    Args:
        parts: the learned parts by name, all of `PART_CLASSES`.
        info: what family.json says: name, and optionally license, description, resolution, defaults, words, trained_on;
            format version, classes and checksums are added here.
        card: text of the model card, README.md.
        replace: put it in the place of an existing folder.
        dtype: of the stored weights; None stores float16.
    Raises InputError for an existing folder unless `replace`, missing parts and an unusable `info`.
    """
    import torch

    from genpipe.parts import save_part, sha256_of

    target = Path(folder)
    if target.exists() and not replace:
        raise InputError(f"{str(target)!r} exists already; choose another folder or say that it may be replaced.")
    if set(parts) != set(PART_CLASSES):
        raise InputError(f"A family needs the parts {', '.join(PART_CLASSES)}, got {', '.join(parts) or 'none'}.")
    building = target.with_name(f".{target.name}-{uuid.uuid4().hex}.tmp")
    try:
        building.mkdir(parents=True)
        entries = {}
        for part, model in parts.items():
            save_part(model, building / part, dtype or torch.float16)
            entries[part] = {"class": type(model).__name__, "sha256": sha256_of(building / part)}
        whole = {**info, "genpipe_format": FORMAT_VERSION, "parts": entries}
        _check_info(whole, "The information about the family")
        (building / INFO_FILE).write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if card:
            (building / "README.md").write_text(card, encoding="utf-8")
        _put_in_place(building, target)
    except OSError as error:
        raise InputError(f"The family {str(target)!r} cannot be written: {error.strerror}.") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _put_in_place(building: Path, target: Path) -> None:
    if not target.exists():
        building.rename(target)
        return
    old = building.with_suffix(".old")
    target.rename(old)
    try:
        building.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)
