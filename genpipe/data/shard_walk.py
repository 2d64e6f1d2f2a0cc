"""The order in which one process reads webdataset shards, and what takes the place of a broken sample."""

import itertools
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from PIL import Image

from genpipe.data.embeddings import ShardEmbeddings, StoredEmbeddings
from genpipe.data.samples import BrokenSample, Report
from genpipe.data.tar_index import ShardIndex, index_shard, read_entry
from genpipe.errors import InputError

_SHARDS, _SAMPLES = range(2)  # independent streams of random numbers; shards.py has the others


class Raw(NamedTuple):
    """A sample as it was read: picture of any size, caption, and its embedding, float32 (D,), if asked for."""

    picture: Image.Image
    caption: str
    embedding: np.ndarray | None


class Walk:
    """The order in which one rank reads the shards of one source: group after group of `mix` shards, without end.

    With `embeddings` a sample without a stored one counts as broken.

    A broken sample is added to `report` when its own turn comes in the first epoch, and never again. Every shard is one
    rank's in that epoch, so all ranks together, and a run with its resumed rest, count each once.
    """

    def __init__(
        self,
        paths: list[Path],
        seed: tuple[int, int],
        rank: int,
        world: int,
        mix: int,
        max_pixels: int,
        report: Report,
        embeddings: StoredEmbeddings | None = None,
    ) -> None:
        self.paths, self.seed, self.rank, self.world, self.mix = paths, seed, rank, world, mix
        self.max_pixels = max_pixels
        self.report = report
        self.found = Report()  # everything that was met, as often as it was met
        self.embeddings = embeddings
        self.share = max(1, len(paths[rank::world]))  # shards per epoch
        self.epoch, self.own = -1, np.empty(0, dtype=np.int64)  # the shards of this rank in the epoch last asked for
        self.group = 0
        self.place = 0  # in the group
        self.pools: dict[int, _Pool] = {}
        self.sizes: dict[Path, int] = {}
        self.barren: set[Path] = set()  # shards in which nothing can be read; once all are, it is an error

    def skip(self, count: int) -> None:
        """Move on by `count` pairs; reads headers alone."""
        while count > 0:
            left = sum(self._size(path) for path in self._members(self.group)) - self.place
            step = min(left, count)
            self.place += step
            count -= step
            if step == left:
                self._next_group()

    def read(self) -> Raw:
        """The sample at this place, or its replacement where it is broken."""
        while True:
            pool = self._pool(self.group)
            if self.place == 0 and self._counts():
                self.report.add(pool.headers)
            if self.place < len(pool.entries):
                break
            self._next_group()
        sample = self._sound(self.place)
        reason = pool.reason(self.place)
        if reason is not None and self._counts():
            self.report.skip(*reason)
        self.place += 1
        return sample

    def _counts(self) -> bool:
        """Whether what is broken in this group is for this rank to count, now."""
        return self.group < self._groups_per_epoch and self.rank < len(self.paths)

    @property
    def _groups_per_epoch(self) -> int:
        return -(-self.share // self.mix)

    def _sound(self, place: int) -> Raw:
        """The sample at a place of the group at work, or the first sound one after it."""
        group = self.group
        while True:
            members = self._members(group)
            if not self.barren.issuperset(members):
                sample = self._pool(group).read(place)
                if sample is not None:
                    return sample
                self.barren.update(members)
                self._check_fruitful()
            group += 1  # a whole group without a sound sample: the next one lends its own

    def close(self) -> None:
        """Close the files."""
        for pool in self.pools.values():
            pool.close()
        self.pools.clear()

    def _members(self, group: int) -> list[Path]:
        epoch, chunk = divmod(group, self._groups_per_epoch)
        if epoch != self.epoch:
            order = np.random.default_rng((*self.seed, _SHARDS, epoch)).permutation(len(self.paths))
            self.epoch = epoch
            self.own = order[self.rank :: self.world] if self.rank < len(order) else order[[self.rank % len(order)]]
        return [self.paths[number] for number in self.own[chunk * self.mix : (chunk + 1) * self.mix]]

    def _size(self, path: Path) -> int:
        if path not in self.sizes:
            self._note(index_shard(path))
        return self.sizes[path]

    def _note(self, index: ShardIndex) -> None:
        self.sizes[index.path] = len(index.entries)
        if not index.entries:
            self.barren.add(index.path)

    def _pool(self, group: int) -> "_Pool":
        if group not in self.pools:
            indexes = [index_shard(path) for path in self._members(group)]
            for index in indexes:
                self._note(index)
            generator = np.random.default_rng((*self.seed, _SAMPLES, self.rank, group))
            self.pools[group] = _Pool(indexes, generator, self.max_pixels, self.found, self.embeddings)
        return self.pools[group]

    def _next_group(self) -> None:
        if self.group in self.pools:
            self.pools.pop(self.group).close()
        self.group += 1
        self.place = 0
        self._check_fruitful()

    def _check_fruitful(self) -> None:
        if len(self.barren) == len(self.paths):
            raise InputError(
                f"No sample can be read from the {len(self.paths)} shards like {str(self.paths[0])!r} ({self.found})."
            )


class _Pool:
    """The samples of a few shards, shuffled together."""

    def __init__(
        self,
        indexes: list[ShardIndex],
        generator: np.random.Generator,
        max_pixels: int,
        found: Report,
        stored: StoredEmbeddings | None,
    ) -> None:
        self.paths = [index.path for index in indexes]
        self.entries = [(number, entry) for number, index in enumerate(indexes) for entry in index.entries]
        self.order = generator.permutation(len(self.entries))
        self.max_pixels = max_pixels
        self.headers = Report()  # what the headers show to be broken
        for index in indexes:
            count_broken(index, self.headers)
        self.found = found
        self.found.add(self.headers)
        self.broken: dict[int, str] = {}  # entry -> reason
        self.files: dict[int, IO[bytes]] = {}
        self.stored = stored
        self.embeddings: dict[int, ShardEmbeddings] = {}

    def read(self, place: int) -> Raw | None:
        """The sample at `place` of the order; if broken, the first sound one from half the order further on."""
        size = len(self.entries)
        for offset in itertools.chain((0,), range(size // 2, size // 2 + size)):
            if len(self.broken) == size:
                return None
            number = int(self.order[(place + offset) % size])
            if number in self.broken:
                continue
            shard, entry = self.entries[number]
            try:
                file = self._file(shard)
                embedding = None if self.stored is None else self._embeddings(shard, self.stored).of(file, entry)
                return Raw(*read_entry(file, entry, self.max_pixels), embedding)
            except BrokenSample as error:
                self.broken[number] = error.reason
                self.found.skip(error.reason, self._where(number))
        return None

    def reason(self, place: int) -> tuple[str, str] | None:
        """Why the sample at `place`, once read, is broken, and which it is; None for a sound one."""
        number = int(self.order[place])
        return (self.broken[number], self._where(number)) if number in self.broken else None

    def _where(self, number: int) -> str:
        shard, entry = self.entries[number]
        return f"{self.paths[shard].name} {entry.key}"

    def close(self) -> None:
        for file in self.files.values():
            file.close()
        self.files.clear()
        self.embeddings.clear()

    def _embeddings(self, shard: int, stored: StoredEmbeddings) -> ShardEmbeddings:
        if shard not in self.embeddings:
            self.embeddings[shard] = stored.load(self.paths[shard])
        return self.embeddings[shard]

    def _file(self, shard: int) -> IO[bytes]:
        if shard not in self.files:
            try:
                self.files[shard] = open(self.paths[shard], "rb")
            except OSError as error:
                raise BrokenSample("shard damaged or cut short", str(error)) from error
        return self.files[shard]


def count_broken(index: ShardIndex, report: Report) -> None:
    """Add what the headers of a shard show to be broken to a report."""
    for reason, key in index.broken:
        report.skip(reason, f"{index.path.name} {key}".strip())
