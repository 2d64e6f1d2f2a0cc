"""Searching pictures with a caption: embeddings of a folder's pictures, made once, and the exact nearest to a text.

What CLIP's objective trains directly (arXiv 2103.00020, section 2.3): the cosine similarity of a text with each of many
pictures. Legend: N pictures, Q queries, D embedding width.
"""

from __future__ import annotations

import importlib.util
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from genpipe.clip.chunks import Chunks
from genpipe.clip.embedding_cache import (
    EmbeddingTable,
    Stamp,
    cache_path,
    check_writable,
    embedding_identity,
    read_cache,
    write_cache,
)
from genpipe.clip.model import CLIP
from genpipe.data.read_ahead import read_ahead
from genpipe.errors import InputError
from genpipe.images import find_pictures, open_picture, shrink, to_unit

FAISS_ABOVE = 1_000_000  # embeddings; up to here numpy's matrix product does
_BLOCK = 2**17  # scores of one matrix product
_SAVE_EVERY = 60.0  # seconds, at least, between two savings of an index that is being made


@dataclass(frozen=True)
class PictureIndex:
    """The pictures below a folder and their embeddings (N, D), float32, of length 1; paths[i] belongs to row i.

    skipped: (path, reason) of pictures that cannot be read.
    embedded, reused, dropped: pictures that went through CLIP now, whose embedding was in the cache, and that have left
        the cache because they are gone. A changed picture is embedded again.
    cache: the file that keeps embeddings for the next time; None where there is none.
    """

    folder: Path
    paths: list[Path]
    embeddings: np.ndarray
    skipped: list[tuple[Path, str]]
    embedded: int
    reused: int
    dropped: int
    cache: Path | None


def index_folder(
    clip: CLIP,
    folder: str | os.PathLike[str],
    cache: str | os.PathLike[str] | None = None,
    chunk_size: int = 64,
    report: Callable[[int, int], None] | None = None,
) -> PictureIndex:
    """Embeddings of all pictures below `folder`: of unchanged files from the cache, of the others made now.

    The cache is a hidden file beside the folder, one for each CLIP, or a file in the folder `cache`; the searched
    folder itself is never written. A picture is known by its path below the folder, its size and its time of change.
    Where nothing can be written beside the folder, a warning says so and nothing is kept. The cache is saved from time
    to time, and when the work is interrupted. CLIP sees `chunk_size` pictures at once, half as many each time memory
    runs out; `report(done, total)` counts the pictures that had to be read. Memory: about 8 N D bytes at most.

    Raises InputError for a folder that is missing, holds no picture or none that can be read, and for a `cache` that
    cannot be written; FloatingPointError where CLIP's numbers are broken.
    """
    root = Path(folder)
    if root.exists() and not root.is_dir():
        raise InputError(f"{str(folder)!r} is a file; give a folder of pictures.")
    if chunk_size < 1:
        raise InputError(f"chunk_size must be at least 1, not {chunk_size}.")
    files = {path.relative_to(root).as_posix(): path for path in find_pictures([root])}
    stamps = {name: _stamp(path) for name, path in files.items()}  # before reading: a change meanwhile shows next time
    identity = embedding_identity(clip)
    place = cache_path(root, identity, None if cache is None else Path(cache))
    known = read_cache(place, identity, clip.embedding_dim)
    kept = known.unchanged(stamps)
    missing = sorted(files.keys() - set(kept.names))
    gone = len(set(known.names) - files.keys())
    writable = bool(missing or gone) and check_writable(place, chosen=cache is not None)

    table, fresh, skipped = kept, list[EmbeddingTable](), list[tuple[Path, str]]()
    changed, saved_at, cost = gone > 0, time.monotonic(), 0.0
    try:
        for done, batch in _embed_files(clip, root, missing, stamps, chunk_size, skipped):
            fresh.append(batch)
            if report is not None:
                report(done, len(missing))
            if writable and time.monotonic() - saved_at > max(_SAVE_EVERY, 20 * cost):
                table, fresh = table.joined(fresh), []
                cost = _save(place, identity, table)
                saved_at = time.monotonic()
    finally:
        changed = changed or bool(fresh)
        table = table.joined(fresh)
        if writable and changed and len(table):
            _save(place, identity, table)
    if not len(table):
        raise InputError(f"None of the {len(files)} pictures in {str(root)!r} can be read; the first: {skipped[0][1]}")
    paths = [files[name] for name in table.names]
    counts = (len(table) - len(kept), len(kept), gone)
    return PictureIndex(root, paths, table.embeddings, skipped, *counts, place if place.is_file() else None)


def search(clip: CLIP, index: PictureIndex, caption: str, k: int = 10) -> list[tuple[float, Path]]:
    """The k pictures (or all, if there are fewer) that fit `caption` best: (cosine similarity, path), best first.

    Of equal similarities the path that comes first in the alphabet wins. Raises InputError for k below 1 and for an
    index that another width of embeddings made; FloatingPointError where CLIP's numbers are broken.
    """
    with torch.no_grad():
        query = clip.encode_text([caption]).normalized.cpu().numpy()
    if not np.isfinite(query).all():
        raise FloatingPointError("CLIP's embedding of the caption is not finite; its weights are damaged.")
    scores, rows = top_k(index.embeddings, query, k)
    return [(float(score), index.paths[row]) for score, row in zip(scores[0], rows[0], strict=True)]


