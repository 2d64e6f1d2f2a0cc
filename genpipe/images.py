"""The only place for value ranges: PIL <-> [0, 1] <-> [-1, 1], -> L*a*b*; the one resize, grids, PNG with its recipe.

Files are read in picture_files.py, whose functions are also found here.
B pictures, H height, W width. "Unit" pixels are float in [0, 1], "signed" pixels float in [-1, 1]; both (B, 3, H, W).
"""

import json
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch.nn import functional as F

from genpipe.errors import InputError
from genpipe.picture_files import (
    MAX_PIXELS,
    decode_picture,
    find_pictures,
    flatten,
    one_line,
    open_file,
    open_picture,
    read_header,
)

__all__ = [
    "MAX_PIXELS",
    "decode_picture",
    "find_pictures",
    "flatten",
    "make_grid",
    "open_picture",
    "read_recipe",
    "resize",
    "resize_picture",
    "save_png",
    "shrink",
    "signed_to_unit",
    "stack_levels",
    "to_levels",
    "to_pil",
    "to_unit",
    "unit_to_signed",
]

RECIPE_KEY = "genpipe"  # keyword of the PNG text chunk
RECIPE_LIMIT = 1_000_000  # characters; Pillow refuses compressed text above 1 MiB as well
LARGE_PIXELS = 16_000_000  # beyond this a picture is shrunk by a whole factor before it becomes floats
_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "area": Image.Resampling.BOX,
}


# Value ranges ---------------------------------------------------------------------------------------------------------


def to_unit(images: Sequence[Image.Image] | np.ndarray | torch.Tensor) -> torch.Tensor:
    """Pictures -> float32 (B, 3, H, W) in [0, 1].

    `images`: PIL pictures of one size, or uint8 pixels (B, 3, H, W) or (3, H, W) as array or tensor; a tensor stays on
    its device. The way back, `to_pil`, returns the same 256 levels. Raises InputError for an empty list, pictures of
    different sizes or another layout.
    """
    if isinstance(images, np.ndarray | torch.Tensor):
        levels = torch.from_numpy(images.copy()) if isinstance(images, np.ndarray) else images
    else:
        sizes = sorted({image.size for image in images})
        if len(sizes) != 1:
            raise InputError(f"Pictures of one size are needed, got the sizes {sizes}; resize or crop them first.")
        arrays = [np.asarray(flatten(image)) for image in images]  # (H, W, 3)
        levels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    if levels.ndim == 3:
        levels = levels[None]
    if levels.dtype != torch.uint8 or levels.ndim != 4 or levels.shape[1] != 3:
        raise InputError(f"uint8 pixels (B, 3, H, W) are needed, got {levels.dtype} {tuple(levels.shape)}.")
    return levels.contiguous().float().div_(255)


