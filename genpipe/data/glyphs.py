"""Colour emoji as small pictures: finds the font, renders each glyph once, keeps it scaled to the sizes in use."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from genpipe.data.styles import line_drawing, restyled
from genpipe.errors import InputError

FONT_VARIABLE = "GENPIPE_EMOJI_FONT"
_FONT_NAME = "NotoColorEmoji.ttf"
_FONT_FOLDERS = (
    "/usr/share/fonts/truetype/noto",
    "/usr/share/fonts/noto",
    "/usr/share/fonts/noto-emoji",
    "/usr/share/fonts/google-noto-emoji",
    "/usr/share/fonts/google-noto-color-emoji-fonts",
    "/usr/local/share/fonts",
    "~/.local/share/fonts",
    "~/.fonts",
    "~/Library/Fonts",
    "/Library/Fonts",
)
_HOW_TO_GET_IT = (
    f"install Debian's fonts-noto-color-emoji or give the path of a {_FONT_NAME} (font=... or {FONT_VARIABLE})"
)
_BITMAP_SIZE = 109  # the one size that the font's CBDT bitmaps have
_CACHE_BYTES = 64 * 2**20  # scaled glyphs kept per process; beyond it, glyphs are scaled anew at each use


def find_font(font: str | Path | None = None) -> Path:
    """Path of the colour emoji font: the argument, else the environment's GENPIPE_EMOJI_FONT, else the usual folders.

    Raises InputError when the named file does not exist, or when none is named and none is found.
    """
    named = font if font is not None else os.environ.get(FONT_VARIABLE) or None
    if named is not None:
        path = Path(named).expanduser()
        if not path.is_file():
            raise InputError(f"There is no colour emoji font at {path}: {_HOW_TO_GET_IT}.")
        return path
    for folder in _FONT_FOLDERS:
        path = Path(folder).expanduser() / _FONT_NAME
        if path.is_file():
            return path
    raise InputError(f"No colour emoji font was found on this computer: {_HOW_TO_GET_IT}.")


class Glyphs:
    """Scaled emoji of one font, ready for compositing. Opens the font at first use; pickles without font and cache.

    A scaled glyph is a pair (colour, keep) of uint8 (h, w, 3): colour is already multiplied by alpha, keep is 255 -
    alpha, three times. `colour + keep * background / 255` composites, without overflow.
    """

    def __init__(self, font: str | Path | None = None):
        self.font = font
        self._reset()

    def _reset(self) -> None:
        self._face: ImageFont.FreeTypeFont | None = None
        self._bitmaps: dict[str, Image.Image] = {}
        self._scaled: dict[tuple[str, int, str | None], tuple[np.ndarray, np.ndarray]] = {}
        self._cached_bytes = 0

    def __getstate__(self) -> dict:
        return {"font": self.font}

    def __setstate__(self, state: dict) -> None:
        self.font = state["font"]
        self._reset()

    def _open(self) -> ImageFont.FreeTypeFont:
        path = find_font(self.font)
        try:
            return ImageFont.truetype(str(path), _BITMAP_SIZE, layout_engine=ImageFont.Layout.BASIC)
        except OSError as error:
            raise InputError(f"{path} cannot be opened as a colour emoji font ({error}): {_HOW_TO_GET_IT}.") from error

    def bitmap(self, glyph: str) -> Image.Image:
        """The glyph at the font's own size, cropped to its ink: RGBa (multiplied by alpha), about 128 pixels a side.

        Raises InputError when the font lacks the glyph.
        """
        found = self._bitmaps.get(glyph)
        if found is None:
            if self._face is None:
                self._face = self._open()
            canvas = Image.new("RGBA", (192, 192))
            ImageDraw.Draw(canvas).text((24, 24), glyph, font=self._face, embedded_color=True)
            ink = canvas.getchannel("A").getbbox()
            if ink is None or not np.asarray(canvas)[..., :3].any():
                raise InputError(f"The font {find_font(self.font)} has no colour emoji {glyph!r}: {_HOW_TO_GET_IT}.")
            found = canvas.crop(ink).convert("RGBa")
            self._bitmaps[glyph] = found
        return found

    def _lines(self, glyph: str) -> Image.Image:
        """The glyph's line drawing, made once."""
        key = f"{glyph} sketch"
        if key not in self._bitmaps:
            self._bitmaps[key] = line_drawing(self.bitmap(glyph))
        return self._bitmaps[key]

    def scaled(self, glyph: str, side: int, attribute: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The pair (colour, keep) of the glyph, its longer side `side` pixels, its aspect kept. Read-only: shared.

        attribute: see `genpipe.data.styles`.
        """
        key = (glyph, side, attribute)
        found = self._scaled.get(key)
        if found is None:
            bitmap = self._lines(glyph) if attribute == "sketch" else self.bitmap(glyph)
            factor = side / max(bitmap.size)
            width, height = (max(1, round(length * factor)) for length in bitmap.size)
            pixels = restyled(bitmap, (width, height), attribute)
            alpha = pixels[..., 3:]
            # Lanczos overshoots at edges: a colour above its alpha would overflow on a bright background.
            found = (np.minimum(pixels[..., :3], alpha), np.repeat(255 - alpha, 3, axis=2))
            size = found[0].nbytes + found[1].nbytes
            if self._cached_bytes + size <= _CACHE_BYTES:
                self._scaled[key] = found
                self._cached_bytes += size
        return found
