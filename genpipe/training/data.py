"""Sources of training data: what data.source names, whether it is there, and the first of what it holds.

Legend: B rows of a batch, S side of the picture.
"""

import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import torch

from genpipe.data.captions import PLAIN_SHARE
from genpipe.data.embeddings import StoredEmbeddings
from genpipe.data.image_text import ImageTextFolder, Report
from genpipe.data.samples import Pair
from genpipe.data.scenes import EmojiScenes, Objects, Split, find_font
from genpipe.data.shards import Shards, expand_shards, is_shards, weighted_sources
from genpipe.data.transforms import CropConfig, centre_crop, stage_1_crop, stage_2_crop
from genpipe.errors import InputError
from genpipe.training.config import DataConfig

Batch = dict[str, torch.Tensor]
# (uint8 pictures (B, 3, S, S), captions, generator of this batch) -> tensors
Collate = Callable[[np.ndarray, list[str], np.random.Generator], Batch]


def twin_pairs(data: DataConfig, batch_size: int) -> int:
    """How many pairs of twins a batch begins with; only emoji scenes have twins."""
    return int(batch_size * data.hard_negatives) // 2 if data.source == "scenes" else 0


class OwnBatches(Protocol):
    """Batches by number that a stage makes itself; `report` of those made here, `left_out` of what was missed before.

    A broken sample is reported once: when its own turn comes in the first epoch.
    """

    left_out: Report

    @property
    def report(self) -> Report: ...

    def __getitem__(self, number: int) -> Batch: ...


def emoji_scenes(data: DataConfig, split: str, plain_share: float = PLAIN_SHARE) -> EmojiScenes:
    """Emoji scenes of the training size and seed on either side of the hold-out."""
    return EmojiScenes(
        size=data.size,
        split=cast(Split, split),
        seed=data.seed,
        plain_share=plain_share,
        unplaced_share=data.unplaced_share,
        objects=cast(Objects, data.objects),
        styles=data.styles,
        emphasis=[name.strip() for name in data.emphasis.split(",") if name.strip()],
        faint_share=data.faint_share,
        blended_share=data.blended_share,
    )


def crop_config(data: DataConfig) -> CropConfig:
    """How pictures of a folder or of shards are cut to data.size; emoji scenes are drawn at that size."""
    return {"centre": centre_crop, "stage_1": stage_1_crop, "stage_2": stage_2_crop}[data.crop](data.size)


def check_source(data: DataConfig) -> None:
    """Raise InputError at once for what would only show after minutes: no emoji font, no such file or folder."""
    for source in (data.source, data.validation):
        if source == "scenes":
            find_font()
            emoji_scenes(data, data.split)  # which refuses settings that no scene can have
        elif is_shards(source):
            expand_shards(source)
        elif source and not Path(source).exists():
            raise InputError(f'there is no data source "{source}"; give "scenes", a folder, a list or shards (*.tar).')
    if data.embeddings and not is_shards(data.source):
        raise InputError(
            f'data.embeddings is "{data.embeddings}", but "{data.source}" is no webdataset shards (*.tar); leave it '
            "empty, and embeddings are computed during training."
        )
    if data.embeddings and data.crop != "centre":
        raise InputError(
            f'data.crop is "{data.crop}", but stored embeddings show the centre of each picture; set '
            "data.crop=centre, or leave data.embeddings empty."
        )


def stored_embeddings(data: DataConfig) -> StoredEmbeddings:
    """Where the embeddings of data.source lie, by data.embeddings."""
    return StoredEmbeddings(None if data.embeddings == "beside" else Path(data.embeddings))


def check_embeddings(data: DataConfig, identity: str) -> None:
    """Raise InputError unless every shard of data.source has embeddings by the CLIP with this `weights_identity`.

    For stages that read "image_embedding" from their batches. Reads headers alone; does nothing without
    data.embeddings.
    """
    if not data.embeddings:
        return
    check_source(data)
    stored = replace(stored_embeddings(data), identity=identity)
    shards = expand_shards(data.source)
    missing = [shard for shard in shards if not stored.exist(shard)]
    if missing:
        out = "" if stored.folder is None else f" --out {stored.folder}"
        raise InputError(
            f"{len(missing):,} of {len(shards):,} shards have no embeddings, the first is {str(missing[0])!r}; make "
            f"them with: genpipe embed {shlex.quote(data.source)} --clip FOLDER{out}."
        )
    for shard in shards:
        stored.header(shard)


def _shares(source: str, count: int) -> list[tuple[str, int]]:
    """The places of shards, and how many of `count` samples each gives by its weight."""
    places, weights = zip(*weighted_sources(source), strict=True)
    ends = np.rint(count * np.cumsum(weights) / sum(weights)).astype(int)
    return list(zip(places, np.diff(ends, prepend=0).tolist(), strict=True))


def _first_pairs(source: str, size: int, count: int) -> Iterator[Pair]:
    """Up to `count` pairs of shards in file order, of each source its share; one is in memory at a time."""
    for place, share in _shares(source, count):
        yield from islice(Shards(place, size=size).once(), share)


def first_embeddings(data: DataConfig, count: int) -> np.ndarray:
    """Up to `count` stored embeddings of the training pictures, float32 (n, D), in file order: always the same ones."""
    stored, found = stored_embeddings(data), []
    for place, share in _shares(data.source, count):
        for shard in expand_shards(place):
            if share > 0:
                found.append(stored.load(shard).values[:share])
                share -= len(found[-1])
    return np.concatenate(found).astype(np.float32)


def pairs_of(source: str, size: int, count: int) -> list[Pair]:
    """Up to `count` pairs of a folder, list or shards, each once, cut from the centre, always the same ones.

    Raises InputError where there is none.
    """
    if is_shards(source):
        found = list(_first_pairs(source, size, count))
        if not found:
            raise InputError(f'No sample can be read from "{source}"; `genpipe data check` tells what is broken.')
        return found
    folder = ImageTextFolder(source, size=size)
    return [folder[i] for i in range(min(count, len(folder)))]


def captions_of(data: DataConfig, count: int) -> list[str]:
    """Up to `count` captions of a source, for training a tokenizer."""
    if data.source == "scenes":
        scenes = emoji_scenes(data, data.split)
        return [scenes.caption(scenes.scene(i), np.random.default_rng((data.seed, 3, i))) for i in range(count)]
    if is_shards(data.source):
        return [caption for _, caption in _first_pairs(data.source, data.size, count)]
    return ImageTextFolder(data.source, size=data.size).captions[:count]
