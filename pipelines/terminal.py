"""How the command meets a terminal: one-line warnings and errors, progress, Ctrl-C that keeps what is finished."""

import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm

INTERRUPTED = 130  # what a shell expects of a command that Ctrl-C ended


def say(kind: str, message: object) -> None:
    """One line on standard error, such as "error: ..." or "warning: ..."; a running progress bar moves down."""
    _write(f"{kind}: {' '.join(str(message).split())}", sys.stderr)


def show(text: str) -> None:
    """A result on standard output; a running progress bar moves down."""
    _write(text, sys.stdout)


def _write(text: str, stream: TextIO) -> None:
    # Characters that the terminal's encoding lacks come out as escapes, not as an exception.
    encoding = stream.encoding or "utf-8"
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    if "tqdm" in sys.modules:  # only then can a bar be running
        sys.modules["tqdm"].tqdm.write(text, file=stream)
    else:
        print(text, file=stream)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Show every warning that is meant for users as one plain line, once; hide those meant for programmers."""
    shown: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if category is UserWarning and str(message) not in shown:
            shown.add(str(message))
            say("warning", message)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


@contextmanager
def progress_bar(what: str, total: float | None = None) -> "Iterator[tqdm]":
    """A bar on standard error, where that is a terminal. Set its `n` (and `total`) and call `refresh`."""
    from tqdm import tqdm

    layout = "{l_bar}{bar}| {elapsed} < {remaining}"
    with tqdm(total=total, desc=what, file=sys.stderr, disable=None, leave=False, bar_format=layout) as bar:
        yield bar


def moving(bar: "tqdm") -> Callable[[float, float], None]:
    """What a long work calls with how much of it is done, and how much there is: it moves the bar."""

    def move(done: float, total: float) -> None:
        bar.total, bar.n = total, done
        bar.refresh()

    return move


class Interrupt:
    """Whether Ctrl-C was pressed."""

    pressed = False


@contextmanager
def polite_interrupt() -> Iterator[Interrupt]:
    """The first Ctrl-C asks the work inside to stop and keep what is finished; the second one ends it at once."""
    interrupt = Interrupt()

    def ask(number: int, frame: FrameType | None) -> None:
        if interrupt.pressed:
            raise KeyboardInterrupt
        interrupt.pressed = True

    if threading.current_thread() is not threading.main_thread():  # signals belong to the main thread
        yield interrupt
        return
    before = signal.signal(signal.SIGINT, ask)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)


def leave_closed_pipe() -> None:
    """After the reader of our output went away (`| head`): keep Python from complaining when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
