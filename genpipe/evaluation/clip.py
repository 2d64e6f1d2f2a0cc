"""What CLIP understands of captioned scenes: retrieval, and telling a caption from its twin (CLIP, 2103.00020, 3.1 and 6)."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from genpipe.clip.model import CLIP
from genpipe.data.scenes import EmojiScenes
from genpipe.images import stack_levels, to_unit

TWIN_KINDS = ("swapped", "recounted", "recoloured")


@torch.no_grad()
def embed_pairs(clip: CLIP, pictures: np.ndarray, captions: Sequence[str], chunk_size: int = 128) -> tuple[Tensor, Tensor]:
    """Normalised image and text embeddings, each (n, D), of uint8 pictures (n, 3, H, W) and their captions."""
    images, texts = [], []
    for start in range(0, len(captions), chunk_size):
        pixels = to_unit(pictures[start : start + chunk_size]).to(clip.device)
        images.append(clip.encode_image(pixels).normalized)
        texts.append(clip.encode_text(list(captions[start : start + chunk_size])).normalized)
    return torch.cat(images), torch.cat(texts)


def retrieval_accuracy(clip: CLIP, scenes: EmojiScenes, count: int = 100, groups: int = 1, first: int = 0) -> float:
    """Share of pictures whose own caption scores best among `count` captions, averaged over `groups` disjoint groups.

    Two scenes of a group may share their caption word by word; such a caption counts as right.
    """
    hits = 0
    for group in range(groups):
        examples = [scenes.example(first + group * count + i) for i in range(count)]
        captions = [example.caption for example in examples]
        image, text = embed_pairs(clip, stack_levels([example.pixels for example in examples]), captions)
        best = (image @ text.T).argmax(dim=1).tolist()
        hits += sum(captions[b] == captions[i] for i, b in enumerate(best))
    return hits / (count * groups)


def twin_accuracy(clip: CLIP, scenes: EmojiScenes, kind: str, count: int = 200, first: int = 0) -> float:
    """Share of pictures that score their own caption above their twin's (chance 0.5); `kind` is one of TWIN_KINDS."""
    twins = [scenes.twins(first + i, kind=kind) for i in range(count)]
    pictures = stack_levels([t.pixels for t in twins] + [t.twin_pixels for t in twins])
    captions = [t.caption for t in twins] + [t.twin_caption for t in twins]
    image, text = embed_pairs(clip, pictures, captions)
    own = (image * text).sum(dim=1)
    other = (image * text.roll(count, dims=0)).sum(dim=1)
    return float((own > other).float().mean())
