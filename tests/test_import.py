"""Published weights as families: converted once, whole or not at all; loaded as they are; what a folder holds."""

import gc
import json
import os
import shutil
import signal
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import all_tiny_parts
from karlo_files import write_folder, write_variations
from safetensors.torch import load_file

from genpipe.errors import InputError
from genpipe.parts import load_part, save_part
from pipelines import importing
from pipelines.cli import main
from pipelines.family import describe_family, load_family, load_part_of
from pipelines.folder_info import describe_folder
from pipelines.importing import import_family
from pipelines.published_source import published_source

Run = Callable[..., tuple[int, str, str]]
PARTS = ["clip", "prior", "decoder", "upsampler"]


@pytest.fixture(scope="module")
def karlo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Karlo for texts, in diffusers' folder, and a licence beside it."""
    folder = write_folder(tmp_path_factory.mktemp("published") / "karlo")
    (folder / "LICENSE").write_text("the licence as it was published")
    return folder


@pytest.fixture(scope="module")
def variations(karlo: Path) -> Path:
    """The same for variations of pictures, pickled."""
    return write_variations(karlo, karlo.parent / "variations")


@pytest.fixture(scope="module")
def imported(karlo: Path) -> Path:
    """The first one converted; no test may change it."""
    out = karlo.parent / "imported"
    import_family(str(karlo), out)
    return out


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A command in an empty working folder: exit code, standard output, standard error."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def command(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        told = capsys.readouterr()
        return int(end.value.code or 0), told.out, told.err

    return command


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.parent.name} {name}": tensor
        for file in folder.glob("*/*.safetensors")
        for name, tensor in load_file(file).items()
    }


def test_the_command_converts_once_and_everything_else_takes_the_folder(run: Run, karlo: Path) -> None:
    code, out, err = run("import", karlo, "mine")
    assert code == 0 and err == "" and out.startswith("mine: karlo-v1-alpha (clip, prior, decoder, upsampler)")
    assert "CreativeML Open RAIL-M: commercial use is allowed" in out
    for folder in ("mine", karlo):
        code, out, _ = run("generate", "a cat", "--family", folder, "--candidates", 2, "--steps", 2, "--json")
        document = json.loads(out)
        assert code == 0 and document["pipeline"] == "dalle2" and not document["ranked"]
        assert document["settings"]["prior_scheduler"] == "unclip" and document["settings"]["upsampler_steps"] == 7
    pixels = [Path(f"genpipe-out/000{number}-1.png").read_bytes() for number in (1, 2)]
    assert len(set(pixels)) == 2  # the recipes differ,
    code, out, _ = run("reproduce", "genpipe-out/0001-1.png", "--family", "mine", "--out", "again.png")
    assert code == 0 and "identical" in out  # the pictures do not:
    from PIL import Image

    first, second = (Image.open(f"genpipe-out/000{number}-1.png").tobytes() for number in (1, 2))
    assert first == second == Image.open("again.png").tobytes()
    code, _, err = run("import", karlo, "mine")
    assert code == 2 and "'mine' exists already" in err


