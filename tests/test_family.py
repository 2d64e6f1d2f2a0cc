"""Families: found by name, folder and Hub id; checked, strictly, before use; saved whole or not at all."""

import json
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_INFO, all_tiny_parts, tiny_parts

from genpipe.errors import InputError
from pipelines.family import Family, describe_family, load_family, load_part_of, save_family, shipped_families
from pipelines.report import as_text, describe

PARTS = ("clip", "dvae", "transformer", "prior", "decoder", "upsampler")
WEIGHTS = "diffusion_pytorch_model.safetensors"


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_saved_family_comes_back_with_one_clip(tiny_family: Family) -> None:
    assert (tiny_family.name, tiny_family.words) == ("tiny", TINY_INFO["words"])
    assert tiny_family.dalle1.clip is tiny_family.clip
    assert tiny_family.dalle2.clip is tiny_family.clip
    assert tiny_family.dalle1.upsampler is tiny_family.dalle2.upsampler is not None
    assert tiny_family.pipeline("dalle1") is tiny_family.dalle1 and tiny_family.pipeline("dalle2") is tiny_family.dalle2
    loaded = {**tiny_family.dalle1.components, **tiny_family.dalle2.components}
    for name, original in all_tiny_parts().items():
        part = loaded[name]
        assert not part.training
        for key, value in original.state_dict().items():
            assert torch.equal(part.state_dict()[key], value.half().float()), (name, key)
    assert load_family(tiny_family.folder, dtype=torch.float16).clip.dtype == torch.float16
    with pytest.raises(InputError, match="no pipeline 'dalle9'"):
        tiny_family.pipeline("dalle9")


@pytest.mark.parametrize(
    ("parts", "pipelines"),
    [
        (["dvae", "transformer"], ["dalle1"]),
        (["dvae", "transformer", "upsampler", "prior"], ["dalle1"]),
        (["decoder"], ["dalle2"]),
        (["decoder", "prior", "upsampler"], ["dalle2"]),
    ],
)
def test_a_family_may_have_one_pipeline_alone(tmp_path: Path, parts: list[str], pipelines: list[str]) -> None:
    every = all_tiny_parts()
    save_family(tmp_path / "some", {part: every[part] for part in ["clip", *parts]}, {**TINY_INFO, "defaults": {}})
    family = load_family(tmp_path / "some")
    assert family.pipelines == pipelines and set(family.parts) == {"clip", *parts}
    (absent,) = {"dalle1", "dalle2"} - set(pipelines)
    assert getattr(family, absent) is None and getattr(family, pipelines[0]).clip is family.clip
    assert (family.pipeline(pipelines[0]).upsampler is None) == ("upsampler" not in parts)
    with pytest.raises(InputError, match=f"no {'dvae and no transformer' if absent == 'dalle1' else 'decoder'}"):
        family.pipeline(absent)


def test_only_the_pipelines_that_are_asked_for_are_loaded(tiny_copy: Path) -> None:
    truncate(tiny_copy)  # the dVAE
    family = load_family(tiny_copy, pipelines=["dalle2"])
    assert family.dalle1 is None and family.dalle2.clip is family.clip
    with pytest.raises(InputError, match="loaded without dalle1"):
        family.pipeline("dalle1")


@pytest.mark.parametrize("strange", ["decoder", "prior"])
def test_parts_that_were_trained_beside_another_clip_are_refused(tmp_path: Path, strange: str) -> None:
    parts = {**all_tiny_parts(), strange: all_tiny_parts(seed=1)[strange]}
    save_family(tmp_path / "mixed", parts, TINY_INFO)
    with pytest.raises(InputError, match=f"The {strange} was trained beside another CLIP"):
        load_family(tmp_path / "mixed")
    assert load_family(tmp_path / "mixed", pipelines=["dalle1"]).dalle1 is not None


def test_a_family_of_the_first_format_still_loads(tmp_path: Path) -> None:
    save_family(tmp_path / "old", tiny_parts(), {**TINY_INFO, "defaults": {}})
    old = {"genpipe_format": 1, "defaults": {"guidance_scale": 2.5, "top_p": 0.9}}
    rewrite(tmp_path / "old" / "family.json", lambda info: info.update(old))
    family = load_family(tmp_path / "old")
    assert family.defaults == {"dalle1": old["defaults"]}
    assert family.dalle1.resolve_sampling().guidance_scale == 2.5


