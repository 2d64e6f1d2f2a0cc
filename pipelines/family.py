"""Families of weights that belong together: load one by name, folder or Hub id, around one CLIP; save one.

What a family says of itself without its weights is in family_info.py, whose functions are also found here.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genpipe.errors import InputError
from pipelines.family_info import (
    FORMAT_VERSION,
    INFO_FILE,
    PART_CLASSES,
    PIPELINE_PARTS,
    FamilyInfo,
    check_pipeline,
    class_of,
    describe_family,
    needed_parts,
    pipelines_of,
    shipped_families,
)
from pipelines.writing import write_family

if TYPE_CHECKING:  # torch takes seconds to import, and listing families needs none of it
    import torch
    from diffusers import ModelMixin

    from genpipe.clip.model import CLIP
    from pipelines.dalle1 import DALLE1Pipeline
    from pipelines.dalle2 import DALLE2Pipeline

__all__ = [
    "FORMAT_VERSION",
    "INFO_FILE",
    "PART_CLASSES",
    "PIPELINE_PARTS",
    "Family",
    "FamilyInfo",
    "check_pipeline",
    "describe_family",
    "load_family",
    "load_part_of",
    "save_family",
    "shipped_families",
]


@dataclass(frozen=True)
class Family(FamilyInfo):
    """A loaded family: every pipeline uses the same `clip` object, and the same upsampler, where there is one.

    A pipeline is None where the family has not its parts, or where it was not asked for.
    """

    clip: "CLIP | None" = field(default=None, repr=False)
    dalle1: "DALLE1Pipeline | None" = field(default=None, repr=False)
    dalle2: "DALLE2Pipeline | None" = field(default=None, repr=False)

    @property
    def hash(self) -> str:
        """Short hash over all parts."""
        checksums = [f"{part}:{self.checksum(part)}" for part in sorted(self.parts)]
        return hashlib.sha256("\n".join(checksums).encode()).hexdigest()[:12]

    def pipeline(self, name: str) -> "DALLE1Pipeline | DALLE2Pipeline":
        """The pipeline of that name. Raises InputError for one that this family does not have."""
        self.check_has(name)
        pipeline = {"dalle1": self.dalle1, "dalle2": self.dalle2}[name]
        if pipeline is None:
            raise InputError(f"The family {self.name!r} was loaded without {name}; load it with all its pipelines.")
        return pipeline


def load_family(
    name: str | os.PathLike[str],
    device: "torch.device | str | None" = None,
    dtype: "torch.dtype | None" = None,
    pipelines: Sequence[str] | None = None,
    download: bool = False,
    clip: str | os.PathLike[str] | None = None,
) -> Family:
    """Load a shipped family by name ("nano"), one in a folder, or one on the Hugging Face Hub ("owner/name").

    A folder or file of published weights that genpipe.published knows is a family too; with float32 weights, they are
    mapped and read from the disk when they are used.

    Args:
        device: None leaves the weights in main memory. dtype: None computes in float32, whatever the files hold.
        pipelines: None loads all that the family has, a list only those with their parts.
        download: fetch what is not on this disk; without it, a Hub id is looked up among earlier downloads alone.
        clip: file or folder of a CLIP in place of that of published weights.
    Raises InputError for an unknown family, a file that is missing, damaged, pickled, of another class or newer than
    this genpipe, a checksum that does not match, a pipeline that it does not have, and a Hub that cannot be reached.
    """
    import torch

    described = describe_family(name, download, dtype or torch.float32, None if clip is None else Path(clip))
    described.check_draws()
    wanted = described.pipelines if pipelines is None else list(pipelines)
    for each in wanted:
        described.check_has(each)
    if clip is not None and described.source is None:
        raise InputError(f"The family {described.name!r} is no published one, whose CLIP could be another's.")
    needed = {part for each in wanted for part in described.parts_of(each)}
    parts = {part: load_part_of(described, part, dtype) for part in described.parts if part in needed | {"clip"}}
    loaded = put_together(described, parts, wanted)
    if device is not None:
        for pipeline in loaded.values():
            pipeline.to(device)
    return Family(described.folder, described.info, described.source, clip=parts.get("clip"), **loaded)


def put_together(described: FamilyInfo, parts: Mapping[str, Any], wanted: Sequence[str]) -> dict[str, Any]:
    """Pipelines of loaded parts, by name. Raises InputError for parts that do not fit one another."""
    from pipelines.dalle1 import DALLE1Pipeline
    from pipelines.dalle2 import DALLE2Pipeline

    classes: dict[str, Any] = {"dalle1": DALLE1Pipeline, "dalle2": DALLE2Pipeline}
    return {
        each: classes[each](
            **{"clip": None, **{part: parts[part] for part in described.parts_of(each)}},
            defaults=described.defaults.get(each),
            family=described.name,
            known_words=described.words,
        )
        for each in wanted
    }


def load_part_of(described: FamilyInfo, part: str, dtype: "torch.dtype | None" = None) -> Any:
    """Load one part of a family, in eval mode, its files checked. Raises InputError as `load_family` does."""
    if part not in described.parts:
        raise InputError(f"The family {described.name!r} has no {part}, only {', '.join(described.parts)}.")
    if described.source is not None:
        model = described.source.build(part)
        model.register_to_config(_name_or_path=str(described.folder))  # as for a saved part: it is not untrained
        return model
    import torch

    from genpipe.parts import load_part, sha256_of

    folder = described.folder / part
    model = load_part(class_of(part, described.info["parts"][part]["class"]), folder, dtype or torch.float32)
    if sha256_of(folder) != described.checksum(part):
        raise InputError(
            f"The files of the part {part!r} in {str(described.folder)!r} are not those that {INFO_FILE} lists (its "
            "checksum differs); get the family again."
        )
    return model


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
        parts: the learned parts by name, those of one pipeline at least; see `PIPELINE_PARTS`.
        info: what family.json says: name, and optionally license, description, resolution, defaults, words, trained_on;
            format version, classes and checksums are added here.
        card: text of the model card, README.md.
        replace: put it in the place of an existing folder.
        dtype: of the stored weights; None stores float16.
    Raises InputError for an existing folder unless `replace`, missing parts and an unusable `info`.
    """
    import torch

    if not pipelines_of(parts):
        raise InputError(
            f"A family needs the parts of a pipeline ({needed_parts()}), got {', '.join(parts) or 'none'}."
        )
    build = {part: partial(parts.__getitem__, part) for part in parts}
    write_family(Path(folder), build, info, card=card, replace=replace, dtype=dtype or torch.float16)
