"""`genpipe data check`: counts the samples of shards and tells what is broken in them, as training would find it."""

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from genpipe import images
from genpipe.data.read_ahead import read_ahead
from genpipe.data.samples import BrokenSample, Report
from genpipe.data.shards import Urls, expand_shards
from genpipe.data.tar_index import index_shard, read_entry

NOTHING = "shard without a sample"


@dataclass
class ShardsCheck:
    """What is in a set of shards.

    report: sound samples as `read`, broken ones by reason, with the first sample of each reason.
    smallest, largest: sound samples of the poorest and of the richest shard.
    repeated_keys: samples whose key an earlier shard had too, and the first of them; training reads both, but it may
        mean that the same data is there twice. Within one shard it counts as broken.
    headers_only: pictures and captions were not looked at.
    """

    shards: int
    bytes: int
    headers_only: bool
    report: Report = field(default_factory=Report)
    smallest: int = 0
    largest: int = 0
    repeated_keys: int = 0
    first_repeated: str = ""

    @property
    def broken(self) -> int:
        """All broken samples and shards."""
        return sum(self.report.skipped.values())

    @property
    def is_sound(self) -> bool:
        """Whether there is a sample, and none is broken; the command's exit code is 0 then, and else 1."""
        return self.report.read > 0 and self.broken == 0

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "sound": self.is_sound,
            "shards": self.shards,
            "bytes": self.bytes,
            "headers_only": self.headers_only,
            "samples": self.report.read,
            "samples_per_shard": {"smallest": self.smallest, "largest": self.largest},
            "broken": {
                reason: {"count": count, "first": self.report.first[reason]}
                for reason, count in sorted(self.report.skipped.items())
            },
            "repeated_keys": {"count": self.repeated_keys, "first": self.first_repeated or None},
        }

    def to_text(self) -> str:
        """Everything for a person."""
        size, seen = f"{self.bytes / 1e6:,.1f} MB", "samples (headers alone)" if self.headers_only else "sound samples"
        each = f"{self.smallest:,}" + (f" to {self.largest:,}" if self.largest > self.smallest else "")
        lines = [f"{self.report.read:,} {seen} in {self.shards:,} shards ({each} each, {size}), {self.broken:,} broken"]
        lines += [
            f"  {count:,} {reason}, the first: {self.report.first[reason]}"
            for reason, count in sorted(self.report.skipped.items(), key=lambda item: (-item[1], item[0]))
        ]
        if self.repeated_keys:
            lines.append(f"  note: {self.repeated_keys:,} keys occur in another shard too, as {self.first_repeated}")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Shard:
    """What one shard holds: hashes of the keys of its sound samples, and (reason, where) of broken ones."""

    keys: "array[int]"
    broken: list[tuple[str, str]]


def check_shards(
    urls: Urls,
    headers_only: bool = False,
    workers: int | None = None,
    max_pixels: int = images.MAX_PIXELS,
    on_broken: Callable[[str, str], None] | None = None,
    report: Callable[[int, int], None] | None = None,
) -> ShardsCheck:
    """Read every sample as training would: pictures decoded, captions as UTF-8 text. No model is loaded.

    `urls`: see `expand_shards`. `headers_only` reads the tars' headers and skips their contents: seconds for a million
    samples, but broken pictures and captions stay unseen. Shards are read by `workers` threads. `on_broken(reason,
    where)` is called for every broken sample, in the order of the shards, and `report(done, total)` after each shard.
    Memory: 8 bytes a sample. Raises InputError for shards that are missing or cannot be meant.
    """
    paths = expand_shards(urls)
    result = ShardsCheck(len(paths), sum(path.stat().st_size for path in paths), headers_only)
    all_keys: array[int] = array("q")
    sizes: list[int] = []
    reading = read_ahead(paths, lambda path: _check(path, headers_only, max_pixels), workers)
    for done, (_, future) in enumerate(reading, start=1):
        shard = future.result()
        result.report.read += len(shard.keys)
        sizes.append(len(shard.keys))
        all_keys.extend(shard.keys)
        for reason, where in shard.broken:
            result.report.skip(reason, where)
            if on_broken is not None:
                on_broken(reason, where)
        if report is not None:
            report(done, len(paths))
    result.smallest, result.largest = min(sizes), max(sizes)
    _note_repeated(result, paths, sizes, np.frombuffer(all_keys, dtype=np.int64))
    return result


def _check(path: Path, headers_only: bool, max_pixels: int) -> _Shard:
    index = index_shard(path)
    keys: array[int] = array("q")
    broken = [(reason, f"{path.name} {key}".strip()) for reason, key in index.broken]
    if not index.entries:
        return _Shard(keys, broken or [(NOTHING, path.name)])
    if headers_only:
        keys.extend(hash(entry.key) for entry in index.entries)
        return _Shard(keys, broken)
    try:
        with open(path, "rb") as file:
            for entry in index.entries:
                try:
                    read_entry(file, entry, max_pixels)
                except BrokenSample as error:
                    broken.append((error.reason, f"{path.name} {entry.key}"))
                else:
                    keys.append(hash(entry.key))
    except OSError as error:  # gone since its headers were read
        broken.append(("shard damaged or cut short", f"{path.name} ({error.strerror})"))
    return _Shard(keys, broken)


def _note_repeated(result: ShardsCheck, paths: list[Path], sizes: list[int], keys: np.ndarray) -> None:
    """Count the keys that an earlier shard had, and name the first; within a shard, keys are distinct already."""
    distinct, first = np.unique(keys, return_index=True)
    result.repeated_keys = len(keys) - len(distinct)
    if not result.repeated_keys:
        return
    again = np.ones(len(keys), dtype=bool)
    again[first] = False
    place = int(np.flatnonzero(again)[0])
    shard = int(np.searchsorted(np.cumsum(sizes), place, side="right"))
    key = next((entry.key for entry in index_shard(paths[shard]).entries if hash(entry.key) == keys[place]), "")
    result.first_repeated = f"{paths[shard].name} {key}".strip()
