"""What CLIP understands of captioned pictures: retrieval, telling a caption from its twin (2103.00020, 3.1 and 6)."""

from collections.abc import Sequence
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from genpipe.clip.model import CLIP
from genpipe.data.scenes import EmojiScenes
from genpipe.data.twins import TwinKind
from genpipe.errors import InputError
from genpipe.images import stack_levels, to_unit

TWIN_KINDS: tuple[TwinKind, ...] = get_args(TwinKind)


@torch.no_grad()
def embed_pairs(
    clip: CLIP, pictures: np.ndarray, captions: Sequence[str], chunk_size: int = 128
) -> tuple[Tensor, Tensor]:
    """Normalised image and text embeddings, each (n, D), of uint8 pictures (n, 3, H, W) and their captions."""
    images, texts = [], []
    for start in range(0, len(captions), chunk_size):
        pixels = to_unit(pictures[start : start + chunk_size]).to(clip.device)
        images.append(clip.encode_image(pixels).normalized)
        texts.append(clip.encode_text(list(captions[start : start + chunk_size])).normalized)
    return torch.cat(images), torch.cat(texts)


def retrieval_share(clip: CLIP, pictures: np.ndarray, captions: Sequence[str], among: int = 100) -> float:
    """Share of pictures (n, 3, H, W) whose own caption scores best among the `among` captions of their group.

    Groups are consecutive; the last may be smaller. Two pictures of a group may share their caption word by word; such
    a caption counts as right. Raises InputError when there is no picture.
    """
    if not len(captions):
        raise InputError("retrieval needs at least one picture with a caption.")
    hits = 0
    for start in range(0, len(captions), among):
        group = captions[start : start + among]
        image, text = embed_pairs(clip, pictures[start : start + among], group)
        best = (image @ text.T).argmax(dim=1).tolist()
        hits += sum(group[b] == caption for b, caption in zip(best, group, strict=True))
    return hits / len(captions)


def retrieval_accuracy(clip: CLIP, scenes: EmojiScenes, count: int = 100, groups: int = 1, first: int = 0) -> float:
    """Share of scenes whose own caption scores best among `count` captions, averaged over `groups` disjoint groups."""
    examples = [scenes.example(first + i) for i in range(count * groups)]
    pictures = stack_levels([example.pixels for example in examples])
    return retrieval_share(clip, pictures, [example.caption for example in examples], count)


def twin_accuracy(clip: CLIP, scenes: EmojiScenes, kind: TwinKind, count: int = 200, first: int = 0) -> float:
    """Share of pictures that score their own caption above their twin's (chance 0.5), over `count` scenes and twins."""
    twins = [scenes.twins(first + i, kind=kind) for i in range(count)]
    pictures = stack_levels([t.pixels for t in twins] + [t.twin_pixels for t in twins])
    captions = [t.caption for t in twins] + [t.twin_caption for t in twins]
    image, text = embed_pairs(clip, pictures, captions)
    own = (image * text).sum(dim=1)
    other = (image * text.roll(count, dims=0)).sum(dim=1)
    return int((own > other).sum()) / len(captions)
