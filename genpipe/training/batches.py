"""Batches for the loop: batch number -> tensors, so that any process can prepare any batch and a resumed run goes on.

Legend: B rows of a batch, S side of the picture.
"""

import copy
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import get_args

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from genpipe.data.embeddings import StoredEmbeddings
from genpipe.data.image_text import ImageTextFolder, Report
from genpipe.data.samples import Pair
from genpipe.data.shards import Shards, is_shards
from genpipe.data.twins import TwinKind
from genpipe.errors import InputError
from genpipe.images import stack_levels
from genpipe.training.config import DataConfig, Recipe
from genpipe.training.data import (
    Batch,
    Collate,
    OwnBatches,
    crop_config,
    emoji_scenes,
    stored_embeddings,
    twin_pairs,
)

TWIN_KINDS: tuple[TwinKind, ...] = get_args(TwinKind)


class SceneBatches:
    """Batches of emoji scenes by number; with hard negatives the first rows are scenes beside their twins.

    The twins of the first data.plain_batches batches tell places by "left of" and "above" nearly always: a short
    curriculum, since CLIP learns what the order of the nouns says before it learns what turns it round.
    """

    def __init__(self, data: DataConfig, batch_size: int, collate: Collate) -> None:
        self.scenes = emoji_scenes(data, data.split)
        self.plain_scenes = emoji_scenes(data, data.split, plain_share=0.95)
        self.plain_batches = data.plain_batches
        self.batch_size = batch_size
        self.report, self.left_out = Report(), Report()  # every scene can be drawn
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


class FolderBatches:
    """Batches of a folder's pictures by number; every epoch is a new permutation with new crops.

    report: of the batches made here. A broken picture is counted once: when its own turn comes in the first epoch,
    which it does in one process alone. left_out: pictures without a caption.
    """

    def __init__(self, data: DataConfig, batch_size: int, collate: Collate) -> None:
        self.pictures = ImageTextFolder(data.source, size=data.size, crop=crop_config(data), seed=data.seed)
        self.batch_size = batch_size
        self.seed = data.seed
        self.collate = collate
        self.report, self.left_out = Report(), copy.deepcopy(self.pictures.report())
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
            self.report.read += 1
            if epoch == 0 and self.pictures.is_broken(index):
                self.report.skip("picture cannot be read", str(self.pictures.paths[index]))
        return _collated(rows, self.collate, self.seed, number)


class ShardBatches:
    """One process's endless batches of webdataset shards, from its batch `first` (0, 1, ...) on.

    Worker processes are streams of their own, asked in turn; a resumed run starts each where it stood. With
    data.embeddings a batch holds "image_embedding", float32 (B, D), beside what `collate` makes. report: of the stream
    that was begun last.
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

    def batches(self, worker: int, lanes: int) -> Iterator[Batch]:
        """Those that worker process `worker` of `lanes` makes."""
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


@dataclass
class _Made:
    """What a worker process hands over: a batch, or what is wrong with the data; and all that it has counted so far."""

    worker: int
    report: Report
    batch: Batch
    error: InputError | None = None


class _Workers(IterableDataset[_Made]):
    """Batches made here, or in turn by worker processes, of which torch would bury an error in its own traceback."""

    def __init__(self, source: OwnBatches | ShardBatches, numbers: range) -> None:
        self.source, self.numbers = source, numbers

    def __iter__(self) -> Iterator[_Made]:
        info, source = get_worker_info(), self.source
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        if isinstance(source, ShardBatches):
            batches = source.batches(worker, workers)
        else:
            batches = map(source.__getitem__, self.numbers[worker::workers])
        try:
            for batch in batches:
                yield _Made(worker, copy.deepcopy(source.report), batch)
        except InputError as error:
            yield _Made(worker, copy.deepcopy(source.report), {}, error)


class BatchStream:
    """This process's batches of what remains of a run.

    Args:
        seen: batches that all processes together have used so far. Batch numbers count on from there and are dealt to
            the `world` processes in turn, so that no two see the same.
        count: batches that this process will ask for.
        own: the stage's own batches, in the place of those of data.source.
    The first batch is made at once: what is wrong with the data shows before anything is written. Raises InputError
    when the source has no usable picture.
    """

    def __init__(
        self,
        recipe: Recipe,
        collate: Collate,
        seen: int,
        count: int,
        rank: int = 0,
        world: int = 1,
        own: OwnBatches | None = None,
    ) -> None:
        data, run = recipe.data, recipe.run
        numbers = range(seen + rank, seen + count * world, world)
        source: OwnBatches | ShardBatches
        if own is not None:
            source = own
        elif is_shards(data.source):
            source = ShardBatches(recipe, collate, seen // world, rank, world)
        elif data.source == "scenes":
            source = SceneBatches(data, run.batch_size, collate)
        else:
            source = FolderBatches(data, run.batch_size, collate)
        self._counts: dict[int, Report] = {}  # by worker process; -1: before any batch, of the whole run
        if seen == rank == 0 and not isinstance(source, ShardBatches):
            self._counts[-1] = source.left_out
        loader: DataLoader[_Made] = DataLoader(
            _Workers(source, numbers),
            batch_size=None,
            num_workers=data.workers,
            worker_init_fn=_ignore_interrupts,
            generator=torch.Generator(),  # or it would draw from torch's own, which decides about dropout
        )
        self._made = islice(loader, count)
        self._first = self._next()

    def _next(self) -> _Made | None:
        made = next(self._made, None)
        if made is not None and made.error is not None:
            raise made.error
        return made

    def __next__(self) -> Batch:
        made, self._first = self._first or self._next(), None
        if made is None:
            raise StopIteration
        self._counts[made.worker] = made.report
        return made.batch

    def __iter__(self) -> "BatchStream":
        return self

    def report(self) -> Report:
        """Pairs in the batches handed out so far, and what was broken among them, each broken one counted once.

        The sum over the processes, and over the parts of a run that was resumed, is right, too.
        """
        total = Report()
        for counts in self._counts.values():
            total.add(counts)
        return total


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; the training process alone decides when its workers end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
