"""Reading every container of published weights: values bit for bit, and refusals that run and write nothing."""

import hashlib
import io
import json
import pickle
import struct
import tarfile
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from published_files import MemoryPeak, write_sparse
from safetensors.torch import load_file, save_file
from torch import nn

from genpipe.errors import InputError
from genpipe.published import fitting
from genpipe.published.containers import checksum, find_weights, is_torch_script, open_tar, read_tensors, table_of

TORCH_CLASSES = [
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.linear.Linear",
    "torch.nn.modules.batchnorm.BatchNorm2d",
    "torch.nn.modules.activation.ReLU",
]
TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)


def tensors() -> dict[str, torch.Tensor]:
    """Every type, no numbers at all, a single one, and matrices, one of them transposed in memory."""
    generator = torch.Generator().manual_seed(0)
    made = {f"of.{str(kind)[6:]}": (torch.randn(3, 5, generator=generator) * 4).to(kind) for kind in TYPES}
    return {**made, "none": torch.empty(0, 4), "one": torch.tensor(2.5), "turned": torch.randn(4, 3).T}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def scripted(module: nn.Module, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch means to replace it, OpenAI's files stay
        torch.jit.save(torch.jit.script(module), path)


def module() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), nn.Linear(4, 2, bias=False))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_torch_files(tmp_path, legacy, wrapped):
    saved = {"state_dict": tensors(), "epoch": 3, "note": ["x", {1, 2}]} if wrapped else tensors()
    torch.save(saved, tmp_path / "weights.xyz", _use_new_zipfile_serialization=not legacy)
    found = read_tensors(tmp_path / "weights.xyz", inside=("model", "state_dict"))
    assert_equal(found, tensors() | {"turned": found["turned"]})
    trusted = torch.load(tmp_path / "weights.xyz", weights_only=True)
    assert_equal(found, trusted["state_dict"] if wrapped else trusted)
    table = table_of(tmp_path / "weights.xyz", inside=("state_dict",))
    assert table["of.int64"] == ((3, 5), False) and table["turned"] == ((3, 4), True)
    if wrapped:
        with pytest.raises(InputError, match=r"what is no tensor: state_dict \(dict\), epoch \(int\), note \(list\)"):
            read_tensors(tmp_path / "weights.xyz")


