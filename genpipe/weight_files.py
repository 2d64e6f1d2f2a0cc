"""The safetensors files of a part: their tables of contents, read before any weight is; written as one file or several.

Several files lie beside an index that says which tensor is in which, as diffusers reads them.
"""

import json
import struct
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file

from genpipe.errors import InputError

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
INDEX_NAME = WEIGHTS_NAME + ".index.json"
PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit
# safetensors' names of types -> (bytes per number, whether it is floating point)
NUMBER_TYPES = {
    "F64": (8, True), "F32": (4, True), "F16": (2, True), "BF16": (2, True), "I64": (8, False), "I32": (4, False),
    "I16": (2, False), "I8": (1, False), "U8": (1, False), "BOOL": (1, False),
}  # fmt: skip


FLOATS = {name for name, (_, floating) in NUMBER_TYPES.items() if floating}
TYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
Table = dict[str, tuple[tuple[int, ...], bool]]  # name of a tensor -> (shape, floating point?)


def rewrite_weights(folder: Path, dtype: torch.dtype | None, file_bytes: int | None) -> None:
    """Store the floating-point tensors of a folder's one safetensors file as `dtype`, in files of at most `file_bytes`.

    None leaves the type, or the one file, as it is. Raises InputError for a weight that is too large for `dtype`.
    """
    path = folder / WEIGHTS_NAME
    if dtype is None and (file_bytes is None or path.stat().st_size <= file_bytes):
        return
    with safe_open(path, framework="pt") as opened:
        stored = {name: opened.get_tensor(name) for name in opened.keys()}
    kinds = {name: dtype if dtype and tensor.is_floating_point() else tensor.dtype for name, tensor in stored.items()}
    shapes = {name: torch.empty_like(tensor, dtype=kinds[name], device="meta") for name, tensor in stored.items()}
    del stored
    pattern = WEIGHTS_NAME.replace(".safetensors", "{suffix}.safetensors")
    most = sum(tensor.nbytes for tensor in shapes.values()) + 1 if file_bytes is None else file_bytes
    split = split_torch_state_dict_into_shards(shapes, filename_pattern=pattern, max_shard_size=most)
    whole = path.rename(path.with_suffix(".whole"))
    for name, inside in split.filename_to_tensors.items():  # one after another: no more than a file is in memory
        save_file({each: _read(whole, each, dtype) for each in inside}, folder / name, metadata={"format": "pt"})
    whole.unlink()
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_weights(found: Path, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """All tensors of a part's safetensors file, or of those that its index names; floating-point ones as `dtype`.

    found: the file or index that `weight_table` looked at. Tensors that need no cast (None: all) are mapped: their
    memory is taken page by page as they are used, and the file must stay. Others are cast one by one, and nothing is in
    memory twice.
    """
    files = {found.name}
    if found.name == INDEX_NAME:
        files = set(json.loads(found.read_text(encoding="utf-8"))["weight_map"].values())
    tensors = {}
    for file in sorted(files):
        path = found.parent / file
        with safe_open(path, framework="pt") as opened:
            kinds = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}
            right = FLOATS if dtype is None else {TYPE_NAMES.get(dtype)}
            as_they_are = {name for name, kind in kinds.items() if kind in right or kind not in FLOATS}
            tensors.update({name: opened.get_tensor(name) for name in as_they_are})
        tensors.update({name: _read(path, name, dtype, check=False) for name in kinds if name not in as_they_are})
    return tensors


def _read(path: Path, name: str, dtype: torch.dtype | None, check: bool = True) -> torch.Tensor:
    """One tensor, as `dtype` if it is floating point. Raises InputError for a weight that is too large, if asked to."""
    with safe_open(path, framework="pt") as opened:  # anew for each: the pages of one that is cast are given back
        tensor = opened.get_tensor(name)
    if dtype is None or dtype == tensor.dtype or not tensor.is_floating_point():
        return tensor
    cast = tensor.to(dtype)
    if check and not torch.equal(cast.isinf(), tensor.isinf()):
        raise InputError(f"the weight {name} is too large for {dtype}; save with dtype=None.")
    return cast


def weight_table(root: Path) -> tuple[Path, Table]:
    """What lies in the safetensors file or files of a part's folder, and the file or index that was read.

    Raises InputError, one sentence that names the file, for what is missing, pickled, truncated or damaged, and for an
    index that does not say what its files hold.
    """
    path, index = root / WEIGHTS_NAME, root / INDEX_NAME
    if path.is_file():
        return path, _read_header(path)
    if index.is_file():
        return index, _read_index(index)
    pickled = sorted(found.name for found in root.iterdir() if found.suffix in PICKLED_SUFFIXES)
    if pickled:
        raise InputError(
            f"{root / pickled[0]} is a pickled file, which can run code when it is read, and is refused; "
            f"{WEIGHTS_NAME} was expected."
        )
    raise InputError(f"{path} is missing, so the part cannot be loaded.")


def _read_index(index: Path) -> Table:
    """The tables of all files that an index names, after a look at whether it tells the truth about them."""
    try:
        if index.stat().st_size > MAX_HEADER_BYTES:
            raise ValueError(f"it has more than {MAX_HEADER_BYTES} bytes")
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(places.values()))
        strange = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
        if strange:
            raise ValueError(f"{strange[0]!r} is no name of a safetensors file beside it")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{index} is damaged ({error}); get the part again.") from error
    whole: Table = {}
    for name in names:
        if not (index.parent / name).is_file():
            raise InputError(f"{index.parent / name} is missing, so the part cannot be loaded.")
        table = _read_header(index.parent / name)
        listed = {tensor for tensor, place in places.items() if place == name}
        if table.keys() != listed:
            raise InputError(f"{index} does not list what is in {name}; get the part again.")
        whole |= table
    return whole


def _read_header(path: Path) -> Table:
    """Name -> (shape, floating point?) of a safetensors file, after checking that the file is whole."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start, brace = file.read(8), file.read(1)
        # A safetensors file begins with the length of its JSON, which may well be 128: the first byte is not enough.
        if brace != b"{" and (start[:2] == b"PK" or start[:1] == b"\x80"):
            raise InputError(f"{path} is a pickled file under the name of a safetensors file and is refused.")
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise InputError(f"{path} is truncated or is not a safetensors file ({size} bytes).")
        try:
            header = json.loads(brace + file.read(length - 1))
            header.pop("__metadata__", None)
            table = {name: _checked_entry(entry, size - 8 - length) for name, entry in header.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{path} has a damaged table of contents ({error}).") from error
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if end != size - 8 - length:
        raise InputError(f"{path} is truncated or damaged: {end} bytes of weights expected, {size - 8 - length} found.")
    return table


def _checked_entry(entry: dict[str, Any], data_bytes: int) -> tuple[tuple[int, ...], bool]:
    """One entry of a safetensors header -> (shape, floating point?); ValueError if it contradicts itself."""
    shape = tuple(int(side) for side in entry["shape"])
    width, floating = NUMBER_TYPES[entry["dtype"]]
    first, last = entry["data_offsets"]
    expected = width
    for side in shape:
        expected *= side
    if last - first != expected or first < 0 or min(shape, default=0) < 0:
        raise ValueError(f"{last - first} bytes for a {entry['dtype']} tensor of shape {list(shape)}")
    return shape, floating