def test_the_hash_follows_the_weights_and_nothing_else(tiny_folder: Path, tiny_copy: Path, tmp_path: Path) -> None:
    rewrite(tiny_copy / "family.json", lambda info: info.update(description="the same weights", name="twin"))
    original, renamed = describe_family(tiny_folder), describe_family(tiny_copy)
    assert renamed.name == "twin"
    for pipeline in ("dalle1", "dalle2"):
        assert renamed.hash_of(pipeline) == original.hash_of(pipeline)
    rewrite(tiny_copy / "family.json", lambda info: info["parts"]["upsampler"].update(sha256="0" * 64))
    other = describe_family(tiny_copy)
    for pipeline in ("dalle1", "dalle2"):
        assert other.hash_of(pipeline) != original.hash_of(pipeline)
        assert other.hash_of(pipeline, upsampled=False) == original.hash_of(pipeline, upsampled=False)
    rewrite(tiny_copy / "family.json", lambda info: info["parts"]["prior"].update(sha256="0" * 64))
    assert describe_family(tiny_copy).hash_of("dalle1") == other.hash_of("dalle1")
    assert describe_family(tiny_copy).hash_of("dalle2") != other.hash_of("dalle2")
    save_family(tmp_path / "other", tiny_parts(seed=1), {**TINY_INFO, "defaults": {}})
    no_upsampler = describe_family(tmp_path / "other")
    assert no_upsampler.hash_of("dalle1") == no_upsampler.hash_of("dalle1", upsampled=False)
    assert no_upsampler.hash_of("dalle1") != original.hash_of("dalle1", upsampled=False)


def test_describing_a_family_reads_no_weights(tiny_folder: Path) -> None:
    report = describe([describe_family(tiny_folder)])
    (family,) = report["families"]
    counted = sum(parameter.numel() for parameter in tiny_parts()["transformer"].parameters())
    assert family["parts"]["transformer"]["parameters"] == counted
    assert family["parts"]["dvae"]["stored_as"] == ["F16"]
    assert family["bytes"] > sum((tiny_folder / part / WEIGHTS).stat().st_size for part in PARTS)
    assert report["devices"][-1] == "cpu" and report["versions"]["torch"] == torch.__version__.partition("+")[0]
    text = as_text(report)
    assert "family tiny" in text and f"{counted:,} parameters" in text and "Apache-2.0" in text
    assert family["hashes"].keys() == {"dalle1", "dalle2"} and "num_inference_steps 2" in text and "Decoder, " in text


@pytest.mark.parametrize("name", ["nope", "", "no/such/folder", "\0", "x" * 5000, "a b"])
def test_an_unknown_family_is_refused_and_the_shipped_ones_are_listed(name: str) -> None:
    with pytest.raises(InputError) as caught:
        load_family(name)
    assert all(shipped in str(caught.value) for shipped in shipped_families())
    assert len(str(caught.value)) < 400


def test_a_hub_that_cannot_be_reached_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Nothing listens on this port, and the empty cache holds no earlier download.
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    started = time.monotonic()
    with pytest.raises(InputError, match="not on this disk; fetch it with `genpipe import somebody/some-family "):
        load_family("somebody/some-family")  # nobody asked for a download
    with pytest.raises(InputError, match="could not be fetched from the Hub"):
        load_family("somebody/some-family", download=True)
    assert time.monotonic() - started < 20


def damaged_info(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder / "family.json", lambda info: info.update(changes))


def damaged_part(part: str, **changes: Any) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder / part / "config.json", lambda config: config.update(changes))


def truncate(folder: Path) -> None:
    weights = folder / "dvae" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-10])


def pickle_instead(folder: Path) -> None:
    (folder / "clip" / WEIGHTS).unlink()
    torch.save({}, folder / "clip" / "diffusion_pytorch_model.bin")


def pickle_in_disguise(folder: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, folder / "clip" / WEIGHTS)