def test_shared_storages_stay_shared(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    torch.save({"whole": whole, "row": whole[1], "column": whole[:, 2]}, tmp_path / "a.pt")
    found = read_tensors(tmp_path / "a.pt")
    assert found["row"].tolist() == [4, 5, 6, 7] and found["column"].tolist() == [2, 6, 10]
    assert found["row"].untyped_storage().data_ptr() == found["whole"].untyped_storage().data_ptr()


@pytest.mark.parametrize("size", range(7))
def test_safetensors_of_any_header_length(tmp_path, size):
    path = tmp_path / "a.bin"  # the name says nothing
    listed = {name: tensor.contiguous() for name, tensor in tensors().items()}
    save_file(listed, path, metadata={"x": "y" * size})
    assert_equal(read_tensors(path), load_file(path))
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    text = content[8 : 8 + length].decode().rstrip()
    for start in (0x80, 0x81, ord("{"), ord("P")):  # the first bytes of other containers, and an odd length
        longer = text.ljust(len(text) + (start - len(text)) % 256).encode()
        path.write_bytes(struct.pack("<Q", len(longer)) + longer + content[8 + length :])
        assert_equal(read_tensors(path), listed)  # numbers that are not aligned, too


def test_several_files_and_their_index(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model-1.safetensors")
    torch.save({"b": torch.zeros(3)}, tmp_path / "model-2.bin")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.bin"}}))
    assert find_weights(tmp_path, "open_clip_model", "model") == index
    assert_equal(read_tensors(index), {"a": torch.ones(2), "b": torch.zeros(3)})
    for place, said in [("../model-2.bin", "not a file beside it"), ("model-1.safetensors", "does not list")]:
        index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": place}}))
        with pytest.raises(InputError, match=said):
            read_tensors(index)
    with pytest.raises(InputError, match=r"has no weights, other.safetensors was expected"):
        find_weights(tmp_path, "other")


@pytest.mark.parametrize("legacy", [False, True])
def test_whole_modules(tmp_path, legacy):
    torch.manual_seed(1)
    original = module()
    original[1].register_buffer("scratch", torch.ones(2), persistent=False)
    torch.save(original, tmp_path / "m.pkl", _use_new_zipfile_serialization=not legacy)
    assert_equal(read_tensors(tmp_path / "m.pkl", stand_ins=TORCH_CLASSES), original.state_dict())
    with pytest.raises(InputError, match=r"names torch.nn.modules.activation.ReLU, which"):
        read_tensors(tmp_path / "m.pkl", stand_ins=TORCH_CLASSES[:3])


def test_torch_script(tmp_path):
    torch.manual_seed(2)
    original = module().half()
    original.register_buffer("resolution", torch.tensor(224))
    scripted(original, tmp_path / "m.pt")
    assert is_torch_script(tmp_path / "m.pt")
    assert_equal(read_tensors(tmp_path / "m.pt"), original.state_dict())
    torch.save(original.state_dict(), tmp_path / "plain.pt")
    assert not is_torch_script(tmp_path / "plain.pt")


def test_mapped_tensors_leave_the_file_alone(tmp_path):
    save_file({"a": torch.ones(5000)}, tmp_path / "a.safetensors")
    read_tensors(tmp_path / "a.safetensors")["a"].zero_()
    assert read_tensors(tmp_path / "a.safetensors", map=False)["a"].sum() == 5000
    assert read_tensors(tmp_path / "a.safetensors", dtype=torch.float16)["a"].dtype == torch.float16


def test_memory_is_what_is_used(tmp_path):
    write_sparse(tmp_path / "a.safetensors", {f"{number}": [2048, 4096] for number in range(16)})  # 512 MiB
    with MemoryPeak() as peak:
        found = read_tensors(tmp_path / "a.safetensors")
    assert peak.rise < 20 << 20
    with MemoryPeak() as peak:
        assert sum(float(found[f"{number}"].sum()) for number in range(4)) == 0
    assert 100 << 20 < peak.rise < 200 << 20  # four matrices of 32 MiB
    del found
    with MemoryPeak() as peak:
        halved = read_tensors(tmp_path / "a.safetensors", dtype=torch.float16)
    assert len(halved) == 16 and peak.rise < (256 + 100) << 20  # 256 MiB are kept


class Runs:
    """Pickled, it is a call of os.system."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        import os

        return os.system, (f"touch {self.marker}",)


class Evaluates(Runs):
    """Pickled, it is a call of eval."""

    def __reduce__(self):
        return eval, (f"open({str(self.marker)!r}, 'w')",)


class Foreign:
    pass


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("make", [Runs, Evaluates])
def test_what_a_pickle_wants_to_run_is_not_run(tmp_path, legacy, make):
    marker = tmp_path / "marker"
    torch.save({"a": torch.ones(1), "b": make(marker)}, tmp_path / "bad.pt", _use_new_zipfile_serialization=not legacy)
    name = {"Runs": r"(posix|nt)\.system", "Evaluates": r"(__builtin__|builtins)\.eval"}[make.__name__]
    for reader in (read_tensors, table_of):
        with pytest.raises(InputError, match=f"bad.pt is refused: its pickle names {name}"):
            reader(tmp_path / "bad.pt", stand_ins=["a.b"])
    assert not marker.exists()
    torch.load(tmp_path / "bad.pt", weights_only=False)  # the file does what it says where it is let
    assert marker.exists()


def test_foreign_classes_are_named_and_may_be_stood_in_for(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(1)}, "calls": {Foreign: Foreign()}}, tmp_path / "a.ckpt")
    name = f"{Foreign.__module__}.Foreign"
    with pytest.raises(InputError, match=name):
        read_tensors(tmp_path / "a.ckpt", inside=["state_dict"])
    assert read_tensors(tmp_path / "a.ckpt", inside=["state_dict"], stand_ins=[name])["a"] == 1


def legacy_file(path: Path, *objects: bytes, behind: bytes = b"") -> Path:
    head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    path.write_bytes(b"".join(pickle.dumps(value, 2) for value in head) + b"".join(objects) + behind)
    return path


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("ctorch.storage\n_load_from_bytes\n", b"(B\x03\x00\x00\x00abct"),
        ("ccopyreg\n_reconstructor\n", b"(NNNt"),
        ("cfunctools\npartial\n", b"(Nt"),
        ("cbuiltins\ngetattr\n", b"(NNt"),
        ("cnumpy.core.multiarray\n_reconstruct\n", b"(NNt"),
        ("ctorch\nload\n", b"(Nt"),
    ],
)
def test_dangerous_names_are_not_on_the_list(tmp_path, name, arguments):
    path = legacy_file(tmp_path / "a.pkl", b"\x80\x02" + name.encode() + arguments + b"R.", pickle.dumps([], 2))
    with pytest.raises(InputError, match=name[1:].strip().replace("\n", r"\.")):
        read_tensors(path)


@pytest.mark.parametrize(
    "code",
    [
        b"\x82\x01.",  # the registry of extensions
        b"\x80\x05\x96\xff\xff\xff\xff\x00\x00\x00\x00.",  # a buffer of 4 GiB that is not there
        b"X\xff\xff\xff\x7f.",  # a string of 2 GiB that is not there
        b"Nr\xff\xff\xff\xff.",  # a memo index that would need 32 GiB of table
        b"ccollections\nOrderedDict\n}b.",  # state for a class
        b"ctorch._utils\n_rebuild_tensor_v2\nN}X\x01\x00\x00\x00aK\x01s\x86b.",  # an attribute for a function of ours
        b"(" * 50 + b".",
        b"}" + b"(" + b"K\x01" * 3 + b"u.",
    ],
)
def test_odd_pickles_are_refused_without_harm(tmp_path, code):
    path = legacy_file(tmp_path / "a.pkl", code, pickle.dumps([], 2))
    with MemoryPeak() as peak, pytest.raises(InputError, match="a.pkl is refused"):
        read_tensors(path)
    assert peak.rise < 50 << 20


@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [(0, (5,), (1,)), (1, (4,), (1,)), (0, (2, 2), (1, 3)), (0, (1 << 40,), (0,)), (-1, (2,), (1,)), (0, (2,), (1, 1))],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_that_leave_their_storage_are_refused(tmp_path, offset, shape, stride, legacy):
    class Claim:
        def __reduce__(self):
            rebuild = torch._utils._rebuild_tensor_v2
            return rebuild, (torch.ones(4).storage(), offset, shape, stride, False, {})

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({"a": Claim()}, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(InputError, match="refused.*(leaves its storage|no list of sizes|has the strides)"):
        read_tensors(tmp_path / "a.pt")


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_truncated_files(tmp_path, kind):
    path = tmp_path / "a"
    if kind == "safetensors":
        save_file({"a": torch.ones(100)}, path)
    else:
        torch.save({"a": torch.ones(100)}, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    for length in (0, 7, 20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=str(path)):
            read_tensors(path)


def test_lying_and_compressed_records(tmp_path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        records = {name: archive.read(name) for name in archive.namelist()}

    def rewritten(changes, compression=zipfile.ZIP_STORED):
        with zipfile.ZipFile(tmp_path / "b.pt", "w", compression) as archive:
            for name, data in {**records, **changes}.items():
                archive.writestr(name, data)
        return tmp_path / "b.pt"

    top = next(iter(records)).split("/")[0]
    assert read_tensors(rewritten({}))["a"].shape == (1000,)
    with pytest.raises(InputError, match="compressed"):  # so a small file cannot become a large one
        read_tensors(rewritten({}, zipfile.ZIP_DEFLATED))
    with pytest.raises(InputError, match="'0' has 8 bytes instead of 4000"):
        read_tensors(rewritten({f"{top}/data/0": b"\0" * 8}))
    with pytest.raises(InputError, match="big-endian"):
        read_tensors(rewritten({f"{top}/byteorder": b"big"}))
    with pytest.raises(InputError, match="not one that torch wrote"):
        read_tensors(rewritten({"other/data.pkl": b"N."}))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<!DOCTYPE html><html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS"),
        (b"{}", "not the index"),
        (b"\x00" * 100, "no known container"),
        (struct.pack("<Q", 40) + b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', "damaged"),
        (struct.pack("<Q", 56) + b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}  ' + b"\0" * 4, "refused"),
    ],
)
def test_other_files_are_told_apart(tmp_path, content, said):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=said):
        read_tensors(tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="cannot be read"):
        read_tensors(tmp_path / "none.safetensors")


def tar_of(path: Path, *members: tuple[str, bytes | None]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            if data is None:
                member.type, member.linkname = tarfile.SYMTYPE, "/etc"
            else:
                member.size = len(data)
            archive.addfile(member, None if data is None else io.BytesIO(data))
    return path


def test_tar(tmp_path):
    archive = tar_of(tmp_path / "a.tar.gz", ("1.3B/x.ckpt", b"weights"), ("1.3B/tok/vocab.json", b"{}"))
    found = open_tar(archive, ["tok/vocab.json", "x.ckpt"], tmp_path / "out")
    assert [path.read_bytes() for path in found] == [b"{}", b"weights"] and found[1] == tmp_path / "out" / "x.ckpt"


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([("a", b"1"), ("../evil", b"2")], "'../evil' would be written outside"),
        ([("a", b"1"), ("/evil", b"2")], "'/evil' would be written outside"),
        ([("a", b"1"), ("b", None)], "'b' is a link or a device"),
        ([("a", b"1"), ("c", b"2")], r"'c' \(1 bytes\) was not expected"),
        ([("a", b"1"), ("x/a", b"2"), ("b", b"3")], "'x/a' .* is there twice"),
        ([("a", b"1")], "lacks b"),
    ],
)
def test_tar_refusals_write_nothing(tmp_path, members, said):
    archive = tar_of(tmp_path / "in.tar.gz", *members)
    with pytest.raises(InputError, match=said):
        open_tar(archive, ["a", "b"], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in.tar.gz"]
    archive.write_bytes(archive.read_bytes()[:-20])
    with pytest.raises(InputError):
        open_tar(archive, ["a", "b"], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in.tar.gz"]


def test_checksum(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 1000)
    seen: list[tuple[int, int]] = []
    checksum(tmp_path / "a", "md5", hashlib.md5(b"abc" * 1000).hexdigest().upper(), lambda *now: seen.append(now))
    assert seen[-1] == (3000, 3000)
    with pytest.raises(InputError, match="sha256 .* instead of 00.*get it again"):
        checksum(tmp_path / "a", "sha256", "00")


@pytest.mark.parametrize(
    ("operations", "shape"),
    [
        (["copy"], (4,)),
        (["transpose"], (3, 5)),
        (["unsqueeze0"], (7, 2)),
        (["squeeze_last"], (4, 3, 1)),
        (["rows:0/3", "rows:1/3", "rows:2/3"], (12, 5)),
        (["per_head_rows:2/3:2", "per_head_rows:0/3:2", "per_head_rows:1/3:2"], (24, 3)),
    ],
)
def test_operations_of_key_maps_are_undone(operations, shape):
    whole = torch.arange(float(torch.Size(shape).numel())).view(shape)
    parts = [(operation, fitting.take(whole, operation)) for operation in operations]
    assert torch.equal(fitting.give_back(parts), whole)


def test_operations_of_key_maps():
    rows = torch.arange(12)[:, None]
    assert fitting.take(rows, "rows:1/3").flatten().tolist() == [4, 5, 6, 7]
    # two heads of three groups of two rows: group 1 is rows 2, 3 of the first head and 8, 9 of the second
    assert fitting.take(rows, "per_head_rows:1/3:2").flatten().tolist() == [2, 3, 8, 9]
    assert fitting.take(torch.zeros(4, 3, 1), "squeeze_last").shape == (4, 3)
    assert fitting.take(torch.zeros(4, 3), "unsqueeze0").shape == (1, 4, 3)
    for operation, shape in [("squeeze_last", (4, 3)), ("transpose", (4,)), ("turn", (4,))]:
        with pytest.raises(ValueError, match=operation):
            fitting.take(torch.zeros(shape), operation)
    with pytest.raises(ValueError, match="3 blocks"):
        fitting.give_back([("rows:0/3", rows), ("rows:2/3", rows)])


class Buffered(nn.Module):
    """With everything that a meta model can get wrong: a buffer that is not saved, a tied weight, draws."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.randn(3))
        self.register_buffer("steps", torch.arange(4.0), persistent=False)
        self.register_buffer("count", torch.tensor(0))


def test_assign():
    torch.manual_seed(3)
    original = Buffered()
    state = torch.random.get_rng_state()
    model = fitting.on_meta(Buffered)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.is_meta for parameter in model.parameters()) and not model.steps.is_meta
    fitting.assign(model, {**original.state_dict(), "loss.x": torch.ones(1)}, "here", torch.float16, ["loss.*"])
    assert model.second.weight is model.first.weight or torch.equal(model.second.weight, model.first.weight)
    assert model.scale.dtype == torch.float16 and model.count.dtype == torch.int64 and model.scale.requires_grad
    assert model.steps.tolist() == [0, 1, 2, 3] and not any(tensor.is_meta for tensor in model.state_dict().values())
    assert not nn.Linear(2, 2).weight.is_meta  # building is over


def test_assign_lists_all_that_does_not_fit():
    given = dict(Buffered().state_dict())
    given |= {
        "first.bias": torch.zeros(3),
        "count": torch.tensor(0.5),
        "extra": torch.zeros(1),
        "scale": given["count"],
    }
    del given["second.bias"]
    with pytest.raises(InputError) as raised:
        fitting.assign(fitting.on_meta(Buffered), given, "here")
    assert str(raised.value) == (
        "here does not fit Buffered: missing second.bias; unexpected extra; mis-shaped scale [] instead of [3]; "
        "count of type torch.float32 instead of torch.int64; mis-shaped first.bias [3] instead of [2]."
    )
