"""The pictures that a run's figures and samples are made of: held out where that is possible, and called so."""

from dataclasses import replace

import numpy as np

from genpipe.data.scenes import EmojiScenes
from genpipe.images import stack_levels
from genpipe.training.config import DataConfig
from genpipe.training.data import emoji_scenes, pairs_of


class Validation:
    """Up to `count` captioned pictures, the same ones all through a run.

    They are held-out emoji scenes, or the first pictures of data.validation, or else of data.source itself. `kind` says
    which: "heldout", or "seen" for pictures that are trained on as well. `scenes` is None for other sources.
    """

    def __init__(self, data: DataConfig, count: int) -> None:
        source = data.validation or data.source
        self.kind = "heldout" if data.validation or source == "scenes" else "seen"
        # Figures of runs with and without these can be compared.
        plain = replace(data, emphasis="", faint_share=0.0, blended_share=0.0)
        self.scenes: EmojiScenes | None = emoji_scenes(plain, "heldout") if source == "scenes" else None
        self._count = count
        self._pairs: tuple[np.ndarray, list[str]] | None = None
        if self.scenes is None:  # what is wrong with files shows at the start
            pairs = pairs_of(source, data.size, count)
            self._pairs = np.stack([picture for picture, _ in pairs]), [caption for _, caption in pairs]

    def pairs(self) -> tuple[np.ndarray, list[str]]:
        """uint8 pictures (n, 3, S, S) and their n captions."""
        if self._pairs is None:
            assert self.scenes is not None
            examples = [self.scenes.example(i) for i in range(self._count)]  # drawn when first needed
            self._pairs = stack_levels([e.pixels for e in examples]), [e.caption for e in examples]
        return self._pairs
