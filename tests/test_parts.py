"""Saving and loading parts: equality, atomic folders, checksums, and every refusal with the file's name in it."""

import json
import pickle
import struct

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from safetensors.torch import load_file, save_file
from torch import nn

from genpipe.clip.architecture import nano_architecture
from genpipe.clip.model import CLIP
from genpipe.errors import InputError
from genpipe.parts import load_part, save_part, sha256_of
from genpipe.tokenizer import CaptionTokenizer

WEIGHTS = "diffusion_pytorch_model.safetensors"


class Tiny(ModelMixin, ConfigMixin):
    """A part with everything that can go wrong: a buffer of integers, one that is not saved, an init that looks."""

    @register_to_config
    def __init__(self, width: int = 4, looks: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 3)
        self.register_buffer("steps", torch.arange(5))
        self.register_buffer("table", torch.linspace(0, 1, 7), persistent=False)
        if looks:
            self.first = float(torch.ones(1).item())


class Other(Tiny):
    """The same under another name."""


@pytest.fixture
def tiny() -> Tiny:
    torch.manual_seed(0)
    return Tiny()


@pytest.fixture
def folder(tiny, tmp_path):
    save_part(tiny, tmp_path / "part")
    return tmp_path / "part"


def rewrite_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def refusal(folder, cls=Tiny) -> str:
    with pytest.raises(InputError) as caught:
        load_part(cls, folder)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("looks", [False, True])
def test_there_and_back(tmp_path, looks):
    model = Tiny(width=6, looks=looks).train()
    save_part(model, tmp_path / "part")
    loaded = load_part(Tiny, tmp_path / "part")
    assert loaded.config["width"] == 6 and not loaded.training and model.training
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    assert torch.equal(loaded.table, model.table)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_saved_small_loaded_in_full(tiny, tmp_path, dtype):
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    save_part(tiny, tmp_path / "part", dtype)
    stored, loaded = load_file(tmp_path / "part" / WEIGHTS), load_part(Tiny, tmp_path / "part")
    assert stored["layer.weight"].dtype == dtype and stored["steps"].dtype == torch.int64
    assert torch.equal(loaded.layer.weight, before["layer.weight"].to(dtype).float())
    assert tiny.dtype == torch.float32 and all(torch.equal(before[k], v) for k, v in tiny.state_dict().items())
    assert load_part(Tiny, tmp_path / "part", dtype).layer.weight.dtype == dtype


def test_clip_with_its_tokenizer(tmp_path):
    tokenizer = CaptionTokenizer.train(["two tigers"] * 3, vocab_size=270)
    clip = CLIP(nano_architecture(tokenizer.vocab_size, width=48, vision_layers=1, text_layers=1))
    clip.tokenizer = tokenizer
    save_part(clip, tmp_path / "clip", torch.float16)
    loaded = load_part(CLIP, tmp_path / "clip")
    again = load_part(CLIP, tmp_path / "clip", torch.float32)
    assert torch.equal(loaded.encode_text(["two"]).embedding, again.encode_text(["two"]).embedding)
    (tmp_path / "clip" / "tokenizer.json").unlink()
    assert "tokenizer.json" in refusal(tmp_path / "clip", CLIP)


def test_folder_written_by_diffusers_alone(tiny, tmp_path):
    tiny.save_pretrained(tmp_path / "part")
    assert torch.equal(load_part(Tiny, tmp_path / "part").layer.weight, tiny.layer.weight)


def test_format_version_survives_diffusers(folder, tmp_path):
    Tiny.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["_genpipe_format"] == 1


# Writing --------------------------------------------------------------------------------------------------------------


def test_saving_replaces_the_old_part(folder, tmp_path):
    (folder / "stale.txt").write_text("of the old part")
    model = Tiny(width=9)
    save_part(model, folder)
    assert torch.equal(load_part(Tiny, folder).layer.weight, model.layer.weight)
    assert not (folder / "stale.txt").exists() and [path.name for path in tmp_path.iterdir()] == ["part"]


