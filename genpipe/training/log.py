"""Figures of a run as log.csv and as TensorBoard events."""

import csv
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from genpipe.errors import InputError

HEAD = ["step", "seconds", "name", "value"]


class Log:
    """log.csv (step, seconds of training, name, value) and TensorBoard events of a run that stands at `step`.

    Rows past that step, which a killed run left behind, are dropped. With enabled=False nothing is written, but
    pictures are counted. Raises InputError when the folder cannot be written.
    """

    def __init__(self, folder: Path, step: int, enabled: bool = True) -> None:
        self.folder, self.step, self.enabled = folder, step, enabled
        self.pictures, self.since = 0, time.monotonic()
        self.started = time.monotonic()

    def __enter__(self) -> "Log":
        if self.enabled:
            from torch.utils.tensorboard import SummaryWriter  # heavy, and only the writing process needs it

            path, fresh = self.folder / "log.csv", self.folder / ".log.csv.new"
            rows = [row for row in _read_rows(path) if int(row[0]) <= self.step]
            with self._complaining():
                with open(fresh, "w", newline="") as handle:
                    csv.writer(handle).writerows([HEAD, *rows])
                os.replace(fresh, path)
                self.handle = open(path, "a", newline="")
                self.events = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.step + 1)
            self.started -= float(rows[-1][1]) if rows else 0.0
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if not self.enabled:
            return
        try:
            with self._complaining():
                try:
                    self.handle.close()
                finally:
                    self.events.close()
        except InputError:
            if error is None:  # else a full disk has been complained about already
                raise

    def count(self, pictures: int) -> None:
        self.pictures += pictures

    def rate(self) -> float:
        """Pictures per second since the last call."""
        now = time.monotonic()
        rate = self.pictures / max(now - self.since, 1e-9)
        self.pictures, self.since = 0, now
        return rate

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append the named values of a step."""
        if not self.enabled:
            return
        seconds = round(time.monotonic() - self.started, 1)
        with self._complaining():
            csv.writer(self.handle).writerows([step, seconds, name, value] for name, value in values.items())
            self.handle.flush()
            for name, value in values.items():
                self.events.add_scalar(name, value, step)

    @contextmanager
    def _complaining(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"the log of {self.folder} cannot be written ({error}); make room and run again to resume from the "
                "last checkpoint."
            ) from error


def _read_rows(path: Path) -> list[list[str]]:
    """Whole rows of a log: a killed run may have left half of one."""
    if not path.is_file():
        return []
    with open(path, newline="") as handle:
        return [row for row in csv.reader(handle) if len(row) == len(HEAD) and row[0].isdigit() and row[3]]
