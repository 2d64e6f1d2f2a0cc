"""The folder that `genpipe generate` writes into: numbered files that never take the place of older ones.

A prompt is never a path: files are 0001-1.png (the best), 0001-2.png, ... and 0001-grid.png, one number per prompt and
pipeline, and 0002-both.png, named after the second of two, where two pipelines drew the same prompt.
"""

import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from genpipe.errors import InputError
from pipelines.recipe import Recipe

GRID_COLUMNS = 4
GRID_CELL = 128  # pixels that a small picture is enlarged to in the grid, in whole steps


@dataclass(frozen=True)
class SavedPictures:
    """Where the pictures of one prompt lie, best first; the grid is there where they are several."""

    pictures: list[Path]
    grid: Path | None


class OutputFolder:
    """A folder for results, made where it is missing. Its constructor raises InputError where it cannot be written."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._made = not self.folder.exists()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise InputError(
                f"The folder {str(folder)!r} cannot be written ({reason}); choose another with --out."
            ) from error

    def discard_if_empty(self) -> None:
        """Take the folder away again if it was made here and nothing was written into it."""
        if self._made:
            try:
                self.folder.rmdir()
            except OSError:  # not empty, or gone already
                pass

    def save(self, images: Sequence[Image.Image], recipes: Sequence[Recipe]) -> SavedPictures:
        """Write the pictures of one prompt, best first, each with its recipe, and a grid of them if they are several.

        Raises InputError where a file cannot be written; those that were stay.
        """
        from genpipe.images import make_grid, save_png

        number = self._claim()
        first = self._path(number, "1")
        saved: list[Path] = []
        try:
            for rank, (image, recipe) in enumerate(zip(images, recipes, strict=True), start=1):
                path = self._path(number, str(rank))
                save_png(image, path, recipe.to_json())
                saved.append(path)
        finally:
            if not saved:
                first.unlink(missing_ok=True)
        if len(images) == 1:
            return SavedPictures(saved, None)
        grid = self._path(number, "grid")
        picture = make_grid([_large(image) for image in images], columns=min(GRID_COLUMNS, len(images)))
        save_png(picture, grid, {**recipes[0].to_json(), "pictures": [path.name for path in saved]})
        return SavedPictures(saved, grid)

    def save_beside(
        self, rows: Mapping[str, tuple[SavedPictures, Sequence[Image.Image]]], recipe: Mapping[str, Any]
    ) -> Path:
        """The best pictures of one prompt by each of several pipelines, a row for each, under its name; where they lie.

        rows: pipeline -> its pictures, at least one, as they were saved. recipe: of one of them.
        """
        from genpipe.images import make_grid, save_png

        columns = max(min(GRID_COLUMNS, len(images)) for _, images in rows.values())
        pictures, labels = [], []
        for name, (_, images) in rows.items():
            best = [_large(image) for image in images[:columns]]
            pictures += best + [Image.new("RGB", best[0].size, (255, 255, 255))] * (columns - len(best))
            labels += [name] * len(best) + [""] * (columns - len(best))
        names = [path.name for saved, _ in rows.values() for path in saved.pictures]
        first = [saved.pictures[0] for saved, _ in rows.values()][-1]
        path = first.with_name(first.name.replace("-1.png", "-both.png"))
        grid = make_grid(pictures, columns if columns > 1 else len(rows), labels)
        save_png(grid, path, {**recipe, "pictures": names})
        return path

    def _path(self, number: int, what: str) -> Path:
        return self.folder / f"{number:04d}-{what}.png"

    def _claim(self) -> int:
        """The next free number, taken by creating its first file: two processes never get the same."""
        found = (re.match(r"(\d{4,9})-", name) for name in os.listdir(self.folder))
        number = max((int(match[1]) for match in found if match), default=0) + 1
        while True:
            try:
                os.close(os.open(self._path(number, "1"), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
                return number
            except FileExistsError:
                number += 1
            except OSError as error:
                raise InputError(f"The folder {str(self.folder)!r} cannot be written ({error.strerror}).") from error


def _large(image: Image.Image) -> Image.Image:
    """A small picture enlarged in whole steps, to be seen in a grid."""
    scale = max(1, GRID_CELL // image.width)
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
