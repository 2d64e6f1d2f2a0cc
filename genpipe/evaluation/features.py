"""Features of pictures for distribution.py: of the judge's detector, of a CLIP, or of FID's InceptionV3.

Legend: B, N pictures, H W their sides, S the side that is looked at, D width of the features.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from genpipe.clip.chunks import Chunks
from genpipe.clip.model import CLIP
from genpipe.data.read_ahead import read_ahead
from genpipe.data.scenes import EmojiScenes, Objects
from genpipe.errors import InputError
from genpipe.evaluation.detector import SceneDetector
from genpipe.images import open_picture, resize, shrink, to_unit

INCEPTION_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"  # as torch-fidelity's release calls them
INCEPTION_SIDE = 256


@dataclass(frozen=True)
class Eye:
    """What looks at pictures.

    side: S. fit: pixels (B, 3, H, W) in [0, 1] -> (B, 3, S, S). look: (B, 3, S, S) -> features (B, D).
    """

    side: int
    fit: Callable[[Tensor], Tensor]
    look: Callable[[Tensor], Tensor]


def judge_eye(detector: SceneDetector) -> Eye:
    """The judge's detector: offline, for emoji scenes, and no part of what is judged."""
    side: int = detector.config.size
    return Eye(side, partial(centre_square, side=side), lambda pixels: detector.features(_to(pixels, detector)))


def clip_eye(clip: CLIP) -> Eye:
    """A CLIP's image embeddings, of length 1. Raises InputError for one without an image tower."""
    if not clip.has_image:
        raise InputError("This CLIP reads texts only; give one that looks at pictures.")

    def look(pixels: Tensor) -> Tensor:
        return F.normalize(clip.embed_image(_to(pixels, clip)).float(), dim=-1)

    return Eye(min(clip.image_size), clip.fit_pixels, look)


def inception_eye(weights: Path | None = None, device: torch.device | None = None) -> Eye:
    """FID's InceptionV3, its 2048 pooled features, of torch-fidelity, which is not installed along, nor its weights.

    Pictures: the centre square, by antialiased bicubic at 256 x 256, in 256 levels; torch-fidelity enlarges them to 299
    as TensorFlow did. weights: their file; None looks where torch keeps its downloads. Nothing is downloaded. Raises
    InputError where package or file is missing, or the file holds anything but these tensors.
    """
    path = weights or Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_WEIGHTS
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise InputError(
            "The features of FID need the package torch-fidelity (pip install torch-fidelity) and its weights in "
            f"{str(path)!r}, or where --inception says."
        ) from error
    if not path.is_file():
        raise InputError(
            f"There are no weights of InceptionV3 in {str(path)!r}; download {INCEPTION_WEIGHTS} from torch-fidelity's "
            "releases to there, or name the file with --inception."
        )
    try:
        torch.load(path, weights_only=True)  # torch-fidelity itself would run what a pickle says
        model = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path))
    except Exception as error:  # which one, depends on what the file is
        raise InputError(f"{str(path)!r} does not hold the weights of torch-fidelity's InceptionV3 alone.") from error
    model.to(device)

    def look(pixels: Tensor) -> Tensor:
        return model((pixels * 255).round().to(device=device, dtype=torch.uint8))[0]

    return Eye(INCEPTION_SIDE, partial(centre_square, side=INCEPTION_SIDE), look)


def _to(pixels: Tensor, model: CLIP | SceneDetector) -> Tensor:
    return pixels.to(device=model.device, dtype=model.dtype)


def centre_square(pixels: Tensor, side: int) -> Tensor:
    """Pixels (B, 3, H, W) in [0, 1] -> their centre square at (B, 3, side, side)."""
    height, width = pixels.shape[-2:]
    shorter = min(height, width)
    top, left = (height - shorter) // 2, (width - shorter) // 2
    return resize(pixels[:, :, top : top + shorter, left : left + shorter], side, clamp=True)


@torch.no_grad()
def features(eye: Eye, pictures: Iterable[Tensor], chunk_size: int = 64) -> Tensor:
    """Pictures (3, H, W) in [0, 1], each of any size -> features (N, D) in main memory, in order.

    `chunk_size` pictures are held at a time, fewer where memory runs out. Raises InputError for no picture at all.
    """
    chunks = Chunks(chunk_size)
    waiting: list[Tensor] = []
    found: list[Tensor] = []

    def look() -> None:
        found.extend(part.float().cpu() for part in chunks.run(eye.look, torch.cat(waiting)))
        waiting.clear()

    for picture in pictures:
        waiting.append(eye.fit(picture[None]))
        if len(waiting) == chunk_size:
            look()
    if waiting:
        look()
    if not found:
        raise InputError("There is no picture to look at.")
    return torch.cat(found)


@dataclass(frozen=True)
class FileFeatures:
    """Features (N, D) of the files that could be read, and (path, reason) of those that could not."""

    features: Tensor
    skipped: list[tuple[Path, str]]


def features_of_files(
    eye: Eye, paths: Sequence[Path], report: Callable[[int, int], None] | None = None, chunk_size: int = 64
) -> FileFeatures:
    """Read picture files, a few ahead in threads, and look at them; `report(read, total)` is called after each.

    Broken files are skipped and listed. Raises InputError where none can be read.
    """
    skipped: list[tuple[Path, str]] = []

    def read(path: Path) -> Tensor:
        return eye.fit(to_unit([shrink(open_picture(path), eye.side)]))[0]

    def pictures() -> Iterator[Tensor]:
        for number, (path, future) in enumerate(read_ahead(paths, read), start=1):
            try:
                yield future.result()
            except InputError as error:
                skipped.append((path, str(error)))
            if report is not None:
                report(number, len(paths))

    try:
        return FileFeatures(features(eye, pictures(), chunk_size), skipped)
    except InputError as error:
        if len(skipped) < len(paths):
            raise
        raise InputError(f"None of the {len(paths)} pictures found can be read; the first: {skipped[0][1]}") from error


def features_of_scenes(
    eye: Eye, count: int, size: int, objects: Objects = "all", report: Callable[[int, int], None] | None = None
) -> Tensor:
    """The first `count` held-out emoji scenes, drawn at size x size -> features (count, D)."""
    scenes = EmojiScenes(size=size, split="heldout", objects=objects)

    def pictures() -> Iterator[Tensor]:
        for index in range(count):
            yield to_unit(scenes.draw(scenes.scene(index)).transpose(2, 0, 1))[0]
            if report is not None:
                report(index + 1, count)

    return features(eye, pictures())
