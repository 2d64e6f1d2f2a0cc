"""Retrieval over a data set: how often a picture finds its caption among all captions, and the other way round.

Recall@k and median rank, in one pass over blocks of the similarity matrix (CLIP, arXiv 2103.00020, section 3).
Legend: N pairs, D embedding width, B a block of pairs.

The rank of a pair, from 1: 1 + how many wrong candidates score better than the right one + half of those that score the
same. Scores that differ by less than TIE are the same: float32 does not tell them apart, and a CLIP that gives one
embedding to everything then ends in the middle, not at the top. A candidate is not wrong if its pair has the same
caption, word by word, or the same picture, pixel by pixel. A caption that would fit in other words is wrong all the
same, so where captions say little ("a dog"), no model reaches a recall@1 of 1.
"""

import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from genpipe.clip.model import CLIP
from genpipe.data.image_text import ImageTextFolder
from genpipe.data.read_ahead import read_ahead
from genpipe.data.samples import Pair, Report
from genpipe.data.scenes import EmojiScenes
from genpipe.data.shards import Shards
from genpipe.data.transforms import CropConfig, crop
from genpipe.errors import InputError
from genpipe.evaluation.clip import embed_pairs
from genpipe.images import open_picture
from genpipe.training.data import is_shards

TIE = 1e-6
RECALLS = (1, 5, 10)


class Source(NamedTuple):
    """Pairs to read once, and the report that counts those that cannot be read."""

    pairs: Iterator[Pair]
    report: Report


def open_source(clip: CLIP, source: str, count: int | None = None) -> Source:
    """The first `count` pairs (None: all) of shards, of a folder or list, or of held-out emoji scenes ("scenes").

    Cut from the centre at the size that `clip` sees, with its own filter. Raises InputError for what is missing, and
    for all of the scenes, which never end.
    """
    size = min(clip.image_size)
    how = CropConfig(size, mode=clip.config["interpolation"])
    if source == "scenes":
        if count is None:
            raise InputError("Emoji scenes never end; say how many of them to take.")
        scenes = EmojiScenes(size=size, split="heldout")
        return Source(((e.pixels.transpose(2, 0, 1), e.caption) for e in map(scenes.example, range(count))), Report())
    if is_shards(source):
        shards = Shards(source, size, how)
        return Source(islice(shards.once(), count), shards.report())
    folder = ImageTextFolder(source, size, how)
    return Source(islice(_folder_pairs(folder, how), count), folder.report())


def _folder_pairs(folder: ImageTextFolder, how: CropConfig) -> Iterator[Pair]:
    """Every sound pair once; a broken picture is left out, where the folder itself would repeat its neighbour."""
    reading = read_ahead(folder.paths, lambda path: crop(open_picture(path), how))
    for (path, future), caption in zip(reading, folder.captions, strict=True):
        try:
            pixels = future.result()
        except InputError:
            folder.report().skip("picture cannot be read", str(path))
            continue
        folder.report().read += 1
        yield pixels, caption


