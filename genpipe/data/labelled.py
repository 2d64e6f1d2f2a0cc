"""Pictures with one label each, to measure classifiers on (CLIP, arXiv 2103.00020, section 3.1), and class names.

A folder with one sub-folder per class, or a list (CSV, TSV, JSONL). Pictures are read one after another, never kept.
"""

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from genpipe import images
from genpipe.data.read_ahead import read_ahead
from genpipe.data.samples import Report
from genpipe.errors import InputError
from genpipe.picture_files import PICTURE_EXTENSIONS

PICTURE_COLUMNS = ("image", "file_name", "path")
LABEL_COLUMNS = ("label", "class")
LIST_SUFFIXES = (".csv", ".tsv", ".jsonl")
MAX_NAME = 200  # characters of a class name; a longer one is a line of something else

Columns = Mapping[str, Sequence[str]]  # what a list must say of each picture -> the names its column may have
Read = TypeVar("Read")


class _Row(NamedTuple):
    """One labelled picture as found; `where` says to a person where its label stands."""

    path: Path
    label: str
    where: str


class LabelledPictures:
    """Pictures on disk with one label each: picture `paths[i]` shows the class `names[labels[i]]`.

    `source`: a folder with one sub-folder per class (searched recursively), or a CSV / TSV / JSONL file with a column
    for the picture (image, file_name or path; relative to the file's folder) and one for the label (label or class).
    `classes`: the names of a classifier, in its order; labels that differ from one of them only in case, or in
    underscores for spaces, mean it. None takes the labels themselves, sorted, underscores read as spaces.

    Rows without a label and pictures outside of a class folder are left out and counted. Raises InputError, naming the
    file, for a missing or empty source, a list without the columns or with missing pictures, labels that are not among
    `classes`, and names that `check_class_names` refuses.
    """

    def __init__(self, source: str | os.PathLike[str], classes: Sequence[str] | None = None) -> None:
        root = Path(source)
        if not root.exists():
            raise InputError(f"There is no file or folder {str(root)!r}.")
        self._left_out = Report()
        rows = _in_folders(root, self._left_out) if root.is_dir() else _listed(root, self._left_out)
        if not rows:
            raise InputError(f"{str(root)!r} has no picture with a label ({self._left_out}).")
        if classes is None:
            self.names = check_class_names(sorted({spaced(row.label) for row in rows}))
        else:
            self.names = check_class_names(classes)
        numbers = {class_key(name): number for number, name in enumerate(self.names)}
        unseen = [row for row in rows if class_key(row.label) not in numbers]
        if unseen:
            others = len({class_key(row.label) for row in unseen}) - 1
            raise InputError(
                f"The label {unseen[0].label[:100]!r} ({unseen[0].where}) is not among the {len(numbers)} classes"
                f"{f', nor are {others} other labels' if others else ''}; name all labels as classes, or leave those "
                "pictures out."
            )
        self.paths = [row.path for row in rows]
        self.labels = [numbers[class_key(row.label)] for row in rows]
        self._report = self._counts()

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, read: Callable[[Path], Read]) -> Iterator[tuple[Read, int]]:
        """(what `read` makes of a picture file, its label's number), in order, a few files read ahead in threads.

        `read` is genpipe.images.open_picture or something on top of it. Files for which it raises InputError are
        skipped and counted; where that is true of all, InputError says so.
        """
        report = self._report = self._counts()
        for number, (_, future) in enumerate(read_ahead(self.paths, read)):
            try:
                picture = future.result()
            except InputError as error:
                report.skip("picture cannot be read", str(error))
                continue
            report.read += 1
            yield picture, self.labels[number]
        if not report.read:
            raise InputError(f"None of the {len(self)} pictures can be read ({report}).")

    def report(self) -> Report:
        """What was read and skipped in the latest pass, and what was left out before."""
        return self._report

    def _counts(self) -> Report:
        return Report(0, dict(self._left_out.skipped), dict(self._left_out.first))


# Class names ----------------------------------------------------------------------------------------------------------


def class_key(name: str) -> str:
    """What makes two names one class: letters regardless of case, underscores read as spaces."""
    return spaced(name).casefold()


def check_class_names(names: Sequence[str]) -> tuple[str, ...]:
    """Class names without white space around or doubled; InputError for fewer than two, empty, long and equal ones."""
    clean = tuple(" ".join(name.split()) for name in names)
    first: dict[str, int] = {}
    for number, name in enumerate(clean, start=1):
        if not any(letter.isprintable() and not letter.isspace() for letter in name):
            raise InputError(f"Class name number {number} of {len(clean)} is empty; give every class a name.")
        if len(name) > MAX_NAME:
            raise InputError(
                f"Class name number {number} ({name[:40]!r} ...) has {len(name):,} characters, the limit is {MAX_NAME}."
            )
        earlier = first.setdefault(class_key(name), number)
        if earlier != number:
            raise InputError(
                f"The class name {name!r} is there twice (numbers {earlier} and {number}); name each class once."
            )
    if len(clean) < 2:
        given = f"only {clean[0]!r} was given" if clean else "none was given"
        raise InputError(f"A classifier needs at least two classes, {given}.")
    return clean


