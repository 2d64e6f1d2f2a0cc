"""Embeddings of a folder's pictures, kept in one safetensors file: of which file each is, and what that looked like.

Legend: N pictures, D embedding width.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from genpipe.clip.model import CLIP
from genpipe.errors import InputError
from genpipe.identity import weights_identity

FORMAT = "genpipe picture embeddings 1"
# What changes the embedding of a picture while the weights stay the same.
_CONFIG_KEYS = ("architecture", "image_mean", "image_std", "interpolation", "resize_mode")
Stamp = tuple[int, int]  # size of a file in bytes, time of its last change in nanoseconds


@dataclass(frozen=True)
class EmbeddingTable:
    """names[i], a path below the folder, had the stamp stamps[i] (N, 2) int64 when embeddings[i] (N, D) was made.

    The embeddings are float32, of length 1.
    """

    names: list[str]
    stamps: np.ndarray
    embeddings: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def unchanged(self, stamps: Mapping[str, Stamp]) -> EmbeddingTable:
        """The rows whose file is in `stamps` with the stamp it had."""
        rows = [row for row, name in enumerate(self.names) if stamps.get(name) == tuple(self.stamps[row].tolist())]
        return self if len(rows) == len(self) else self._rows(rows)

    def joined(self, others: Sequence[EmbeddingTable]) -> EmbeddingTable:
        """The rows of all, in the order of their names."""
        tables = [table for table in (self, *others) if len(table)]
        if len(tables) < 2:
            return tables[0] if tables else self
        names = [name for table in tables for name in table.names]
        stamps = np.concatenate([table.stamps for table in tables])
        embeddings = np.concatenate([table.embeddings for table in tables])
        return EmbeddingTable(names, stamps, embeddings)._rows(sorted(range(len(names)), key=names.__getitem__))

    def _rows(self, rows: Sequence[int]) -> EmbeddingTable:
        return EmbeddingTable([self.names[row] for row in rows], self.stamps[rows], self.embeddings[rows])


def empty_table(width: int) -> EmbeddingTable:
    """A table of no pictures, for embeddings of `width` numbers."""
    return EmbeddingTable([], np.zeros((0, 2), dtype=np.int64), np.zeros((0, width), dtype=np.float32))


def embedding_identity(clip: CLIP) -> str:
    """SHA-256 in hex over all that decides what `clip` makes of a picture: weights, architecture, preprocessing."""
    described = json.dumps({key: clip.config[key] for key in _CONFIG_KEYS}, sort_keys=True)
    return hashlib.sha256(f"{weights_identity(clip)}\n{described}".encode()).hexdigest()


def cache_path(folder: Path, identity: str, cache: Path | None = None) -> Path:
    """The file for the pictures below `folder` under one CLIP: hidden, beside the folder, or in the folder `cache`.

    Each CLIP has a file of its own, so that two of them do not push each other out. In `cache` the name holds a hash of
    the folder's whole path too.
    """
    absolute = Path(os.path.abspath(folder))
    if cache is None:
        return absolute.parent / f".{absolute.name}.genpipe-{identity[:12]}.safetensors"
    where = hashlib.sha256(os.fsencode(absolute)).hexdigest()[:12]
    return cache / f"{absolute.name}-{where}.genpipe-{identity[:12]}.safetensors"


def read_cache(path: Path, identity: str, width: int) -> EmbeddingTable:
    """What the file holds; an empty table where there is none.

    A file that is damaged, or of another CLIP or format, is as good as none, with a warning; rows that are not of
    length 1 are left out.
    """
    if not path.is_file():
        return empty_table(width)
    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT or about.get("clip") != identity:
                raise ValueError("it is of another CLIP or of another version of genpipe")
            embeddings, stamps, joined = (file.get_tensor(name) for name in ("embeddings", "stamps", "names"))
        names = [os.fsdecode(name) for name in joined.tobytes().split(b"\0")[:-1]]
        kinds = (embeddings.dtype, embeddings.shape, stamps.dtype, stamps.shape, len(set(names)))
        if kinds != (np.float32, (len(names), width), np.int64, (len(names), 2), len(names)):
            raise ValueError("its tables do not fit one another")
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        warnings.warn(f"The embeddings in {str(path)!r} are not used ({reason}); they are made anew.", stacklevel=3)
        return empty_table(width)
    table = EmbeddingTable(names, stamps, embeddings)
    sound = np.abs(np.einsum("nd,nd->n", embeddings, embeddings) - 1) < 1e-3  # False for NaN
    return table if sound.all() else table._rows(np.flatnonzero(sound).tolist())


def write_cache(path: Path, identity: str, table: EmbeddingTable) -> None:
    """Put `table` in the place of what the file held: whole, or not at all. Raises OSError where it cannot be written.

    Of two processes that write at once the later wins; what only the other one knew is embedded again next time.
    """
    tensors: dict[str, np.ndarray] = {
        "embeddings": np.ascontiguousarray(table.embeddings, dtype=np.float32),
        "stamps": np.ascontiguousarray(table.stamps, dtype=np.int64),
        "names": np.array(bytearray(b"".join(os.fsencode(name) + b"\0" for name in table.names)), dtype=np.uint8),
    }
    fresh = _temporary(path)
    try:
        fresh.touch(exist_ok=False)
        mode = fresh.stat().st_mode  # as the person wants new files; safetensors makes them readable to the owner alone
        try:
            save_file(tensors, fresh, metadata={"format": FORMAT, "clip": identity})
        except SafetensorError as error:  # what safetensors makes of a full disk
            raise OSError(str(error)) from error
        os.chmod(fresh, mode)
        with open(fresh, "rb") as file:
            os.fsync(file.fileno())
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def check_writable(path: Path, chosen: bool) -> bool:
    """Whether the cache can be written; its folder is made if `chosen`, that is, if a person named it.

    If it cannot, raises InputError, or warns where nobody chose the place.
    """
    probe = _temporary(path)
    try:
        if chosen:
            path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        place = f"The folder {str(path.parent)!r} cannot be written ({error.strerror or error})"
        if chosen:
            raise InputError(f"{place}; choose another for the embeddings.") from error
        warnings.warn(f"{place}: the embeddings are not kept; name a folder for them with --cache.", stacklevel=3)
        return False
    return True


def _temporary(path: Path) -> Path:
    return path.parent / f".genpipe-{uuid.uuid4().hex}.tmp"
