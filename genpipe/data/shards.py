"""Endless, exactly resumable streams of captioned pictures from webdataset shards in img2dataset's (LAION's) layout."""

import itertools
import math
import os
import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from PIL import Image
from webdataset.shardlists import expand_urls

from genpipe import images
from genpipe.data.embeddings import StoredEmbeddings
from genpipe.data.samples import BrokenSample, Example, Pair, Report
from genpipe.data.shard_walk import Walk, count_broken
from genpipe.data.tar_index import index_shard, read_entry
from genpipe.data.transforms import CropConfig, crop, crop_of
from genpipe.errors import InputError

Urls = str | Path | Sequence[str | Path]

_CROP, _SOURCES = 2, 3  # independent streams of random numbers; shard_walk.py has the others
_BLOCK = 4096  # positions whose sources are drawn at once
_JOINT = "::"  # between sources
_WEIGHTED = re.compile(r"(?P<place>.*)=(?P<weight>[^=/]*)")


class Shards:
    """An endless stream of pairs from webdataset shards (tars of key.jpg | png | webp, key.txt, key.json).

    `urls`: tar files of this computer, with brace expansion ("laion/{00000..00099}.tar"), a folder of them, or a list
    of these; or a list of (urls, weight), or one string of several sources (see `weighted_sources`): each pair comes
    from a source with a probability proportional to its weight.

    Order. In every epoch the shards of a source are shuffled and dealt to the `world` ranks; a rank shuffles the
    samples of `mix` of its shards together. All of it follows from (seed, rank, world). The stream never ends, so ranks
    with fewer or shorter shards keep nobody waiting. With more ranks than shards, ranks share shards in other orders.
    For the worker processes of a loader take rank = rank * workers + worker and world = world * workers.

    Place. The position is one number: how many pairs this rank has read. `start=n` goes on exactly as a stream does
    after n pairs, for the price of the headers of the shards in between. To keep this true a broken sample does not
    shift the order: another sample of the same shards takes its place (from half the order further on, because the
    neighbour would put the same pair twice into one contrastive batch).

    `embeddings`: where the CLIP embeddings of the pictures are stored; `examples` then gives each with its pair, joined
    by key, and in the stream a pair without one counts as broken.

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
        embeddings: StoredEmbeddings | None = None,
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
        self.embeddings = embeddings
        self._report = Report()

    def __iter__(self) -> Iterator[Pair]:
        with closing(self.examples()) as examples:
            for example in examples:
                yield example.pixels, example.caption

    def examples(self) -> Generator[Example, None, None]:
        """The same stream, each pair with its stored embedding, or None where the stream was given no `embeddings`."""
        shared = (self.rank, self.world, self.mix, self.max_pixels, self._report, self.embeddings)
        walks = [Walk(paths, (self.seed, number), *shared) for number, paths in enumerate(self.sources)]
        try:
            for walk, count in zip(walks, self._read_before_start(), strict=True):
                walk.skip(count)
            block, choices = -1, np.empty(0, dtype=np.int64)
            for position in itertools.count(self.start):
                if position // _BLOCK != block:
                    block = position // _BLOCK
                    choices = self._choices(block)
                picture, caption, embedding = walks[choices[position % _BLOCK]].read()
                self._report.read += 1
                yield Example(self._cut(picture, position), caption, embedding)
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
        """Counts so far, of this process: pairs each time, a broken sample once, when its turn comes in epoch one."""
        return self._report

    def _cut(self, picture: Image.Image, position: int) -> np.ndarray:
        generator = np.random.default_rng((self.seed, _CROP, self.rank, position)) if self.crop.is_random else None
        return crop(picture, self.crop, generator)


def weighted_sources(text: str) -> list[tuple[str, float]]:
    """`laion/{00000..00099}.tar=3::cc12m=1` -> the places of the sources with their weights, 1 where none is given.

    A file or folder that exists is one place, whatever its name looks like. Raises InputError for an empty place, for a
    weight that is no number above 0, and for a place that is joined to others but is no shards.
    """
    pieces, found = _pieces(text), []
    for place, number in pieces:
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not place or not 0 < weight < math.inf:
            raise InputError(
                f'The source "{text}" needs a place and a weight above 0 between each "::", as in '
                "laion/{00000..00099}.tar=3::cc12m/{00000..00031}.tar=1."
            )
        if len(pieces) > 1 and not _holds_shards(place):
            raise InputError(f'"{place}" is no webdataset shards (*.tar), and only such can be joined by "::".')
        found.append((place, weight))
    return found


def is_shards(source: str) -> bool:
    """Whether a data source names webdataset shards; of several sources joined by "::", all must, and are taken to."""
    pieces = _pieces(source)
    return len(pieces) > 1 or _holds_shards(pieces[0][0])


def _pieces(text: str) -> list[tuple[str, str]]:
    """Places and their weights, as they are written."""
    found = []
    for piece in [text] if os.path.exists(text) else text.split(_JOINT):
        match = None if piece.endswith(".tar") or os.path.exists(piece) else _WEIGHTED.fullmatch(piece)
        found.append((match["place"], match["weight"]) if match else (piece, "1"))
    return found


def _holds_shards(place: str) -> bool:
    return place.endswith(".tar") or (os.path.isdir(place) and any(Path(place).glob("*.tar")))


def expand_shards(urls: Urls) -> list[Path]:
    """Brace expressions, folders (their *.tar, sorted) and files -> shard files, each once; weights do not matter here.

    Raises InputError for addresses of other computers, compressed or missing files and where nothing is found.
    """
    items = [urls] if isinstance(urls, str | Path) else list(urls)
    paths: list[Path] = []
    for item in (place for text in map(str, items) for place, _ in weighted_sources(text)):
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
    """Sources with their weights; a list of addresses is one source where none has a weight."""
    if isinstance(urls, str):
        return list(weighted_sources(urls))
    if isinstance(urls, Path):
        return [(urls, 1.0)]
    plain = [item for item in urls if isinstance(item, str | Path)]
    if len(plain) == len(urls):
        return [(plain, 1.0)]
    try:
        return [(source, float(weight)) for source, weight in urls]  # type: ignore[str-unpack,misc]
    except (TypeError, ValueError) as error:
        raise InputError("Shards are given as addresses, or as (addresses, weight) for every source.") from error
