"""How well a head tells the classes of pictures with texts: loss, accuracy, and the mean accuracy over the classes."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from genpipe.clip.image_text import ImageTextClassifier, PairFeatures, encode_pairs
from genpipe.clip.model import CLIP
from genpipe.clip.retrieval import fit_for_clip
from genpipe.data.labelled_pairs import LabelledPairs

CHUNK = 64


class PairTable(NamedTuple):
    """Features of n pairs and their labels (n,), on the processor, to be read again and again."""

    features: PairFeatures
    labels: Tensor

    def at(self, places: Tensor, device: torch.device) -> PairFeatures:
        """The features of some pairs, on a device."""
        return PairFeatures._make(None if x is None else x[places].to(device) for x in self.features)


def read_chunks(
    clip: CLIP, pairs: LabelledPairs, rows: Sequence[int], size: int = CHUNK
) -> Iterator[tuple[Tensor, list[str], Tensor]]:
    """Pixels (b, 3, H, W) at CLIP's size, b texts and labels (b,) of the pairs `rows`, in order, b <= size."""
    for start in range(0, len(rows), size):
        found = [pairs[row] for row in rows[start : start + size]]
        pixels = torch.stack([fit_for_clip(clip, pair.picture) for pair in found])
        yield pixels, [pair.text for pair in found], torch.tensor([pair.label for pair in found])


@torch.no_grad()
def tabulate(clip: CLIP, pairs: LabelledPairs, rows: Sequence[int], states: bool) -> PairTable:
    """The features of the pairs `rows`, computed once."""
    chunks, labels = [], []
    for pixels, texts, label in read_chunks(clip, pairs, rows):
        chunks.append([None if x is None else x.cpu() for x in encode_pairs(clip, pixels, texts, states)])
        labels.append(label)
    columns = [None if column[0] is None else torch.cat(column) for column in zip(*chunks, strict=True)]
    return PairTable(PairFeatures._make(columns), torch.cat(labels))


@torch.no_grad()
def classify_pairs(
    classifier: ImageTextClassifier, pairs: LabelledPairs, rows: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (n, C) and labels (n,) of the pairs `rows`, or of all, read from disk."""
    chosen = range(len(pairs)) if rows is None else rows
    found = [
        (classifier.probabilities(pixels, texts).cpu().clamp(min=1e-12).log(), labels)
        for pixels, texts, labels in read_chunks(classifier.clip, pairs, chosen)
    ]
    return torch.cat([row for row, _ in found]), torch.cat([labels for _, labels in found])


def label_figures(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> dict[str, float]:
    """Logits or log-probabilities (n, C) and labels (n,) -> loss (with a weight for each class), accuracy, and
    balanced_accuracy: the mean over the classes that occur, so that a rare one counts as much as a frequent one.
    """
    right = logits.argmax(dim=1) == labels
    per_class = [float(right[labels == label].float().mean()) for label in labels.unique()]
    return {
        "loss": float(F.cross_entropy(logits, labels, weight=weights)),
        "accuracy": float(right.float().mean()),
        "balanced_accuracy": sum(per_class) / len(per_class),
    }


def inverse_frequencies(labels: Iterable[int], count: int) -> Tensor:
    """One weight for each of `count` classes: n / (count n_c), so that every class weighs the same in all; mean 1.

    A class that never occurs gets 0.
    """
    numbers = torch.bincount(torch.tensor(list(labels)), minlength=count).float()
    return torch.where(numbers > 0, numbers.sum() / (count * numbers.clamp(min=1)), torch.zeros(count))
