"""The stage of the judge's detector: emoji strewn at random, seen through blur, noise, other colours and JPEG.

Legend: B pictures, S side, G cells a side, K kinds of objects.
"""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from genpipe.data.scenes import EmojiScenes, Placement, Scene
from genpipe.errors import InputError
from genpipe.evaluation.detector import CELL, SceneDetector, detector_loss
from genpipe.images import make_grid, stack_levels, to_pil, to_unit
from genpipe.parts import load_part
from genpipe.training.config import Recipe
from genpipe.training.data import Batch, emoji_scenes
from genpipe.training.stage import Logs, Stage, build

_MOST = 6  # objects in a picture
_TRIES = 12  # of finding room for one more
_SIZES = ((0.3, 0.5), (0.5, 0.98))  # of objects among others, and of one alone
_SHOWN, _VALIDATED = 16, 500


class DetectorStage(Stage):
    """Draws its own pictures, whatever the scenes of the batch: any objects, any places, things that are no objects."""

    part = "detector"

    def __init__(self, recipe: Recipe, resumed: Path | None) -> None:
        if recipe.data.source != "scenes":
            raise InputError(
                f'the detector learns emoji scenes only; set data.source to "scenes", not {recipe.data.source!r}.'
            )
        self.scenes = emoji_scenes(recipe.data, "all")
        settings = {**recipe.model, "names": list(self.scenes.objects)}
        self.model = load_part(SceneDetector, recipe.init) if recipe.init else build(SceneDetector, settings)
        if self.model.config.size != recipe.data.size:
            raise InputError(
                f"data.size is {recipe.data.size}, the detector's {self.model.config.size}; make both the same."
            )
        self.scrambled = recipe.objective["scrambled"]
        self.held_out = EmojiScenes(recipe.data.size, split="heldout", seed=recipe.data.seed)

    def collate(self, pictures: np.ndarray, captions: list[str], generator: np.random.Generator) -> Batch:
        """Pixels uint8 (B, 3, S, S), and the heat and labels (B, G, G) that the detector should answer."""
        rows = [strewn(self.scenes, generator, self.scrambled) for _ in range(len(pictures))]
        targets = [self.target(placements) for _, placements in rows]
        return {
            "pixels": torch.from_numpy(stack_levels([worsened(pixels, generator) for pixels, _ in rows])),
            "heat": torch.from_numpy(np.stack([heat for heat, _ in targets])),
            "labels": torch.from_numpy(np.stack([labels for _, labels in targets])),
        }

    def target(self, placements: list[Placement]) -> tuple[np.ndarray, np.ndarray]:
        """Heat float32 and labels int64 (G, G) of what is in a picture."""
        cells = self.model.config.size // CELL
        heat, labels = np.zeros((cells, cells), np.float32), np.full((cells, cells), -1, np.int64)
        rows, columns = np.mgrid[:cells, :cells] + 0.5
        for placement in placements:
            x, y = placement.x * cells, placement.y * cells
            spread = max(0.6, placement.size * cells / 9)  # of the bell around the centre, in cells
            bell = np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * spread**2)).astype(np.float32)
            heat = np.maximum(heat, np.minimum(bell, 0.99))
        for placement in placements:
            row, column = (min(int(share * cells), cells - 1) for share in (placement.y, placement.x))
            heat[row, column] = 1
            around = (slice(max(row - 1, 0), row + 2), slice(max(column - 1, 0), column + 2))
            labels[around] = self.model.config.names.index(placement.object)
        return heat, labels

    def loss(self, model: nn.Module, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, Logs]:
        centres, kinds = model(to_unit(batch["pixels"]))
        loss, focal, kind = detector_loss(centres.float(), kinds.float(), batch["heat"], batch["labels"])
        own = batch["labels"] >= 0
        right = (kinds.argmax(dim=1) == batch["labels"])[own].float().mean()
        return loss, {"focal": focal.detach(), "kind": kind.detach(), "right": right}

    def validate(self) -> dict[str, float]:
        """Held-out scenes as they are drawn: the share of pictures in which exactly what is there was seen."""
        share = exact_share(self.model, self.held_out, _VALIDATED)
        return {f"heldout_{name}": value for name, value in share.items()}

    def sample(self) -> Image.Image:
        """Training pictures under what is seen in them."""
        rows = [strewn(self.scenes, np.random.default_rng((5, i)), self.scrambled) for i in range(_SHOWN)]
        pictures = to_unit(stack_levels([worsened(p, np.random.default_rng((6, i))) for i, (p, _) in enumerate(rows)]))
        seen = self.model.detect(pictures.to(self.model.device))
        labels = [", ".join(each.name for each in found) or "nothing" for found in seen]
        return make_grid(to_pil(pictures), columns=8, labels=labels, scale=2)


