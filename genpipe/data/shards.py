"""Endless, exactly resumable streams of captioned pictures from webdataset shards in img2dataset's (LAION's) layout."""

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image
from webdataset.shardlists import expand_urls

from genpipe import images
from genpipe.data.samples import BrokenSample, Pair, Report
from genpipe.data.tar_index import ShardIndex, index_shard, read_entry
from genpipe.data.transforms import CropConfig, crop, crop_of
from genpipe.errors import InputError

Urls = str | Path | Sequence[str | Path]

_SHARDS, _SAMPLES, _CROP, _SOURCES = range(4)  # independent streams of random numbers
_BLOCK = 4096  # positions whose sources are drawn at once


class Shards:
    """An endless stream of pairs from webdataset shards (tars of key.jpg | png | webp, key.txt, key.json).

    `urls`: tar files of this computer, with brace expansion ("laion/{00000..00099}.tar"), a folder of them, or a list
    of these; or a list of (urls, weight): each pair comes from a source with a probability proportional to its weight.

    Order. In every epoch the shards of a source are shuffled and dealt to the `world` ranks; a rank shuffles the
    samples of `mix` of its shards together. All of it follows from (seed, rank, world). The stream never ends, so ranks
    with fewer or shorter shards keep nobody waiting. With more ranks than shards, ranks share shards in other orders.
    For the worker processes of a loader take rank = rank * workers + worker and world = world * workers.

    Place. The position is one number: how many pairs this rank has read. `start=n` goes on exactly as a stream does
    after n pairs, for the price of the headers of the shards in between. To keep this true a broken sample does not
    shift the order: another sample of the same shards takes its place (from half the order further on, because the
    neighbour would put the same pair twice into one contrastive batch).

    `once` reads every sound pair a single time in file order, for evaluation and checks. Raises InputError for missing
    files and, when reading, where no sample at all can be read.
    """

    def __init__(
        self,
        urls: Urls | Sequence[tuple[Urls, float]],
        size: int,
        crop: CropConfig | None = None,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
        mix: int = 4,
        max_pixels: int = images.MAX_PIXELS,
    ) -> None:
        if not 0 <= rank < world or min(seed, start) < 0 or mix < 1:
            raise InputError(f"Shards need rank {rank} < world {world}, seed and start >= 0 and mix >= 1.")
        weighted = _weighted(urls)
        self.sources = [expand_shards(source) for source, _ in weighted]
        weights = np.array([weight for _, weight in weighted], dtype=np.float64)
        if not (np.isfinite(weights).all() and (weights > 0).all()):
            raise InputError(f"The weights of shards must be above 0, got {weights.tolist()}.")
        self.shares = weights / weights.sum()
        self.crop = crop_of(size, crop)
        self.seed, self.rank, self.world, self.start = seed, rank, world, start
        self.mix = mix
        self.max_pixels = max_pixels
        self._report = Report()

    def __iter__(self) -> Iterator[Pair]:
        walks = [
            _Walk(paths, (self.seed, number), self.rank, self.world, self.mix, self.max_pixels, self._report)
            for number, paths in enumerate(self.sources)
        ]
        try:
            for walk, count in zip(walks, self._read_before_start(), strict=True):
                walk.skip(count)
            block, choices = -1, np.empty(0, dtype=np.int64)
            for position in itertools.count(self.start):
                if position // _BLOCK != block:
                    block = position // _BLOCK
                    choices = self._choices(block)
                picture, caption = walks[choices[position % _BLOCK]].read()
                self._report.read += 1
                yield self._cut(picture, position), caption
        finally:
            for walk in walks:
                walk.close()

    def _choices(self, block: int) -> np.ndarray:
        """For each of the positions block * _BLOCK ... the number of the source that its pair comes from."""
        generator = np.random.default_rng((self.seed, _SOURCES, self.rank, block))
        return generator.choice(len(self.sources), size=_BLOCK, p=self.shares)

    def _read_before_start(self) -> list[int]:
        """How many of the first `start` pairs came from each source."""
        if len(self.sources) == 1:
            return [self.start]
        counts = np.zeros(len(self.sources), dtype=np.int64)
        for first in range(0, self.start, _BLOCK):
            choices = self._choices(first // _BLOCK)[: self.start - first]
            counts += np.bincount(choices, minlength=len(self.sources))
        return counts.tolist()

    def once(self) -> Iterator[Pair]:
        """Every sound pair of this rank's shards once, in file order; broken ones are counted."""
        paths = list(itertools.chain.from_iterable(self.sources))[self.rank :: self.world]
        position = itertools.count()
        for path in paths:
            index = index_shard(path)
            count_broken(index, self._report)
            if not index.entries:  # so it may not even be possible to open it
                continue
            with open(path, "rb") as file:
                for entry in index.entries:
                    try:
                        picture, caption = read_entry(file, entry, self.max_pixels)
                    except BrokenSample as error:
                        self._report.skip(error.reason, f"{path.name} {entry.key}")
                        continue
                    self._report.read += 1
                    yield self._cut(picture, next(position)), caption

    def report(self) -> Report:
        """Counts so far, of this process: a broken sample counts each time the stream comes by it."""
        return self._report

    def _cut(self, picture: Image.Image, position: int) -> np.ndarray:
        generator = np.random.default_rng((self.seed, _CROP, self.rank, position)) if self.crop.is_random else None
        return crop(picture, self.crop, generator)


class _Walk:
    """The order in which one rank reads the shards of one source: group after group of `mix` shards, without end."""

    def __init__(
        self, paths: list[Path], seed: tuple[int, int], rank: int, world: int, mix: int, max_pixels: int, report: Report
    ) -> None:
        self.paths, self.seed, self.rank, self.world, self.mix = paths, seed, rank, world, mix
        self.max_pixels = max_pixels
        self.report = report
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

    def read(self) -> tuple[Image.Image, str]:
        """The pair at this place, or its replacement where it is broken."""
        while self.place >= len(self._pool(self.group).entries):
            self._next_group()
        place = self.place
        self.place += 1
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
        epoch, chunk = divmod(group, -(-self.share // self.mix))
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
                count_broken(index, self.report)
            generator = np.random.default_rng((*self.seed, _SAMPLES, self.rank, group))
            self.pools[group] = _Pool(indexes, generator, self.max_pixels, self.report)
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
                f"No sample can be read from the {len(self.paths)} shards like {str(self.paths[0])!r} ({self.report})."
            )


class _Pool:
    """The samples of a few shards, shuffled together."""

    def __init__(
        self, indexes: list[ShardIndex], generator: np.random.Generator, max_pixels: int, report: Report
    ) -> None:
        self.paths = [index.path for index in indexes]
        self.entries = [(number, entry) for number, index in enumerate(indexes) for entry in index.entries]
        self.order = generator.permutation(len(self.entries))
        self.max_pixels = max_pixels
        self.report = report
        self.broken: set[int] = set()
        self.files: dict[int, IO[bytes]] = {}

    def read(self, place: int) -> tuple[Image.Image, str] | None:
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
                return read_entry(self._file(shard), entry, self.max_pixels)
            except BrokenSample as error:
                self.broken.add(number)
                self.report.skip(error.reason, f"{self.paths[shard].name} {entry.key}")
        return None

    def close(self) -> None:
        for file in self.files.values():
            file.close()
        self.files.clear()

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


def expand_shards(urls: Urls) -> list[Path]:
    """Brace expressions, folders (their *.tar, sorted) and files -> shard files, each once.

    Raises InputError for addresses of other computers, compressed or missing files and where nothing is found.
    """
    items = [urls] if isinstance(urls, str | Path) else list(urls)
    paths: list[Path] = []
    for item in map(str, items):
        if "://" in item or item.startswith("pipe:"):
            raise InputError(f"The shards {item!r} are not on this computer; download them first.")
        if os.path.isdir(item):
            paths += sorted(Path(item).glob("*.tar"))
        elif os.path.exists(item):
            paths.append(Path(item))
        else:
            try:
                paths += [Path(path) for path in expand_urls(item)]
            except ValueError as error:
                raise InputError(f"The braces in {item!r} cannot be expanded: {error}.") from error
    packed = next((path for path in paths if path.suffix in (".gz", ".tgz", ".bz2", ".xz", ".zst")), None)
    if packed is not None:
        raise InputError(f"The shard {str(packed)!r} is compressed; decompress it, shards are read by position.")
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise InputError(f"{len(missing):,} of {len(paths):,} shards are missing, the first is {str(missing[0])!r}.")
    if not paths:
        raise InputError(f"There are no shards (*.tar) in {', '.join(map(repr, map(str, items))) or 'an empty list'}.")
    return list(dict.fromkeys(paths))


def _weighted(urls: Urls | Sequence[tuple[Urls, float]]) -> list[tuple[Urls, float]]:
    """Sources with their weights; everything is one source where none has a weight."""
    if isinstance(urls, str | Path):
        return [(urls, 1.0)]
    plain = [item for item in urls if isinstance(item, str | Path)]
    if len(plain) == len(urls):
        return [(plain, 1.0)]
    try:
        return [(source, float(weight)) for source, weight in urls]  # type: ignore[str-unpack,misc]
    except (TypeError, ValueError) as error:
        raise InputError("Shards are given as addresses, or as (addresses, weight) for every source.") from error
