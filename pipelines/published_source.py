"""A family in published weights as they are: what it says of itself, the hash of its files, its parts."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genpipe.errors import InputError
from genpipe.published.registry import Published, Reader, recognised
from pipelines.settings import sampling_of

if TYPE_CHECKING:
    import torch
    from diffusers import ModelMixin

BLOCK = 1 << 20


@dataclass(frozen=True)
class PublishedSource:
    """Published weights that a reader has looked at: its parts are built when they are asked for."""

    path: Path
    family: str
    reader: Reader = field(repr=False)
    published: Published = field(repr=False)

    @cached_property
    def sha256(self) -> str:
        """Over all files; reading gigabytes takes its time, so only where it is needed."""
        return fingerprint(self.published.files, self.path)

    def build(self, part: str) -> "ModelMixin":
        """One part, in eval mode."""
        return self.published.parts[part]().eval()

    @property
    def info(self) -> dict[str, Any]:
        """What a family.json would say."""
        about = self.published
        return {
            "name": about.name,
            "license": about.licence.name,
            "description": about.description,
            "resolution": about.resolution,
            "defaults": {pipeline: dict(settings) for pipeline, settings in about.defaults.items()},
            "parts": {part: {} for part in about.parts},
        }


def published_source(
    path: Path, dtype: "torch.dtype | None" = None, clip: Path | None = None
) -> PublishedSource | None:
    """Published weights in a folder or file; None where no reader knows it. `dtype`: None keeps that of the files.

    Raises InputError for what is incomplete or does not fit, and for weights that are known and cannot be read.
    """
    found = recognised(path)
    if found is None:
        from genpipe.published.refused import reason

        why = reason(path)
        if why is not None:
            raise InputError(why)
        return None
    family, reader = found
    published = reader.read(path, dtype, clip)
    for pipeline, settings in published.defaults.items():
        sampling_of(pipeline, settings)
    return PublishedSource(path, family, reader, published)


def fingerprint(files: Sequence[Path], source: Path, report: Callable[[int, int], Any] | None = None) -> str:
    """SHA-256 in hex over names and contents of files, in the order of their names; where the source lies is no part
    of it. `report(read, all)`, in bytes.
    """
    names = {_name(file, source): file for file in files}
    total, read = hashlib.sha256(), 0
    size = sum(file.stat().st_size for file in names.values())
    for name in sorted(names):
        digest = hashlib.sha256()
        with names[name].open("rb") as opened:
            while block := opened.read(BLOCK):
                digest.update(block)
                read += len(block)
                if report is not None:
                    report(read, size)
        total.update(f"{name}\0{digest.hexdigest()}\n".encode())
    return total.hexdigest()


def sizes_of(files: Sequence[Path], source: Path) -> Mapping[str, int]:
    """Name -> bytes."""
    return {_name(file, source): file.stat().st_size for file in sorted(files)}


def _name(file: Path, source: Path) -> str:
    folder = source if source.is_dir() else source.parent
    return file.relative_to(folder).as_posix() if file.is_relative_to(folder) else file.name
