"""Which of several published weight files counts, and reading of strangers' JSON: one order for all who ask."""

from pathlib import Path

import huggingface_hub
import pytest
import torch
from karlo_files import write_folder
from published_files import write_image_encoder, write_json
from safetensors.torch import load_file, save_file
from test_published_clip import TINY, original, write_hugging_face

from genpipe.errors import InputError
from genpipe.json_files import JSON_LIMIT, peek_json, read_json
from genpipe.published import clip_family, karlo
from genpipe.published.clip import read_clip
from genpipe.published.clip_hub import fetch_clip
from genpipe.published.containers import find_weights
from genpipe.published.weight_names import (
    HUGGING_FACE_STEMS,
    OPEN_CLIP_STEMS,
    clip_stems,
    clip_type,
    in_order,
    weights_file,
    weights_files,
)


def both_kinds(folder: Path) -> None:
    """Makes model.safetensors a model.fp16.safetensors beside pytorch_model.bin, which holds zeros instead."""
    tensors = load_file(folder / "model.safetensors")
    torch.save({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")


def test_the_file_that_is_read_is_the_one_that_is_hashed(tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    model = original()
    write_hugging_face(tmp_path / "clip", model)
    both_kinds(tmp_path / "clip")
    assert clip_family.recognises(tmp_path / "clip") and clip_family.missing(tmp_path / "clip") == []
    published = clip_family.read(tmp_path / "clip")
    assert [path.name for path in published.files] == ["config.json", "model.fp16.safetensors"]
    for clip in (published.parts["clip"](), read_clip(tmp_path / "clip")):
        assert torch.equal(clip.towers.text_projection, model.text_projection)

    folder = write_folder(tmp_path / "karlo-v1-alpha")
    both_kinds(folder / "text_encoder")
    prior = folder / "prior"
    (prior / "diffusion_pytorch_model.safetensors").rename(prior / "diffusion_pytorch_model.fp16.safetensors")
    (prior / "diffusion_pytorch_model.bin").write_bytes(b"no weights")
    assert karlo.missing(folder) == []
    published = karlo.read(folder)
    names = {f"{path.parent.name}/{path.name}" for path in published.files}
    assert {"text_encoder/model.fp16.safetensors", "prior/diffusion_pytorch_model.fp16.safetensors"} <= names
    assert not any(name.endswith(".bin") for name in names)
    published.parts["prior"]()
    assert published.parts["clip"]().towers.text_projection.any()


@pytest.mark.parametrize("stems", [HUGGING_FACE_STEMS, OPEN_CLIP_STEMS])
def test_all_look_in_the_same_order(tmp_path: Path, stems: tuple[str, ...]) -> None:
    names = list(in_order(stems))
    assert len(set(names)) == 4 * len(stems) and names[0] == f"{stems[0]}.safetensors"
    assert [name.endswith((".bin", ".bin.index.json")) for name in names] == sorted([False, True] * (2 * len(stems)))
    assert weights_file(tmp_path, stems) is None and weights_files(tmp_path, stems) == []
    for name in reversed(names):  # each new one goes before those that are there
        write_json(tmp_path / name, {})
        assert find_weights(tmp_path, *stems) == weights_file(tmp_path, stems) == tmp_path / name
        assert weights_files(tmp_path, stems) == [tmp_path / name]


def test_an_index_and_the_files_that_it_names(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    write_json(index, {"weight_map": {"a": "2.safetensors", "b": "1.safetensors", "c": "../3.safetensors", "d": ""}})
    for name in ("1.safetensors", "2.safetensors"):
        (tmp_path / name).touch()
    found = [index, tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    assert weights_files(tmp_path, HUGGING_FACE_STEMS) == found
    write_json(index, {"weight_map": ["1.safetensors"]})
    assert weights_files(tmp_path, HUGGING_FACE_STEMS) == [index]
    index.write_text("[")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        weights_files(tmp_path, HUGGING_FACE_STEMS)


def test_a_folder_of_two_descriptions(tmp_path: Path) -> None:
    """open_clip's file is read unless Hugging Face's alone is safetensors."""
    model, other = original(), original(1)
    write_hugging_face(tmp_path, other)
    write_json(tmp_path / "open_clip_config.json", {"model_cfg": {**TINY, "quick_gelu": True}, "preprocess_cfg": {}})
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    assert clip_stems(tmp_path) == (*OPEN_CLIP_STEMS, *HUGGING_FACE_STEMS)
    assert torch.equal(read_clip(tmp_path).towers.text_projection, other.text_projection)
    assert (tmp_path / "model.safetensors") in clip_family.read(tmp_path).files
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    assert torch.equal(read_clip(tmp_path).towers.text_projection, model.text_projection)
    assert (tmp_path / "open_clip_pytorch_model.bin") in clip_family.read(tmp_path).files
    (tmp_path / "config.json").unlink()
    assert clip_stems(tmp_path) == OPEN_CLIP_STEMS


def test_a_clip_of_the_hub_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the Hub's client has it in its cache, without a network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("clip", "other"):
        place = tmp_path / f"models--some--{name}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text("0" * 40)
        (place / "snapshots" / ("0" * 40)).mkdir(parents=True)
    folder, other = (tmp_path / f"models--some--{name}" / "snapshots" / ("0" * 40) for name in ("clip", "other"))
    model = original()
    tensors = write_hugging_face(folder, model)
    (folder / "model.safetensors").unlink()
    places = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(tensors)}
    for file in set(places.values()):
        save_file({name: tensor for name, tensor in tensors.items() if places[name] == file}, folder / file)
    write_json(folder / "model.safetensors.index.json", {"weight_map": places})
    assert fetch_clip("some/clip") == folder
    assert torch.equal(read_clip(folder).towers.text_projection, model.text_projection)
    files = {path.name for path in clip_family.read(folder).files}
    assert files == {"config.json", "model.safetensors.index.json", "model-0.safetensors", "model-1.safetensors"}
    write_json(other / "config.json", {"model_type": "bert"})
    assert fetch_clip("some/other") is None


def test_types_of_clip(tmp_path: Path) -> None:
    assert clip_type(tmp_path) is None and clip_stems(tmp_path) == ()
    write_image_encoder(tmp_path / "image", 16, 8, side=16, patch=8)
    assert clip_type(tmp_path / "image") == "clip_vision_model" and clip_stems(tmp_path / "image") == HUGGING_FACE_STEMS
    for odd in ({"model_type": ["clip"]}, {"model_type": "bert"}, {}, ["clip"]):
        write_json(tmp_path / "config.json", odd)
        assert clip_type(tmp_path) is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "cannot be read as JSON .*get the folder again"),
        (b"\xff\xfe", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b"[1]", "is no config: it holds a list; get the folder again"),
        (b" " * (JSON_LIMIT + 1), "is larger than 10,000,000 bytes"),
    ],
)
def test_what_is_no_json_object(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"config.json {said}"):
        read_json(path)
    assert peek_json(path) == {}


def test_what_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(InputError, match="cannot be read"):
            read_json(path)
        assert peek_json(path) == {}
    assert peek_json(Path("a\0b")) == {}
    write_json(tmp_path / "a.json", {"b": 1})
    assert read_json(tmp_path / "a.json") == peek_json(tmp_path / "a.json") == {"b": 1}
