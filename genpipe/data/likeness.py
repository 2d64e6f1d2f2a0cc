"""What is hard to tell from afar: emoji that look alike, and emoji on a background of nearly their own colours."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from PIL import Image

from genpipe.data.backgrounds import Colour
from genpipe.data.glyphs import Glyphs
from genpipe.data.vocabulary import vocabulary

_SIDE = 4  # pixels that an emoji is seen in, which leave its colours and their places
_GREY = 128
_FAINT_SHARE = 0.15  # of the combinations of an object and a background that count as faint


class Likeness:
    """Orders objects of the vocabulary by how they look; what was seen is kept."""

    def __init__(self, glyphs: Glyphs) -> None:
        self._glyphs = glyphs
        self._seen: dict[str, np.ndarray] = {}

    def __getstate__(self) -> dict:
        return {"_glyphs": self._glyphs, "_seen": {}}

    def nearest_first(self, name: str, others: Iterable[str]) -> list[str]:
        """`others`, the one that looks most like `name` first; all are names of the vocabulary."""
        others = list(others)
        own, rest = np.split(self._on((_GREY, _GREY, _GREY), [name, *others]), [1])
        distance = np.square(own - rest).sum(axis=(1, 2, 3))
        return [others[i] for i in np.argsort(distance, kind="stable")]

    def faint(self, names: Sequence[str], colours: Mapping[str, Colour]) -> frozenset[tuple[str, str]]:
        """(object, background) combinations of the least contrast, the fifteen hundredths of all that stand out least.

        names: of the vocabulary; colours: RGB of each background, 0 to 255. Contrast is the RMS distance of the emoji,
        seen from afar, from the background's colour in CIE L*a*b*, where distances are about those that people see: of
        what small models fail to draw, it tells more than a distance in RGB.
        """
        from genpipe.images import lab, stack_levels, to_unit  # scenes that ask for nothing faint do without torch

        contrast: dict[tuple[str, str], float] = {}
        for background, colour in colours.items():
            emoji = lab(to_unit(stack_levels(list(self._on(colour, names).round().astype(np.uint8)))))  # names, 3, H, W
            plain = lab(to_unit(np.asarray(colour, dtype=np.uint8)[:, None, None]))  # 1, 3, 1, 1
            squares = (emoji - plain).square().mean(dim=(1, 2, 3)).tolist()
            contrast.update({(name, background): square for name, square in zip(names, squares, strict=True)})
        return frozenset(sorted(contrast, key=contrast.__getitem__)[: round(_FAINT_SHARE * len(contrast))])

    def _on(self, colour: Colour, names: Sequence[str]) -> np.ndarray:
        """The emoji from afar on a plain background, (names, side, side, 3), 0 to 255."""
        rgba = np.stack([self._look(name) for name in names])
        return rgba[..., :3] + (1 - rgba[..., 3:] / 255) * np.asarray(colour, dtype=np.float32)

    def _look(self, name: str) -> np.ndarray:
        """Red, green and blue times alpha, and alpha, (side, side, 4), 0 to 255."""
        if name not in self._seen:
            bitmap = self._glyphs.bitmap(vocabulary().objects[name].glyph)
            side = max(bitmap.size)
            canvas = Image.new("RGBa", (side, side))
            canvas.paste(bitmap, ((side - bitmap.width) // 2, (side - bitmap.height) // 2))
            self._seen[name] = np.asarray(canvas.resize((_SIDE, _SIDE), Image.Resampling.BOX), dtype=np.float32)
        return self._seen[name]