def retrieval_figures(
    clip: CLIP, pairs: Iterable[Pair], recalls: Sequence[int] = RECALLS, chunk_size: int = 128, block_size: int = 2048
) -> dict[str, Any]:
    """Figures of retrieval among `pairs` (pixels uint8 (3, S, S), caption), which are read once, one chunk at a time.

    Returns pairs (N), distinct_captions, distinct_pictures, and for picture_to_caption and caption_to_picture each
    recall@k for the `recalls` and median_rank. Memory: two blocks of embeddings and of similarities, and some 400 bytes
    a pair; the embeddings themselves lie in temporary files (8 N D bytes).

    Raises InputError where there is no pair, and FloatingPointError where CLIP's numbers are broken.
    """
    if min(recalls, default=0) < 1 or min(chunk_size, block_size) < 1:
        raise InputError(f"Recalls and sizes start at 1, got {tuple(recalls)}, {chunk_size} and {block_size}.")
    captions, pictures = _Groups(), _Groups()
    with tempfile.TemporaryFile() as image_file, tempfile.TemporaryFile() as text_file:
        stream = iter(pairs)
        while rows := list(islice(stream, chunk_size)):
            texts = [caption for _, caption in rows]
            image, text = embed_pairs(clip, np.stack([pixels for pixels, _ in rows]), texts, chunk_size)
            if not bool(image.isfinite().all() and text.isfinite().all()):
                raise FloatingPointError("CLIP's embeddings for retrieval are not finite; its weights are damaged.")
            _append(image_file, image)
            _append(text_file, text)
            for pixels, caption in rows:
                captions.add(caption.encode("utf-8", "surrogatepass"))
                pictures.add(np.ascontiguousarray(pixels).tobytes())
        if not len(captions):
            raise InputError("Retrieval needs at least one picture with a caption.")
        shape = (len(captions), clip.embedding_dim)
        image_rows, text_rows = (np.memmap(file, np.float32, mode="r", shape=shape) for file in (image_file, text_file))
        groups = (torch.tensor(captions.numbers), torch.tensor(pictures.numbers))
        by_picture, by_caption = ranks(image_rows, text_rows, groups, block_size, clip.device)
    return {
        "pairs": shape[0],
        "distinct_captions": captions.distinct,
        "distinct_pictures": pictures.distinct,
        "picture_to_caption": _summary(by_picture, recalls),
        "caption_to_picture": _summary(by_caption, recalls),
    }


@torch.no_grad()
def ranks(
    image: np.ndarray,
    text: np.ndarray,
    groups: tuple[Tensor, Tensor],
    block_size: int,
    device: torch.device,
) -> tuple[np.ndarray, np.ndarray]:
    """Ranks (N,) of each pair's caption for its picture, and of its picture for its caption; see above.

    image, text: normalised embeddings (N, D), float32, possibly in a file. groups: numbers (N,) that are equal for the
    same caption, and for the same picture.
    """
    count = len(image)
    starts = range(0, count, block_size)
    own = torch.from_numpy(
        np.concatenate([(image[s : s + block_size] * text[s : s + block_size]).sum(1) for s in starts])
    )
    by_picture, by_caption = torch.ones(count, dtype=torch.float64), torch.ones(count, dtype=torch.float64)
    for row in starts:
        rows = slice(row, row + block_size)
        left = torch.from_numpy(np.array(image[rows])).to(device)  # B, D
        for column in starts:
            columns = slice(column, column + block_size)
            right = torch.from_numpy(np.array(text[columns])).to(device)
            similarity = left @ right.T  # B, B
            wrong = torch.ones_like(similarity, dtype=torch.bool)
            for group in groups:
                wrong &= (group[rows, None] != group[None, columns]).to(device)
            by_picture[rows] += _ahead(similarity, own[rows, None].to(device), wrong).sum(1).cpu()
            by_caption[columns] += _ahead(similarity, own[None, columns].to(device), wrong).sum(0).cpu()
    return by_picture.numpy(), by_caption.numpy()


def _ahead(similarity: Tensor, own: Tensor, wrong: Tensor) -> Tensor:
    """1 where a wrong candidate scores better than the right one, 0.5 where it scores the same, else 0."""
    better, level = similarity > own + TIE, (similarity - own).abs() <= TIE
    return (better.double() + 0.5 * level.double()) * wrong


def _summary(ranks: np.ndarray, recalls: Sequence[int]) -> dict[str, float]:
    figures = {f"recall@{k}": float((ranks <= k).mean()) for k in recalls}
    return {**figures, "median_rank": float(np.median(ranks))}


def _append(file: IO[bytes], rows: Tensor) -> None:
    file.write(np.ascontiguousarray(rows.float().cpu().numpy(), np.float32).tobytes())
    file.flush()


class _Groups:
    """Numbers things so that equal ones share a number; keeps a digest of each, not the thing."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self._known: dict[bytes, int] = {}

    def add(self, thing: bytes) -> None:
        digest = hashlib.blake2b(thing, digest_size=16).digest()
        self.numbers.append(self._known.setdefault(digest, len(self._known)))

    @property
    def distinct(self) -> int:
        return len(self._known)

    def __len__(self) -> int:
        return len(self.numbers)