def stack_levels(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Drawn pictures, uint8 (H, W, 3) each, of one size -> uint8 (B, 3, H, W), the layout of every batch."""
    return np.stack(pictures).transpose(0, 3, 1, 2)


def to_levels(pixels: torch.Tensor) -> np.ndarray:
    """Unit pixels (B, 3, H, W) or (3, H, W) -> uint8 (B, H, W, 3), rounded, values outside [0, 1] clipped.

    Raises ValueError where a pixel is not a finite number.
    """
    pixels = pixels.detach()[None] if pixels.ndim == 3 else pixels.detach()
    if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
        raise ValueError(f"float pixels (B, 3, H, W) are needed, got {pixels.dtype} {tuple(pixels.shape)}")
    if not torch.isfinite(pixels).all():
        raise ValueError("a pixel is not a finite number")
    levels = pixels.float().clamp(0, 1).mul(255).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).cpu().numpy()


def to_pil(pixels: torch.Tensor) -> list[Image.Image]:
    """Unit pixels (B, 3, H, W) or (3, H, W) -> RGB pictures; see `to_levels`."""
    return [Image.fromarray(level) for level in to_levels(pixels)]


def unit_to_signed(pixels: torch.Tensor) -> torch.Tensor:
    """[0, 1] -> [-1, 1], any shape."""
    return pixels * 2 - 1


def signed_to_unit(pixels: torch.Tensor) -> torch.Tensor:
    """[-1, 1] -> [0, 1], any shape. Not clipped: `to_pil` does that."""
    return (pixels + 1) / 2


def lab(pixels: torch.Tensor) -> torch.Tensor:
    """sRGB (B, 3, H, W) in [0, 1] -> CIE L*a*b* under D65, in which distances are about those that people see."""
    linear = torch.where(pixels <= 0.04045, pixels / 12.92, ((pixels + 0.055) / 1.055) ** 2.4)
    to_xyz = pixels.new_tensor(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    )
    white = pixels.new_tensor([0.95047, 1.0, 1.08883])[:, None, None]
    xyz = torch.einsum("ij,bjhw->bihw", to_xyz, linear) / white
    f = torch.where(xyz > (6 / 29) ** 3, xyz.clamp(min=1e-9) ** (1 / 3), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = f.unbind(dim=1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


def resize(
    pixels: torch.Tensor,
    size: int | tuple[int, int],
    mode: str = "bicubic",
    antialias: bool = True,
    clamp: bool = False,
) -> torch.Tensor:
    """The one resize function of the project, for training and inference alike; differentiable.

    `pixels` (B, 3, H, W) float of any range; `size` the side of a square or (height, width); `mode` one of bicubic,
    bilinear, area, nearest, where `antialias` (a filter that widens when shrinking, as Pillow's does) counts for the
    first two. Bicubic overshoots: `clamp` cuts the result to [0, 1]. Computed in float32, returned in the given dtype.
    """
    if pixels.ndim != 4 or not pixels.is_floating_point():
        raise ValueError(f"float pixels (B, 3, H, W) are needed, got {pixels.dtype} {tuple(pixels.shape)}")
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise InputError(f"A picture cannot be resized to {width}x{height}; both sides must be at least 1.")
    if (height, width) != tuple(pixels.shape[-2:]):
        smooth = mode in ("bicubic", "bilinear")
        resized = F.interpolate(
            pixels.float(),
            size=(height, width),
            mode=mode,
            align_corners=False if smooth else None,
            antialias=antialias and smooth,
        )
        pixels = resized.to(pixels.dtype)
    return pixels.clamp(0, 1) if clamp else pixels


def resize_picture(picture: Image.Image, size: int | tuple[int, int], mode: str = "bicubic") -> Image.Image:
    """`resize` for an 8-bit picture that is still PIL's, several times faster: for loading training data.

    Bicubic and bilinear agree with `resize` to one level, but where they overshoot the ends of the range; so does area
    wherever the sides are divided by a whole number.
    """
    height, width = (size, size) if isinstance(size, int) else size
    return picture.resize((width, height), _FILTERS[mode])


def shrink(picture: Image.Image, side: int) -> Image.Image:
    """A very large picture by a whole factor smaller, its shorter side at least 4 * `side`; others as they are.

    100 megapixels would be 1.2 GB of floats. Four times the side is left for the real resize.
    """
    factor = min(picture.size) // (4 * side)
    return picture.reduce(factor) if picture.width * picture.height > LARGE_PIXELS and factor > 1 else picture


# Grids and PNG files with their recipe --------------------------------------------------------------------------------


def make_grid(
    images: Sequence[Image.Image],
    columns: int,
    labels: Sequence[str] | None = None,
    scale: int = 1,
    padding: int = 2,
    label_size: int = 12,
) -> Image.Image:
    """Pictures in rows of `columns`, on white, `padding` pixels around each, enlarged `scale` times without smoothing.

    `labels`: one text below each picture, wrapped to its width, at most three lines of `label_size` pixels. A cell is
    as large as the largest picture. Raises InputError for no pictures, numbers below 1, or another number of labels.
    """
    if not images or min(columns, scale, label_size) < 1 or padding < 0:
        raise InputError("A grid needs pictures; columns, scale and label size start at 1, padding at 0.")
    if labels is not None and len(labels) != len(images):
        raise InputError(f"A grid of {len(images)} pictures needs as many labels, got {len(labels)}.")
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    cell = scale * max(image.width for image in images)
    picture_height = scale * max(image.height for image in images)
    font = ImageFont.load_default(label_size)
    wrapped = [_wrap(label, font, cell) for label in labels] if labels is not None else [[]] * len(images)
    line_height = label_size + label_size // 4
    row_height = picture_height + line_height * max(len(lines) for lines in wrapped)

    grid = Image.new(
        "RGB", (columns * (cell + padding) + padding, rows * (row_height + padding) + padding), (255, 255, 255)
    )
    draw = ImageDraw.Draw(grid)
    for index, (image, lines) in enumerate(zip(images, wrapped, strict=True)):
        x = padding + (index % columns) * (cell + padding)
        y = padding + (index // columns) * (row_height + padding)
        large = flatten(image).resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
        grid.paste(large, (x + (cell - large.width) // 2, y + (picture_height - large.height) // 2))
        for number, line in enumerate(lines):
            draw.text((x, y + picture_height + number * line_height), line, fill=(0, 0, 0), font=font)
    return grid


def _wrap(text: str, font: Any, width: int, max_lines: int = 3) -> list[str]:
    lines: list[str] = [""]
    for word in text[:1000].split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > max_lines:
        lines = [*lines[: max_lines - 1], lines[max_lines - 1] + " ..."]
    return [_shorten(line, font, width) for line in lines if line]


def _shorten(line: str, font: Any, width: int) -> str:
    while len(line) > 1 and font.getlength(line) > width:
        line = line[:-1]
    return line


def save_png(image: Image.Image, path: str | Path, recipe: dict[str, Any]) -> None:
    """Write a PNG that carries `recipe` as JSON in its text chunk "genpipe"; makes the folder where it is missing.

    Atomic: the file is whole or absent, an older one stays until the new one is complete. Raises InputError where the
    folder cannot be made or written or the disk is full, and for a recipe that JSON cannot hold.
    """
    path = Path(path)
    try:
        text = json.dumps(recipe, allow_nan=False)  # ASCII only, so that any tool shows it and lone surrogates survive
    except (TypeError, ValueError) as error:
        raise InputError(f"The recipe of {str(path)!r} cannot be written as JSON: {one_line(error)}.") from error
    if len(text) > RECIPE_LIMIT:
        raise InputError(f"The recipe of {str(path)!r} has {len(text):,} characters, more than {RECIPE_LIMIT:,}.")
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text(RECIPE_KEY, text)
    temporary = path.parent / f".genpipe-{uuid.uuid4().hex}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb") as file:
                image.save(file, format="PNG", pnginfo=chunks)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        reason = one_line(error)
        raise InputError(f"{str(path)!r} cannot be written ({reason}); choose another folder or free space.") from error


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The recipe that `save_png` wrote into a PNG; nothing is decoded but the header.

    Raises InputError, one sentence with the path, for a file that is no PNG, has no recipe, or one that is too long or
    not a JSON object.
    """
    name = repr(str(path))
    with open_file(path) as file:
        text = read_header(file, name, ("PNG",)).info.get(RECIPE_KEY)
    if not isinstance(text, str):
        raise InputError(f"The picture {name} carries no recipe; only PNG files written by genpipe do.")
    if len(text) > RECIPE_LIMIT:
        raise InputError(f"The recipe in {name} has {len(text):,} characters, more than {RECIPE_LIMIT:,}.")
    try:
        recipe = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"The recipe in {name} is not valid JSON ({one_line(error)}).") from error
    if not isinstance(recipe, dict):
        raise InputError(f"The recipe in {name} is a JSON {type(recipe).__name__}, an object is needed.")
    return recipe
