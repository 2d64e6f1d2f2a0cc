"""Reranking: score candidates against a caption with CLIP and keep the best few (DALL-E 1, section 2.6).

Candidates arrive as one tensor or as any iterable of tensors and pass through CLIP in bounded chunks, so thousands of
them fit in memory. Legend: N candidates, D embedding width.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from genpipe.clip.chunks import Chunks
from genpipe.clip.model import CLIP
from genpipe.errors import InputError


class TopK:
    """The k best of a stream of scored things, best first; of equal scores the lower index wins."""

    def __init__(self, k: int) -> None:
        if k < 1:
            raise InputError(f"the number of candidates to keep must be at least 1, not {k}.")
        self.k = k
        self._heap: list[tuple[float, int, Any]] = []  # (score, -index, payload), the worst of the kept on top

    def update(
        self, scores: Sequence[float] | torch.Tensor, items: Sequence[Any] | torch.Tensor | None, start_index: int
    ) -> None:
        """Take in `scores`, of the things number start_index, start_index + 1, ...; `items[i]` is kept along if given.

        Tensor items are copied when kept, so that the chunk they come from can be freed. Raises InputError on NaN.
        """
        values = [float(score) for score in scores]
        if any(value != value for value in values):
            raise InputError(f"a score among the candidates from number {start_index} on is NaN, it cannot be ranked.")
        for offset, value in enumerate(values):
            rank = (value, -(start_index + offset))
            if len(self._heap) == self.k and rank <= self._heap[0][:2]:
                continue
            item = None if items is None else items[offset]
            entry = (*rank, item.detach().clone() if isinstance(item, torch.Tensor) else item)
            if len(self._heap) < self.k:
                heapq.heappush(self._heap, entry)
            else:
                heapq.heapreplace(self._heap, entry)

    def result(self) -> list[tuple[float, int, Any]]:
        """(score, index, item) of at most k things, best first."""
        ordered = sorted(self._heap, key=lambda entry: entry[:2], reverse=True)
        return [(value, -negative_index, item) for value, negative_index, item in ordered]


@dataclass(frozen=True)
class Ranking:
    """The kept candidates, best first: index in the order of arrival, cosine similarity, pixels (3, H, W) if kept."""

    indices: list[int]
    scores: list[float]
    pixels: list[torch.Tensor]

    @property
    def pairs(self) -> list[tuple[int, float]]:
        """(index, score), best first."""
        return list(zip(self.indices, self.scores, strict=True))


def score(
    clip: CLIP,
    pixels: torch.Tensor | Iterable[torch.Tensor],
    text: str | torch.Tensor,
    chunk_size: int = 64,
) -> torch.Tensor:
    """Cosine similarity of every candidate with the text: (N,) float32 on the CPU.

    `pixels` (N, 3, H, W) in [0, 1], or an iterable of such chunks whose sizes may differ (they are resized as CLIP's
    config says). `text` is a caption or its embedding (D,) or (1, D). CLIP sees at most `chunk_size` pictures at once,
    half as many each time memory runs out. Raises InputError naming the stage in which a NaN or infinity appeared.
    """
    scores = [chunk for _, chunk, _ in _scored(clip, pixels, text, chunk_size, keep_pixels=False)]
    return torch.cat(scores) if scores else torch.zeros(0)


def rerank(
    clip: CLIP,
    caption: str | torch.Tensor,
    candidates: torch.Tensor | Iterable[torch.Tensor],
    k: int,
    chunk_size: int = 64,
    keep_pixels: bool = True,
) -> Ranking:
    """The `k` candidates (or all, if there are fewer) that fit the caption best; arguments and errors as in `score`.

    An iterable is read once and never held as a whole: besides two chunks, only the k best pictures (on their device)
    are in memory; `keep_pixels=False` drops those and the chunks' originals too, which is meant for large pictures.
    """
    best = TopK(k)
    for start, scores, originals in _scored(clip, candidates, caption, chunk_size, keep_pixels):
        best.update(scores, originals, start)
    kept = best.result()
    pixels = [picture for _, _, picture in kept if picture is not None]
    return Ranking([index for _, index, _ in kept], [value for value, _, _ in kept], pixels)


@torch.no_grad()
def _scored(
    clip: CLIP,
    candidates: torch.Tensor | Iterable[torch.Tensor],
    text: str | torch.Tensor,
    chunk_size: int,
    keep_pixels: bool,
) -> Iterator[tuple[int, torch.Tensor, list[torch.Tensor] | None]]:
    """(index of the first, scores (n,), the n original pictures if asked for) chunk by chunk, in order."""
    chunks = Chunks(chunk_size)
    text_embedding = _text_direction(clip, text)
    start = 0
    for fitted, originals in _chunks(clip, candidates, chunk_size, keep_pixels):
        done: list[torch.Tensor] = []
        for embedding in map(torch.Tensor.float, chunks.run(clip.embed_image, fitted)):
            norm = _finite(embedding, "the image embedding").norm(dim=-1)
            similarity = embedding @ text_embedding.to(embedding) / norm.clamp(min=1e-12)  # n
            done.append(_finite(similarity, "the scores").cpu())
        yield start, torch.cat(done), originals
        start += len(fitted)


def _chunks(
    clip: CLIP, candidates: torch.Tensor | Iterable[torch.Tensor], chunk_size: int, keep_pixels: bool
) -> Iterator[tuple[torch.Tensor, list[torch.Tensor] | None]]:
    """Pieces of any number and size -> chunks at CLIP's size (n, 3, S, S), n <= chunk_size, and their originals."""
    pieces = [candidates] if isinstance(candidates, torch.Tensor) else candidates
    fitted: list[torch.Tensor] = []
    originals: list[torch.Tensor] = []
    for piece in pieces:
        for rows in piece.split(chunk_size):
            clip.check_range(_finite(rows, "the candidates' pixels"))
            fitted.extend(clip.fit_pixels(rows))
            if keep_pixels:
                originals.extend(rows)
            while len(fitted) >= chunk_size:
                yield torch.stack(fitted[:chunk_size]), originals[:chunk_size] if keep_pixels else None
                del fitted[:chunk_size], originals[:chunk_size]
    if fitted:
        yield torch.stack(fitted), originals if keep_pixels else None


def _text_direction(clip: CLIP, text: str | torch.Tensor) -> torch.Tensor:
    """Caption or embedding -> unit vector (D,) in float32."""
    embedding = clip.encode_text([text]).embedding if isinstance(text, str) else text
    if embedding.numel() != clip.embedding_dim or embedding.ndim > 2:
        raise InputError(
            f"the text must be one caption or one embedding of {clip.embedding_dim} numbers, not of shape "
            f"{tuple(embedding.shape)}."
        )
    flat = _finite(embedding.reshape(-1).float(), "the text embedding")
    return flat / flat.norm().clamp(min=1e-12)


def _finite(values: torch.Tensor, stage: str) -> torch.Tensor:
    """`values`, or InputError naming the stage if one of them is NaN or infinite."""
    if not bool(values.isfinite().all()):
        raise InputError(f"reranking found NaN or infinity in {stage}; the weights or an earlier stage are broken.")
    return values
