"""Batches for the loop: batch number -> tensors, so that any process can prepare any batch and a resumed run goes on.

Legend: B rows of a batch, S side of the picture.
"""

import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import cast, get_args

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from genpipe.data.captions import PLAIN_SHARE
from genpipe.data.embeddings import StoredEmbeddings
from genpipe.data.image_text import ImageTextFolder, Report
from genpipe.data.samples import Pair
from genpipe.data.scenes import EmojiScenes, Split, TwinKind, find_font
from genpipe.data.shards import Shards, expand_shards
from genpipe.data.transforms import CropConfig, centre_crop, stage_1_crop, stage_2_crop
from genpipe.errors import InputError
from genpipe.images import stack_levels
from genpipe.training.config import DataConfig, Recipe

Batch = dict[str, torch.Tensor]
TWIN_KINDS: tuple[TwinKind, ...] = get_args(TwinKind)
# (uint8 pictures (B, 3, S, S), captions, generator of this batch) -> tensors
Collate = Callable[[np.ndarray, list[str], np.random.Generator], Batch]


def twin_pairs(data: DataConfig, batch_size: int) -> int:
    """How many pairs of twins a batch begins with; only emoji scenes have twins."""
    return int(batch_size * data.hard_negatives) // 2 if data.source == "scenes" else 0


class SceneBatches(Dataset[Batch]):
    """Batches of emoji scenes by number; with hard negatives the first rows are scenes beside their twins.

    The twins of the first data.plain_batches batches tell places by "left of" and "above" nearly always: a short
    curriculum, since CLIP learns what the order of the nouns says before it learns what turns it round.
    """

    def __init__(self, data: DataConfig, batch_size: int, collate: Collate) -> None:
        self.scenes = emoji_scenes(data, data.split)
        self.plain_scenes = emoji_scenes(data, data.split, plain_share=0.95)
        self.plain_batches = data.plain_batches
        self.batch_size = batch_size
        self.pairs = twin_pairs(data, batch_size)
        self.shares = np.array(data.twin_shares) / sum(data.twin_shares)
        self.seed = data.seed
        self.collate = collate

    def __getitem__(self, number: int) -> Batch:
        generator = np.random.default_rng((self.seed, 1, number))
        first = number * self.batch_size
        twin_scenes = self.plain_scenes if number < self.plain_batches else self.scenes
        pixels, captions = [], []
        # a pair fills two rows, so the rows of a batch end before its last indices
        for index in range(first, first + self.pairs):
            kind = TWIN_KINDS[generator.choice(len(TWIN_KINDS), p=self.shares)]
            twins = twin_scenes.twins(index, kind=kind)
            pixels += [twins.pixels, twins.twin_pixels]
            captions += [twins.caption, twins.twin_caption]
        for index in range(first + self.pairs, first + self.batch_size - self.pairs):
            example = self.scenes.example(index)
            pixels.append(example.pixels)
            captions.append(example.caption)
        return self.collate(stack_levels(pixels), captions, generator)


class FolderBatches(Dataset[Batch]):
    """Batches of a folder's pictures by number; every epoch is a new permutation with new crops."""

    def __init__(self, data: DataConfig, batch_size: int, collate: Collate) -> None:
        self.pictures = ImageTextFolder(data.source, size=data.size, crop=crop_config(data), seed=data.seed)
        self.batch_size = batch_size
        self.seed = data.seed
        self.collate = collate
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    def _place(self, position: int) -> tuple[int, int]:
        """(epoch, picture) of the position in the endless sequence."""
        epoch, place = divmod(position, len(self.pictures))
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng((self.seed, 2, epoch)).permutation(len(self.pictures)))
        return epoch, int(self._order[1][place])

    def __getitem__(self, number: int) -> Batch:
        rows = []
        for position in range(number * self.batch_size, (number + 1) * self.batch_size):
            epoch, index = self._place(position)
            rows.append(self.pictures.example(index, epoch))
        return _collated(rows, self.collate, self.seed, number)


class ShardBatches(IterableDataset[Batch]):
    """One process's endless batches of webdataset shards, from its batch `first` (0, 1, ...) on.

    Worker processes are streams of their own, asked in turn; a resumed run starts each where it stood. With
    data.embeddings a batch holds "image_embedding", float32 (B, D), beside what `collate` makes.
    """

    def __init__(self, recipe: Recipe, collate: Collate, first: int, rank: int, world: int) -> None:
        self.data, self.batch_size, self.collate = recipe.data, recipe.run.batch_size, collate
        self.first, self.rank, self.world = first, rank, world
        self.report = Report()
        self.embeddings: StoredEmbeddings | None = None
        sources = self._shards(0, 1, 0).sources  # says at once what is missing
        if self.data.embeddings:
            stored = stored_embeddings(self.data)
            self.embeddings = replace(stored, identity=stored.header(sources[0][0]).clip_identity)  # all from one CLIP

    def _shards(self, lane: int, lanes: int, start: int) -> Shards:
        rank, world = self.rank * lanes + lane, self.world * lanes
        data, crop = self.data, crop_config(self.data)
        return Shards(
            data.source, data.size, crop, data.seed, rank=rank, world=world, start=start, embeddings=self.embeddings
        )

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, lanes = (info.id, info.num_workers) if info is not None else (0, 1)
        lane = (self.first + worker) % lanes  # the loader begins with worker 0, whichever stream's turn it is
        delivered = len(range(lane, self.first, lanes))
        shards = self._shards(lane, lanes, delivered * self.batch_size)
        self.report = shards.report()
        stream = shards.examples()
        place = self.first + worker
        while True:
            rows = list(islice(stream, self.batch_size))
            pairs = [(row.pixels, row.caption) for row in rows]
            batch = _collated(pairs, self.collate, self.data.seed, place * self.world + self.rank)
            embeddings = [row.embedding for row in rows if row.embedding is not None]
            yield {**batch, "image_embedding": torch.from_numpy(np.stack(embeddings))} if embeddings else batch
            place += lanes


