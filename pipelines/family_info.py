"""What a family says of itself: found by name, folder or Hub id, its family.json read and checked, without its weights.

A family is a folder: family.json (what it is, the checksum of every part), one folder per part, README.md (model card).
"""

import hashlib
import importlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import genpipe
from genpipe.errors import InputError
from pipelines.request import is_whole
from pipelines.settings import sampling_of

if TYPE_CHECKING:
    import torch

    from pipelines.published_source import PublishedSource

# 1: all of dalle1's parts and no others; the defaults are dalle1's. 2: one class for each part, and always a CLIP.
FORMAT_VERSION = 3
INFO_FILE = "family.json"
INFO_LIMIT = 10_000_000  # bytes; a word list is far smaller

# Part -> dotted paths of the classes that it may be of; family.json names one of them, the first is that of own
# trainings. The paths stand in saved weights: they are frozen.
PART_CLASSES: dict[str, tuple[str, ...]] = {
    "clip": ("genpipe.clip.model.CLIP",),
    "dvae": ("genpipe.dalle1.dvae.DVAE", "genpipe.dalle1.vqgan.VQGAN"),
    "transformer": ("genpipe.dalle1.transformer.DALLE1Transformer", "genpipe.dalle1.mindalle.MinDALLETransformer"),
    "prior": ("genpipe.dalle2.prior.Prior",),
    "decoder": (
        "genpipe.dalle2.decoder.Decoder", "genpipe.dalle2.latent_decoder.LatentDecoder", "genpipe.dalle2.glide.GLIDE",
    ),
    "upsampler": ("genpipe.dalle2.upsampler.Upsampler", "genpipe.dalle2.glide.GLIDEUpsampler"),
    "guide": ("genpipe.clip.noise_aware.NoiseAwareCLIP",),
}  # fmt: skip


@dataclass(frozen=True)
class PipelineParts:
    """Parts of a pipeline: those it cannot do without, and those it uses where they are there."""

    required: tuple[str, ...]
    optional: tuple[str, ...]


# Without a CLIP nothing is ranked, and a decoder needs a text encoder of its own.
PIPELINE_PARTS = {
    "dalle1": PipelineParts(("dvae", "transformer"), ("clip", "upsampler", "decoder")),
    "dalle2": PipelineParts(("decoder",), ("clip", "prior", "upsampler", "guide")),
}


@dataclass(frozen=True)
class FamilyInfo:
    """A family as described by its family.json, checked, without its weights."""

    folder: Path
    info: dict[str, Any] = field(repr=False)
    source: "PublishedSource | None" = field(
        default=None, repr=False, compare=False
    )  # of a family in published weights

    @property
    def name(self) -> str:
        return self.info["name"]

    @property
    def words(self) -> list[str] | None:
        """All words of the captions it was trained on, lower case; None where the family does not say."""
        return self.info.get("words")

    @property
    def defaults(self) -> dict[str, dict[str, Any]]:
        """Pipeline -> settings that suit this family (fields of its sampling in pipelines.settings)."""
        return defaults_by_pipeline(self.info.get("defaults", {}))

    @property
    def parts(self) -> list[str]:
        """The parts it has."""
        return [part for part in PART_CLASSES if part in self.info["parts"]]

    @property
    def pipelines(self) -> list[str]:
        """The pipelines that its parts make."""
        return pipelines_of(self.parts)

    def parts_of(self, pipeline: str) -> list[str]:
        """The parts that a pipeline uses, as far as this family has them."""
        used = PIPELINE_PARTS[pipeline]
        return [part for part in self.parts if part in used.required + used.optional]

    def check_has(self, pipeline: str) -> None:
        """Raises InputError for a pipeline that does not exist, or whose parts this family does not have."""
        check_pipeline(pipeline)
        if pipeline not in self.pipelines:
            missing = [part for part in PIPELINE_PARTS[pipeline].required if part not in self.parts]
            instead = f"{' or '.join(self.pipelines)}, or " if self.pipelines else ""
            raise InputError(
                f"The family {self.name!r} has no {' and no '.join(missing)}, which {pipeline} needs; choose "
                f"{instead}another family."
            )

    def check_draws(self) -> None:
        """Raises InputError where the parts make no pipeline."""
        if not self.pipelines:
            raise InputError(
                f"The family {self.name!r} has no parts that make a pipeline ({needed_parts()}), only "
                f"{', '.join(self.parts) or 'none'}; choose another family."
            )

    def checksum(self, part: str) -> str:
        """SHA-256 of a part's files; of published weights that of all files together."""
        return self.info["parts"][part]["sha256"] if self.source is None else self.source.sha256

    def hash_of(self, pipeline: str, upsampled: bool = True, ranked: bool = False) -> str:
        """Short hash over the parts that a pipeline draws with: equal hashes draw equal pictures.

        upsampled: whether the upsampler, where there is one, is among them. ranked: whether DALL-E 2's decoder is,
        which only helps to rank DALL-E 1's pictures: then equal hashes keep the same of them.
        """
        unused = set() if upsampled else {"upsampler"}
        if pipeline == "dalle1" and not ranked:
            unused.add("decoder")
        parts = [part for part in self.parts_of(pipeline) if part not in unused]
        checksums = [f"{part}:{self.checksum(part)}" for part in parts]
        return hashlib.sha256("\n".join(checksums).encode()).hexdigest()[:12]


