"""Attributes of the objects of emoji scenes: sketches, silhouettes, pixel art and tints, drawn from the emoji itself.

Legend: h w sides of a drawn glyph. Pixels are RGBa, multiplied by alpha, as `genpipe.data.glyphs` has them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageChops, ImageFilter, ImageOps

from genpipe.data.layout import Attributes
from genpipe.data.vocabulary import Noun, vocabulary
from genpipe.errors import InputError

STYLES = ("sketch", "silhouette", "pixel art")
TINTS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")  # in the backgrounds' colours
ATTRIBUTES = (*STYLES, *TINTS)

INK = (34, 32, 40)  # RGB of silhouettes and of a sketch's lines
_DARKEST_PAPER = 60.0  # luma below which ink does not show on a background: black and navy
_CELLS = 8  # of pixel art, along the longer side
_LINE = 4  # pixels, of the font's about 128, of a sketch's line
_LIGHT, _SHADE = 0.5, 0.65  # largest share of white and of black in a tint
_LUMA = np.array([0.299, 0.587, 0.114])


def draw_attributes(styled: Sequence[bool] | np.ndarray, generator: np.random.Generator) -> Attributes:
    """An attribute for each True, None for each False: a style for one half, a tint for the other."""
    found: list[str | None] = []
    for wanted in styled:
        kind, choice = generator.random(2).tolist()
        names = STYLES if kind < 0.5 else TINTS
        found.append(names[int(choice * len(names))] if wanted else None)
    return tuple(found)


def shows_on(attribute: str | None, background: str) -> bool:
    """False for ink on the darkest backgrounds and for a tint on its own colour."""
    if attribute in ("sketch", "silhouette"):
        return float(_LUMA @ vocabulary().backgrounds[background].colour) >= _DARKEST_PAPER
    return attribute != background


def named(noun: Noun, attribute: str | None) -> Noun:
    """A name with its attribute: "a red cat", "three pixel art stars", "two sketches of dogs"."""
    if attribute is None:
        return noun
    if attribute in ("sketch", "silhouette"):
        plural = "sketches" if attribute == "sketch" else "silhouettes"
        return Noun(f"{attribute} of {noun.article} {noun.name}", f"{plural} of {noun.plural}", "a")
    article = vocabulary().backgrounds[attribute].names[0][0] if attribute in TINTS else "a"
    return Noun(f"{attribute} {noun.name}", f"{attribute} {noun.plural}", article)


def restyled(bitmap: Image.Image, size: tuple[int, int], attribute: str | None) -> np.ndarray:
    """A glyph's bitmap (RGBa) drawn at size (w, h) with an attribute -> pixels uint8 (h, w, 4), RGBa.

    For a sketch the bitmap is `line_drawing`'s. Raises InputError for an attribute that there is not.
    """
    if attribute is not None and attribute not in ATTRIBUTES:
        raise InputError(f"There is no attribute {attribute!r}; objects have one of {', '.join(ATTRIBUTES)}.")
    if attribute == "pixel art":
        return _pixelated(bitmap, size)
    pixels = bitmap.resize(size, Image.Resampling.LANCZOS)
    if attribute in ("sketch", "silhouette"):
        return _inked(pixels.getchannel(3))
    return _tinted(np.asarray(pixels), attribute) if attribute in TINTS else np.asarray(pixels)


def _inked(alpha: Image.Image) -> np.ndarray:
    """Ink as dense as alpha says."""
    a = np.asarray(alpha)[..., None]  # h, w, 1
    return np.concatenate([np.rint(a / 255 * np.array(INK)).astype(np.uint8), a], axis=-1)


def line_drawing(bitmap: Image.Image) -> Image.Image:
    """A glyph's bitmap (RGBa) as black lines: the inner rim of the shape, and where its brightness changes."""
    margin = 2 * _LINE
    alpha = ImageOps.expand(bitmap.getchannel(3), margin)
    rim = ImageChops.subtract(alpha, alpha.filter(ImageFilter.MinFilter(2 * _LINE + 1)))
    luma = np.asarray(bitmap)[..., :3] @ _LUMA
    bright = ImageOps.expand(Image.fromarray(np.rint(luma).astype(np.uint8)), margin)
    bright = bright.filter(ImageFilter.GaussianBlur(1))
    steps = ImageChops.subtract(bright.filter(ImageFilter.MaxFilter(3)), bright.filter(ImageFilter.MinFilter(3)))
    steps = steps.point([min(max(6 * (level - 16), 0), 255) for level in range(256)])
    lines = ImageChops.lighter(rim, ImageChops.multiply(steps, alpha))
    lines = ImageOps.crop(lines, margin)
    black = Image.new("L", lines.size)
    return Image.merge("RGBa", (black, black, black, lines))


def _pixelated(bitmap: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """At most 8 x 8 cells, each either empty or of one colour, enlarged without blending."""
    cells = [max(1, round(_CELLS * side / max(bitmap.size))) for side in bitmap.size]
    small = np.asarray(bitmap.resize((cells[0], cells[1]), Image.Resampling.BOX)).astype(float)
    alpha = small[..., 3:]
    solid = alpha >= min(96.0, alpha.max() / 2)  # thin objects keep their fullest cells
    colour = np.rint(small[..., :3] * 255 / np.maximum(alpha, 1)).clip(0, 255)
    whole = np.concatenate([colour * solid, 255.0 * solid], axis=-1).astype(np.uint8)
    rows, columns = (np.arange(side) * count // side for side, count in zip(size[::-1], whole.shape[:2], strict=True))
    return whole[rows][:, columns]


def _tinted(pixels: np.ndarray, tint: str) -> np.ndarray:
    """One hue for the whole glyph: the named colour where it has its mean brightness, with white or black elsewhere."""
    alpha = pixels[..., 3:] / 255.0  # h, w, 1
    luma = np.minimum((pixels[..., :3] @ _LUMA)[..., None] / 255, alpha)
    level = luma / np.maximum(alpha, 1 / 255) - luma.sum() / max(alpha.sum(), 1e-6)  # -1 to 1, 0 on average
    colour = np.array(vocabulary().backgrounds[tint].colour) / 255
    colour = np.where(level > 0, colour + (1 - colour) * _LIGHT * level, colour * (1 + _SHADE * level))
    return np.rint(255 * np.concatenate([colour * alpha, alpha], axis=-1)).astype(np.uint8)
