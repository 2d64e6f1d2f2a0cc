"""When a run has stopped getting better: the best validation so far, and how many came after it (early stopping)."""

import math
from typing import Any


class EarlyStopping:
    """Watches one validation figure, the lower the better; after `patience` validations without a better one: over.

    patience 0 never ends a run; the best weights are kept all the same. `best`, `step` and `worse` (validations since
    the best) are all of its state; see `record`.
    """

    def __init__(self, figure: str, patience: int) -> None:
        self.figure, self.patience = figure, patience
        self.best, self.step, self.worse = math.inf, 0, 0

    def improved(self, figures: dict[str, float], step: int) -> bool:
        """Take in the figures of a validation; True if they are the best so far (the first always are)."""
        value = figures[self.figure]
        if value < self.best or self.step == 0:
            self.best, self.step, self.worse = value, step, 0
            return True
        self.worse += 1
        return False

    @property
    def over(self) -> bool:
        """Whether training on has brought nothing for too long."""
        return 0 < self.patience <= self.worse

    def record(self) -> dict[str, Any]:
        """The state, for a checkpoint."""
        return {"best": self.best, "step": self.step, "worse": self.worse}

    def restore(self, record: dict[str, Any]) -> None:
        """Take over the state of a checkpoint."""
        self.best, self.step, self.worse = float(record["best"]), int(record["step"]), int(record["worse"])
