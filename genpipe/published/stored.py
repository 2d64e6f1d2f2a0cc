"""Tensors that still lie in a file: where, of which type and shape, checked before anything is read."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


class Damaged(Exception):
    """What a file says about itself cannot be true; the readers turn it into an InputError that names the file."""


@dataclass(frozen=True)
class Storage:
    """`numel` numbers of type `dtype` from byte `start` of the file `path` on."""

    path: Path
    start: int
    dtype: torch.dtype
    numel: int

    def read(self) -> torch.Tensor:
        """The numbers (numel,), mapped: memory is taken page by page as they are used, and freed with the tensor."""
        if self.numel == 0:
            return torch.empty(0, dtype=self.dtype)
        size = self.numel * self.dtype.itemsize
        with self.path.open("rb") as file:
            if self.start % self.dtype.itemsize:  # as old writers left them; torch computes with aligned numbers only
                copied = torch.empty(self.numel, dtype=self.dtype)
                file.seek(self.start)
                if file.readinto(copied.view(torch.uint8).numpy().data) != size:
                    raise Damaged("it ends before its weights do")
                return copied
            inside = self.start % mmap.ALLOCATIONGRANULARITY
            # A private mapping: whoever changes the tensor changes neither the file nor other readers' tensors.
            pages = mmap.mmap(file.fileno(), inside + size, access=mmap.ACCESS_COPY, offset=self.start - inside)
        return torch.frombuffer(pages, dtype=self.dtype, count=self.numel, offset=inside)


@dataclass(frozen=True)
class StoredTensor:
    """A view of a storage, as torch describes one: `offset`, `shape` and `stride` count numbers, not bytes."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def read(self, storages: dict[Storage, torch.Tensor]) -> torch.Tensor:
        """The tensor; `storages` remembers what is already mapped, since tensors may share a storage."""
        if self.storage not in storages:
            storages[self.storage] = self.storage.read()
        return storages[self.storage].as_strided(self.shape, self.stride, self.offset)

    @property
    def floating(self) -> bool:
        """Whether its numbers are floating point."""
        return self.storage.dtype.is_floating_point


def stored_tensor(storage: Any, offset: Any, shape: Any, stride: Any) -> StoredTensor:
    """A StoredTensor from what a file claims. Raises Damaged for a view that leaves its storage or repeats it."""
    if not isinstance(storage, Storage):
        raise Damaged("a tensor has no storage")
    sizes, steps = _counts(shape), _counts(stride)
    (start,) = _counts((offset,))
    if len(sizes) != len(steps) or len(sizes) > 32:
        raise Damaged(f"a tensor of shape {list(sizes)} has the strides {list(steps)}")
    last = start + sum((size - 1) * step for size, step in zip(sizes, steps, strict=True))
    if 0 not in sizes and (last >= storage.numel or math.prod(sizes) > storage.numel):
        raise Damaged(
            f"a tensor of shape {list(sizes)}, strides {list(steps)} and offset {start} leaves its storage of "
            f"{storage.numel} numbers"
        )
    return StoredTensor(storage, start, sizes, steps)


def contiguous(storage: Storage, shape: Sequence[int]) -> StoredTensor:
    """The whole of `storage` as a tensor of `shape`, row by row."""
    steps, step = [], 1
    for size in reversed(shape):
        steps.append(step)
        step *= max(size, 1)
    return stored_tensor(storage, 0, tuple(shape), tuple(reversed(steps)))


def _counts(values: Any) -> tuple[int, ...]:
    if not isinstance(values, (tuple, list)) or any(
        type(value) is not int or not 0 <= value < 2**62 for value in values
    ):
        raise Damaged(f"{str(values)[:60]} is no list of sizes")
    return tuple(values)
