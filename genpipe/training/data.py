"""Batches for the loop: batch number -> tensors, so that any process can prepare any batch and a resumed run finds its place.

Legend: B rows of a batch, S side of the picture.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from genpipe.data.image_text import ImageTextFolder
from genpipe.data.scenes import EmojiScenes
from genpipe.data.shards import Shards
from genpipe.data.transforms import CropConfig, centre_crop, stage_1_crop, stage_2_crop
from genpipe.images import stack_levels
from genpipe.training.config import DataConfig, Recipe

Batch = dict[str, torch.Tensor]
# (uint8 pictures (B, 3, S, S), captions, generator of this batch) -> tensors
Collate = Callable[[np.ndarray, list[str], np.random.Generator], Batch]


class SceneBatches(Dataset[Batch]):
    """Batches of emoji scenes by number; with hard negatives a share of the rows are scenes beside their twins."""

    def __init__(self, data: DataConfig, batch_size: int, collate: Collate) -> None:
        self.scenes = EmojiScenes(size=data.size, split=data.split, seed=data.seed)
        self.batch_size = batch_size
        self.pairs = int(batch_size * data.hard_negatives) // 2
        self.seed = data.seed
        self.collate = collate

    def __getitem__(self, number: int) -> Batch:
        generator = np.random.default_rng((self.seed, 1, number))
        first = number * self.batch_size
        pixels, captions = [], []
        # a pair fills two rows, so the rows of a batch end before its last indices
        for index in range(first, first + self.pairs):
            twins = self.scenes.twins(index)
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
        generator = np.random.default_rng((self.seed, 1, number))
        rows = []
        for position in range(number * self.batch_size, (number + 1) * self.batch_size):
            epoch, index = self._place(position)
            rows.append(self.pictures.example(index, epoch))
        return self.collate(np.stack([row[0] for row in rows]), [row[1] for row in rows], generator)


def crop_config(data: DataConfig) -> CropConfig:
    """How pictures of a folder or of shards are cut to data.size; emoji scenes are drawn at that size."""
    return {"centre": centre_crop, "stage_1": stage_1_crop, "stage_2": stage_2_crop}[data.crop](data.size)


class _Numbers:
    """Sampler: the batch numbers of this process, from the first one that is still to come."""

    def __init__(self, start: int, rank: int, world: int, accumulate: int, stop: int) -> None:
        self.start, self.rank, self.world, self.accumulate, self.stop = start, rank, world, accumulate, stop

    def __iter__(self) -> Iterator[int]:
        for step in range(self.start, self.stop):
            for micro in range(self.accumulate):
                yield (step * self.accumulate + micro) * self.world + self.rank


def is_shards(source: str) -> bool:
    """Whether a data source names webdataset shards."""
    return source.endswith(".tar")


def batches(recipe: Recipe, collate: Collate, start: int, rank: int, world: int) -> Iterator[Batch]:
    """This process's batches from optimiser step `start` on, run.accumulate of them per step.

    Raises InputError when the source has no usable picture.
    """
    data, run = recipe.data, recipe.run
    if is_shards(data.source):
        yield from _shard_batches(recipe, collate, start, rank, world)
        return
    if data.source == "scenes":
        dataset: Dataset[Batch] = SceneBatches(data, run.batch_size, collate)
    else:
        dataset = FolderBatches(data, run.batch_size, collate)
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=_Numbers(start, rank, world, run.accumulate, run.steps),
        num_workers=data.workers,
        persistent_workers=data.workers > 0,
    )
    yield from loader


def _shard_batches(recipe: Recipe, collate: Collate, start: int, rank: int, world: int) -> Iterator[Batch]:
    """Shards are a stream: a resumed run reads past what it has already seen."""
    data, run = recipe.data, recipe.run
    seen = start * run.accumulate * run.batch_size
    crop = crop_config(data)
    stream = iter(Shards(data.source, data.size, crop=crop, seed=data.seed, rank=rank, world=world, start=seen))
    number = start * run.accumulate * world + rank
    while True:
        rows = [next(stream) for _ in range(run.batch_size)]
        generator = np.random.default_rng((data.seed, 1, number))
        yield collate(np.stack([row[0] for row in rows]), [row[1] for row in rows], generator)
        number += world


def captions_of(data: DataConfig, count: int) -> list[str]:
    """Up to `count` captions of a source, for training a tokenizer."""
    if data.source == "scenes":
        scenes = EmojiScenes(size=data.size, split=data.split, seed=data.seed)
        return [scenes.caption(scenes.scene(i), np.random.default_rng((data.seed, 3, i))) for i in range(count)]
    if is_shards(data.source):
        stream = iter(Shards(data.source, size=data.size, seed=data.seed))
        return [next(stream)[1] for _ in range(count)]
    return list(ImageTextFolder(data.source, size=data.size).captions[:count])
