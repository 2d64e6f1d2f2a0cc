"""Which emoji look alike from afar: the ones that small or blurred pictures confuse."""

from collections.abc import Iterable

import numpy as np
from PIL import Image

from genpipe.data.glyphs import Glyphs
from genpipe.data.vocabulary import vocabulary

_SIDE = 4  # pixels that an emoji is seen in, which leave its colours and their places
_GREY = 128


class Likeness:
    """Orders objects of the vocabulary by how they look; what was seen is kept."""

    def __init__(self, glyphs: Glyphs) -> None:
        self._glyphs = glyphs
        self._seen: dict[str, np.ndarray] = {}

    def __getstate__(self) -> dict:
        return {"_glyphs": self._glyphs, "_seen": {}}

    def nearest_first(self, name: str, others: Iterable[str]) -> list[str]:
        """`others`, the one that looks most like `name` first; all are names of the vocabulary."""
        own = self._look(name)
        return sorted(others, key=lambda other: float(np.square(own - self._look(other)).sum()))

    def _look(self, name: str) -> np.ndarray:
        if name not in self._seen:
            bitmap = self._glyphs.bitmap(vocabulary().objects[name].glyph)
            side = max(bitmap.size)
            canvas = Image.new("RGBa", (side, side))
            canvas.paste(bitmap, ((side - bitmap.width) // 2, (side - bitmap.height) // 2))
            rgba = np.asarray(canvas.resize((_SIDE, _SIDE), Image.Resampling.BOX), dtype=np.float32)
            self._seen[name] = rgba[..., :3] + (1 - rgba[..., 3:] / 255) * _GREY
        return self._seen[name]
