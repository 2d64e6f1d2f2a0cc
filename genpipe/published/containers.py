"""Any container of published weights -> names and tensors, without running anything that is in it.

safetensors (one file, or several and their index), torch.save's zip files, the container before torch 1.6, pickles of
whole modules in either, and TorchScript archives. A container is recognised by its bytes, never by its name.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from genpipe.errors import InputError
from genpipe.published.archives import checksum, open_tar
from genpipe.published.pickles import Inert
from genpipe.published.stored import Damaged, Storage, StoredTensor, contiguous
from genpipe.published.torch_files import ZIP_START, is_scripted, read_legacy, read_zip
from genpipe.published.weight_names import weights_file
from genpipe.weight_files import MAX_HEADER_BYTES, Table

__all__ = ["checksum", "find_weights", "is_torch_script", "open_tar", "read_tensors", "table_of"]

SAFETENSORS_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
MAX_MODULES = 5_000
MAX_NAME = 1_000  # characters


def read_tensors(
    path: str | os.PathLike[str],
    *,
    inside: Sequence[str] = (),
    stand_ins: Sequence[str] = (),
    map: bool = True,
    dtype: torch.dtype | None = None,
) -> dict[str, torch.Tensor]:
    """Name -> tensor of a weights file, or of the files that an index beside them names.

    The tensors are mapped: memory is taken page by page as they are used, never twice, and the file must stay where it
    is. With `map=False`, or with a `dtype` other than the file's (for its floating-point tensors), each is copied when
    read and its pages are given back at once. `inside`: keys of a dictionary around the weights, the first one present
    is entered. `stand_ins`: dotted names of classes that a pickle may mention; nothing is imported for them. A pickled
    module becomes the names of its parameters and buffers, a list of tensors the names "0", "1" and so on.

    Raises InputError, one sentence that names the file, for what is missing, truncated, no known container, or damaged,
    for globals that a pickle may not ask for, for tensors that leave their storage, and for entries that are none.
    """
    stored = _stored(Path(path), inside, stand_ins)
    storages: dict[Storage, torch.Tensor] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, entry in stored.items():
        cast = dtype if dtype is not None and entry.floating else entry.storage.dtype
        try:
            if map and cast == entry.storage.dtype:
                tensors[name] = entry.read(storages)
            else:
                tensors[name] = entry.read({}).to(cast, copy=True)
        except (OSError, ValueError, Damaged) as error:
            raise InputError(f"{path} cannot be read at {name} ({error}).") from error
    return tensors


def table_of(path: str | os.PathLike[str], *, inside: Sequence[str] = (), stand_ins: Sequence[str] = ()) -> Table:
    """Name -> (shape, floating point?) of a weights file, from its table of contents alone; errors as read_tensors."""
    stored = _stored(Path(path), inside, stand_ins)
    return {name: (entry.shape, entry.floating) for name, entry in stored.items()}


def find_weights(folder: str | os.PathLike[str], *stems: str) -> Path:
    """The weights in `folder` called by one of `stems`, e.g. "model", see `weights_file`: the file, or its index.

    Raises InputError if there is none.
    """
    found = weights_file(Path(folder), stems)
    if found is not None:
        return found
    names = " or ".join(stem + ".safetensors" for stem in stems)
    raise InputError(f"{folder} has no weights, {names} was expected; get the folder again.")


def is_torch_script(path: str | os.PathLike[str]) -> bool:
    """Whether a file is an archive of torch.jit.save. Raises InputError if it is a zip file that cannot be read."""
    try:
        return is_scripted(Path(path))
    except Damaged as error:
        raise InputError(f"{path} is refused: {error}.") from error


def _stored(path: Path, inside: Sequence[str], stand_ins: Sequence[str]) -> dict[str, StoredTensor]:
    """Name -> StoredTensor of whatever container `path` is. Raises InputError."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
        if start[8:9] == b"{" and struct.unpack("<Q", start[:8])[0] <= MAX_HEADER_BYTES:
            return _read_safetensors(path)  # asked first: its length may begin with any of the bytes below
        if start[:4] == ZIP_START:
            return _named(read_zip(path, stand_ins), inside)
        if start[:1] == b"\x80":
            return _named(read_legacy(path, stand_ins), inside)
        if start[:1] == b"{":
            return _read_index(path, inside, stand_ins)
        raise Damaged(_strange(start, path.stat().st_size))
    except Damaged as error:
        raise InputError(f"{path} is refused: {error}.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}).") from error