def test_a_failed_save_leaves_the_old_part(folder, tmp_path):
    class Breaks(Tiny):
        def save_pretrained(self, save_directory, **kwargs):
            super().save_pretrained(save_directory, **kwargs)
            raise OSError(28, "No space left on device")

    old = sha256_of(folder)
    with pytest.raises(InputError, match="No space left"):
        save_part(Breaks(), folder)
    assert sha256_of(folder) == old and [path.name for path in tmp_path.iterdir()] == ["part"]


def test_foreign_folders_and_files_are_not_overwritten(tiny, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    for name in ("home", "file"):
        with pytest.raises(InputError, match=f"{name} exists and is not"):
            save_part(tiny, tmp_path / name)
    with pytest.raises(InputError, match="cannot be written"):
        save_part(tiny, tmp_path / "file" / "below")
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years of work"


def test_weights_too_large_for_half(tiny, tmp_path):
    with torch.no_grad():
        tiny.layer.bias[0] = 1e6
    with pytest.raises(InputError, match="layer.bias is too large for torch.float16"):
        save_part(tiny, tmp_path / "part", torch.float16)
    assert not (tmp_path / "part").exists()


def test_checksum(tiny, folder, tmp_path):
    save_part(tiny, tmp_path / "twin")
    assert sha256_of(folder) == sha256_of(tmp_path / "twin") and len(sha256_of(folder)) == 64
    (tmp_path / "twin" / ".hidden").write_text("does not count")
    assert sha256_of(folder) == sha256_of(tmp_path / "twin")
    (tmp_path / "twin" / "config.json").rename(tmp_path / "twin" / "konfig.json")
    assert sha256_of(folder) != sha256_of(tmp_path / "twin")
    (tmp_path / "empty").write_bytes(b"")
    assert sha256_of(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    with pytest.raises(InputError, match="absent"):
        sha256_of(tmp_path / "absent")


# Refusals -------------------------------------------------------------------------------------------------------------


def test_missing_folder(tmp_path):
    assert str(tmp_path / "absent") in refusal(tmp_path / "absent")
    (tmp_path / ".absent.old-1234").mkdir()  # what a save leaves that is killed between its two renames
    assert ".absent.old-1234" in refusal(tmp_path / "absent")


def test_missing_config(folder):
    (folder / "config.json").unlink()
    assert "config.json cannot be read" in refusal(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00"])
def test_config_that_is_not_json(folder, content):
    (folder / "config.json").write_bytes(content)
    assert "config.json is not valid JSON" in refusal(folder)


def test_config_of_another_class(folder):
    assert "config.json describes a 'Tiny', expected was a 'Other'" in refusal(folder, Other)
    (folder / "config.json").write_text("[1]")
    assert "config.json describes a None" in refusal(folder)


@pytest.mark.parametrize("version", [2, 99])
def test_version_from_the_future(folder, version):
    rewrite_config(folder, _genpipe_format=version)
    text = refusal(folder)
    assert f"config.json has format version {version}" in text and "newer genpipe" in text


def test_version_that_is_none(folder):
    rewrite_config(folder, _genpipe_format="new")
    assert "config.json has the format version 'new'" in refusal(folder)


def test_config_with_unknown_entries(folder):
    rewrite_config(folder, depth=3)
    assert "config.json has entries that Tiny does not know: depth" in refusal(folder)


def test_config_that_cannot_be_built(folder):
    rewrite_config(folder, width="wide")
    assert "config.json does not describe a Tiny that can be built" in refusal(folder)


def test_missing_weights(folder):
    (folder / WEIGHTS).unlink()
    assert f"{WEIGHTS} is missing" in refusal(folder)


@pytest.mark.parametrize("length", [0x180, 0x4B50])
def test_a_header_as_long_as_a_pickle_or_a_zip_begins_is_read(folder, length):
    """The lowest bytes of its length are 0x80 or "PK"; spaces may follow the JSON."""
    content = (folder / WEIGHTS).read_bytes()
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}  # out of the file itself
    end = 8 + struct.unpack("<Q", content[:8])[0]
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", length) + content[8:end].ljust(length) + content[end:])
    loaded = load_part(Tiny, folder).state_dict()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.pt", "last.ckpt", "x.pth", "x.pkl"])
def test_pickled_weights_are_never_read(folder, tmp_path, name):
    class Touch:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(pickle.dumps(Touch()))
    assert f"{name} is a pickled file" in refusal(folder)
    (folder / name).rename(folder / WEIGHTS)
    assert f"{WEIGHTS} is a pickled file" in refusal(folder)
    torch.save({"a": Touch()}, folder / WEIGHTS)
    assert f"{WEIGHTS} is a pickled file" in refusal(folder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("kept", [0, 4, 8, 60, -1, -40])
def test_truncated_weights(folder, kept):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:kept])
    text = refusal(folder)
    assert WEIGHTS in text and "truncated" in text


def test_weights_with_a_tail(folder):
    with (folder / WEIGHTS).open("ab") as file:
        file.write(b"more")
    assert f"{WEIGHTS} is truncated or damaged" in refusal(folder)


@pytest.mark.parametrize(
    "header",
    [
        b"not json at all",
        b"[1, 2]",
        b'{"a": 3}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
    ],
)
def test_damaged_header(folder, header):
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header)
    assert f"{WEIGHTS} has a damaged table of contents" in refusal(folder)


