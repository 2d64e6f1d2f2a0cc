"""The safetensors files of a part: their tables of contents, read before any weight is; written as one file or several.

Several files lie beside an index that says which tensor is in which, as diffusers reads them.
"""

import json
import struct
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file

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


Table = dict[str, tuple[tuple[int, ...], bool]]  # name of a tensor -> (shape, floating point?)


def rewrite_weights(folder: Path, dtype: torch.dtype | None, file_bytes: int | None) -> None:
    """Store the floating-point tensors of a folder's one safetensors file as `dtype`, in files of at most `file_bytes`.

    None leaves the type, or the one file, as it is. Raises InputError for a weight that is too large for `dtype`.
    """
    path = folder / WEIGHTS_NAME
    if dtype is None and (file_bytes is None or path.stat().st_size <= file_bytes):
        return
    tensors = load_file(path)
    if dtype is not None:
        cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
        too_large = [name for name, tensor in cast.items() if not torch.equal(tensor.isinf(), tensors[name].isinf())]
        if too_large:
            raise InputError(f"the weights {', '.join(too_large)} are too large for {dtype}; save with dtype=None.")
        tensors = cast
    pattern = WEIGHTS_NAME.replace(".safetensors", "{suffix}.safetensors")
    most = sum(tensor.nbytes for tensor in tensors.values()) + 1 if file_bytes is None else file_bytes
    split = split_torch_state_dict_into_shards(tensors, filename_pattern=pattern, max_shard_size=most)
    path.unlink()
    for name, inside in split.filename_to_tensors.items():
        save_file({tensor: tensors[tensor] for tensor in inside}, folder / name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=1, sort_keys=True) + "\n", encoding="utf-8")


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
        start = file.read(8)
        if start[:2] == b"PK" or start[:1] == b"\x80":
            raise InputError(f"{path} is a pickled file under the name of a safetensors file and is refused.")
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise InputError(f"{path} is truncated or is not a safetensors file ({size} bytes).")
        try:
            header = json.loads(file.read(length))
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
