"""Work for several threads, such as decoding pictures, handed back in order and never far ahead of its reader."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def default_workers() -> int:
    """Threads for decoding pictures: one a core, four at most, because each may hold a very large picture."""
    return min(4, os.cpu_count() or 1)


def read_ahead(
    items: Iterable[Item], work: Callable[[Item], Result], workers: int | None = None
) -> Iterator[tuple[Item, "Future[Result]"]]:
    """Each item with the finished future of `work(item)`, in the order of the items.

    `future.result()` returns what `work` did, or raises what it raised. At most workers + 1 results are in memory. What
    gains by it releases Python's lock, as Pillow's decoders do.
    """
    workers = workers or default_workers()
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[tuple[Item, Future[Result]]] = deque()
        try:
            for item in items:
                waiting.append((item, pool.submit(work, item)))
                if len(waiting) > workers:
                    waiting[0][1].exception()  # waits
                    yield waiting.popleft()
            while waiting:
                waiting[0][1].exception()
                yield waiting.popleft()
        finally:  # a reader that stops early waits for the items under way alone
            for _, future in waiting:
                future.cancel()