def test_what_a_converted_family_says_of_itself(karlo: Path, imported: Path) -> None:
    described = describe_family(imported)
    assert described.parts == PARTS and described.pipelines == ["dalle2"] and described.source is None
    info = described.info
    assert info["license"] == "CreativeML Open RAIL-M" and info["license_url"].startswith("https://")
    assert "use restrictions" in info["conditions"] and info["source"]["family"] == "karlo"
    assert info["source"]["files"]["prior/diffusion_pytorch_model.safetensors"] > 10_000
    source = published_source(karlo)
    assert source is not None and info["source"]["sha256"] == source.sha256 and len(source.sha256) == 64
    assert (imported / "LICENSE").read_text() == "the licence as it was published"
    assert "attachment A" in (imported / "LICENSE.md").read_text()
    card = (imported / "README.md").read_text()
    assert info["source"]["sha256"] in card and "Open RAIL-M" in card and "not ranked" in card
    told = "".join(file.read_text() for file in imported.iterdir() if file.is_file())
    assert str(karlo.parent) not in told  # no path of this machine
    assert {tensor.dtype for tensor in tensors_of(imported).values()} == {torch.float32}
    files = [path for path in imported.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors", ".md", ""}


def test_the_source_hash_follows_the_files_and_not_their_place(karlo: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(karlo, tmp_path / "elsewhere"))
    sources = [published_source(each) for each in (karlo, moved)]
    assert sources[0].sha256 == sources[1].sha256
    weights = moved / "prior" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    assert published_source(moved).sha256 != sources[0].sha256


def test_published_weights_load_as_they_are(karlo: Path, imported: Path, variations: Path) -> None:
    family, converted = load_family(karlo), load_family(imported)
    assert family.pipelines == ["dalle2"] and family.source is not None and family.name == "karlo-v1-alpha"
    assert len(family.hash_of("dalle2")) == 12 and family.hash_of("dalle2") != converted.hash_of("dalle2")
    for name, part in converted.dalle2.components.items():
        if part is not None:
            theirs = family.dalle2.components[name].state_dict()
            assert all(torch.equal(value, theirs[key]) for key, value in part.state_dict().items())
    assert load_family(karlo, dtype=torch.bfloat16).dalle2.decoder.dtype == torch.bfloat16
    both = load_family(karlo, clip=variations / "image_encoder")
    assert both.dalle2.ranks and not family.dalle2.ranks
    with pytest.raises(InputError, match="no upsampler|has no dvae"):
        load_part_of(describe_family(karlo), "dvae")


def test_weights_are_stored_as_asked_in_files_that_are_not_too_large(
    karlo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importing, "FILE_BYTES", 100_000)
    done = import_family(str(karlo), tmp_path / "half", dtype="bfloat16")
    tensors = tensors_of(tmp_path / "half")
    assert {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()} == {torch.bfloat16}
    assert done["source"]["stored_as"] == "bfloat16" and done["bytes"] < 0.6 * sum(done["source"]["files"].values())
    assert len(list((tmp_path / "half" / "decoder").glob("*.safetensors"))) > 1
    part = load_part_of(describe_family(tmp_path / "half"), "decoder")
    assert part.dtype == torch.float32


def test_a_clip_is_put_beside_it(run: Run, karlo: Path, variations: Path) -> None:
    code, out, err = run("import", karlo, "ranked", "--clip", variations / "image_encoder", "--json")
    assert code == 0 and err == "" and json.loads(out)["pipelines"] == ["dalle2"]
    family = load_family("ranked")
    assert family.clip.has_image and family.clip.has_text and family.dalle2.ranks
    code, out, _ = run("generate", "a cat", "--family", "ranked", "--candidates", 2, "--keep", 1, "--steps", 1)
    assert code == 0 and "score" in out


def test_one_part_is_in_memory_at_a_time_and_each_is_built_once(
    karlo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Any]] = []
    most: list[int] = []
    built = importing._built

    def watched(*arguments: Any) -> Any:
        gc.collect()
        most.append(sum(each() is not None for each in alive))
        model = built(*arguments)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(importing, "_built", watched)
    import_family(str(karlo), tmp_path / "out")
    assert most == [0, 0, 0, 0]  # the ones before are gone when the next is asked for


def damaged(karlo: Path, tmp_path: Path) -> Path:
    """The last part that is read has a transposed matrix."""
    copy = Path(shutil.copytree(karlo, tmp_path / "damaged"))
    path = copy / "super_res_last" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return copy


