"""Labelled pictures: class folders and lists, labels against a classifier's names, broken files, refusals."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from genpipe.data.labelled import LabelledPictures, check_class_names, parse_class_names, read_class_names
from genpipe.errors import InputError
from genpipe.images import open_picture


def draw(path: Path, level: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (level, 0, 0)).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "set"
    draw(root / "hot_dog" / "1.png", 10)
    draw(root / "hot_dog" / "deeper" / "2.png", 20)
    draw(root / "cat" / "1.jpg", 30)
    draw(root / ".hidden" / "1.png")
    (root / "cat" / "notes.txt").write_text("no picture")
    return root


def levels(data: LabelledPictures) -> list[tuple[int, str]]:
    return [(picture.getpixel((0, 0))[0], data.names[label]) for picture, label in data.read(open_picture)]


def test_a_folder_per_class(folder: Path) -> None:
    data = LabelledPictures(folder)
    assert data.names == ("cat", "hot dog") and len(data) == 3
    assert data.paths == [folder / "cat/1.jpg", folder / "hot_dog/1.png", folder / "hot_dog/deeper/2.png"]
    assert levels(data) == [(30, "cat"), (10, "hot dog"), (20, "hot dog")]
    assert (data.report().read, data.report().skipped) == (3, {})


def test_labels_are_numbered_as_the_classifier_has_them(folder: Path) -> None:
    data = LabelledPictures(folder, ["zebra", "Hot Dog", " CAT "])
    assert data.names == ("zebra", "Hot Dog", "CAT") and data.labels == [2, 1, 1]


def test_pictures_beside_the_class_folders_are_counted(folder: Path) -> None:
    draw(folder / "stray.png")
    data = LabelledPictures(folder)
    assert len(data) == 3 and data.report().skipped == {"picture outside of a class folder": 1}


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_lists(folder: Path, kind: str) -> None:
    absolute = str(folder / "cat" / "1.jpg")
    rows = [("hot_dog/1.png", "hot_dog"), (absolute, " Cat"), ("hot_dog/1.png", ""), ("hot_dog/deeper/2.png", "7")]
    file = folder / f"list.{kind}"
    if kind == "jsonl":
        lines = [json.dumps({"file_name": a, "label": int(b) if b.isdigit() else b, "x": [1]}) for a, b in rows]
        file.write_text("\n".join([*lines, ""]))
    else:
        comma = {"csv": ",", "tsv": "\t"}[kind]
        file.write_bytes("\ufeff".encode() + "\r\n".join(map(comma.join, [(" Image", "CLASS"), *rows])).encode())
    data = LabelledPictures(file)
    assert data.names == ("7", "Cat", "hot dog") and data.labels == [2, 1, 0]
    assert levels(data) == [(10, "hot dog"), (30, "Cat"), (20, "7")]
    assert data.report().skipped == {"no label": 1} and "list" in data.report().first["no label"]


def test_broken_pictures_are_skipped_and_counted_each_time(folder: Path) -> None:
    (folder / "cat" / "0.png").write_bytes(b"no picture")
    (folder / "cat" / "9.png").write_bytes(b"")
    data = LabelledPictures(folder)
    for _ in range(2):
        assert levels(data) == [(30, "cat"), (10, "hot dog"), (20, "hot dog")]
        assert (data.report().read, data.report().skipped) == (3, {"picture cannot be read": 2})
    for path in data.paths:
        path.write_bytes(b"")
    with pytest.raises(InputError, match="None of the 5 pictures can be read"):
        list(data.read(open_picture))


def test_pictures_are_not_held(folder: Path) -> None:
    open_files = []

    def read(path: Path) -> Path:
        open_files.append(path)
        return path

    for number in range(100):
        draw(folder / "cat" / f"many{number}.png")
    data = LabelledPictures(folder)
    stream = data.read(read)
    next(stream)
    assert len(open_files) < 20 < len(data)
    stream.close()


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file or folder"):
        LabelledPictures(tmp_path / "nowhere")
    draw(tmp_path / "flat" / "1.png")
    with pytest.raises(InputError, match="has no sub-folders; labelled pictures lie"):
        LabelledPictures(tmp_path / "flat")
    draw(tmp_path / "one" / "cat" / "1.png")
    with pytest.raises(InputError, match="at least two classes, only 'cat' was given"):
        LabelledPictures(tmp_path / "one")
    os.mkdir(tmp_path / "one" / "dog")
    with pytest.raises(InputError, match="No pictures were found in .*dog"):
        LabelledPictures(tmp_path / "one")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            b"image,caption\ncat/1.jpg,x\n",
            "needs a column .* label, class for its label; it has caption, image",
        ),
        ("a.csv", b"label\ncat\n", "needs a column image, file_name, path"),
        ("a.csv", b"", "it has none"),
        ("a.csv", b"image,label\n", "has no picture with a label"),
        ("a.csv", b"image,label\ncat/1.jpg,\n", "has no picture with a label .*1 no label"),
        ("a.csv", b"image,label\nnope.png,cat\ncat/1.jpg,dog\n", "1 pictures named in .* are missing.*nope.png"),
        ("a.csv", b"image,label\ncat/1.jpg,cat\n", "only 'cat' was given"),
        ("a.csv", b"image,label\n\xff.png,cat\n", "not UTF-8"),
        ("a.jsonl", b'{"image": "cat/1.jpg", "label": "cat"}\n{', "Line 2 of .* is not valid JSON"),
        ("a.jsonl", b"[1]", r"\(line 1\) needs a column"),
        ("a.jsonl", b'{"image": "cat/1.jpg", "label": ["cat"]}', "Line 1 of .* has a list where text is needed"),
        ("a.txt", b"cat/1.jpg cat", "neither a folder of class folders nor a list"),
    ],
)
def test_lists_that_cannot_be_used(folder: Path, name: str, content: bytes, message: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        LabelledPictures(folder / name)
    assert "\n" not in str(error.value)


def test_labels_that_the_classifier_has_not(folder: Path) -> None:
    (folder / "a.csv").write_text("image,label\ncat/1.jpg,cat\ncat/1.jpg,horse\ncat/1.jpg,cow\ncat/1.jpg,horse\n")
    with pytest.raises(
        InputError, match=r"'horse' \(line 3 of .*a.csv'\) is not among the 2 classes, nor are 1 other labels; name"
    ):
        LabelledPictures(folder / "a.csv", ["cat", "dog"])
    with pytest.raises(InputError, match="'hot_dog' .the folder .*hot_dog'. is not among the 2 classes; name"):
        LabelledPictures(folder, ["cat", "dog"])


def test_class_names() -> None:
    assert parse_class_names(" cat,hot  dog , it's {a}") == ("cat", "hot dog", "it's {a}")
    assert check_class_names(["été", "猫"]) == ("été", "猫")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "at least two classes, none was given"),
        ("cat", "at least two classes, only 'cat' was given"),
        ("cat,", "number 2 of 2 is empty"),
        ("cat,,dog", "number 2 of 3 is empty"),
        ("cat, \u200b, dog", "number 2 of 3 is empty"),
        ("cat, dog, cat", r"'cat' is there twice \(numbers 1 and 3\)"),
        ("hot_dog, Hot Dog", "'Hot Dog' is there twice"),
        ("cat, " + 201 * "x", "has 201 characters, the limit is 200"),
    ],
)
def test_class_names_that_cannot_be_used(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_class_names(text)


def test_class_names_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "classes.txt"
    file.write_bytes("\ufeffcat\r\ndog, the animal\n\n".encode())
    assert read_class_names(file) == ("cat", "dog, the animal")
    file.write_bytes(b"cat\n\ndog")
    with pytest.raises(InputError, match="number 2 of 3 is empty"):
        read_class_names(file)
    file.write_bytes(b"cat\n\xff")
    with pytest.raises(InputError, match="not UTF-8"):
        read_class_names(file)
    with pytest.raises(InputError, match="classes.txt2' cannot be read"):
        read_class_names(tmp_path / "classes.txt2")
    with pytest.raises(InputError, match="cannot be read"):
        read_class_names(tmp_path)
