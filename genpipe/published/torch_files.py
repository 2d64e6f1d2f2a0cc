"""Where the tensors lie in files of torch.save (zip, and the container before torch 1.6) and of torch.jit.save."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any

import torch

from genpipe.published.pickles import MAX_PICKLE_BYTES, read_pickle
from genpipe.published.stored import Damaged, Storage

ZIP_START = b"PK\x03\x04"
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
MAX_RECORDS = 200_000
WANTED = ("data.pkl", "data/", "constants.pkl", "byteorder")  # a TorchScript archive's code, compressed, is not


def read_zip(path: Path, stand_ins: Collection[str]) -> Any:
    """What a zip file of torch.save or torch.jit.save holds, its tensors as StoredTensor. Raises Damaged."""
    records = _records(path)
    pickled = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickled) != 1:
        raise Damaged("it is a zip file, but not one that torch wrote")
    top = pickled[0].removesuffix("data.pkl")
    if _text(path, records, top + "byteorder") not in ("", "little"):
        raise Damaged("its numbers are stored in big-endian order")

    def storage(key: str, dtype: torch.dtype, numel: int) -> Storage:
        place = records.get(f"{top}data/{key}")
        if place is None:
            raise Damaged(f"its storage {key[:40]!r} is missing")
        if place[1] != numel * dtype.itemsize:
            raise Damaged(f"its storage {key[:40]!r} has {place[1]} bytes instead of {numel * dtype.itemsize}")
        return Storage(path, place[0], dtype, numel)

    start, size = records[pickled[0]]
    if size > MAX_PICKLE_BYTES:
        raise Damaged(f"its pickle is larger than {MAX_PICKLE_BYTES >> 20} MiB")
    with path.open("rb") as file:
        file.seek(start)
        return read_pickle(file, storage, stand_ins, torch_script=top + "constants.pkl" in records)


def is_scripted(path: Path) -> bool:
    """Whether a file is an archive of torch.jit.save. Raises Damaged if it is a zip file that cannot be read."""
    with path.open("rb") as file:
        if file.read(4) != ZIP_START:
            return False
    return any(name.endswith("/constants.pkl") for name in _records(path))


def _records(path: Path) -> dict[str, tuple[int, int]]:
    """Name -> (first byte, bytes) of the records that hold weights or describe them; nothing is unpacked."""
    end = path.stat().st_size
    places: dict[str, tuple[int, int]] = {}
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            entries = archive.infolist()
            if len(entries) > MAX_RECORDS:
                raise Damaged(f"it has {len(entries)} records")
            for entry in entries:
                if not entry.filename.partition("/")[2].startswith(WANTED):
                    continue
                if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                    raise Damaged(f"its record {entry.filename[:60]!r} is compressed, which torch never does")
                file.seek(entry.header_offset)
                head = file.read(30)
                if len(head) != 30 or head[:4] != ZIP_START:
                    raise Damaged(f"its record {entry.filename[:60]!r} is not where its table says")
                start = entry.header_offset + 30 + sum(struct.unpack("<HH", head[26:30]))
                if start + entry.file_size > end:
                    raise Damaged(f"its record {entry.filename[:60]!r} goes beyond its end")
                if entry.filename in places:
                    raise Damaged(f"its record {entry.filename[:60]!r} is there twice")
                places[entry.filename] = (start, entry.file_size)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise Damaged(f"its zip directory cannot be read ({error}); it may be truncated") from error
    return places


def _text(path: Path, records: dict[str, tuple[int, int]], name: str) -> str:
    if name not in records:
        return ""
    start, size = records[name]
    with path.open("rb") as file:
        file.seek(start)
        return file.read(min(size, 100)).decode("ascii", "replace")


def read_legacy(path: Path, stand_ins: Collection[str]) -> Any:
    """What a file of the container before torch 1.6 holds, its tensors as StoredTensor. Raises Damaged.

    Four pickles (magic number, protocol, system, object), then one with the keys of the storages, then those.
    """

    def none(*unused: Any) -> Storage:
        raise Damaged("it is not built as torch builds it")

    sizes: dict[str, tuple[torch.dtype, int]] = {}
    places: dict[str, Storage] = {}

    def seen(key: str, dtype: torch.dtype, numel: int) -> Storage:
        if sizes.setdefault(key, (dtype, numel)) != (dtype, numel):
            raise Damaged(f"its storage {key[:40]!r} is described in two ways")
        return Storage(path, 0, dtype, numel)

    with path.open("rb") as file:
        if read_pickle(file, none) != LEGACY_MAGIC:
            raise Damaged("it is a pickle, but none of torch's")
        read_pickle(file, none)
        system = read_pickle(file, none)
        if not isinstance(system, dict) or not system.get("little_endian", True):
            raise Damaged("its numbers are stored in big-endian order")
        start = file.tell()
        read_pickle(file, seen, stand_ins)  # where the storages lie is said only behind the object, so it is read twice
        keys = read_pickle(file, none)
        if not isinstance(keys, list) or any(not isinstance(key, str) for key in keys) or set(keys) != set(sizes):
            raise Damaged("its list of storages does not fit its tensors")
        for key in keys:
            places[key] = _legacy_storage(file, path, key, *sizes[key])
        file.seek(start)
        return read_pickle(file, lambda key, *unused: places[key], stand_ins)


def _legacy_storage(file: IO[bytes], path: Path, key: str, dtype: torch.dtype, numel: int) -> Storage:
    """The storage that begins here with its number of numbers; afterwards the file stands behind it."""
    count = file.read(8)
    start = file.tell()
    behind = start + numel * dtype.itemsize
    if len(count) != 8 or behind > path.stat().st_size:
        raise Damaged(f"it ends before its storage {key[:40]!r} does")
    if struct.unpack("<q", count)[0] != numel:
        raise Damaged(f"its storage {key[:40]!r} has another size than its tensors say")
    file.seek(behind)
    return Storage(path, start, dtype, numel)
