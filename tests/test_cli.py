"""The `genpipe` command but for drawing, as a person meets it: files, output, exit codes, one-sentence errors."""

import io
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from command_line import Run, picture, refused
from conftest import all_tiny_parts
from PIL import Image

import genpipe
from genpipe.parts import save_part
from pipelines.assembly import RECIPE_OF_PART
from pipelines.family import PART_CLASSES, describe_family

# rerank ---------------------------------------------------------------------------------------------------------------


def test_rerank_orders_files_and_folders(run: Run, tiny_folder: Path) -> None:
    for number, colour in enumerate([(250, 0, 0), (0, 250, 0), (0, 0, 250), (90, 90, 90)]):
        picture(Path(f"folder/{number}.png"), side=10 + 20 * number, colour=colour)
    single = picture(Path("single.jpg"), side=40)
    document = json.loads(run("rerank", "a cat", "folder", single, "--clip", tiny_folder, "--json").out)
    scores = [entry["score"] for entry in document["pictures"]]
    assert len(scores) == 5 and scores == sorted(scores, reverse=True) and document["skipped"] == []

    top = run("rerank", "a cat", "folder", single, "--clip", tiny_folder / "clip", "--top", 2)
    lines = [line.split() for line in top.out.splitlines()]
    assert [path for _, path in lines] == [entry["path"] for entry in document["pictures"][:2]]
    assert np.allclose([float(value) for value, _ in lines], scores[:2], atol=1e-4)


def test_rerank_reads_pictures_of_every_kind(run: Run, tiny_folder: Path) -> None:
    rgb = Image.new("RGB", (30, 24), (200, 30, 30))
    rgb.convert("RGBA").save("rgba.png")
    rgb.convert("L").save("grey.png")
    rgb.convert("CMYK").save("cmyk.jpg")
    rgb.convert("P").save("palette.gif", save_all=True, append_images=[Image.new("P", (30, 24))] * 2)
    Image.fromarray(np.full((24, 30), 40_000, np.uint16)).save("deep.png")
    names = ["rgba.png", "grey.png", "cmyk.jpg", "palette.gif", "deep.png"]
    result = run("rerank", "a cat", *names, "--clip", tiny_folder)
    assert result.code == 0 and sorted(line.split()[1] for line in result.out.splitlines()) == sorted(names)


