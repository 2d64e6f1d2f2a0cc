"""Samples per second read from shards: genpipe's stream against plain webdataset reading the same shards.

    python benchmarks/shards.py [--shards 8] [--samples 2000] [--side 256] [--size 64] [--repeats 5]

Both decode the same JPEG files and cut the same squares of `size` pixels with the same function, in one process, in
turn; each figure is the median over the repeats. Seconds are those of the clock, and those that the processor worked,
which other work on the computer disturbs less. webdataset is measured twice: with its own shuffle, as a training would
use it, and without any. What genpipe does besides: samples of four shards are mixed over their whole length, the order
can be resumed anywhere, and broken samples are replaced and counted.
"""

import argparse
import io
import itertools
import json
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from genpipe.data.shards import Shards
from genpipe.data.transforms import centre_crop, crop


def write_shards(folder: Path, shards: int, samples: int, side: int) -> None:
    """JPEG files that cost about as much to decode as photos do: smooth noise, `side` pixels a side, quality 90."""
    generator = np.random.default_rng(0)
    number = 0
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for _ in range(samples * (shard + 1) // shards - samples * shard // shards):
                levels = generator.integers(0, 256, size=(side // 8, side // 8, 3), dtype=np.uint8)
                buffer = io.BytesIO()
                Image.fromarray(levels).resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
                key = f"{number:09d}"
                for name, data in ((f"{key}.jpg", buffer.getvalue()), (f"{key}.txt", f"sample {number}".encode())):
                    header = tarfile.TarInfo(name)
                    header.size = len(data)
                    tar.addfile(header, io.BytesIO(data))
                number += 1


def plain(urls: str, size: int, shuffle: bool) -> Iterator[tuple[np.ndarray, str]]:
    """Pairs as webdataset gives them, cut as genpipe cuts them."""
    how = centre_crop(size)
    data = webdataset.WebDataset(urls, shardshuffle=100 if shuffle else False, seed=0, empty_check=False)
    stream = (data.shuffle(1000) if shuffle else data).decode("pil").to_tuple("jpg", "txt")
    return ((crop(picture, how), caption) for picture, caption in stream)


def rates(pairs: Callable[[], Iterator[tuple[np.ndarray, str]]], count: int) -> tuple[float, float]:
    """Samples of one pass over `count` pairs, opening included, per second of the clock and of the processor."""
    wall, work = time.perf_counter(), time.process_time()
    read = sum(1 for _ in itertools.islice(pairs(), count))
    if read != count:
        raise RuntimeError(f"{read} pairs came where {count} were written")
    return count / (time.perf_counter() - wall), count / (time.process_time() - work)


def main() -> None:
    parser = argparse.ArgumentParser(description="Samples per second from shards, against plain webdataset.")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--samples", type=int, default=2000, help="in all shards together")
    parser.add_argument("--side", type=int, default=256, help="of the stored pictures")
    parser.add_argument("--size", type=int, default=64, help="of the pictures that come out")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), arguments.shards, arguments.samples, arguments.side)
        urls, size = f"{folder}/{{00000..{arguments.shards - 1:05d}}}.tar", arguments.size
        readers: dict[str, Callable[[], Iterator[tuple[np.ndarray, str]]]] = {
            "genpipe_shuffled": lambda: iter(Shards(urls, size)),
            "webdataset_shuffled": lambda: plain(urls, size, shuffle=True),
            "genpipe_in_order": lambda: Shards(urls, size).once(),
            "webdataset_in_order": lambda: plain(urls, size, shuffle=False),
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in readers}
        for _ in range(arguments.repeats + 1):  # the first round warms the file cache up
            for name, reader in readers.items():
                found[name].append(rates(reader, arguments.samples))
    table = {name: np.array(values[1:]) for name, values in found.items()}  # repeats, 2
    ours, theirs = table["genpipe_shuffled"], table["webdataset_shuffled"]
    median = {name: np.median(values, axis=0) for name, values in table.items()}
    shuffled = median["genpipe_shuffled"] / median["webdataset_shuffled"]
    in_order = median["genpipe_in_order"] / median["webdataset_in_order"]
    figures = {
        **vars(arguments),
        "samples_per_s": {name: round(value[0], 1) for name, value in median.items()},
        "samples_per_processor_s": {name: round(value[1], 1) for name, value in median.items()},
        "genpipe_over_webdataset": round(shuffled[0], 3),
        "genpipe_over_webdataset_processor": round(shuffled[1], 3),
        "genpipe_over_webdataset_range": [round(float(end), 3) for end in np.sort((ours / theirs)[:, 0])[[0, -1]]],
        "genpipe_over_webdataset_in_order": round(in_order[0], 3),
        "genpipe_over_webdataset_in_order_processor": round(in_order[1], 3),
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