def _strange(start: bytes, size: int) -> str:
    """What a file may be that is no container of weights."""
    if start.startswith(b"version https://git-lfs"):
        return "it is only a pointer to the weights (Git LFS), fetch the file itself"
    if start.lstrip()[:1] == b"<":
        return "it is a web page, not weights; download it again"
    return f"it is truncated or no known container of weights ({size} bytes)"


def _read_safetensors(path: Path) -> dict[str, StoredTensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise Damaged(f"it is truncated or not a safetensors file ({size} bytes)")
        text = file.read(length)
    start = 8 + length
    stored, ends = {}, [0]
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            dtype = SAFETENSORS_TYPES[entry["dtype"]]
            numel, rest = divmod(last - first, dtype.itemsize)
            if rest or not 0 <= first <= last:
                raise Damaged(f"its tensor {name[:80]} has {last - first} bytes")
            stored[name] = contiguous(Storage(path, start + first, dtype, numel), entry["shape"])
            if _numel(stored[name].shape) != numel:
                raise Damaged(f"its tensor {name[:80]} has {last - first} bytes for the shape {entry['shape']}")
            ends.append(last)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Damaged(f"its table of contents is damaged ({type(error).__name__}: {str(error)[:80]})") from error
    if start + max(ends) != size:
        raise Damaged(
            f"it is truncated or damaged, {max(ends)} bytes of weights were expected and {size - start} found"
        )
    return stored


def _numel(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())


def _read_index(path: Path, inside: Sequence[str], stand_ins: Sequence[str]) -> dict[str, StoredTensor]:
    """All files that an index names, after a look at whether it tells the truth about them."""
    if path.stat().st_size > MAX_HEADER_BYTES:
        raise Damaged(f"as an index it has more than {MAX_HEADER_BYTES} bytes")
    try:
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(places.values()))
        strange = [name for name in names if Path(name).name != name or name.endswith(".json") or name[:1] == "."]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Damaged("it is JSON, but not the index of a weights file") from error
    if strange:
        raise Damaged(f"it names {strange[0][:80]!r}, which is not a file beside it")
    whole: dict[str, StoredTensor] = {}
    for name in names:
        found = _stored(path.parent / name, inside, stand_ins)
        if found.keys() != {tensor for tensor, place in places.items() if place == name}:
            raise Damaged(f"it does not list what is in {name}")
        whole |= found
    return whole


def _named(value: Any, inside: Sequence[str]) -> dict[str, StoredTensor]:
    """What a pickle held -> its tensors by name. Raises Damaged listing what is no tensor."""
    if isinstance(value, Mapping):
        entered = next((key for key in inside if key in value), None)
        value = value if entered is None else value[entered]
    if isinstance(value, Inert):
        return _walk(value)
    if isinstance(value, (tuple, list)):
        value = {str(place): entry for place, entry in enumerate(value)}
    if not isinstance(value, Mapping):
        raise Damaged(f"it holds a {type(value).__name__}, not a dictionary of tensors")
    others = [
        f"{str(name)[:60]} ({type(entry).__name__})" for name, entry in value.items() if not _is_entry(name, entry)
    ]
    if others:
        raise Damaged(f"it holds what is no tensor: {', '.join(others[:12])}")
    return dict(value)


def _is_entry(name: Any, entry: Any) -> bool:
    return isinstance(name, str) and isinstance(entry, StoredTensor)


def _walk(top: Inert) -> dict[str, StoredTensor]:
    """The tensors of a pickled module by the names of its state dict; of a scripted one, those of its attributes."""
    found: dict[str, StoredTensor] = {}
    waiting = [("", top)]
    for prefix, module in waiting:
        if len(waiting) > MAX_MODULES or len(prefix) > MAX_NAME:
            raise Damaged("its modules contain one another")
        state = module.state
        own = [state.get(kind) for kind in ("_parameters", "_buffers", "_modules")]
        groups = [group for group in own if isinstance(group, Mapping)] or [state]
        unsaved = state.get("_non_persistent_buffers_set") or ()
        for name, entry in (pair for group in groups for pair in group.items()):
            if isinstance(entry, StoredTensor) and name not in unsaved:
                found[f"{prefix}{name}"] = entry
            elif isinstance(entry, Inert):
                waiting.append((f"{prefix}{name}.", entry))
    return found
