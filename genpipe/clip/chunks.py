"""Bounded memory: many things through a model in chunks that halve when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import OutOfMemoryError, Tensor

from genpipe.errors import InputError

OUT_OF_MEMORY_TEXTS = ("out of memory", "allocate memory", "not enough memory")


class Chunks:
    """Work on at most `size` things at once; `size` halves for good each time memory runs out.

    Raises InputError for a size below 1.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise InputError(f"chunk_size must be at least 1, not {size}.")
        self.size = size

    def run(self, work: Callable[[Any], Tensor], things: Any) -> Iterator[Tensor]:
        """`work`, whose result has a row for each thing, of all things (a list, or rows of a tensor): in order.

        Whatever `work` raises comes through, unless memory ran out and fewer things can be tried.
        """
        start = 0
        while start < len(things):
            try:
                result = work(things[start : start + self.size])
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or self.size == 1:
                    raise
                self.size = max(1, min(self.size, len(things) - start) // 2)
                continue
            start += len(result)
            yield result


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on whatever device; on a CPU torch tells by its text only."""
    text = str(error).lower()
    return isinstance(error, MemoryError | OutOfMemoryError) or any(phrase in text for phrase in OUT_OF_MEMORY_TEXTS)