def class_of(part: str, class_name: str | None = None) -> Any:
    """The class of a part, by its bare name; None: that of own trainings. Raises InputError for an unknown name."""
    for path in PART_CLASSES[part]:
        module, _, name = path.rpartition(".")
        if class_name in (None, name):
            return getattr(importlib.import_module(module), name)
    raise InputError(f"There is no class {str(class_name)[:40]!r} for the part {part!r}; get the family again.")


def part_of(class_name: object) -> str | None:
    """The part that a class, by its bare name, is one of; None for a name that is not known."""
    known = ((part, path.rpartition(".")[2]) for part, paths in PART_CLASSES.items() for path in paths)
    return next((part for part, name in known if name == class_name), None)


def pipelines_of(parts: Iterable[str]) -> list[str]:
    """The pipelines that some parts make."""
    present = set(parts)
    return [name for name, used in PIPELINE_PARTS.items() if present.issuperset(used.required)]


def needed_parts() -> str:
    """What a family needs, for messages."""
    return "; ".join(f"{name}: {', '.join(used.required)}" for name, used in PIPELINE_PARTS.items())


def check_pipeline(name: str) -> None:
    """Raises InputError for a pipeline that does not exist."""
    if name not in PIPELINE_PARTS:
        raise InputError(f"There is no pipeline {name!r}; choose from {', '.join(PIPELINE_PARTS)}.")


def defaults_by_pipeline(defaults: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The defaults of a family.json, of this format or of the first, by pipeline."""
    flat = not all(name in PIPELINE_PARTS for name in defaults)
    return {"dalle1": dict(defaults)} if flat else dict(defaults)


def shipped_families() -> list[str]:
    """Names of the families that come with genpipe."""
    folder = _shipped_folder()
    return sorted(file.parent.name for file in folder.glob(f"*/{INFO_FILE}"))


def _shipped_folder() -> Path:
    return Path(genpipe.__file__).parent / "families"


def describe_family(
    name: str | os.PathLike[str],
    download: bool = False,
    dtype: "torch.dtype | None" = None,
    clip: Path | None = None,
) -> FamilyInfo:
    """Find a family and read what it says of itself, without its weights; the arguments are those of `load_family`."""
    path, own = located_family(name, download)
    if own:
        return FamilyInfo(path, _read_info(path))
    from pipelines.published_source import published_source

    source = published_source(path, dtype, clip)
    if source is None:
        raise InputError(
            f"{str(path)!r} is no family: it has no {INFO_FILE}, and no published weights that genpipe knows."
        )
    return FamilyInfo(path, source.info, source)


def located_family(name: str | os.PathLike[str], download: bool = False) -> tuple[Path, bool]:
    """Where a family lies, and whether it is one of ours: a shipped one, or a folder with a family.json.

    Raises InputError for a name that is nothing that could be one, and for one that is not on this disk.
    """
    text = os.fspath(name)
    if text in shipped_families():
        return _shipped_folder() / text, True
    if text and _is_there(text):
        return Path(text), (Path(text) / INFO_FILE).is_file()
    from genpipe.published.download import fetch, known, on_this_disk

    found = known(text)
    if found is None:
        shipped = ", ".join(shipped_families()) or "none"
        raise InputError(
            f"There is no family {text[:100]!r}; give the name of a shipped family ({shipped}), a folder or a Hub id."
        )
    check_name(text)
    path = fetch(text) if download else on_this_disk(text)
    if path is None:
        size = f" (about {found[1].gigabytes:.1f} GB)" if found[1].gigabytes else ""
        raise InputError(
            f"The family {text!r} is not on this disk; fetch it{size} with `genpipe import {text} FOLDER`, and give "
            "that folder from then on."
        )
    return path, (path / INFO_FILE).is_file()


def check_name(name: str) -> None:
    """Raises InputError for what is known not to be readable, before anything of it is fetched."""
    from genpipe.published.refused import reason_by_name

    why = reason_by_name(name)
    if why is not None:
        raise InputError(why)


def _is_there(text: str) -> bool:
    try:
        return Path(text).exists()
    except (OSError, ValueError):  # too long for a path, or with a zero byte
        return False


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
    check_info(info, where)
    return info


def check_info(info: Any, where: str) -> None:
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
    for part, entry in parts.items():
        if part not in PART_CLASSES:
            raise refuse(f"lists a part {part[:40]!r} that is not known")
        names = [path.rpartition(".")[2] for path in PART_CLASSES[part]]
        if not isinstance(entry, dict) or entry.get("class") not in names:
            raise refuse(f"lists no part {part!r} of the class {' or '.join(names)}")
        if not re.fullmatch(r"[0-9a-f]{64}", str(entry.get("sha256"))):
            raise refuse(f"has no checksum (sha256) for the part {part!r}")
    words = info.get("words")
    if words is not None and not (isinstance(words, list) and all(isinstance(word, str) for word in words)):
        raise refuse("has words that are not a list of strings")
    _check_defaults(info.get("defaults", {}), where)


def _check_defaults(defaults: Any, where: str) -> None:
    try:
        if not isinstance(defaults, dict):
            raise InputError("they are no JSON object")
        for pipeline, settings in defaults_by_pipeline(defaults).items():
            sampling_of(pipeline, settings)
    except InputError as error:
        raise InputError(f"{where} has defaults that cannot be used ({str(error).rstrip('.')}).") from error
