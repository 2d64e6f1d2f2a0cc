"""The verbs of CLIP and of data sets on the command line: search, classify, evaluate, embed, data."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from command_line import Result, Run, refused
from PIL import Image

COLOURS = {"red": (200, 30, 30), "blue": (30, 30, 200), "white": (240, 240, 240)}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with a folder per colour, three captioned pictures in each."""
    folder = tmp_path / "pictures"
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for number in range(3):
            pixels = np.full((16, 16, 3), colour, np.uint8)
            pixels[number : number + 4, :4] = 255 - pixels[0, 0]
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
            (folder / name / f"{number}.txt").write_text(f"{name} dogs {number}")
    return folder


def document(result: Result) -> dict:
    """The JSON document that a successful command printed, and nothing else."""
    assert result.code == 0, result.err
    return json.loads(result.out)


def test_search_embeds_once_and_finds_the_best_first(run: Run, pictures: Path, tiny_folder: Path) -> None:  # noqa: F811
    first = document(run("search", pictures, "a dog", "--top", 4, "--clip", tiny_folder, "--json"))
    scores = [entry["score"] for entry in first["pictures"]]
    assert len(scores) == 4 and scores == sorted(scores, reverse=True)
    assert (first["embedded"], first["reused"]) == (9, 0)
    (pictures / "red" / "0.png").unlink()
    second = document(run("search", pictures, "a dog", "--clip", tiny_folder, "--json"))
    assert (second["embedded"], second["reused"], second["dropped"]) == (0, 8, 1)
    assert "nowhere" in refused(run("search", "nowhere", "a dog"))


def test_classify_builds_saves_and_reuses_a_classifier(run: Run, pictures: Path, tiny_folder: Path) -> None:  # noqa: F811
    made = run(
        "classify", pictures, "--classes", "cat, dog", "--clip", tiny_folder, "--save-classifier", "kept", "--json"
    )
    built = document(made)
    assert built["classes"] == ["cat", "dog"] and len(built["pictures"]) == 9
    for entry in built["pictures"]:
        assert sum(likely["probability"] for likely in entry["classes"]) == pytest.approx(1, abs=1e-4)
    again = document(run("classify", pictures, "--classifier", "kept", "--clip", tiny_folder, "--json"))
    assert again["pictures"] == built["pictures"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "No classes were given"),
        (["--classes", "cat"], "cat"),
        (["--classes", "cat, cat"], "cat"),
        (["--classes", "cat, dog", "--templates", "none such"], "none such"),
        (["--classes", "cat, dog", "--classifier", "kept"], "leave out --classes"),
        (["--classes", "cat, dog", "--top", 0], "at least 1"),
    ],
)
def test_classify_refuses(run: Run, pictures: Path, arguments: list, words: str) -> None:  # noqa: F811
    assert words in refused(run("classify", pictures, *arguments))


def test_evaluate_zero_shot_and_retrieval(run: Run, pictures: Path, tiny_folder: Path) -> None:  # noqa: F811
    figures = document(run("evaluate", "zero-shot", pictures, "--clip", tiny_folder, "--confusion", "c.png", "--json"))
    assert figures["pictures"] == 9 and 0 <= figures["top1"] <= figures["top5"] == 1
    assert Image.open("c.png").width > 50
    ways = document(run("evaluate", "retrieval", pictures, "--clip", tiny_folder, "--json"))
    assert ways["pairs"] == 9 and 0 <= ways["picture_to_caption"]["recall@1"] <= 1


def test_pack_check_and_embed_shards(run: Run, pictures: Path, tiny_folder: Path) -> None:  # noqa: F811
    packed = document(run("data", "pack", pictures, "out/set", "--samples", 5, "--json"))
    assert packed["samples"] == 9 and len(packed["files"]) == 2
    assert document(run("data", "check", *packed["files"], "--json"))["samples"] == 9
    written = document(run("embed", *packed["files"], "--clip", tiny_folder, "--json"))
    assert (written["written"], written["embeddings"]) == (2, 9)
    assert document(run("embed", *packed["files"], "--clip", tiny_folder, "--json"))["written"] == 0
    with tarfile.open(packed["files"][0], "a") as tar:  # a caption without its picture
        (Path("x.txt")).write_text("alone")
        tar.add("x.txt", "zzz.txt")
    broken = run("data", "check", packed["files"][0])
    assert broken.code == 1 and "1" in broken.out
    assert "none.tar" in refused(run("embed", "none.tar"))
