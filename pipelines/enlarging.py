"""The upsampler of a call: each picture enlarged alone, before it is ranked or only if it is kept."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from PIL import Image
from torch import Tensor

from genpipe.dalle2.sampling import Step
from genpipe.dalle2.upsampler import upsample
from genpipe.images import to_pil, to_unit
from pipelines.candidates import Tracker
from pipelines.encoding import TextEncoding, read_texts
from pipelines.request import GenerationOutput, Stopped
from pipelines.settings import DALLE1Sampling, DALLE2Sampling
from pipelines.steering import Filling


@dataclass(frozen=True)
class Enlarging:
    """An upsampler (pipelines.protocols.Enlarger) with the settings of a call; None: as it was made for."""

    model: Any
    num_inference_steps: int | None
    scheduler: str | None
    filling: Filling | None = None  # what is kept of a given picture, for an upsampler that fills holes

    @classmethod
    def of(
        cls, model: Any, sampling: DALLE1Sampling | DALLE2Sampling, filling: Filling | None = None
    ) -> "Enlarging | None":
        """What a call uses; None where it does not upsample."""
        if not sampling.upsample:
            return None
        fills = getattr(model, "fills", False)
        return cls(model, sampling.upsampler_steps, sampling.upsampler_scheduler, filling if fills else None)

    def read(self, prompt: str) -> TextEncoding | None:
        """A prompt as the upsampler encodes it; None where it reads no text."""
        return read_texts(self.model, [prompt]) if getattr(self.model, "reads_text", False) else None

    def enlarge(
        self,
        pixels: Tensor,
        seed: int,
        text: TextEncoding | None,
        report: Callable[[Step], None] | None = None,
    ) -> Tensor:
        """Pixels (1, 3, H, W) of candidate `seed` in [0, 1] -> (1, 3, f H, f W). One at a time: see Block.together."""
        options: dict[str, Any] = {} if self.scheduler is None else {"scheduler": self.scheduler}
        if self.filling is not None:
            options |= self.filling.at(pixels.shape[-1] * self.model.config.factor, pixels.device)
        if text is not None:
            return self.model.upsample(pixels, [seed], self.num_inference_steps, callback=report, text=text, **options)
        return upsample(self.model, pixels, [seed], self.num_inference_steps, callback=report, **options)


def upsampled(output: GenerationOutput, enlarging: Enlarging, tracker: Tracker, device: Any) -> GenerationOutput:
    """The same pictures enlarged on `device`, in the same order; those that a callback left undone are missing.

    Where the drawing was stopped, what is kept is enlarged without asking again.
    """
    total, done = sum(len(images) for images in output.images), 0
    images: list[list[Image.Image]] = [[] for _ in output.images]
    complete = output.complete
    try:
        for row, (prompt, pictures, seeds) in enumerate(zip(output.prompts, output.images, output.seeds, strict=True)):
            text = enlarging.read(prompt) if pictures else None
            for picture, seed in zip(pictures, seeds, strict=True):
                report = partial(tracker.upsampling, done, total) if output.complete else None
                images[row] += to_pil(enlarging.enlarge(to_unit([picture]).to(device), seed, text, report))
                done += 1
    except Stopped:
        complete = False

    def cut(rows: Sequence[list[Any]]) -> list[list[Any]]:
        return [row[: len(pictures)] for row, pictures in zip(rows, images, strict=True)]

    return replace(output, images=images, scores=cut(output.scores), seeds=cut(output.seeds), complete=complete)
