"""`genpipe generate` as a person meets it: files, output, exit codes, one-sentence errors, Ctrl-C."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import Run, picture, refused
from conftest import TINY_INFO, all_tiny_parts
from PIL import Image

import genpipe
from genpipe.dalle2.sampling import SCHEDULERS
from genpipe.images import read_recipe
from pipelines.family import describe_family, save_family
from pipelines.settings import MODES, DALLE2Sampling


def test_generate_writes_the_best_pictures_with_their_recipes(run: Run, tiny_folder: Path) -> None:
    result = run("generate", "a cat on a red background", "two dogs", "--family", tiny_folder, "--candidates", 5)
    assert result.code == 0 and result.err == ""
    names = [f"000{number}-{what}.png" for number in (1, 2) for what in (1, 2, 3, 4, "grid")]
    assert sorted(path.name for path in Path("genpipe-out").iterdir()) == names
    assert all(f"genpipe-out/{name}" in result.out for name in names) and "two dogs" in result.out

    recipes = [read_recipe(Path("genpipe-out") / f"0001-{rank}.png") for rank in (1, 2, 3, 4)]
    scores = [recipe["score"] for recipe in recipes]
    assert scores == sorted(scores, reverse=True)
    assert len({recipe["seed"] for recipe in recipes}) == 4
    first = recipes[0]
    assert first["prompt"] == "a cat on a red background" and first["genpipe"] == genpipe.__version__
    assert first["family"] == {"name": "tiny", "hash": describe_family(tiny_folder).hash_of("dalle1", upsampled=False)}
    plain = {"temperature": 1.0, "top_k": None, "top_p": None, "upsample": False, "upsampler_steps": None}
    plain |= {"upsampler_scheduler": None, "decoder_weight": 0.0}
    assert first["settings"] == {**plain, "guidance_scale": 2.0}
    assert read_recipe(Path("genpipe-out/0001-grid.png"))["pictures"] == names[:4]
    assert Image.open("genpipe-out/0001-1.png").size == (16, 16)
    assert Image.open("genpipe-out/0001-grid.png").width > 4 * 128


def test_generate_as_json_prints_one_document_and_never_replaces_a_file(run: Run, tiny_folder: Path) -> None:
    command = ["generate", "a cat", "--family", tiny_folder, "--candidates", 2, "--keep", 1, "--seed", 9, "--json"]
    command += ["--out", "here", "--guidance", 1, "--top-k", 5]
    first = json.loads(run(*command).out)
    before = Path("here/0001-1.png").read_bytes()
    second = json.loads(run(*command).out)
    assert Path("here/0001-1.png").read_bytes() == before
    (result,) = second["results"]
    (drawn,) = result["pictures"]
    assert Path(drawn["path"]) == Path("here/0002-1.png") and result["grid"] is None and second["complete"]
    assert drawn["seed"] in (9, 10) and drawn["seed"] == first["results"][0]["pictures"][0]["seed"]
    assert second["settings"]["guidance_scale"] == 1.0 and second["settings"]["top_k"] == 5
    assert sorted(path.name for path in Path("here").iterdir()) == ["0001-1.png", "0002-1.png"]


def test_generate_with_dalle2_takes_its_own_flags(run: Run, tiny_folder: Path) -> None:
    command = ["generate", "a cat", "--family", tiny_folder, "--pipeline", "dalle2", "--candidates", 2, "--keep", 1]
    flags = ["--steps", 3, "--guidance", 2, "--negative", " two  dogs", "--scheduler", "ddim", "--prior-guidance", 3]
    document = json.loads(run(*command, *flags, "--mode", "text", "--json").out)
    expected = {
        "num_inference_steps": 3, "guidance_scale": 2.0, "negative_prompt": "two dogs", "scheduler": "ddim",
        "prior_guidance_scale": 3.0, "mode": "text", "upsample": True, "upsampler_steps": 2,
    }  # fmt: skip
    assert document["pipeline"] == "dalle2" and document["complete"]
    assert expected.items() <= document["settings"].items()
    described = describe_family(tiny_folder)
    assert document["family"] == {"name": "tiny", "hash": described.hash_of("dalle2")}
    recipe = read_recipe("genpipe-out/0001-1.png")
    assert recipe["settings"] == document["settings"] and recipe["pipeline"] == "dalle2" and "image" not in recipe
    assert Image.open("genpipe-out/0001-1.png").size == (32, 32)
    small = json.loads(run(*command, "--no-upsample", "--json").out)
    assert small["settings"]["mode"] == "prior" and Image.open("genpipe-out/0002-1.png").size == (16, 16)
    assert small["family"]["hash"] == described.hash_of("dalle2", upsampled=False)


def test_both_pipelines_draw_the_same_prompts_side_by_side(run: Run, tiny_folder: Path) -> None:
    command = ["generate", "a cat", "two dogs", "--family", tiny_folder, "--pipeline", "both", "--candidates", 3]
    command += ["--keep", 2, "--top-k", 9, "--mode", "caption", "--guidance", 1.5]
    result = run(*command)
    assert result.code == 0 and result.err == ""
    assert "a cat  (dalle1)" in result.out and "a cat  (dalle2)" in result.out
    names = [f"000{number}-{what}.png" for number in (1, 2, 3, 4) for what in (1, 2, "grid")]
    names += ["0002-both.png", "0004-both.png"]
    assert sorted(path.name for path in Path("genpipe-out").iterdir()) == sorted(names)
    assert all(f"genpipe-out/{name}" in result.out for name in names)
    recipes = [read_recipe(f"genpipe-out/000{number}-1.png") for number in (1, 2, 3, 4)]
    assert [(recipe["prompt"], recipe["pipeline"]) for recipe in recipes] == [
        (prompt, pipeline) for prompt in ("a cat", "two dogs") for pipeline in ("dalle1", "dalle2")
    ]
    assert recipes[0]["settings"]["top_k"] == 9 and recipes[1]["settings"]["mode"] == "caption"
    assert recipes[0]["settings"]["guidance_scale"] == recipes[1]["settings"]["guidance_scale"] == 1.5
    beside = np.asarray(Image.open("genpipe-out/0002-both.png"))
    for column, (top, below) in enumerate(zip(*(
        [np.asarray(Image.open(f"genpipe-out/000{number}-{rank}.png")) for rank in (1, 2)] for number in (1, 2)
    ), strict=True)):  # fmt: skip
        left = 2 + column * 130
        assert np.array_equal(beside[2:130:8, left : left + 128 : 8], top)
        lower = beside.shape[0] - 2 - 15 - 128
        assert np.array_equal(beside[lower : lower + 128 : 4, left : left + 128 : 4], below)
    assert "0001-1.png, 0001-2.png, 0002-1.png" in refused(run("reproduce", "genpipe-out/0002-both.png"))

    document = json.loads(run(*command, "--json").out)
    assert [each["pipeline"] for each in document["pipelines"]] == ["dalle1", "dalle2"]
    assert [each["prompt"] for each in document["pipelines"][1]["results"]] == ["a cat", "two dogs"]
    assert [Path(each["path"]).name for each in document["side_by_side"]] == ["0006-both.png", "0008-both.png"]


def test_variations_of_a_picture(run: Run, tiny_folder: Path) -> None:
    original = picture(Path("given.png"), side=50)
    command = ["generate", "--family", tiny_folder, "--pipeline", "dalle2", "--candidates", 3, "--keep", 1]
    result = run(*command, "--image", original)
    assert result.code == 0 and "the given picture  (dalle2)" in result.out
    recipe = read_recipe("genpipe-out/0001-1.png")
    assert recipe["prompt"] == "" and recipe["settings"]["mode"] == "image" and len(recipe["image"]) == 64
    run(*command, "a cat", "--image", original)
    assert read_recipe("genpipe-out/0002-1.png")["prompt"] == "a cat"

    Image.open(original).save("given.bmp")  # the same pixels
    for number in (1, 2):
        again = run("reproduce", f"genpipe-out/000{number}-1.png", "--family", tiny_folder, "--image", "given.bmp")
        assert again.code == 0 and "identical" in again.out
    reproduce = ["reproduce", "genpipe-out/0001-1.png", "--family", tiny_folder]
    assert "give that one with --image" in refused(run(*reproduce))
    other = picture(Path("other.png"), side=50, colour=(1, 2, 3))
    assert "another one than that of --image" in refused(run(*reproduce, "--image", other))
    assert "belongs to dalle2 alone" in refused(run("generate", "a cat", "--family", tiny_folder, "--image", original))
    assert "missing.png" in refused(run(*command, "--image", "missing.png"))


@pytest.mark.parametrize("parts", [["dvae", "transformer"], ["decoder"]])
def test_generate_draws_with_what_the_family_has(run: Run, tmp_path: Path, parts: list[str]) -> None:
    every = all_tiny_parts()
    info = {**TINY_INFO, "defaults": {"dalle2": {"num_inference_steps": 1}}}
    save_family(tmp_path / "some", {part: every[part] for part in ["clip", *parts]}, info)
    result = run("generate", "a cat", "--family", tmp_path / "some", "--candidates", 1, "--json")
    present, absent = ("dalle1", "dalle2") if "dvae" in parts else ("dalle2", "dalle1")
    assert json.loads(result.out)["pipeline"] == present
    for pipeline in (absent, "both"):
        complaint = refused(run("generate", "a cat", "--family", tmp_path / "some", "--pipeline", pipeline))
        assert f"which {absent} needs; choose {present}" in complaint
    assert "no upsampler" in refused(run("generate", "a cat", "--family", tmp_path / "some", "--upsample"))


def test_a_prompt_is_never_a_path_and_strange_characters_still_draw(run: Run, tiny_folder: Path) -> None:
    result = run("generate", "../../x\x1b[2J\0 /etc/🦊", "--family", tiny_folder, "--candidates", 1, "--json")
    (drawn,) = json.loads(result.out)["results"]
    assert drawn["prompt"] == "../../x[2J /etc/🦊"
    assert sorted(path.name for path in Path.cwd().rglob("*")) == ["0001-1.png", "genpipe-out"]
    assert "warning: Control characters" in result.err and "'🦊'" in result.err
    assert result.err.count("\n") == 2


def test_a_prompt_of_10000_characters_is_cut_with_one_warning(run: Run, tiny_folder: Path) -> None:
    result = run("generate", "a cat on a red background " * 400, "--family", tiny_folder, "--candidates", 1)
    assert result.code == 0
    assert result.err.startswith("warning: The prompt has 10,399 characters") and result.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([""], "prompt is empty"),
        (["a cat", " \t "], "prompt is empty"),
        (["a cat", "--candidates", 3, "--keep", 4], "4 pictures cannot be kept of 3"),
        (["a cat", "--candidates", 0], "candidates must be a whole number of at least 1, got 0"),
        (["a cat", "--candidates", -5], "at least 1, got -5"),
        (["a cat", "--keep", 0], "at least 1, got 0"),
        (["a cat", "--seed", -1], "seed must be"),
        (["a cat", "--temperature", 0], "temperature must be"),
        (["a cat", "--top-k", 0], "Top-k must be"),
        (["a cat", "--top-p", 1.5], "Top-p must be"),
        (["a cat", "--guidance", "-1"], "guidance scale must be"),
        (["a cat", "--guidance", "nan"], "guidance scale must be"),
        (["a cat", "--guidance", "much"], "--guidance"),
        (["a cat", "--pipeline", "dalle9"], "choose from dalle1, dalle2, both"),
        (["a cat", "--pipeline", "dalle2", "--top-k", 3], "--top-k belongs to dalle1, not to dalle2"),
        (["a cat", "--steps", 3], "--steps belongs to dalle2, not to dalle1"),
        (["a cat", "--mode", "caption"], "--mode belongs to dalle2"),
        (["a cat", "--pipeline", "dalle2", "--mode", "magic"], "choose from prior, caption, text"),
        (["a cat", "--pipeline", "dalle2", "--mode", "image"], "needs a picture"),
        (["a cat", "--pipeline", "dalle2", "--steps", 0], "number of steps must be"),
        (["a cat", "--pipeline", "dalle2", "--steps", 5000], "from 1 to 1000"),
        (["a cat", "--pipeline", "dalle2", "--scheduler", "magic"], "no scheduler 'magic'; choose from ddpm, "),
        (["a cat", "--pipeline", "dalle2", "--prior-guidance", -1], "guidance scale must be"),
        (["a cat", "--pipeline", "both", "--image", "file"], "--image belongs to dalle2 alone"),
        (["a cat", "--pipeline", "dalle2", "--image", "file"], "'file'"),
        (["--pipeline", "dalle2"], "No prompt was given"),
        (["a cat", "--family", "nope"], "no family 'nope'"),
        (["a cat", "--device", "abacus"], "choose from auto, "),
        (["a cat", "--out", "file/below"], "'file/below' cannot be written"),
        (["a cat", "--sed", 3], "genpipe generate --help"),
        ([], "No prompt was given"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_written(
    run: Run, tiny_folder: Path, arguments: list[object], complaint: str
) -> None:
    Path("file").write_text("")
    result = run("generate", "--family", tiny_folder, *arguments)
    assert complaint in refused(result)
    assert [path.name for path in Path.cwd().iterdir()] == ["file"]


def test_a_damaged_family_leaves_no_folder_behind(run: Run, tiny_copy: Path) -> None:
    weights = tiny_copy / "dvae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "truncated" in refused(run("generate", "a cat", "--family", tiny_copy))
    assert list(Path.cwd().iterdir()) == []


def test_weights_that_are_not_numbers_end_in_one_line_that_names_stage_and_step(run: Run, tmp_path: Path) -> None:
    parts = all_tiny_parts()
    with torch.no_grad():
        parts["decoder"].unet.conv_out.bias.fill_(float("nan"))
    save_family(tmp_path / "broken", {part: parts[part] for part in ("clip", "decoder")}, {**TINY_INFO, "defaults": {}})
    result = run("generate", "a cat", "--family", tmp_path / "broken", "--steps", 3)
    assert result.code == 1 and result.out == "" and result.err.count("\n") == 1
    assert result.err.startswith("error: the decoder's output is not finite at step 1 of 3")
    assert list(Path.cwd().iterdir()) == []


def test_the_help_names_every_scheduler_and_mode(run: Run) -> None:
    shown = " ".join(run("generate", "--help").out.replace("│", " ").split())
    plain = DALLE2Sampling()
    assert {plain.scheduler, plain.prior_scheduler} <= set(SCHEDULERS)
    assert f"dalle2: {', '.join(list(SCHEDULERS)[:-1])} or {list(SCHEDULERS)[-1]}." in shown
    assert all(f"{mode}:" in shown or f"{mode};" in shown for mode in MODES)


@contextmanager
def ctrl_c_when_there(path: Path) -> Iterator[None]:
    """Sends this process SIGINT as soon as the file is there."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            if path.exists():
                os.kill(os.getpid(), signal.SIGINT)
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield
    over.set()
    thread.join()


@pytest.mark.parametrize("style", [[], ["--json"]])
def test_ctrl_c_keeps_and_names_what_was_finished(run: Run, tiny_folder: Path, style: list[str]) -> None:
    prompts = ["a cat"] * 500
    handler = signal.getsignal(signal.SIGINT)
    with ctrl_c_when_there(Path("genpipe-out/0002-2.png")):
        result = run("generate", *prompts, "--family", tiny_folder, "--candidates", 3, "--keep", 2, *style)
    assert result.code == 130 and signal.getsignal(signal.SIGINT) is handler
    assert result.err.startswith("interrupted: ")
    written = sorted(Path("genpipe-out").iterdir())
    assert 6 <= len(written) < 1500
    for path in written:
        assert read_recipe(path)["prompt"] == "a cat" and str(path) in result.out
        Image.open(path).load()
    if style:
        assert json.loads(result.out)["complete"] is False
