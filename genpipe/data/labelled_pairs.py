"""Pictures with a text and a label each, for image-text classification: lists (CSV, TSV, JSONL) and webdataset shards.

All of it is indexed at once, and pictures are read when asked for, in any order.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from genpipe import images
from genpipe.data.labelled import (
    LABEL_COLUMNS,
    LIST_SUFFIXES,
    PICTURE_COLUMNS,
    check_class_names,
    check_present,
    class_key,
    listed_rows,
    spaced,
)
from genpipe.data.samples import BrokenSample, Report
from genpipe.data.shard_walk import count_broken
from genpipe.data.shards import expand_shards, is_shards
from genpipe.data.tar_index import Entry, index_shard, read_entry, read_record, read_text
from genpipe.errors import InputError

TEXT_COLUMNS = ("text", "caption")


class LabelledPair(NamedTuple):
    """An RGB picture of any size, a text of one line, the number of the class."""

    picture: Image.Image
    text: str
    label: int


class _Row(NamedTuple):
    path: Path  # of the picture, or of its shard
    entry: Entry | None  # in the shard
    text: str
    label: str
    where: str


class LabelledPairs:
    """Pairs of picture and text with one label each: pair i has the text `texts[i]` and the class `names[labels[i]]`.

    `source`: a CSV / TSV / JSONL file with a column for the picture (image, file_name or path; relative to the file's
    folder), one for the text (text or caption) and one for the label (label or class); or webdataset shards whose .json
    has the label (and the text, where there is no .txt).
    `names`: the classes of a classifier, in its order; labels that differ from one of them only in case, or in
    underscores for spaces, mean it. None takes the labels themselves, sorted.

    Pairs without text or label are left out and counted. A picture that turns out to be broken when it is read is
    counted, and the pair that follows takes its place, text and label too. Raises InputError, naming the file, for a
    missing or empty source, missing columns or pictures, labels that are not among `names`, and names that
    `check_class_names` refuses; when reading, where no picture at all can be read.
    """

    def __init__(
        self,
        source: str | Path,
        names: Sequence[str] | None = None,
        max_pixels: int = images.MAX_PIXELS,
    ) -> None:
        self.max_pixels = max_pixels
        self.left_out = Report()  # what has no text or label, or is broken on its face
        self._report = Report()  # what was read
        self._broken: set[int] = set()
        if is_shards(str(source)):
            self._rows = _in_shards(source, self.left_out)
        elif Path(source).is_file() and Path(source).suffix.lower() in LIST_SUFFIXES:
            self._rows = _listed(Path(source), self.left_out)
        else:
            raise InputError(
                f"There are no labelled pairs in {str(source)!r}; give a list (.csv, .tsv, .jsonl) with the columns "
                "image, text, label, or shards (*.tar)."
            )
        if not self._rows:
            raise InputError(f"{str(source)!r} has no picture with a text and a label ({self.left_out}).")
        found = sorted({spaced(row.label) for row in self._rows})
        self.names = check_class_names(found if names is None else names)
        numbers = {class_key(name): number for number, name in enumerate(self.names)}
        unseen = [row for row in self._rows if class_key(row.label) not in numbers]
        if unseen:
            others = len({class_key(row.label) for row in unseen}) - 1
            raise InputError(
                f"The label {unseen[0].label[:100]!r} ({unseen[0].where}) is not among the {len(numbers)} classes"
                f"{f', nor are {others} other labels' if others else ''}; train with pairs of all labels, or leave "
                "those pairs out."
            )
        self.texts = [row.text for row in self._rows]
        self.labels = [numbers[class_key(row.label)] for row in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> LabelledPair:
        """The pair `index`, or the first sound one behind it."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} pairs")
        for place in ((index + step) % len(self) for step in range(len(self))):
            if place in self._broken:
                continue
            try:
                picture = self._picture(self._rows[place])
            except (InputError, BrokenSample, OSError) as error:
                self._broken.add(place)
                self._report.skip("picture cannot be read", str(error))
                continue
            self._report.read += 1
            return LabelledPair(picture, self.texts[place], self.labels[place])
        raise InputError(f"None of the {len(self)} pictures can be read ({self._report}).")

    def report(self) -> Report:
        """Pairs read so far in this process, and pictures that could not be, each counted once."""
        return self._report

    def _picture(self, row: _Row) -> Image.Image:
        if row.entry is None:
            return images.open_picture(row.path, self.max_pixels)
        with open(row.path, "rb") as file:
            return read_entry(file, row.entry, self.max_pixels)[0]


def _listed(file: Path, left_out: Report) -> list[_Row]:
    columns = {"the picture": PICTURE_COLUMNS, "its text": TEXT_COLUMNS, "its label": LABEL_COLUMNS}
    rows = [
        _Row(file.parent / picture, None, " ".join(text.split()), label, f"line {line} of {str(file)!r}")
        for line, (picture, text, label) in listed_rows(file, columns)
    ]
    check_present(file, [row.path for row in rows])
    return [row for row in rows if _complete(row, left_out)]


def _in_shards(source: str | Path, left_out: Report) -> list[_Row]:
    """The samples of all shards in file order; what their headers or JSON show to be broken is counted."""
    rows = []
    for path in expand_shards(source):
        index = index_shard(path)
        count_broken(index, left_out)
        if not index.entries:  # so it may not even be possible to open it
            continue
        with open(path, "rb") as file:
            for entry in index.entries:
                where = f"{entry.key} in {str(path)!r}"
                try:
                    text, record = read_text(file, entry), read_record(file, entry)
                except BrokenSample as error:
                    left_out.skip(error.reason, where)
                    continue
                value = next((record[name] for name in LABEL_COLUMNS if name in record), None)
                label = str(value).strip() if isinstance(value, str | int) else ""
                row = _Row(path, entry, text, label, where)
                if _complete(row, left_out):
                    rows.append(row)
    return rows


def _complete(row: _Row, left_out: Report) -> bool:
    for reason, value in (("no text", row.text), ("no label", row.label)):
        if not value:
            left_out.skip(reason, row.where)
            return False
    return True