def swap_two_weights(folder: Path) -> None:
    """A file that is sound in itself: other values of the right shapes."""
    path = folder / "transformer" / WEIGHTS
    content = bytearray(path.read_bytes())
    (start,) = struct.unpack("<Q", content[:8])
    content[8 + start], content[8 + start + 2] = content[8 + start + 2] ^ 1, content[8 + start]
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda folder: shutil.rmtree(folder / "dvae"), "dvae"),
        (lambda folder: (folder / "clip" / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "clip" / "tokenizer.json").unlink(), "tokenizer.json"),
        (lambda folder: (folder / "transformer" / WEIGHTS).unlink(), "safetensors"),
        (lambda folder: (folder / "transformer" / WEIGHTS).write_bytes(b""), "safetensors"),
        (truncate, "truncated"),
        (pickle_instead, "pickle"),
        (pickle_in_disguise, "pickle"),
        (swap_two_weights, "part 'transformer' .* checksum"),
        (damaged_part("dvae", num_codes=32), "mis-shaped"),
        (damaged_part("transformer", num_layers=3), "missing blocks.2"),
        (damaged_part("transformer", num_layers=1), "unexpected blocks.1"),
        (damaged_part("clip", _class_name="DVAE"), "CLIP"),
        (damaged_part("clip", _genpipe_format=99), "newer genpipe"),
        (damaged_info(genpipe_format=99), "newer genpipe"),
        (damaged_info(genpipe_format="1"), "format version"),
        (damaged_info(genpipe_format=True), "format version"),
        (damaged_info(parts={}), "no parts that make a pipeline"),
        (damaged_info(parts={"clip": {"class": "CLIP", "sha256": "0" * 64}}), "no parts that make a pipeline"),
        (damaged_info(parts=[1]), "no parts"),
        (damaged_info(parts={part: {"class": "CLIP", "sha256": "0" * 64} for part in PARTS}), "class DVAE"),
        (damaged_info(name="../../etc"), "name"),
        (damaged_info(name=7), "name"),
        (damaged_info(words="cat"), "words"),
        (damaged_info(words=[1]), "words"),
        (damaged_info(defaults={"guidance_scale": "much"}), "defaults"),
        (damaged_info(defaults={"prompt": "a cat"}), "defaults"),
        (damaged_info(defaults=[]), "defaults"),
        (damaged_info(defaults={"dalle2": {"top_k": 3}}), "defaults .* no setting 'top_k'"),
        (damaged_info(defaults={"dalle2": {"scheduler": "magic"}}), "defaults .* no scheduler 'magic'"),
        (damaged_info(defaults={"dalle2": 7}), "defaults"),
        (lambda folder: (folder / "family.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "family.json").write_bytes(b"\xff\xfe"), "not valid JSON"),
        (lambda folder: (folder / "family.json").write_text("[" * 100_000), "not valid JSON"),
        (lambda folder: (folder / "family.json").write_text("[]"), "not a JSON object"),
        (lambda folder: (folder / "family.json").unlink(), "no family.json"),
    ],
)
def test_a_damaged_family_is_refused_in_one_sentence(
    tiny_copy: Path, damage: Callable[[Path], None], complaint: str
) -> None:
    damage(tiny_copy)
    with pytest.raises(InputError, match=complaint) as caught:
        load_family(tiny_copy)
    assert "\n" not in str(caught.value)


def test_only_the_part_that_is_asked_for_is_read(tiny_copy: Path) -> None:
    truncate(tiny_copy)
    clip = load_part_of(describe_family(tiny_copy), "clip")
    assert clip.encode_text(["a cat"]).embedding.shape == (1, clip.embedding_dim)


def test_saving_is_whole_or_not_at_all(tiny_copy: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in tiny_copy.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="exists already"):
        save_family(tiny_copy, tiny_parts(1), TINY_INFO)
    with pytest.raises(InputError, match="no name"):
        save_family(tiny_copy, tiny_parts(1), {**TINY_INFO, "name": "a/b"}, replace=True)
    with pytest.raises(InputError, match="needs the parts of a pipeline .*dalle2: decoder.*, got clip"):
        save_family(tmp_path / "half", {"clip": tiny_parts()["clip"]}, TINY_INFO)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        save_family(tmp_path / "file" / "below", tiny_parts(), TINY_INFO)
    assert {path: path.read_bytes() for path in tiny_copy.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged", "file"]

    old = describe_family(tiny_copy).hash_of("dalle1")
    save_family(tiny_copy, tiny_parts(1), TINY_INFO, replace=True)
    assert load_family(tiny_copy).hash_of("dalle1") != old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged", "file"]