def test_what_cannot_be_finished_leaves_nothing(run: Run, karlo: Path, tmp_path: Path) -> None:
    source = damaged(karlo, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for arguments, complaint in [
        ((source, "out"), "diffusion_pytorch_model.safetensors"),
        ((source / "nothing", "out"), "no folder, no Hub id"),
        ((karlo, "out", "--dtype", "int8"), "no type 'int8'"),
        ((karlo, "out", "--clip", karlo / "prior"), "has no weights"),
        ((karlo, karlo, "--replace"), "is no family's folder and is not replaced"),
        ((tmp_path, "out"), "no published weights that genpipe knows"),
    ]:
        code, out, err = run("import", *arguments)
        assert (code, out) == (2, "") and err.count("\n") == 1 and complaint in err, (arguments, err)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_existing_family_stays_until_the_new_one_is_whole(karlo: Path, tmp_path: Path, imported: Path) -> None:
    mine = Path(shutil.copytree(imported, tmp_path / "mine"))
    before = {path: path.read_bytes() for path in mine.rglob("*") if path.is_file()}
    with pytest.raises(InputError):
        import_family(str(damaged(karlo, tmp_path)), mine, replace=True)
    assert {path: path.read_bytes() for path in mine.rglob("*") if path.is_file()} == before
    import_family(str(karlo), mine, dtype="float16", replace=True)
    assert describe_family(mine).info["source"]["stored_as"] == "float16"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged", "mine"]


def test_ctrl_c_leaves_nothing(run: Run, karlo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_and_press(model: Any, folder: Path, *settings: Any) -> None:
        save_part(model, folder, *settings)
        if folder.name == "decoder":
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("genpipe.parts.save_part", save_and_press)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests started in the background ignore it
    try:
        code, out, err = run("import", karlo, "out")
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 130 and out == "" and err.startswith("interrupted")
    assert list(Path.cwd().iterdir()) == []


def test_a_full_disk_leaves_nothing(karlo: Path, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(InputError, match="cannot be written"):
            import_family(str(karlo), tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_a_family_of_our_own_is_taken_over(tiny_folder: Path, tmp_path: Path) -> None:
    import_family(str(tiny_folder), tmp_path / "copy")
    ours, copy = describe_family(tiny_folder), describe_family(tmp_path / "copy")
    assert copy.hash_of("dalle1") == ours.hash_of("dalle1") and copy.words == ours.words
    with pytest.raises(InputError, match="a CLIP of its own cannot be exchanged"):
        import_family(str(tiny_folder), tmp_path / "other", clip=tiny_folder / "clip")


# info -----------------------------------------------------------------------------------------------------------------


def test_info_says_what_a_folder_holds(run: Run, karlo: Path, imported: Path, tiny_folder: Path) -> None:
    code, out, err = run("info", karlo)
    assert code == 0 and err == "" and "published weights karlo-v1-alpha" in out and "genpipe import" in out
    assert "Open RAIL-M" in out and "complete     yes" in out
    (found,) = json.loads(run("info", karlo, "--json")[1])["found"]
    assert found["kind"] == "published weights" and found["family"] == "karlo" and found["parts"] == PARTS
    assert found["complete"] and found["bytes"] == sum(found["files"].values())
    (family,) = json.loads(run("info", imported, "--json")[1])["families"]
    assert family["complete"] and family["missing"] == [] and "use restrictions" in family["conditions"]
    (part,) = json.loads(run("info", imported / "decoder", "--json")[1])["found"]
    assert (part["kind"], part["part"], part["class"], part["complete"]) == ("part", "decoder", "Decoder", True)
    assert part["parameters"] == sum(each.numel() for each in load_family(imported).dalle2.decoder.parameters())


def test_info_says_what_is_missing(run: Run, karlo: Path, tiny_copy: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(karlo, tmp_path / "copy"))
    (copy / "prior" / "diffusion_pytorch_model.safetensors").unlink()
    (copy / "decoder_scheduler" / "scheduler_config.json").unlink()
    found = describe_folder(copy)
    assert not found["complete"] and found["missing"] == [
        "prior/diffusion_pytorch_model.safetensors", "decoder_scheduler/scheduler_config.json",
    ]  # fmt: skip
    code, out, _ = run("info", copy)
    assert code == 0 and "complete     no: prior/diffusion_pytorch_model.safetensors" in out
    (tiny_copy / "dvae" / "diffusion_pytorch_model.safetensors").write_bytes(b"short")
    shutil.rmtree(tiny_copy / "prior")
    (family,) = json.loads(run("info", tiny_copy, "--json")[1])["families"]
    assert not family["complete"] and len(family["missing"]) == 2 and "prior/config.json" in family["missing"]


def test_info_knows_runs_and_clips_and_refuses_the_rest(run: Run, variations: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "decoder"
    save_part(all_tiny_parts()["decoder"], folder / "decoder")
    (folder / "checkpoints" / "step-00000040").mkdir(parents=True)
    recipe = {"name": "decoder", "stage": "decoder", "run": {"steps": 50}}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    found = describe_folder(folder)
    assert (found["kind"], found["steps_done"], found["steps"], found["complete"]) == ("training run", 40, 50, False)
    assert found["parts"] == ["decoder"] and "no: it has not ended" in run("info", folder)[1]
    clip = describe_folder(variations / "image_encoder")
    assert (clip["kind"], clip["family"], clip["parts"]) == ("published weights", "clip_family", ["clip"])
    code, out, err = run("info", tmp_path)
    assert code == 2 and out == "" and "no family, no published weights that genpipe knows, no part" in err


def test_info_reads_no_weights(karlo: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(karlo, tmp_path / "copy"))
    large = copy / "text_encoder" / "model.safetensors"
    os.truncate(large, 500 << 30)  # sparse; reading it would take minutes
    started = time.monotonic()
    assert describe_folder(copy)["bytes"] > 500 << 30
    assert time.monotonic() - started < 5


def test_a_part_that_was_imported_trains_on_as_any_other(imported: Path) -> None:
    from genpipe.dalle2.decoder import Decoder

    decoder = load_part(Decoder, imported / "decoder")
    assert all(parameter.requires_grad for parameter in decoder.parameters())