def parse_class_names(text: str) -> tuple[str, ...]:
    """Class names separated by commas, as in "cat, dog"; checked."""
    return check_class_names(text.split(",") if text.strip() else [])


def read_class_names(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Class names from a text file in UTF-8, one a line; checked. Empty lines at the end do not count."""
    return check_class_names(re.split(r"\r\n|\r|\n", _read_text(Path(path)).rstrip()))


# Sources --------------------------------------------------------------------------------------------------------------


def spaced(label: str) -> str:
    """A label as a class name is shown: underscores and doubled spaces read as one space."""
    return " ".join(label.replace("_", " ").split())


def _in_folders(root: Path, left_out: Report) -> list[_Row]:
    """The pictures of every sub-folder, labelled with its name."""
    try:
        entries = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise InputError(f"The folder {str(root)!r} cannot be read: {error.strerror}.") from error
    folders = [path for path in entries if path.is_dir()]
    if not folders:
        raise InputError(
            f"The folder {str(root)!r} has no sub-folders; labelled pictures lie in one sub-folder per class, or are "
            "named in a CSV, TSV or JSONL file."
        )
    for path in entries:
        if path not in folders and path.suffix.lower() in PICTURE_EXTENSIONS:
            left_out.skip("picture outside of a class folder", str(path))
    return [
        _Row(picture, folder.name, f"the folder {str(folder)!r}")
        for folder in folders
        for picture in images.find_pictures([folder])
    ]


def _listed(file: Path, left_out: Report) -> list[_Row]:
    """The pictures that a CSV, TSV or JSONL file names; every one must be there."""
    rows = []
    for line, (picture, label) in listed_rows(file, {"the picture": PICTURE_COLUMNS, "its label": LABEL_COLUMNS}):
        if not label:
            left_out.skip("no label", f"line {line} of {str(file)!r}")
            continue
        rows.append(_Row(file.parent / picture, label, f"line {line} of {str(file)!r}"))
    check_present(file, [row.path for row in rows])
    return rows


def listed_rows(file: Path, columns: Columns) -> Iterator[tuple[int, list[str]]]:
    """(line, one value for each of `columns`) of a CSV, TSV or JSONL file; each kind has the names it may go by.

    Raises InputError, naming file and line, for other files, what cannot be read, and missing columns.
    """
    kind = file.suffix.lower()
    if kind not in LIST_SUFFIXES:
        raise InputError(f"{str(file)!r} is neither a folder of class folders nor a list (.csv, .tsv, .jsonl).")
    text = _read_text(file)
    delimiter = "\t" if kind == ".tsv" else ","
    records = _json_records(file, text, columns) if kind == ".jsonl" else _table_records(file, text, delimiter, columns)
    for line, record in records:
        yield line, [_column(file, line, record, known) for known in columns.values()]


def check_present(file: Path, paths: Sequence[Path]) -> None:
    """Raise InputError unless all pictures that a list names are there."""
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise InputError(
            f"{len(missing):,} pictures named in {str(file)!r} are missing, the first is {str(missing[0])!r}."
        )


def _table_records(file: Path, text: str, delimiter: str, columns: Columns) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        names = {name: name.strip().lower() for name in reader.fieldnames or () if name}
        _check_columns(file, 1, set(names.values()), columns)  # a list without rows too
        for row in reader:
            yield reader.line_num, {short: row[name] for name, short in names.items()}
    except csv.Error as error:
        raise InputError(f"The row after line {reader.line_num} of {str(file)!r} cannot be read: {error}.") from error


def _json_records(file: Path, text: str, columns: Columns) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            record = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise InputError(f"Line {line} of {str(file)!r} is not valid JSON: {error}.") from error
        record = record if isinstance(record, dict) else {}
        _check_columns(file, line, set(record), columns)
        yield line, record


def _check_columns(file: Path, line: int, names: set[str], columns: Columns) -> None:
    if not all(names.intersection(known) for known in columns.values()):
        needed = " and ".join(f"a column {', '.join(known)} for {what}" for what, known in columns.items())
        raise InputError(f"{str(file)!r} (line {line}) needs {needed}; it has {', '.join(sorted(names)) or 'none'}.")


def _column(file: Path, line: int, record: dict[str, Any], known: Sequence[str]) -> str:
    value = next(record[name] for name in known if name in record)
    if value is not None and not isinstance(value, str | int):
        raise InputError(f"Line {line} of {str(file)!r} has a {type(value).__name__} where text is needed.")
    return "" if value is None else str(value).strip()


def _read_text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it is not UTF-8 ({error.reason})"
        raise InputError(f"The file {str(file)!r} cannot be read: {reason}.") from error
