"""A drawing in a thread of its own, so that whoever waits for it can look at it, stop it, or walk away."""

import dataclasses
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from pipelines.family import Family
from pipelines.recipe import Recipe, recipe_of_call
from pipelines.request import Progress

NEWS_SECONDS = 0.5  # between two views of a drawing
PREVIEW_SHARE = 0.1  # of the time that may go into previews


@dataclass(frozen=True)
class Order:
    """One prompt for one pipeline or several in turn. The numbers are checked by the pipelines."""

    prompt: str
    pipelines: tuple[str, ...]
    num_candidates: int
    keep: int
    seed: int


@dataclass(frozen=True)
class Finished:
    """What one pipeline drew, best first: every picture's recipe has its score and seed."""

    images: list[Image.Image]
    recipes: list[Recipe]
    complete: bool  # False where it was stopped before all candidates were drawn


@dataclass(frozen=True)
class View:
    """A drawing as it stands. Each is a whole of its own and never changes."""

    pipeline: str  # the one that draws now
    before: int = 0  # orders whose turn comes first
    progress: Progress | None = None
    fraction: float = 0.0  # share of the whole order that is done, in [0, 1]
    preview: tuple[Image.Image, ...] = ()  # the candidates so far, the running ones as far as they have come
    finished: Mapping[str, Finished] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


class Line:
    """Orders that wait for one machine: first come, first served."""

    def __init__(self) -> None:
        self._waiting: list[object] = []
        self._moved = threading.Condition()

    def join(self, ticket: object) -> None:
        """Stand at the end; any object will do as a ticket."""
        with self._moved:
            self._waiting.append(ticket)

    def leave(self, ticket: object) -> None:
        """Make room for the next."""
        with self._moved:
            self._waiting.remove(ticket)
            self._moved.notify_all()

    def before(self, ticket: object) -> int:
        """How many stand before; 0 also for one who has left."""
        with self._moved:
            return self._waiting.index(ticket) if ticket in self._waiting else 0

    def wait(self, ticket: object, seconds: float) -> bool:
        """Wait at most so long for one's turn; whether it has come."""
        with self._moved:
            return self._moved.wait_for(lambda: self._waiting.index(ticket) == 0, seconds)


class Drawing:
    """An order that is carried out in the background: `start` it, `follow` it, `stop` it.

    Args:
        line: orders in the same line are carried out one after another.
    """

    def __init__(self, family: Family, order: Order, line: Line) -> None:
        self.family, self.order, self._line = family, order, line
        self._view = View(order.pipelines[0])
        self._error: BaseException | None = None
        self._stopping, self._over = threading.Event(), threading.Event()
        self._next_look = 0.0  # when the next preview is due, on the monotonic clock
        # No daemon, whatever thread makes it: a program that ends tells it to stop, and waits for the current step.
        self._thread = threading.Thread(target=self._run, name="drawing", daemon=False)

    def start(self) -> None:
        """Stand in line, once; begin when the turn comes."""
        self._line.join(self)
        self._thread.start()

    def stop(self) -> None:
        """Ask for an end after the current step; what is finished by then is kept. May be called at any time."""
        self._stopping.set()

    @property
    def stopping(self) -> bool:
        """Whether it was asked to end, or the program is ending."""
        return self._stopping.is_set() or not threading.main_thread().is_alive()

    def follow(self) -> Iterator[View]:
        """A view of the drawing twice a second, and one when it is over.

        Raises what the pipeline raised: InputError for an order it refuses, FloatingPointError for damaged weights.
        """
        while not self._over.wait(NEWS_SECONDS):
            yield dataclasses.replace(self._view, before=self._line.before(self))
        yield self._view
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while not self._line.wait(self, 0.1) and not self.stopping:
                pass
            for index, name in enumerate(self.order.pipelines):
                if not self.stopping:
                    self._draw(index, name)
        except BaseException as error:  # handed over to the thread that follows
            self._error = error
        finally:
            self._line.leave(self)
            self._over.set()

    def _draw(self, index: int, name: str) -> None:
        order, pipeline = self.order, self.family.pipeline(name)
        share = 1 / len(order.pipelines)
        self._next_look = time.monotonic() + NEWS_SECONDS

        def report(progress: Progress) -> bool:
            fraction = (index + progress.fraction) * share
            self._tell(progress=progress, fraction=fraction, preview=self._look(progress))
            return self.stopping

        self._tell(pipeline=name, progress=None, fraction=index * share, preview=())
        with self._heard_warnings():
            drawn = pipeline(
                order.prompt, num_candidates=order.num_candidates, keep=order.keep, seed=order.seed, callback=report
            )
        # Here, in the thread that drew: a recipe tells the number of threads.
        sampling = pipeline.resolve_sampling()
        candidates = order.num_candidates if pipeline.ranks else order.keep
        recipe = recipe_of_call(self.family, name, sampling, drawn.prompts[0], order.seed, candidates)
        recipes = [
            dataclasses.replace(recipe, seed=seed, score=score)
            for seed, score in zip(drawn.seeds[0], drawn.scores[0], strict=True)
        ]
        finished = Finished(drawn.images[0], recipes, drawn.complete)
        self._tell(fraction=(index + 1) * share, preview=(), finished={**self._view.finished, name: finished})

    def _look(self, progress: Progress) -> tuple[Image.Image, ...]:
        """The preview with the running candidates in their places; looked at now and then, and when they are done."""
        now = time.monotonic()
        seen = self._view.preview
        enlarging = progress.stage == "upsampler"  # what was drawn stays in view
        if enlarging or (now < self._next_look and progress.step < progress.num_steps):
            return seen
        running = progress.preview()
        self._next_look = now + max(NEWS_SECONDS, (time.monotonic() - now) / PREVIEW_SHARE)
        return (*seen[: progress.finished], *running)

    def _tell(self, **changes: Any) -> None:
        self._view = dataclasses.replace(self._view, **changes)

    @contextmanager
    def _heard_warnings(self) -> Iterator[None]:
        """Keep the warnings for users that this thread gives, each once. Entered by one at a time, whose turn it is."""
        listening = threading.get_ident()
        with warnings.catch_warnings():
            shown_before = warnings.showwarning

            def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
                if threading.get_ident() != listening:
                    shown_before(message, category, *place, **more)
                elif category is UserWarning and str(message) not in self._view.warnings:
                    self._tell(warnings=(*self._view.warnings, str(message)))

            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = show
            yield