def test_overlapping_tensors(folder):
    data = (folder / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header["layer.bias"]["data_offsets"] = [0, 12]
    fresh = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(fresh)) + fresh + data[8 + length :])
    assert WEIGHTS in refusal(folder)


def test_all_misfits_are_listed(folder):
    def change(tensors):
        tensors["layer.weight"] = tensors["layer.weight"].T.contiguous()
        tensors["steps"] = tensors["steps"].float()
        tensors["extra.one"] = torch.zeros(1)
        tensors["extra.two"] = torch.zeros(1)
        del tensors["layer.bias"]

    rewrite_weights(folder, change)
    text = refusal(folder)
    assert WEIGHTS in text
    for part in (
        "missing layer.bias",
        "unexpected extra.one",
        "unexpected extra.two",
        "mis-shaped layer.weight [4, 3] instead of [3, 4]",
        "mis-shaped steps [5] instead of [5], integer and floating point confused",
    ):
        assert part in text


INDEX = WEIGHTS + ".index.json"


@pytest.fixture
def in_files(tiny, tmp_path):
    save_part(tiny, tmp_path / "files", torch.float16, file_bytes=32)
    return tmp_path / "files"


def rewrite_index(folder, change):
    path = folder / INDEX
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def test_several_files_and_one_hold_the_same(tiny, in_files, tmp_path, capsys):
    files = sorted(in_files.glob("*.safetensors"))
    assert len(files) > 1 and not (in_files / WEIGHTS).exists()
    save_part(tiny, tmp_path / "one", torch.float16, file_bytes=10_000)
    assert not (tmp_path / "one" / INDEX).exists()
    first, second = load_part(Tiny, in_files).state_dict(), load_part(Tiny, tmp_path / "one").state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert capsys.readouterr().err == ""


def test_a_file_that_the_index_names_is_missing(in_files):
    gone = sorted(in_files.glob("*.safetensors"))[0]
    gone.unlink()
    assert f"{gone} is missing" in refusal(in_files)


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.pop("weight_map"),
        lambda index: index.update(weight_map=[1]),
        lambda index: index["weight_map"].update({"layer.bias": "../elsewhere.safetensors"}),
        lambda index: index["weight_map"].update({"layer.bias": 7}),
        lambda index: index["weight_map"].update({"layer.bias": "weights.bin"}),
    ],
)
def test_a_damaged_index(in_files, change):
    rewrite_index(in_files, change)
    assert INDEX in refusal(in_files)


def test_an_index_that_does_not_tell_the_truth(in_files):
    def swap(index):
        places = index["weight_map"]
        first, *others = places
        second = next(name for name in others if places[name] != places[first])
        places[first], places[second] = places[second], places[first]

    rewrite_index(in_files, swap)
    assert "does not list what is in" in refusal(in_files)


def test_a_truncated_file_among_several(in_files):
    file = sorted(in_files.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-1])
    assert str(file) in refusal(in_files)
