"""`genpipe embed`: a CLIP's embeddings of the pictures in webdataset shards, made once and stored for training.

Prior and decoder learn from CLIP's embedding z_i of every picture (2204.06125, 2), which never changes. A picture is
embedded as it lies in the shard, fitted to CLIP as CLIP's own config says (mostly: shorter side resized, centre cut
out), and not from the data.size pixels that a stage trains on: so small training pictures keep the embedding of the
large original, one file serves every training size, and z_i means what it means where a person's own picture is
embedded. Both see the centre, so training from stored embeddings allows no random crops.

B pictures of a batch, S side of CLIP's pictures, D embedding width.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from genpipe.clip.chunks import Chunks
from genpipe.clip.model import CLIP
from genpipe.data.embeddings import EmbeddingsHeader, StoredEmbeddings
from genpipe.data.samples import BrokenSample, Report
from genpipe.data.shard_walk import count_broken
from genpipe.data.shards import Urls, expand_shards
from genpipe.data.tar_index import ShardIndex, index_shard, picture_crc, read_entry
from genpipe.errors import InputError
from genpipe.identity import weights_identity
from genpipe.images import shrink, to_unit
from genpipe.parts import load_part, sha256_of


@dataclass(frozen=True)
class EmbedReport:
    """What `embed` found and did.

    shards: all of them. written: shards embedded by this call; the others, `kept`, had their embeddings. pairs: of all
    shards, embeddings there are now, and samples that have none, by reason. embedding_dim: D.
    """

    shards: int
    written: int
    pairs: Report
    embedding_dim: int
    clip_identity: str

    @property
    def kept(self) -> int:
        return self.shards - self.written

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "shards": self.shards,
            "written": self.written,
            "kept": self.kept,
            "embeddings": self.pairs.read,
            "skipped": dict(self.pairs.skipped),
            "embedding_dim": self.embedding_dim,
            "clip_identity": self.clip_identity,
        }


def embed(
    shards: Urls,
    clip: CLIP | str | Path,
    out: str | Path | None = None,
    batch_size: int = 64,
    progress: Callable[[float, int], None] | None = None,
) -> EmbedReport:
    """Write the CLIP embeddings of the pictures in shards, beside each shard or in the folder `out`.

    A shard's files appear when all of it is embedded. A shard whose files are there, whole, of this CLIP and of the
    shard as it is now, is left alone: after an interrupt, the same call goes on. In memory are one batch and the
    embeddings of one shard. Samples that cannot be used are counted and have no embedding.

    Args:
        shards: as `genpipe.data.shards.Shards` takes them. clip: the model, on its device, or the folder of one.
        batch_size: most pictures that CLIP sees at once; half as many each time memory runs out.
        progress: called with the number of shards done, a fraction for the one at work, and the number of all.
    Raises InputError for shards or a CLIP that cannot be read and a folder that cannot be written, FloatingPointError
    for an embedding that is not finite.
    """
    if batch_size < 1:
        raise InputError(f"The batch size is {batch_size}; it must be at least 1.")
    paths = expand_shards(shards)
    model = clip if isinstance(clip, CLIP) else load_part(CLIP, clip)
    if model.training:
        raise InputError("The CLIP is in training mode, in which embeddings may be random; call its eval() first.")
    stored = StoredEmbeddings(None if out is None else Path(out), weights_identity(model))
    _check_names(paths, stored)
    embedder = _Embedder(model, batch_size)
    report, written = Report(), 0
    for number, path in enumerate(paths):

        def follow(fraction: float, done: int = number) -> None:
            if progress is not None:
                progress(done + fraction, len(paths))

        header = finished(path, stored)
        if header is not None:
            found = Report(len(header.keys), header.skipped, dict.fromkeys(header.skipped, path.name))
        else:
            found = _embed_shard(path, embedder, stored, follow)
            written += 1
        report.add(found)
        follow(1.0)
    assert stored.identity is not None
    return EmbedReport(len(paths), written, report, model.embedding_dim, stored.identity)


def finished(shard: Path, stored: StoredEmbeddings) -> EmbeddingsHeader | None:
    """The header of a shard's embeddings if nothing is left to do: sound, of this CLIP and of the shard as it is."""
    try:
        header = stored.load(shard).header
    except InputError:
        return None
    with _complaining(shard):
        if shard.stat().st_mtime_ns != header.shard_modified_ns and sha256_of(shard) != header.shard_sha256:
            return None
    return header


