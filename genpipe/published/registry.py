"""Which reader takes a folder or file of published weights, and what every reader hands over.

A reader is one module of this package, genpipe.published.<family>: see `Reader`.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from genpipe.errors import InputError

if TYPE_CHECKING:  # torch takes seconds to import, and a folder is recognised without it
    import torch
    from diffusers import ModelMixin

# Asked in this order; the first that recognises a source reads it. The names of families are their last parts.
READERS = (
    "genpipe.published.karlo",
    "genpipe.published.kandinsky",
    "genpipe.published.glide",
    "genpipe.published.mindalle",
    "genpipe.published.openai_dvae",
    "genpipe.published.clip_family",
)


@dataclass(frozen=True)
class Licence:
    """Of published weights: its usual short name, where it stands, and the conditions that must be passed on."""

    name: str
    url: str
    conditions: str


@dataclass(frozen=True)
class Published:
    """A family of published weights, found and checked by its small files; its parts are built when they are asked for.

    name: of the family as shown; letters, digits, dots, dashes and spaces. family: the reader's, as "karlo".
    licence, description: what it is and what it draws, a sentence.
    parts: name of a part (see pipelines.family_info.PART_CLASSES) -> builds it, in eval mode; each is called at most
        once and only when its part is needed, so that no two of them need be in memory at once.
    defaults: "dalle1" or "dalle2" -> settings by name that reproduce the reference's sampler.
    files: all that were or will be read, for the source hash. resolution: of the drawn pictures before upsampling.
    notes: sentences for the model card: what differs from the reference, what is missing.
    """

    name: str
    family: str
    licence: Licence
    description: str
    parts: Mapping[str, "Callable[[], ModelMixin]"]
    defaults: Mapping[str, Mapping[str, Any]]
    files: Sequence[Path]
    resolution: int
    notes: Sequence[str] = field(default=())


class Reader(Protocol):
    """What a module genpipe.published.<family> offers."""

    LICENCE: Licence

    def recognises(self, source: Path) -> bool:
        """Whether this folder or file is one of the family's, by names and small JSON files alone. Never raises."""

    def missing(self, source: Path) -> list[str]:
        """Files of a recognised source that are needed and not there; empty where it is complete."""

    def read(self, source: Path, dtype: "torch.dtype | None" = None, clip: Path | None = None) -> Published:
        """The source as parts. `dtype`: of the weights, None keeps the files'. `clip`: a CLIP in place of its own.

        Raises InputError for what is missing or does not fit.
        """


def readers() -> Iterator[tuple[str, Reader]]:
    """Name of the family and reader, in the order in which they are asked."""
    for path in READERS:
        yield path.rpartition(".")[2], cast(Reader, importlib.import_module(path))


def recognised(source: Path) -> tuple[str, Reader] | None:
    """The family and the reader of a folder or file of published weights; None where no reader knows it."""
    return next(((name, reader) for name, reader in readers() if reader.recognises(source)), None)


def find(source: Path) -> Reader:
    """The reader of a folder or file of published weights.

    Raises InputError for one that no reader knows; where it is of a kind that cannot be read, with the reason.
    """
    found = recognised(source)
    if found is not None:
        return found[1]
    from genpipe.published.refused import reason

    known = ", ".join(path.rpartition(".")[2] for path in READERS)
    raise InputError(
        reason(source)
        or f"{str(source)!r} holds no published weights that genpipe knows; it reads {known}, and folders of its own."
    )