def top_k(embeddings: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest inner products of each query (Q, D) with embeddings (N, D): scores (Q, k) and rows (Q, k).

    Best first, and exact: every product is computed, a block of rows at a time. With fewer than k embeddings all are
    returned. Above a million embeddings FAISS, where it is installed, computes the same faster. Of equal scores the
    lower row wins (with FAISS only among those returned). Raises InputError for k below 1 and widths that differ.
    """
    if k < 1:
        raise InputError(f"The number of pictures to find must be at least 1, got {k}.")
    if embeddings.ndim != 2 or queries.ndim != 2 or embeddings.shape[1] != queries.shape[1]:
        raise InputError(
            f"Embeddings of shape {embeddings.shape} cannot be searched with queries of shape {queries.shape}."
        )
    k = min(k, len(embeddings))
    if len(embeddings) > FAISS_ABOVE and has_faiss():
        return top_k_by_faiss(embeddings, queries, k)
    return top_k_by_product(embeddings, queries, k, max(1024, _BLOCK // max(1, len(queries))))


def top_k_by_product(embeddings: np.ndarray, queries: np.ndarray, k: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """`top_k` for k <= N, by products with `rows` embeddings at a time."""
    scores = np.zeros((len(queries), 0), dtype=np.float32)
    found = np.zeros((len(queries), 0), dtype=np.int64)
    for start in range(0, len(embeddings), rows):
        block = queries @ embeddings[start : start + rows].T  # Q, rows
        numbers = np.broadcast_to(np.arange(start, start + block.shape[1]), block.shape)
        scores, found = np.concatenate([scores, block], axis=1), np.concatenate([found, numbers], axis=1)
        best = np.stack([_best(row, k) for row in scores])
        scores, found = np.take_along_axis(scores, best, axis=1), np.take_along_axis(found, best, axis=1)
    return scores, found


def _best(scores: np.ndarray, k: int) -> np.ndarray:
    """Places of the k largest of scores (n,), best first; of equal ones the lower place comes first, and is kept."""
    places = np.arange(len(scores))
    if k < len(scores):
        smallest = np.partition(scores, len(scores) - k)[len(scores) - k]
        above, equal = np.flatnonzero(scores > smallest), np.flatnonzero(scores == smallest)
        places = np.concatenate([above, equal[: k - len(above)]])
    return places[np.lexsort((places, -scores[places]))]


def has_faiss() -> bool:
    """Whether FAISS is installed (the extra `search`)."""
    return importlib.util.find_spec("faiss") is not None


def top_k_by_faiss(embeddings: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """`top_k` for k <= N by FAISS's exhaustive search, which builds no index: exact, and without a copy."""
    import faiss

    scores, found = faiss.knn(
        np.ascontiguousarray(queries, np.float32),
        np.ascontiguousarray(embeddings, np.float32),
        k,
        metric=faiss.METRIC_INNER_PRODUCT,
    )
    order = np.lexsort((found, -scores), axis=-1)
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(found, order, axis=1).astype(np.int64)


def read_for_clip(clip: CLIP, path: str | os.PathLike[str]) -> torch.Tensor:
    """A picture file of any kind and size -> pixels (3, H, W) in [0, 1] at CLIP's size; raises InputError."""
    return fit_for_clip(clip, open_picture(Path(path)))


def fit_for_clip(clip: CLIP, picture: Image.Image) -> torch.Tensor:
    """A picture of any size -> pixels (3, H, W) in [0, 1] at CLIP's size."""
    return clip.fit_pixels(to_unit([shrink(picture, max(clip.image_size))]))[0]


def _embed_files(
    clip: CLIP,
    root: Path,
    names: Sequence[str],
    stamps: dict[str, Stamp],
    chunk_size: int,
    skipped: list[tuple[Path, str]],
) -> Iterator[tuple[int, EmbeddingTable]]:
    """(files read so far, rows of the sound ones since the last time); what cannot be read is appended to `skipped`."""
    sound: list[str] = []
    pixels: list[torch.Tensor] = []
    reading = read_ahead(names, lambda name: read_for_clip(clip, root / name))
    chunks = Chunks(chunk_size)
    for done, (name, future) in enumerate(reading, start=1):
        try:
            pixels.append(future.result())
            sound.append(name)
        except InputError as error:
            skipped.append((root / name, str(error)))
        if sound and (len(sound) >= chunks.size or done == len(names)):
            rows = np.array([stamps[name] for name in sound], dtype=np.int64)
            yield done, EmbeddingTable(sound, rows, _embed(clip, torch.stack(pixels), chunks))
            sound, pixels = [], []


@torch.no_grad()
def _embed(clip: CLIP, pixels: torch.Tensor, chunks: Chunks) -> np.ndarray:
    """Pixels (n, 3, H, W) -> embeddings (n, D) of length 1."""
    embedding = torch.cat([each.float().cpu() for each in chunks.run(clip.embed_image, pixels)])
    if not bool(embedding.isfinite().all()):
        raise FloatingPointError("CLIP's embedding of a picture is not finite; its weights are damaged.")
    return F.normalize(embedding, dim=-1).numpy()


def _stamp(path: Path) -> Stamp:
    try:
        status = path.stat()
    except OSError:  # gone again, or a link to nowhere; reading it will tell
        return (-1, -1)
    return (status.st_size, status.st_mtime_ns)


def _save(place: Path, identity: str, table: EmbeddingTable) -> float:
    """Write the cache, or warn that this failed; returns the seconds it took."""
    start = time.monotonic()
    try:
        write_cache(place, identity, table)
    except OSError as error:
        reason = error.strerror or str(error)
        warnings.warn(f"The embeddings cannot be kept in {str(place)!r} ({reason}).", stacklevel=3)
    return time.monotonic() - start