def _collated(rows: list[Pair], collate: Collate, seed: int, number: int) -> Batch:
    return collate(
        np.stack([row[0] for row in rows]), [row[1] for row in rows], np.random.default_rng((seed, 1, number))
    )


class BatchStream:
    """This process's batches of what remains of a run.

    Args:
        seen: batches that all processes together have used so far. Batch numbers count on from there and are dealt to
            the `world` processes in turn, so that no two see the same.
        count: batches that this process will ask for.
    The first batch is made at once: what is wrong with the data shows before anything is written. Raises InputError
    when the source has no usable picture.
    """

    def __init__(self, recipe: Recipe, collate: Collate, seen: int, count: int, rank: int = 0, world: int = 1) -> None:
        data, run = recipe.data, recipe.run
        numbers = range(seen + rank, seen + count * world, world)
        self._dataset: SceneBatches | FolderBatches | ShardBatches
        if is_shards(data.source):
            self._dataset = ShardBatches(recipe, collate, seen // world, rank, world)
        elif data.source == "scenes":
            self._dataset = SceneBatches(data, run.batch_size, collate)
        else:
            self._dataset = FolderBatches(data, run.batch_size, collate)
        loader: DataLoader[Batch] = DataLoader(
            self._dataset,
            batch_size=None,
            sampler=None if isinstance(self._dataset, ShardBatches) else numbers,
            num_workers=data.workers,
            worker_init_fn=_ignore_interrupts,
            generator=torch.Generator(),  # or it would draw from torch's own, which decides about dropout
        )
        self._batches = islice(loader, count)
        self._first = next(self._batches, None)

    def __next__(self) -> Batch:
        if self._first is not None:
            first, self._first = self._first, None
            return first
        return next(self._batches)

    def __iter__(self) -> "BatchStream":
        return self

    def report(self) -> Report:
        """What could not be read so far; what worker processes skip is not known here."""
        if isinstance(self._dataset, ShardBatches):
            return self._dataset.report
        return self._dataset.pictures.report() if isinstance(self._dataset, FolderBatches) else Report()


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; the training process alone decides when its workers end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def emoji_scenes(data: DataConfig, split: str, plain_share: float = PLAIN_SHARE) -> EmojiScenes:
    """Emoji scenes of the training size and seed on either side of the hold-out."""
    return EmojiScenes(size=data.size, split=cast(Split, split), seed=data.seed, plain_share=plain_share)


def crop_config(data: DataConfig) -> CropConfig:
    """How pictures of a folder or of shards are cut to data.size; emoji scenes are drawn at that size."""
    return {"centre": centre_crop, "stage_1": stage_1_crop, "stage_2": stage_2_crop}[data.crop](data.size)


def is_shards(source: str) -> bool:
    """Whether a data source names webdataset shards."""
    return source.endswith(".tar") or (Path(source).is_dir() and any(Path(source).glob("*.tar")))


def check_source(data: DataConfig) -> None:
    """Raise InputError at once for what would only show after minutes: no emoji font, no such file or folder."""
    for source in (data.source, data.validation):
        if source == "scenes":
            find_font()
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
            f"them with: genpipe embed {data.source} --clip FOLDER{out}."
        )
    for shard in shards:
        stored.header(shard)


def first_embeddings(data: DataConfig, count: int) -> np.ndarray:
    """Up to `count` stored embeddings of the training pictures, float32 (n, D), in file order: always the same ones."""
    stored, found = stored_embeddings(data), []
    for shard in expand_shards(data.source):
        found.append(stored.load(shard).values[:count])
        count -= len(found[-1])
        if count <= 0:
            break
    return np.concatenate(found).astype(np.float32)


def pairs_of(source: str, size: int, count: int) -> list[Pair]:
    """Up to `count` pairs of a folder, list or shards, each once, cut from the centre, always the same ones."""
    if is_shards(source):
        return list(islice(Shards(source, size=size).once(), count))
    folder = ImageTextFolder(source, size=size)
    return [folder[i] for i in range(min(count, len(folder)))]


def captions_of(data: DataConfig, count: int) -> list[str]:
    """Up to `count` captions of a source, for training a tokenizer."""
    if data.source == "scenes":
        scenes = emoji_scenes(data, data.split)
        return [scenes.caption(scenes.scene(i), np.random.default_rng((data.seed, 3, i))) for i in range(count)]
    if is_shards(data.source):  # one picture in memory at a time
        return [caption for _, caption in islice(Shards(data.source, size=data.size).once(), count)]
    return ImageTextFolder(data.source, size=data.size).captions[:count]
