"""What is hard to tell from afar: emoji that look alike, and emoji on a background of nearly their own colours."""

import functools
from collections.abc import Iterable, Mapping

import numpy as np
from PIL import Image, ImageCms

from genpipe.data.glyphs import Glyphs
from genpipe.data.vocabulary import vocabulary

_SIDE = 4  # pixels that an emoji is seen in, which leave its colours and their places
_GREY = 128
_FAINT_SHARE = 0.15  # of the combinations of an object and a background that count as faint

Colour = tuple[int, int, int]  # RGB, 0 to 255


@functools.cache
def _to_lab() -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")


def _lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB (H, W, 3), 0 to 255 -> CIE L*a*b*, the same shape."""
    picture = ImageCms.applyTransform(Image.fromarray(rgb.round().astype(np.uint8)), _to_lab())
    assert picture is not None  # it is None only where the picture is changed in place
    lightness, a, b = (np.asarray(channel, dtype=np.float32) for channel in picture.split())
    return np.stack([lightness / 2.55, a - 128, b - 128], axis=-1)


class Likeness:
    """Orders objects of the vocabulary by how they look; what was seen is kept."""

    def __init__(self, glyphs: Glyphs) -> None:
        self._glyphs = glyphs
        self._seen: dict[str, np.ndarray] = {}

    def __getstate__(self) -> dict:
        return {"_glyphs": self._glyphs, "_seen": {}}

    def nearest_first(self, name: str, others: Iterable[str]) -> list[str]:
        """`others`, the one that looks most like `name` first; all are names of the vocabulary."""
        own = self._on(name, (_GREY, _GREY, _GREY))
        return sorted(others, key=lambda other: float(np.square(own - self._on(other, (_GREY, _GREY, _GREY))).sum()))

    def faint(self, names: Iterable[str], colours: Mapping[str, Colour]) -> frozenset[tuple[str, str]]:
        """(object, background) combinations of the least contrast, the fifteen hundredths of all that stand out least.

        names: of the vocabulary; colours: RGB of each background, 0 to 255. Contrast is the RMS distance of the emoji,
        seen from afar, from the background's colour in CIE L*a*b*, where distances are about those that people see: of
        what small models fail to draw, it tells more than a distance in RGB.
        """
        contrast = {
            (name, background): float(np.square(_lab(self._on(name, colour)) - _lab(np.full((1, 1, 3), colour))).mean())
            for name in names
            for background, colour in colours.items()
        }
        return frozenset(sorted(contrast, key=contrast.__getitem__)[: round(_FAINT_SHARE * len(contrast))])

    def _on(self, name: str, colour: Colour) -> np.ndarray:
        """The emoji from afar on a plain background, (side, side, 3), 0 to 255."""
        rgba = self._look(name)
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
