"""Pictures with captions from disk: folders and lists, map-style, here; `Shards`, streamed, in shards.py.

Every source gives pairs: pixels uint8 (3, S, S), S the side asked for, and a caption of one line. What is broken is
skipped, counted by reason and reported; it never ends a run. Every draw is seeded by (seed, epoch, index).
"""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from genpipe import images
from genpipe.data.samples import BrokenSample, Pair, Report, read_caption
from genpipe.data.shards import Shards
from genpipe.data.transforms import CropConfig, crop, crop_of
from genpipe.errors import InputError

__all__ = ["ImageTextFolder", "Pair", "Report", "Shards"]

PICTURE_COLUMNS = ("image", "file_name", "path")
CAPTION_COLUMNS = ("caption", "text")
_LIST_NAMES = ("metadata.jsonl", "metadata.csv")  # looked for in a folder, as in the Hub's picture folders
_CROP = 2  # this module's stream of random numbers


class ImageTextFolder:
    """Captioned pictures on disk, map-style.

    `source`: a folder with a name.txt beside each picture (searched recursively) or with a metadata.jsonl or
    metadata.csv; or a CSV / TSV / JSONL file with a column for the picture (image, file_name or path; relative to the
    file's folder) and one for the caption (caption or text). `captions[i]` belongs to `paths[i]`.

    Pictures without a usable caption are left out at construction, and counted. A picture that turns out to be broken
    when it is read is counted, and the pair that follows it takes its place, so that the length never changes.
    Raises InputError, naming the file, for a missing or empty source, a list without the columns or with missing
    pictures, and, when reading, where no picture at all can be read.
    """

    def __init__(
        self,
        source: str | Path,
        size: int,
        crop: CropConfig | None = None,
        seed: int = 0,
        max_pixels: int = images.MAX_PIXELS,
    ) -> None:
        self.crop = crop_of(size, crop)
        self.seed = seed
        self.max_pixels = max_pixels
        self._report = Report()
        self._broken: set[int] = set()
        source = Path(source)
        if not source.exists():
            raise InputError(f"There is no file or folder {str(source)!r}.")
        inside = next((source / name for name in _LIST_NAMES if (source / name).is_file()), source)
        found = _beside(inside) if inside.is_dir() else _listed(inside)
        self.paths: list[Path] = []
        self.captions: list[str] = []
        for path, data in found:
            try:
                caption = read_caption(data)
            except BrokenSample as error:
                self._report.skip(error.reason, str(path))
                continue
            self.paths.append(path)
            self.captions.append(caption)
        if not self.paths:
            raise InputError(f"{str(source)!r} has no picture with a caption ({self._report}).")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Pair:
        return self.example(index)

    def example(self, index: int, epoch: int = 0) -> Pair:
        """The pair `index`, its random crop drawn from (seed, epoch, index)."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} pairs")
        index %= len(self)
        for place in ((index + step) % len(self) for step in range(len(self))):
            if place in self._broken:
                continue
            try:
                picture = images.open_picture(self.paths[place], self.max_pixels)
            except InputError as error:
                self._broken.add(place)
                self._report.skip("picture cannot be read", str(error))
                continue
            self._report.read += 1
            generator = np.random.default_rng((self.seed, _CROP, epoch, index))
            return crop(picture, self.crop, generator), self.captions[place]
        raise InputError(f"None of the {len(self)} pictures can be read ({self._report}).")

    def is_broken(self, index: int) -> bool:
        """Whether the picture `index` turned out to be broken when it was read."""
        return index in self._broken

    def report(self) -> Report:
        """Counts so far, of this process."""
        return self._report


def _beside(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Pictures below a folder with the bytes of their name.txt, empty where there is none."""
    for path in images.find_pictures([folder]):
        text = path.with_suffix(".txt")
        try:
            yield path, text.read_bytes() if text.is_file() else b""
        except OSError as error:
            raise InputError(f"The caption {str(text)!r} cannot be read: {error.strerror}.") from error


def _listed(file: Path) -> list[tuple[Path, bytes]]:
    """Pictures and captions that a CSV, TSV or JSONL file names; every picture must be there."""
    readers = {".csv": _csv_rows, ".tsv": _csv_rows, ".jsonl": _jsonl_rows}
    if file.suffix.lower() not in readers:
        kinds = ", ".join(readers)
        raise InputError(f"{str(file)!r} is neither a folder with pictures nor a list of captions ({kinds}).")
    try:
        text = file.read_bytes().decode("utf-8-sig")  # newlines inside quoted fields stay
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it is not UTF-8 ({error.reason})"
        raise InputError(f"The list {str(file)!r} cannot be read: {reason}.") from error
    rows = readers[file.suffix.lower()](file, text)
    if not rows:
        raise InputError(f"The list {str(file)!r} has no rows.")
    pairs = [(file.parent / picture, caption.encode("utf-8", "replace")) for picture, caption in rows]
    missing = [path for path, _ in pairs if not path.is_file()]
    if missing:
        raise InputError(
            f"{len(missing):,} pictures named in {str(file)!r} are missing, the first is {str(missing[0])!r}."
        )
    return pairs


def _csv_rows(file: Path, text: str) -> list[tuple[str, str]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if file.suffix.lower() == ".tsv" else ",")
    try:
        columns = {name.strip().lower(): name for name in reader.fieldnames or () if name}
        picture, caption = _columns(file, columns)
        return [(row[columns[picture]] or "", row[columns[caption]] or "") for row in reader]
    except csv.Error as error:
        raise InputError(f"The row after line {reader.line_num} of {str(file)!r} cannot be read: {error}.") from error


def _jsonl_rows(file: Path, text: str) -> list[tuple[str, str]]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"Line {number} of {str(file)!r} is not valid JSON: {error}.") from error
        names = record if isinstance(record, dict) else {}
        picture, caption = _columns(file, names, f" in line {number}")
        rows.append((str(names[picture]), str(names[caption] or "")))
    return rows


def _columns(file: Path, names: dict[str, Any], where: str = "") -> tuple[str, str]:
    picture = next((name for name in PICTURE_COLUMNS if name in names), None)
    caption = next((name for name in CAPTION_COLUMNS if name in names), None)
    if picture is None or caption is None:
        raise InputError(
            f"{str(file)!r}{where} needs a column {', '.join(PICTURE_COLUMNS)} for the picture and a column "
            f"{', '.join(CAPTION_COLUMNS)} for the caption; it has {', '.join(names) or 'none'}."
        )
    return picture, caption
