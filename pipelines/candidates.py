"""Candidates of several prompts: drawn in blocks that fit in memory, the best of each prompt kept.

What both pipelines do around their own way of drawing. Legend: B prompts, n candidates per prompt, H W pixels.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from genpipe.clip.chunks import is_out_of_memory
from genpipe.clip.model import CLIP
from genpipe.clip.rerank import TopK, score
from genpipe.dalle2.sampling import Step
from genpipe.images import signed_to_unit, to_pil
from pipelines.request import Callback, GenerationOutput, Progress, Stopped

DRAWING_SHARE = 0.9  # of the work of a call; the rest is the upsampling of the pictures that are kept


@dataclass(frozen=True)
class Block:
    """Candidates that are drawn together: a range of prompts, and the same range of candidates for each of them.

    together: rows that are computed at once, if need be filled up with copies: batches of one size round alike, so that
    a candidate is the same whatever was drawn beside it.
    """

    prompts: range
    candidates: range
    together: int = 1

    def __len__(self) -> int:
        return len(self.prompts) * len(self.candidates)

    def halves(self) -> list["Block"]:
        """The same candidates in two blocks, split between prompts if they are several; one without copies."""
        if len(self) == 1:
            return [Block(self.prompts, self.candidates)]
        fewer = max(1, self.together // 2)
        if len(self.prompts) > 1:
            middle = len(self.prompts) // 2
            sides = [self.prompts[:middle], self.prompts[middle:]]
            return [Block(side, self.candidates, fewer) for side in sides]
        middle = len(self.candidates) // 2
        return [Block(self.prompts, side, fewer) for side in (self.candidates[:middle], self.candidates[middle:])]


def blocks(num_prompts: int, num_candidates: int, rows: int, together: int = 1) -> Iterator[Block]:
    """All candidates of all prompts in blocks of at most `rows`, prompts in order."""
    prompts_at_once = max(1, rows // num_candidates)  # prompts whose candidates fit in one block
    for first in range(0, num_prompts, prompts_at_once):
        prompts = range(first, min(first + prompts_at_once, num_prompts))
        for start in range(0, num_candidates, rows):
            yield Block(prompts, range(start, min(start + rows, num_candidates)), min(rows, together))


def in_blocks(work: Callable[[Block, int], None], todo: Iterator[Block]) -> bool:
    """Do `work(block, candidates finished before)` for every block; one for which memory runs out, again in halves.

    Returns False where `work` raised Stopped: what was finished before counts.
    """
    pending, finished = list(todo)[::-1], 0
    while pending:
        block = pending.pop()
        try:
            work(block, finished)
        except Stopped:
            return False
        except (RuntimeError, MemoryError) as error:
            if max(len(block), block.together) == 1 or not is_out_of_memory(error):
                raise
            pending += block.halves()[::-1]
            continue
        finished += len(block)
    return True


@dataclass(frozen=True)
class Tracker:
    """Tells a callback how far a call has come, and asks it whether to go on.

    total: candidates of the whole call. upsampled_after: the pictures that are kept are upsampled in the end.
    """

    callback: Callback | None
    total: int
    upsampled_after: bool

    def drawing(
        self,
        stage: str,
        finished: int,
        running: int,
        steps: tuple[int, int],
        preview: Callable[[], list[Image.Image]],
        span: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        """`steps` (done, all) of a stage of `running` candidates; `span`: what part of their drawing the stage is."""
        begin, end = span
        drawn = finished + running * (begin + (end - begin) * steps[0] / steps[1])
        share = DRAWING_SHARE if self.upsampled_after else 1.0
        self._tell(finished, running, steps, share * drawn / self.total, preview, stage)

    def upsampling(self, done: int, total: int, step: Step) -> None:
        """A step of the upsampling of a picture, after the drawing; `done` of `total` are upsampled already."""
        steps = (step.index + 1, step.num_steps)
        share = (done + steps[0] / steps[1]) / total
        fraction = DRAWING_SHARE + (1 - DRAWING_SHARE) * share
        self._tell(self.total, 1, steps, fraction, lambda: as_pictures(step.x_0), "upsampler")

    def _tell(
        self,
        finished: int,
        running: int,
        steps: tuple[int, int],
        fraction: float,
        preview: Callable[[], list[Image.Image]],
        stage: str,
    ) -> None:
        progress = Progress(finished, self.total, running, *steps, fraction, preview, stage)
        if self.callback is not None and self.callback(progress):
            raise Stopped


class Best:
    """The best `keep` pictures of each of B prompts so far, by CLIP's score and, where there is one, a fault.

    The first ones where nothing is ranked.
    """

    def __init__(
        self,
        clip: CLIP | None,
        embedding: Tensor | None,
        prompts: int,
        keep: int,
        seed: int,
        fault: Callable[[Tensor, int], Tensor] | None = None,
    ) -> None:
        """embedding (B, D): what the pictures are compared with, None: they are not ranked; prompts: B; seed: of the
        first candidate of every prompt; fault: pictures (n, 3, H, W) of a prompt and its number -> what is taken from
        their scores (n,) before they are ranked.
        """
        self.clip, self.embedding, self.seed, self.fault = clip, embedding, seed, fault
        self._kept = [TopK(keep) for _ in range(prompts)]

    def rank(self, block: Block, pixels: Iterable[Tensor]) -> None:
        """Score a block's pictures, (n, 3, H, W) in [0, 1] for each of its prompts, and keep the best."""
        ranked = []
        for prompt, drawn in zip(block.prompts, pixels, strict=True):
            scores = self._score(drawn, prompt)
            values = scores if self.fault is None or self.embedding is None else scores - self.fault(drawn, prompt)
            ranked.append((values, list(zip(to_pil(drawn), scores.tolist(), strict=True))))
        # Only now, so that a block that ran out of memory half-way leaves nothing behind and can be drawn again.
        for prompt, (values, scored) in zip(block.prompts, ranked, strict=True):
            self._kept[prompt].update(values, scored, block.candidates.start)

    def _score(self, drawn: Tensor, prompt: int) -> Tensor:
        if self.clip is None or self.embedding is None:
            if not bool(drawn.isfinite().all()):  # ranking would find it
                raise FloatingPointError("the drawn pictures' pixels are not finite; the weights are damaged.")
            return torch.zeros(len(drawn))  # of equal ones the first are kept
        return score(self.clip, drawn, self.embedding[prompt])

    def output(self, prompts: Sequence[str], complete: bool) -> GenerationOutput:
        """What a pipeline returns: the pictures of each prompt, best first."""
        ranked = [kept.result() for kept in self._kept]  # (value, index, (picture, score))
        return GenerationOutput(
            images=[[picture for _, _, (picture, _) in entries] for entries in ranked],
            scores=[[None if self.embedding is None else score for _, _, (_, score) in row] for row in ranked],
            seeds=[[self.seed + index for _, index, _ in entries] for entries in ranked],
            prompts=list(prompts),
            complete=complete,
        )


def as_pictures(x_0: Tensor) -> list[Image.Image]:
    """Estimates (R, 3, H, W) in about [-1, 1] -> pictures."""
    return to_pil(signed_to_unit(x_0))


def grey(rows: int, side: int) -> list[Image.Image]:
    """What is seen of candidates of which nothing is drawn yet."""
    return to_pil(torch.full((rows, 3, side, side), 0.5))