def _check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be written, before CLIP works for nothing."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise InputError(f"The folder {str(folder)!r} cannot be written; choose another with --out.")


def _check_names(paths: list[Path], stored: StoredEmbeddings) -> None:
    """Refuse shards whose embeddings would have one name."""
    names: dict[Path, Path] = {}
    for path in paths:
        other = names.setdefault(stored.files(path)[0].absolute(), path)
        if other != path:
            raise InputError(
                f"The shards {str(other)!r} and {str(path)!r} have one name, so their embeddings cannot lie in one "
                "folder; embed them one at a time with a folder --out for each, or without --out beside the shards."
            )


@contextmanager
def _complaining(shard: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"The shard {str(shard)!r} cannot be read ({error.strerror or error}).") from error


class _Embedder:
    """CLIP in bounded batches: pixels in, what is stored out."""

    def __init__(self, clip: CLIP, batch_size: int) -> None:
        self.clip, self.chunks = clip, Chunks(batch_size)

    def fit(self, picture: Image.Image) -> torch.Tensor:
        """Picture of any size -> pixels (3, S, S) in [0, 1]."""
        return self.clip.fit_pixels(to_unit([shrink(picture, max(self.clip.image_size))]))[0]

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor) -> np.ndarray:
        """Pixels (B, 3, S, S) -> embeddings float16 (B, D)."""
        found = self.chunks.run(self.clip.embed_image, pixels)
        return torch.cat([embedding.to(torch.float16).cpu() for embedding in found]).numpy()


def _embed_shard(shard: Path, embedder: _Embedder, stored: StoredEmbeddings, follow: Callable[[float], None]) -> Report:
    """Embed one shard and write its files; counts of embeddings and of broken samples."""
    _check_folder(stored.files(shard)[0].parent)
    with _complaining(shard):
        before, digest = shard.stat(), sha256_of(shard)
    index = index_shard(shard)
    report = Report()
    count_broken(index, report)
    keys: list[str] = []
    crcs: list[int] = []
    values = [np.zeros((0, embedder.clip.embedding_dim), dtype=np.float16)]
    samples = _samples(index, embedder, report)
    while batch := list(islice(samples, embedder.chunks.size)):
        embedded = embedder(torch.stack([pixels for _, _, pixels in batch]))
        odd = np.flatnonzero(~np.isfinite(embedded).all(axis=1))
        if len(odd):
            raise FloatingPointError(
                f"embed: CLIP's embedding of {batch[odd[0]][0][:100]!r} in {str(shard)!r} is not finite in half "
                "precision; its weights are damaged or its training diverged."
            )
        keys += [key for key, _, _ in batch]
        crcs += [crc for _, crc, _ in batch]
        values.append(embedded)
        follow((len(keys) + sum(report.skipped.values())) / (len(index.entries) + len(index.broken)))
    with _complaining(shard):
        after = shard.stat()
    if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise InputError(f"The shard {str(shard)!r} was changed while it was read; run again when it is complete.")
    assert stored.identity is not None
    header = EmbeddingsHeader(
        clip_identity=stored.identity,
        embedding_dim=embedder.clip.embedding_dim,
        shard_bytes=before.st_size,
        shard_modified_ns=before.st_mtime_ns,
        shard_sha256=digest,
        array_sha256="",
        keys=keys,
        picture_crcs=crcs,
        skipped=dict(report.skipped),
    )
    stored.save(shard, header, np.concatenate(values))
    report.read = len(keys)
    return report


def _samples(index: ShardIndex, embedder: _Embedder, report: Report) -> Iterator[tuple[str, int, torch.Tensor]]:
    """Key, CRC-32 and pixels (3, S, S) of every sound sample, in file order."""
    if not index.entries:
        return
    with _complaining(index.path), open(index.path, "rb") as file:
        for entry in index.entries:
            try:
                crc = picture_crc(file, entry)
                picture, _ = read_entry(file, entry)
            except BrokenSample as error:
                report.skip(error.reason, f"{index.path.name} {entry.key}")
                continue
            yield entry.key, crc, embedder.fit(picture)
