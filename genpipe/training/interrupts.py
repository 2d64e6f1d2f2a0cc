"""Ctrl-C and SIGTERM as a flag that the loop looks at between two steps."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PATIENCE = 3.0  # seconds


@contextmanager
def stop_on_interrupt() -> Iterator[list[bool]]:
    """A flag that the first Ctrl-C or SIGTERM sets, so that the running step ends and is saved; a later one interrupts.

    Later means PATIENCE seconds: a launcher passes on a signal that the terminal has sent to its workers already.
    """
    flag: list[bool] = []
    first = 0.0

    def handle(number: int, frame: Any) -> None:
        nonlocal first
        if not flag:
            first = time.monotonic()
            flag.append(True)
        elif time.monotonic() - first > PATIENCE:
            raise KeyboardInterrupt

    try:
        previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: interrupts are the caller's
        previous = {}
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
