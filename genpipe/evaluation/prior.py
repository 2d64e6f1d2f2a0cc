"""How near the prior's image embeddings come to the true ones, and the text embedding without it (2204.06125, 5).

Legend: n pictures with captions, D CLIP width, W width of CLIP's text states, L text positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from genpipe.clip.model import CLIP
from genpipe.dalle2.prior import Prior, TextCondition, sample
from genpipe.data.scenes import EmojiScenes
from genpipe.errors import InputError
from genpipe.images import stack_levels, to_unit


@dataclass(frozen=True)
class EncodedPairs:
    """Captioned pictures as CLIP sees them: embeddings (n, D) not normalised, text states (n, L, W) and mask (n, L)."""

    captions: list[str]
    image: Tensor
    text: Tensor
    states: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, rows: slice) -> "EncodedPairs":
        return EncodedPairs(self.captions[rows], self.image[rows], self.text[rows], self.states[rows], self.mask[rows])


@torch.no_grad()
def encode_pairs(clip: CLIP, pictures: np.ndarray, captions: Sequence[str], chunk_size: int = 128) -> EncodedPairs:
    """uint8 pictures (n, 3, H, W) and their captions -> EncodedPairs. Raises InputError when there is none."""
    if not len(captions) or len(pictures) != len(captions):
        raise InputError(f"pairs of pictures and captions are needed, got {len(pictures)} and {len(captions)}.")
    images, texts = [], []
    for start in range(0, len(captions), chunk_size):
        images.append(clip.embed_image(to_unit(pictures[start : start + chunk_size]).to(clip.device)))
        texts.append(clip.encode_text(list(captions[start : start + chunk_size])))
    return EncodedPairs(
        list(captions),
        torch.cat(images),
        torch.cat([text.embedding for text in texts]),
        torch.cat([text.states for text in texts]),
        torch.cat([text.mask for text in texts]),
    )


@torch.no_grad()
def null_text(clip: CLIP) -> TextCondition:
    """The empty caption as the prior takes it: embedding (1, D), states (1, L, W), mask (1, L)."""
    text = clip.encode_text([""])
    return text.embedding, text.states, text.mask


def predicted_embeddings(
    prior: Prior,
    pairs: EncodedPairs,
    null: TextCondition,
    num_inference_steps: int = 25,
    guidance_scale: float = 1.0,
    draws: int = 2,
    chunk_size: int = 128,
) -> Tensor:
    """One sampled image embedding per caption (n, D), caption i with seed i. One step gives the prior's mean."""
    predicted = []
    for start in range(0, len(pairs), chunk_size):
        rows = pairs[start : start + chunk_size]
        text, seeds = (rows.text, rows.states, rows.mask), [[start + i] for i in range(len(rows))]
        drawn = sample(prior, *text, seeds, null, num_inference_steps, guidance_scale=guidance_scale, draws=draws)
        predicted.append(drawn[:, 0])
    return torch.cat(predicted)


def cosine_figures(predicted: Tensor, pairs: EncodedPairs) -> dict[str, float]:
    """Mean cosines of predicted image embeddings (n, D), and of what they should be.

    true: predicted with the caption's own picture; text: with its caption; shuffled: with the next caption's picture.
    text_true: the caption's own embedding with the picture, what using no prior achieves; true_shuffled: one picture
    with the next, what chance achieves.
    """
    predicted, image, text = (F.normalize(x.float(), dim=-1) for x in (predicted, pairs.image, pairs.text))

    def cosine(a: Tensor, b: Tensor) -> float:
        return float((a * b).sum(dim=-1).mean())

    other = image.roll(1, dims=0)
    return {
        "cosine_true": cosine(predicted, image),
        "cosine_text": cosine(predicted, text),
        "cosine_shuffled": cosine(predicted, other),
        "cosine_text_true": cosine(text, image),
        "cosine_true_shuffled": cosine(image, other),
    }


def nearest(embedding: Tensor, image: Tensor) -> Tensor:
    """Index (n,) of the picture, among those with the embeddings `image` (k, D), nearest to each embedding (n, D)."""
    return (F.normalize(embedding.float(), dim=-1) @ F.normalize(image.float(), dim=-1).T).argmax(dim=1)


def retrieval(embedding: Tensor, pairs: EncodedPairs, among: int = 100) -> float:
    """Share of embeddings (n, D), one per caption, whose nearest picture in their group of `among` is their own.

    Groups are consecutive; the last may be smaller. A picture with the same caption word by word counts as right.
    """
    hits = 0
    for start in range(0, len(pairs), among):
        group = pairs.captions[start : start + among]
        found = nearest(embedding[start : start + among], pairs.image[start : start + among]).tolist()
        hits += sum(group[i] == caption for i, caption in zip(found, group, strict=True))
    return hits / len(pairs)


def prior_figures(
    prior: Prior,
    clip: CLIP,
    scenes: EmojiScenes,
    count: int = 1000,
    num_inference_steps: int = 25,
    guidance_scale: float = 1.0,
    draws: int = 2,
) -> dict[str, float]:
    """Cosines and retrieval on the first `count` scenes: the prior's samples, the prior's mean, the text embedding.

    mean_cosine_true is that of the prior's answer to pure noise, its expectation over all pictures of the caption: no
    sample can be expected to come as near. Raises InputError for a count below 2.
    """
    if count < 2:
        raise InputError(f"{count} captions are too few to compare with one another; ask for at least 2.")
    examples = [scenes.example(i) for i in range(count)]
    pictures = stack_levels([example.pixels for example in examples])
    pairs = encode_pairs(clip, pictures, [example.caption for example in examples])
    null = null_text(clip)
    drawn = predicted_embeddings(prior, pairs, null, num_inference_steps, guidance_scale, draws)
    mean = predicted_embeddings(prior, pairs, null, 1, 1.0, 1)
    return {
        **cosine_figures(drawn, pairs),
        "mean_cosine_true": cosine_figures(mean, pairs)["cosine_true"],
        "retrieval": retrieval(drawn, pairs),
        "mean_retrieval": retrieval(mean, pairs),
        "text_retrieval": retrieval(pairs.text, pairs),
    }
