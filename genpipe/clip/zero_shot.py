"""Zero-shot classification: class names -> prompts -> a linear classifier (CLIP, arXiv 2103.00020, 3.1.2 and 3.1.4).

Legend: C classes, T templates, B pictures, D embedding width.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from genpipe.clip.chunks import Chunks
from genpipe.clip.model import CLIP
from genpipe.clip.retrieval import read_for_clip
from genpipe.clip.templates import choose_templates, fill
from genpipe.data.labelled import check_class_names
from genpipe.data.read_ahead import read_ahead
from genpipe.errors import InputError
from genpipe.identity import weights_identity
from genpipe.images import find_pictures
from genpipe.parts import CONFIG_NAME, load_part, save_part


class ZeroShotClassifier(ModelMixin, ConfigMixin):
    """One direction per class in the space of one CLIP, made of text alone; see `save_classifier`.

    Arguments (all stored in config.json):
        names: the classes, at least two, in the order of the outputs.
        templates: what the prompts were made of; each has {} for the name.
        embedding_dim: D.
        logit_scale: the CLIP's own, already exponentiated and clipped.
        clip_identity: genpipe.identity.weights_identity of the CLIP.

    `weights` (C, D), float32, has rows of length 1. Raises InputError for names or templates that cannot be used.
    """

    @register_to_config
    def __init__(
        self,
        names: Sequence[str],
        templates: Sequence[str],
        embedding_dim: int,
        logit_scale: float,
        clip_identity: str,
    ) -> None:
        super().__init__()
        checked = check_class_names(names)
        self.register_to_config(names=list(checked), templates=list(choose_templates(templates)))
        self.weights: Tensor
        self.register_buffer("weights", torch.zeros(len(checked), embedding_dim))

    @property
    def names(self) -> tuple[str, ...]:
        """The classes, in the order of the outputs."""
        return tuple(self.config["names"])

    @property
    def templates(self) -> tuple[str, ...]:
        """What the prompts were made of."""
        return tuple(self.config["templates"])

    def forward(self, image_embedding: Tensor) -> Tensor:
        """Image embeddings (B, D) of any length -> logits (B, C): the logit scale times the cosine similarity."""
        cosine = F.normalize(image_embedding.float(), dim=-1) @ self.weights.to(image_embedding.device).T  # B, C
        return self.config["logit_scale"] * cosine

    def probabilities(self, image_embedding: Tensor) -> Tensor:
        """Image embeddings (B, D) -> (B, C), rows that add up to 1: softmax of the logits (section 3.1.2)."""
        return self(image_embedding).softmax(dim=-1)

    def check_clip(self, clip: CLIP) -> None:
        """Raise InputError unless `clip` is the one whose text embeddings these weights are."""
        if weights_identity(clip) != self.config["clip_identity"]:
            raise InputError(
                "This zero-shot classifier was built with another CLIP; choose that one, or build it again from its "
                "class names."
            )


@torch.no_grad()
def build_classifier(
    clip: CLIP,
    names: Sequence[str],
    templates: str | Sequence[str] = "plain",
    chunk_size: int = 128,
    report: Callable[[int, int], None] | None = None,
) -> ZeroShotClassifier:
    """Class names -> classifier: the prompts of a class are embedded, normalised, averaged and normalised again.

    `templates`: see `choose_templates`. CLIP reads `chunk_size` prompts at once, half as many each time memory runs
    out; besides the C x D weights no more is held. `report(done, total)` counts prompts.

    Raises InputError for names and templates that cannot be used and for two classes whose prompts are the same to this
    CLIP; FloatingPointError where its numbers are broken.
    """
    names, templates = check_class_names(names), choose_templates(templates)
    _check_told_apart(clip, names, templates)
    identity, scale = weights_identity(clip), float(clip.clipped_logit_scale().detach())
    classifier = ZeroShotClassifier(list(names), list(templates), clip.embedding_dim, scale, identity)
    total = torch.zeros(len(names), clip.embedding_dim, device=clip.device)  # C, D
    chunks = Chunks(chunk_size)
    count = len(names) * len(templates)
    for start in range(0, count, chunk_size):
        numbers = range(start, min(start + chunk_size, count))  # templates of the first class, of the second, ...
        prompts = [fill(templates[n % len(templates)], names[n // len(templates)]) for n in numbers]
        rows = _embed(chunks, lambda texts: clip.encode_text(texts).embedding, prompts, "text embeddings")
        classes = torch.tensor([n // len(templates) for n in numbers], device=rows.device)
        total.index_add_(0, classes, rows)
        if report is not None:
            report(numbers.stop, count)
    classifier.weights = F.normalize(total, dim=-1)
    return classifier.to(clip.device).eval()


def check_classifier_folder(folder: str | os.PathLike[str]) -> None:
    """Raise InputError unless `folder` is missing, empty, or holds a classifier, whose place a new one may take."""
    path = Path(folder)
    try:
        config = path / CONFIG_NAME
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return
        held = json.loads(config.read_text(encoding="utf-8")).get("_class_name") if config.is_file() else None
    except (OSError, ValueError, AttributeError):
        held = None
    if held != ZeroShotClassifier.__name__:
        raise InputError(f"{str(folder)!r} exists and holds no classifier; choose another place for this one.")


def save_classifier(classifier: ZeroShotClassifier, folder: str | os.PathLike[str]) -> None:
    """Write config.json and one safetensors file, whole or not at all; an older classifier there is replaced.

    Raises InputError where something else is in its place or the folder cannot be written.
    """
    check_classifier_folder(folder)
    save_part(classifier, folder)


def load_classifier(folder: str | os.PathLike[str], clip: CLIP | None = None) -> ZeroShotClassifier:
    """A classifier that `save_classifier` wrote, for `clip`; None leaves out the check that it was built with it.

    Raises InputError for what `load_part` refuses, weights that are no directions, and another CLIP.
    """
    classifier = load_part(ZeroShotClassifier, folder)
    lengths = classifier.weights.norm(dim=-1)
    if not bool(((lengths - 1).abs() < 1e-2).all()):  # false for NaN
        raise InputError(f"The weights in {str(folder)!r} are not of length 1, they are damaged; build them again.")
    if clip is not None:
        classifier.check_clip(clip)
        classifier.to(clip.device)
    return classifier


@torch.no_grad()
def embed_pictures(clip: CLIP, pictures: Iterable[Tensor], chunk_size: int = 64) -> Iterator[Tensor]:
    """Pictures (3, H, W) in [0, 1], each of any size, or one tensor (B, 3, H, W) of them -> embeddings (n, D).

    In order, of length 1, n <= chunk_size at a time; half as many go through CLIP each time memory runs out. Besides
    one chunk nothing is held. Raises InputError for pixels outside [0, 1], FloatingPointError for broken numbers.
    """
    chunks = Chunks(chunk_size)
    waiting: list[Tensor] = []

    def embed() -> Tensor:
        pixels = torch.stack(waiting)  # n, 3, S, S
        clip.check_range(pixels)
        return _embed(chunks, clip.embed_image, pixels, "image embeddings")

    for picture in pictures:
        waiting.append(clip.fit_pixels(picture[None])[0])
        if len(waiting) == chunk_size:
            yield embed()
            waiting.clear()
    if waiting:
        yield embed()


@dataclass(frozen=True)
class ClassifiedFiles:
    """`pictures`: (path, [(class, probability), ...] most likely first); `skipped`: (path, reason)."""

    pictures: list[tuple[Path, list[tuple[str, float]]]]
    skipped: list[tuple[Path, str]]


def classify_files(
    clip: CLIP,
    classifier: ZeroShotClassifier,
    paths: Sequence[str | os.PathLike[str]],
    top: int = 5,
    chunk_size: int = 64,
    report: Callable[[int, int], None] | None = None,
) -> ClassifiedFiles:
    """The `top` likeliest classes (or all, if there are fewer) of the pictures in `paths`: files, or folders of them.

    `report(read, total)` is called after each picture. Raises InputError for missing paths, `top` below 1, a broken
    picture that was named itself (found in a folder, it is skipped and listed), and where none can be read.
    """

    def predict(pictures: Iterator[Tensor]) -> Iterator[Tensor]:
        return map(classifier.probabilities, embed_pictures(clip, pictures, chunk_size))

    return label_files(clip, paths, classifier.names, predict, top, report)


def label_files(
    clip: CLIP,
    paths: Sequence[str | os.PathLike[str]],
    names: Sequence[str],
    predict: Callable[[Iterator[Tensor]], Iterator[Tensor]],
    top: int,
    report: Callable[[int, int], None] | None = None,
) -> ClassifiedFiles:
    """What `classify_files` does, by any classifier: `predict` turns pictures (3, H, W) at CLIP's size, in order, into
    probabilities (n, C) of the classes `names`, some pictures at a time.
    """
    if top < 1:
        raise InputError(f"The number of classes to show must be at least 1, got {top}.")
    files = find_pictures([Path(path) for path in paths])
    named = {Path(path) for path in paths}
    readable: list[Path] = []
    skipped: list[tuple[Path, str]] = []

    def pictures() -> Iterator[Tensor]:
        for number, (path, future) in enumerate(read_ahead(files, lambda path: read_for_clip(clip, path)), start=1):
            try:
                pixels = future.result()
            except InputError as error:
                if path in named:
                    raise
                skipped.append((path, str(error)))
            else:
                readable.append(path)
                yield pixels
            if report is not None:
                report(number, len(files))

    found: list[list[tuple[str, float]]] = []
    for probabilities in predict(pictures()):
        best = probabilities.topk(min(top, len(names)))
        for values, numbers in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            found.append([(names[n], value) for n, value in zip(numbers, values, strict=True)])
    if not readable:
        raise InputError(f"None of the {len(files)} pictures found can be read; the first: {skipped[0][1]}")
    return ClassifiedFiles(list(zip(readable, found, strict=True)), skipped)


def _embed(chunks: Chunks, work: Callable[[Any], Tensor], things: Any, what: str) -> Tensor:
    """`work` of a list of n texts, or of pixels (n, 3, S, S) -> embeddings (n, D) in float32, of length 1."""
    embedding = torch.cat([each.float() for each in chunks.run(work, things)])
    if not bool(embedding.isfinite().all()):
        raise FloatingPointError(f"CLIP's {what} are not finite; its weights are damaged.")
    return F.normalize(embedding, dim=-1)


def _check_told_apart(clip: CLIP, names: Sequence[str], templates: Sequence[str]) -> None:
    """Raise InputError if two names give the same prompts, token by token."""

    def ids(name: str, some: Sequence[str]) -> Tensor:
        return clip.tokenize([fill(template, name) for template in some]).ids

    seen: dict[bytes, str] = {}
    for name in names:
        earlier = seen.setdefault(ids(name, templates[:1]).numpy().tobytes(), name)
        if earlier != name and torch.equal(ids(earlier, templates), ids(name, templates)):
            raise InputError(
                f"The classes {earlier!r} and {name!r} are the same text to this CLIP, which reads "
                f"{clip.context_length} tokens; name them differently, or put {{}} near the template's beginning."
            )