def bomb() -> bytes:
    """A PNG of a hundred bytes that claims 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def half_a_picture() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, "PNG")
    return file.getvalue()[:1000]


@pytest.mark.parametrize(
    "content", [b"", b"no picture at all", half_a_picture(), bomb()], ids=["empty", "text", "half", "bomb"]
)
def test_a_broken_picture_is_refused_by_name_and_skipped_in_a_folder(
    run: Run, tiny_folder: Path, content: bytes
) -> None:
    picture(Path("folder/good.png"))
    broken = Path("folder/broken.png")
    broken.write_bytes(content)
    assert "folder/broken.png" in refused(run("rerank", "a cat", "folder/good.png", broken, "--clip", tiny_folder))

    result = run("rerank", "a cat", "folder", "--clip", tiny_folder, "--json")
    assert result.code == 0 and result.err.startswith("skipped: ") and "folder/broken.png" in result.err
    document = json.loads(result.out)
    assert [entry["path"] for entry in document["pictures"]] == ["folder/good.png"]
    assert [entry["path"] for entry in document["skipped"]] == ["folder/broken.png"]

    Path("folder/good.png").unlink()
    assert "None of the 1 pictures found can be read" in refused(
        run("rerank", "a cat", "folder", "--clip", tiny_folder)
    )


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["", "one.png"], "prompt is empty"),
        (["a cat", "missing.png"], "missing.png"),
        (["a cat", "empty"], "No pictures were found"),
        (["a cat", "one.png", "--top", 0], "at least 1, got 0"),
        (["a cat", "one.png", "--clip", "nope"], "no CLIP 'nope'"),
        (["a cat", "one.png", "--clip", "empty"], "config.json"),
        (["a cat", "one.png", "--clip", "ViT-B-32"], "ViT-B-32:WEIGHTS"),
        (["a cat", "one.png", "--clip", "ViT-B-32:nope"], "nope"),
        (["a cat"], "PICTURES"),
    ],
)
def test_rerank_refuses_in_one_sentence(run: Run, tiny_folder: Path, arguments: list[object], complaint: str) -> None:
    picture(Path("one.png"))
    Path("empty").mkdir()
    clip = [] if "--clip" in arguments else ["--clip", tiny_folder]
    assert complaint in refused(run("rerank", *arguments, *clip))


# assemble -------------------------------------------------------------------------------------------------------------


def put_runs(parts: list[str]) -> None:
    """Folders as `genpipe train` leaves them."""
    every = all_tiny_parts()
    for part in parts:
        run_folder = Path("runs") / RECIPE_OF_PART[part]
        save_part(every[part], run_folder / part)
        (run_folder / "recipe.json").write_text(json.dumps({"data": {"source": "pictures"}}))


@pytest.mark.parametrize(
    ("parts", "pipelines"),
    [
        (["clip", "dvae", "transformer"], ["dalle1"]),
        (["clip", "decoder"], ["dalle2"]),
        (["clip", "dvae", "transformer", "prior", "decoder", "upsampler"], ["dalle1", "dalle2"]),
        (["clip", "dvae", "decoder"], ["dalle2"]),
    ],
)
def test_assemble_makes_a_family_of_what_is_there(run: Run, parts: list[str], pipelines: list[str]) -> None:
    put_runs(parts)
    command = ["assemble", "mine", "--default", "dalle2.num_inference_steps=1", "--default", "dalle2.scheduler=ddim"]
    assert run(*command, "--guidance", 1.5).code == 0
    described = describe_family("mine")
    assert (described.parts, described.pipelines, described.name) == (
        [part for part in PART_CLASSES if part in parts], pipelines, "mine",
    )  # fmt: skip
    assert described.defaults["dalle2"] == {"num_inference_steps": 1, "scheduler": "ddim"}
    assert described.info["trained_on"] == "pictures" and described.info["resolution"] == 16
    if "dalle1" in pipelines:
        assert described.defaults["dalle1"]["guidance_scale"] == 1.5
    assert run("generate", "a cat", "--family", "mine", "--pipeline", pipelines[-1], "--candidates", 1).code == 0


def test_assemble_takes_parts_of_another_family_and_refuses_in_one_sentence(run: Run, tiny_folder: Path) -> None:
    put_runs(["decoder"])
    assert "no trained clip in 'runs/clip/clip'; train one with `genpipe train clip`" in refused(
        run("assemble", "mine")
    )
    assert "no trained clip in 'nowhere'" in refused(run("assemble", "mine", "--clip", "nowhere"))
    taken = ["--clip", tiny_folder / "clip", "--prior", tiny_folder / "prior"]
    for wrong in ("steps", "dalle2.steps=3", "dalle2.scheduler=magic", "dalle9.mode=text", "dalle2.eta=7"):
        refused(run("assemble", "mine", *taken, "--default", wrong))
    assert not Path("mine").exists()
    assert run("assemble", "mine", *taken).code == 0
    assert describe_family("mine").info["trained_on"] == "pictures, unknown"  # the tiny family does not say
    assert describe_family("mine").parts == ["clip", "prior", "decoder"]


# train, info, and the command as a whole ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nope"], "nope"),
        (["dvae", "--set", "run.no_such_key=1"], "no_such_key"),
        (["dvae", "--set", "nonsense"], "nonsense"),
        (["dvae", "--set", "run.steps=many"], "many"),
        (["dvae", "--minutes", 0], "0"),
        (["dvae", "--steps", 0], "steps"),
    ],
)
def test_train_refuses_in_one_sentence(run: Run, arguments: list[object], complaint: str) -> None:
    assert complaint in refused(run("train", *arguments))
    assert list(Path.cwd().iterdir()) == []


def test_info_describes_a_family(run: Run, tiny_folder: Path) -> None:
    document = json.loads(run("info", tiny_folder, "--json").out)
    assert document["families"][0]["license"] == "Apache-2.0" and document["genpipe"] == genpipe.__version__
    text = run("info", tiny_folder)
    assert text.code == 0 and "family tiny" in text.out and "devices" in text.out
    assert "no family 'nope'" in refused(run("info", "nope"))
    assert run("--version").out == f"{genpipe.__version__}\n"
    assert "generate" in run().out


def test_the_module_is_the_command_and_survives_a_reader_that_leaves(tmp_path: Path, tiny_folder: Path) -> None:
    command = [sys.executable, "-m", "pipelines"]
    refusal = subprocess.run([*command, "generate", ""], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (refusal.returncode, refusal.stdout) == (2, "")
    assert refusal.stderr == "error: The prompt is empty; say in a few words what to draw.\n"

    reading, writing = os.pipe()
    os.close(reading)  # as when `| head` has read enough
    gone = subprocess.run(
        [*command, "info", str(tiny_folder)],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        timeout=60,
    )
    os.close(writing)
    assert gone.returncode == 1 and gone.stderr == ""
