"""What the loop asks of a stage, and what stages share: building a part, having a tokenizer.

Legend: B pictures, S side, L text positions, N image tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from genpipe.errors import InputError
from genpipe.tokenizer import FILE_NAME, CaptionTokenizer
from genpipe.training.config import Recipe
from genpipe.training.data import Batch, OwnBatches, captions_of
from genpipe.training.early_stopping import EarlyStopping

Logs = dict[str, Tensor]
Part = TypeVar("Part")


@dataclass(frozen=True)
class MicroBatch:
    """One of the run.accumulate batches of an update; seeds: of its dropout and of its noise."""

    batch: Batch
    seeds: tuple[int, int]

    def generator(self) -> torch.Generator:
        """The generator of its noise; torch's own, which dropout draws from, is set to the start of this batch, too."""
        torch.manual_seed(self.seeds[0])
        return torch.Generator().manual_seed(self.seeds[1])


class Stage(ABC):
    """One trained part: builds its modules and turns a batch into a loss; it knows nothing of optimisers.

    part: folder name of the part inside a family. model: the trained part. Stages are made from a recipe and the folder
    of the run that is resumed, None for a fresh start; they write nothing.
    """

    part: str
    model: Any

    def frozen(self) -> list[nn.Module]:
        """Modules that must be on the training device but are not trained."""
        return []

    @abstractmethod
    def collate(self, pictures: np.ndarray, captions: list[str], generator: np.random.Generator) -> Batch:
        """uint8 pictures (B, 3, S, S) and captions -> tensors of one batch."""

    def batches(self) -> OwnBatches | None:
        """Batches by number, for a stage whose data is more than captioned pictures; None: the loop's, by `collate`."""
        return None

    def rates(self) -> dict[str, float]:
        """Parameter name -> its share of the learning rate; 1 for all that are not named."""
        return {}

    def early_stopping(self) -> EarlyStopping | None:
        """What ends a run before its last step, if anything does."""
        return None

    def before_step(self, batch: Batch, step: int, generator: torch.Generator) -> None:
        """Change the model outside of gradient descent; most stages never do."""
        return None

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, Logs]:
        """Scalar loss and detached figures; `model` is self.model, possibly wrapped for several processes."""

    def losses(self, model: nn.Module, micro_batches: Iterable[MicroBatch], step: int) -> Iterator[tuple[Tensor, Logs]]:
        """Loss and figures of each batch of an update; each is back-propagated before the next is asked for.

        The update follows their mean. Overridden where the loss compares pictures of several batches.
        """
        for each in micro_batches:
            yield self.loss(model, each.batch, step, each.generator())

    @abstractmethod
    def validate(self) -> dict[str, float]:
        """Figures on validation pictures."""

    @abstractmethod
    def sample(self) -> Image.Image:
        """A picture that shows what the part can do now."""


def build(part: Callable[..., Part], settings: dict[str, Any]) -> Part:
    """part(**settings). Raises InputError for settings that no model can be built with."""
    try:
        return part(**settings)
    except InputError:
        raise
    except (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError, AssertionError) as error:
        name, reason = getattr(part, "__name__", "part"), " ".join(str(error).split())
        raise InputError(f"a {name} cannot be built with these model settings ({reason}).") from error


def adopt_clip(model: Any, identity: str, recipe: Recipe) -> None:
    """Make a prior or decoder that a run starts from one of the CLIP with this `weights_identity`.

    Raises InputError where it was trained beside another one, unless objective.new_clip says that it is to learn this.
    """
    if model.config.clip_identity not in (None, identity) and not recipe.objective["new_clip"]:
        raise InputError(
            f"{recipe.init} was trained beside another CLIP than {recipe.objective['clip']}; take that one, or set "
            "objective.new_clip=true to go on with this one."
        )
    model.register_to_config(clip_identity=identity)


def tokenizer_for(recipe: Recipe, resumed: Path | None) -> CaptionTokenizer:
    """The run's tokenizer: from objective.tokenizer (a part's folder), from a resumed run, else trained on captions."""
    given = recipe.objective["tokenizer"] or (
        resumed if resumed is not None and (resumed / FILE_NAME).is_file() else ""
    )
    if given:
        return CaptionTokenizer.load(given)
    captions = captions_of(recipe.data, recipe.objective["tokenizer_captions"])
    return CaptionTokenizer.train(captions, vocab_size=recipe.objective["vocab_size"])