def exact_share(model: SceneDetector, scenes: EmojiScenes, count: int, first: int = 0) -> dict[str, float]:
    """By kind ("single", "count", "pair"), the share of scenes whose objects were seen as often as they are there."""
    right: dict[str, list[bool]] = {"single": [], "count": [], "pair": []}
    for start in range(first, first + count, 100):
        batch = [scenes.scene(i) for i in range(start, min(start + 100, first + count))]
        pixels = to_unit(stack_levels([scenes.draw(scene) for scene in batch])).to(model.device)
        for scene, found in zip(batch, model.detect(pixels), strict=True):
            there = sorted(placement.object for placement in scene.placements)
            right[scene.kind].append(sorted(each.name for each in found) == there)
    return {kind: float(np.mean(hits)) for kind, hits in right.items() if hits}


def strewn(scenes: EmojiScenes, generator: np.random.Generator, scrambled: float) -> tuple[np.ndarray, list[Placement]]:
    """A picture uint8 (S, S, 3) of up to six objects anywhere, and what is in it.

    scrambled: share of objects whose pieces are exchanged or that are blurred away, so that they are none any more;
    half as many pictures are noise of any grain.
    """
    if generator.random() < scrambled / 2:
        return noise(scenes.size, generator), []
    count = int(generator.integers(_MOST + 1))
    low, high = _SIZES[count <= 1]
    placements: list[Placement] = []
    same = generator.random() < 0.4
    name = scenes.objects[generator.integers(len(scenes.objects))]
    for _ in range(count):
        if not same:
            name = scenes.objects[generator.integers(len(scenes.objects))]
        for _ in range(_TRIES):
            size = float(generator.uniform(low, high))
            x, y = generator.uniform(size / 2, 1 - size / 2, size=2)
            if all(max(abs(x - p.x), abs(y - p.y)) > 0.45 * (size + p.size) for p in placements):
                placements.append(Placement(name, float(x), float(y), size))
                break
    background = tuple(int(level) for level in generator.integers(256, size=3))
    colour = (background[0], background[1], background[2])
    scene = Scene("count", (name,), len(placements), "", None, None, tuple(placements), colour)
    pixels, there = scenes.draw(scene), []
    for placement in placements:
        if generator.random() < scrambled:
            _scramble(pixels, placement, generator)
        else:
            there.append(placement)
    return pixels, there


def noise(side: int, generator: np.random.Generator) -> np.ndarray:
    """A picture uint8 (side, side, 3) of random colours in patches of any one size, from single pixels to halves."""
    grain = round(float(np.exp(generator.uniform(np.log(2), np.log(side)))))
    colours = generator.integers(256, size=(grain, grain, 3)).astype(np.float32)
    middle, contrast = generator.uniform(0, 255, size=3), generator.uniform(0.1, 1)
    levels = np.clip(middle + contrast * (colours - middle), 0, 255).astype(np.uint8)
    how = (Image.Resampling.NEAREST, Image.Resampling.BICUBIC)[generator.integers(2)]
    return np.array(Image.fromarray(levels).resize((side, side), how))


def _scramble(pixels: np.ndarray, placement: Placement, generator: np.random.Generator) -> None:
    """Make the object at a place unrecognisable: its quarters of quarters in another order, or blurred to a blot."""
    side = pixels.shape[0]
    half = max(4, round(placement.size * side / 2))
    left, top = (min(max(round(c * side) - half, 0), side - 2 * half) for c in (placement.x, placement.y))
    left, top = max(left, 0), max(top, 0)
    patch = pixels[top : top + 2 * half, left : left + 2 * half]
    height, width = patch.shape[:2]
    if generator.random() < 0.5:
        pieces = [(y, x) for y in range(4) for x in range(4)]
        h, w = height // 4, width // 4
        copy = patch.copy()
        for (y, x), number in zip(pieces, generator.permutation(16), strict=True):
            v, u = pieces[number]
            patch[y * h : (y + 1) * h, x * w : (x + 1) * w] = copy[v * h : (v + 1) * h, u * w : (u + 1) * w]
        return
    small = Image.fromarray(patch).resize((3, 3), Image.Resampling.BOX)
    patch[:] = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def worsened(pixels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A picture uint8 (S, S, 3) as a model might have drawn it: blurred, noisy, of shifted colours, JPEG-compressed."""
    side = pixels.shape[0]
    picture = Image.fromarray(pixels)
    if generator.random() < 0.6:  # as pictures that were drawn smaller and enlarged
        small = int(generator.integers(side * 3 // 8, side + 1))
        picture = picture.resize((small, small), Image.Resampling.BICUBIC)
        picture = picture.resize((side, side), Image.Resampling.BICUBIC)
    levels = np.array(picture, dtype=np.float32)
    if generator.random() < 0.5:
        levels *= generator.uniform(0.85, 1.15, size=3)
        levels += generator.uniform(-15, 15, size=3)
    if generator.random() < 0.5:
        levels += np.float32(generator.uniform(0, 20)) * generator.standard_normal(levels.shape, np.float32)
    result = np.clip(np.round(levels), 0, 255).astype(np.uint8)
    if generator.random() < 0.3:
        buffer = io.BytesIO()
        Image.fromarray(result).save(buffer, "JPEG", quality=int(generator.integers(30, 96)))
        result = np.asarray(Image.open(buffer))
    return result
