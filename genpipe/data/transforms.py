"""From a picture of any size to a training square: the crops of DALL-E 1 (arXiv 2102.12092, appendices A.1 and B.1).

S is the side of the square, M the shorter side of the picture.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from genpipe import images
from genpipe.errors import InputError


@dataclass(frozen=True)
class CropConfig:
    """How `size` x `size` pixels are cut: a square as large as the picture allows, resized, cropped, flipped.

    spread: part of the room along the longer side in which the first square is placed, around the middle; 0 is the
        centre, 1 is anywhere.
    zoom_min, zoom_max: side after resizing, as multiples of `size`, drawn evenly between the two (whole pixels, both
        included); from it a square of `size` is cut anywhere. A picture is not enlarged for this: the side stays at or
        below the picture's own, M, and reaches `size` only because it must.
    flip: left-right, half of the time. Never for pictures whose captions mention sides.
    mode: of `genpipe.images.resize_picture`, for shrinking; enlarging is bicubic, because area would give blocks.
    """

    size: int
    spread: float = 0.0
    zoom_min: float = 1.0
    zoom_max: float = 1.0
    flip: bool = False
    mode: str = "area"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InputError(f"The crop size is {self.size}; it must be at least 1.")
        if not 0 <= self.spread <= 1:
            raise InputError(f"The crop spread is {self.spread}; it must lie between 0 and 1.")
        if self.mode not in ("area", "bicubic", "bilinear"):
            raise InputError(f"The crop mode is {self.mode!r}; it must be area, bicubic or bilinear.")
        if not 1 <= self.zoom_min <= self.zoom_max:
            raise InputError(f"The crop zooms are {self.zoom_min} and {self.zoom_max}; they must rise from at least 1.")

    @property
    def is_random(self) -> bool:
        """Whether cutting draws random numbers."""
        return self.spread > 0 or self.zoom_max > 1 or self.flip


def centre_crop(size: int) -> CropConfig:
    """The middle square, nothing random: for evaluation and for data that is to stay as it is."""
    return CropConfig(size)


def stage_1_crop(size: int) -> CropConfig:
    """dVAE training: a square anywhere, side 9/8 to 12/8 of `size` by area, a crop anywhere in it, flips."""
    return CropConfig(size, spread=1.0, zoom_min=9 / 8, zoom_max=12 / 8, flip=True)


def stage_2_crop(size: int) -> CropConfig:
    """Transformer training: a square near the centre (3/8 to 5/8 of the room), side 1 to 9/8 of `size`, no flips."""
    return CropConfig(size, spread=1 / 4, zoom_min=1.0, zoom_max=9 / 8)


def crop_of(size: int, config: CropConfig | None) -> CropConfig:
    """The crop of a source that gives pictures of `size`: the centre where none is named, else `config`, checked."""
    if config is not None and config.size != size:
        raise InputError(f"The crop gives {config.size} pixels where the size is {size}; both must be the same.")
    return config if config is not None else centre_crop(size)


def crop(picture: Image.Image, config: CropConfig, generator: np.random.Generator | None = None) -> np.ndarray:
    """Picture of any size and mode -> uint8 (3, S, S).

    `generator` makes every draw and may be None where `config.is_random` is false. The picture is not changed.
    """
    if generator is None:
        if config.is_random:
            raise ValueError("a random crop needs a generator")
        generator = np.random.default_rng(0)  # draws below have one outcome each
    width, height = picture.size
    shorter = min(width, height)
    left, top = (_near_centre(side - shorter, config.spread, generator) for side in (width, height))
    square = picture.crop((left, top, left + shorter, top + shorter))

    zooms = (config.zoom_min, config.zoom_max)
    smallest, largest = (max(config.size, min(shorter, round(zoom * config.size))) for zoom in zooms)
    side = int(generator.integers(smallest, largest + 1))
    square = images.flatten(square)
    if side != shorter:
        square = images.resize_picture(square, side, config.mode if side < shorter else "bicubic")
    levels = np.asarray(square)  # (side, side, 3)

    x, y = (int(offset) for offset in generator.integers(0, side - config.size + 1, size=2))
    levels = levels[y : y + config.size, x : x + config.size]
    if config.flip and generator.random() < 0.5:
        levels = levels[:, ::-1]
    return np.ascontiguousarray(levels.transpose(2, 0, 1))


def _near_centre(room: int, spread: float, generator: np.random.Generator) -> int:
    """Offset of a square that has `room` pixels to move in: whole numbers within `spread` of the room, both ends in."""
    lowest = int(room * (1 - spread) / 2)
    highest = max(lowest, room - lowest) if spread > 0 else lowest
    return int(generator.integers(lowest, highest + 1))
