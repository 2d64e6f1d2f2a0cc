"""Pictures that a system drew for captions of emoji scenes: CLIP learns to rank the scenes above them.

A caption's candidates are all meant to fit it, so what tells them apart is how well they are drawn; a CLIP that has
only seen true pictures does not look for that. Written by `genpipe data draw`, read by the stage of CLIP.
"""

import json
import os
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from genpipe.data.scenes import EmojiScenes, Example, Objects
from genpipe.errors import InputError
from genpipe.images import stack_levels

SUFFIX = ".safetensors"
_ENTRY = "genpipe_drawn"  # of the file's header


@dataclass(frozen=True)
class DrawnSettings:
    """Which training scenes were drawn: number 0, 1, 2 ... of this seed, at this size."""

    seed: int
    size: int
    objects: str
    unplaced_share: float

    def scenes(self) -> EmojiScenes:
        """The scenes, of the split "train". Raises InputError for settings that there are no scenes of."""
        objects = cast(Objects, self.objects)
        return EmojiScenes(self.size, seed=self.seed, objects=objects, unplaced_share=self.unplaced_share)


class Triples(NamedTuple):
    """True and drawn pictures, uint8 (n, 3, S, S), and the n captions of both."""

    true: np.ndarray
    drawn: np.ndarray
    captions: list[str]


class DrawnScenes:
    """All drawn pictures of a folder.

    Args: folder: with files of `save_drawn`; size: S, the side that the pictures must have.
    Raises InputError where there are none, a file is damaged, or the pictures have another side.
    """

    def __init__(self, folder: str | Path, size: int) -> None:
        files = sorted(Path(folder).glob(f"*{SUFFIX}"))
        if not files:
            raise InputError(f"{str(folder)!r} holds no drawn pictures (*{SUFFIX}); make some with genpipe data draw.")
        read = [load_drawn(file) for file in files]
        for file, (settings, _) in zip(files, read, strict=True):
            if settings.size != size:
                raise InputError(f"{str(file)!r} holds pictures of {settings.size} pixels; data.size is {size}.")
        self._parts = [(settings.scenes(), drawn) for settings, drawn in read]
        self._ends = np.cumsum([len(drawn) for _, drawn in self._parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def pick(self, count: int, generator: np.random.Generator) -> Triples:
        """`count` of them by chance."""
        examples: list[Example] = []
        drawn = []
        for number in generator.integers(len(self), size=count).tolist():
            part = int(np.searchsorted(self._ends, number, side="right"))
            scenes, pictures = self._parts[part]
            index = number - (int(self._ends[part - 1]) if part else 0)
            examples.append(scenes.example(index))
            drawn.append(pictures[index])
        true = stack_levels([example.pixels for example in examples])
        return Triples(true, np.stack(drawn), [example.caption for example in examples])


def save_drawn(path: Path, drawn: np.ndarray, settings: DrawnSettings) -> None:
    """Write pictures, uint8 (n, 3, S, S), of the first n scenes of `settings`: all of a file or nothing.

    A file that is there is replaced. Raises InputError where it cannot be written.
    """
    data = save({"drawn": np.ascontiguousarray(drawn)}, metadata={_ENTRY: json.dumps(asdict(settings))})
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.new")
    try:
        try:
            fresh.write_bytes(data)
            os.replace(fresh, path)
        finally:
            fresh.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{str(path)!r} cannot be written ({reason}); choose another file or free space.") from error


def load_drawn(path: Path) -> tuple[DrawnSettings, np.ndarray]:
    """What `save_drawn` wrote. Raises InputError for a damaged or foreign file."""
    try:
        with safe_open(path, framework="numpy") as file:
            entries: dict[str, Any] = json.loads((file.metadata() or {})[_ENTRY])
            settings, drawn = DrawnSettings(**entries), file.get_tensor("drawn")
        settings.scenes()
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, InputError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{str(path)!r} holds no drawn pictures ({reason}); make it with genpipe data draw."
        ) from error
    side = settings.size
    if drawn.dtype != np.uint8 or drawn.ndim != 4 or drawn.shape[1:] != (3, side, side) or not len(drawn):
        raise InputError(
            f"{str(path)!r} holds {drawn.dtype} {list(drawn.shape)}; uint8 (n, 3, {side}, {side}) is needed."
        )
    return settings, drawn
