"""The stage of CLIP: the contrastive loss over all pairs of an update, twins of scenes among them (2103.00020, 2.3).

Legend: A batches of an update, B pairs of a batch, D embedding width.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from genpipe.clip.loss import contrastive_loss
from genpipe.clip.model import CLIP
from genpipe.dalle1.dvae import DVAE
from genpipe.data.drawn import DrawnScenes
from genpipe.errors import InputError
from genpipe.evaluation.clip import TWIN_KINDS, retrieval_share, twin_accuracy
from genpipe.images import make_grid, to_pil, to_unit
from genpipe.parts import load_part
from genpipe.training.config import Recipe
from genpipe.training.data import Batch, twin_pairs
from genpipe.training.gradient_cache import cached_losses
from genpipe.training.stage import Logs, MicroBatch, Stage, build, tokenizer_for
from genpipe.training.validation import Validation

Features = tuple[Tensor, ...]  # image and text embeddings (B, D), normalised, and the logit scale


class ClipStage(Stage):
    """CLIP: symmetric contrastive loss over pairs, twins of scenes among them as hard negatives (2103.00020, 2.3).

    The loss of an update compares all its pairs: of run.accumulate batches, of all processes.
    """

    part = "clip"

    def __init__(self, recipe: Recipe, resumed: Path | None) -> None:
        o = self.objective = recipe.objective
        if o["freeze_text"] and not recipe.init:
            raise InputError("objective.freeze_text leaves texts as they are; name a trained CLIP with init=FOLDER.")
        if recipe.init:
            self.model = load_part(CLIP, recipe.init)
            if o["freeze_text"]:
                for name, parameter in self.model.towers.named_parameters():
                    parameter.requires_grad_(name.startswith("visual.") or name == "logit_scale")
        else:
            tokenizer = tokenizer_for(recipe, resumed)
            settings = dict(recipe.model)
            architecture = settings.pop("architecture")
            text = {**architecture.get("text_cfg", {}), "vocab_size": tokenizer.vocab_size}
            self.model = build(CLIP, {"architecture": {**architecture, "text_cfg": text}, **settings})
            self.model.tokenizer = tokenizer
        self.dvae = load_part(DVAE, o["dvae"]).requires_grad_(False) if o["dvae"] else None
        self.drawn = DrawnScenes(o["drawn"], recipe.data.size) if o["drawn"] else None
        self.accumulate = recipe.run.accumulate
        if self.drawn is not None and self.accumulate > 1:
            raise InputError("objective.drawn needs all pairs of an update in one batch; set run.accumulate=1.")
        self.twin_rows = 2 * twin_pairs(recipe.data, recipe.run.batch_size)
        self.validation = Validation(recipe.data, 200)

    def collate(self, pictures: np.ndarray, captions: list[str], generator: np.random.Generator) -> Batch:
        arrays = {"pixels": pictures}
        if self.drawn is not None:
            true, drawn, more = self.drawn.pick(self.objective["drawn_rows"], generator)
            arrays |= {"true": true, "drawn": drawn}
            captions = [*captions, *more]
        tokens = self.model.tokenize(captions)
        pixels = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        return {**pixels, "ids": tokens.ids, "mask": tokens.mask}

    def frozen(self) -> list[nn.Module]:
        return [] if self.dvae is None else [self.dvae]

    def loss(self, model: nn.Module, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, Logs]:
        """Of the batch's pairs, and of drawn pictures beside true ones, where there are any."""
        image, text, scale = self._features(model, batch, generator)
        pairs = len(batch["pixels"])
        loss, logs = self._loss([(image[:pairs], text[:pairs], scale)])
        if self.drawn is not None:
            drawn, share = drawn_loss(image[pairs:], text[pairs:], scale)
            loss = loss + self.objective["drawn_weight"] * drawn
            logs |= {"drawn_loss": drawn.detach(), "drawn_accuracy": share}
        return loss, logs

    def losses(self, model: nn.Module, micro_batches: Iterable[MicroBatch], step: int) -> Iterator[tuple[Tensor, Logs]]:
        """With several batches to an update: the loss of one batch of all their pairs, in the memory of one of them."""
        if self.accumulate == 1:
            yield from super().losses(model, micro_batches, step)
            return
        yield from cached_losses(
            lambda each: self._features(model, each.batch, each.generator()), list(micro_batches), self._loss
        )

    def _features(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Features:
        probability = self.objective["degrade"]
        pixels = degrade(to_unit(batch["pixels"]), probability, generator, self.dvae)
        if self.drawn is not None:
            true = degrade(to_unit(batch["true"]), probability, generator, self.dvae)
            drawn = degrade(to_unit(batch["drawn"]), probability, generator)
            pixels = torch.cat([pixels, true, drawn])
        return model(pixels, batch["ids"], batch["mask"])

    def _loss(self, parts: list[Features]) -> tuple[Tensor, Logs]:
        """Loss and figures of the pairs of A batches, compared with one another."""
        images, texts, scales = (torch.stack(each) for each in zip(*parts, strict=True))  # A, B, D; A, B, D; A
        image, text, scale = images.flatten(0, 1), texts.flatten(0, 1), scales.mean()
        loss = contrastive_loss(image, text, scale, local_loss=self.objective["local_loss"])
        with torch.no_grad():
            right = (image @ text.T).argmax(dim=1) == torch.arange(len(image), device=image.device)
        logs = {"accuracy": right.float().mean(), "logit_scale": scale.detach()}
        if self.twin_rows:
            twins = [each[:, : self.twin_rows].flatten(0, 1) for each in (images, texts)]
            twin, accuracy = twin_loss(twins[0], twins[1], scale)
            loss = loss + self.objective["twin_weight"] * twin
            logs |= {"twin_loss": twin.detach(), "twin_accuracy": accuracy}
        return loss, logs

    def validate(self) -> dict[str, float]:
        """Retrieval among 100 captions; for emoji scenes also how often a scene is told from its twin."""
        figures = {"retrieval": retrieval_share(self.model, *self.validation.pairs())}
        if self.validation.scenes is not None:
            scenes = self.validation.scenes
            figures |= {f"twin_{kind}": twin_accuracy(self.model, scenes, kind, 100) for kind in TWIN_KINDS}
        return {f"{self.validation.kind}_{name}": value for name, value in figures.items()}

    @torch.no_grad()
    def sample(self) -> Image.Image:
        """Pictures under the caption, out of 100, that scores best."""
        pictures, captions = self.validation.pairs()
        pixels, captions = to_unit(pictures[:16]).to(self.model.device), captions[:100]
        text = self.model.encode_text(captions).normalized
        best = (self.model.encode_image(pixels).normalized @ text.T).argmax(dim=1).tolist()
        return make_grid(to_pil(pixels), columns=8, labels=[captions[b] for b in best], scale=4)


def twin_loss(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of telling one's own caption, and one's own picture, from its twin's alone; and the accuracy.

    image, text: normalised (2 n, D), twins side by side; scale: of the logits. In the loss of the whole batch a twin is
    one of many candidates, and before CLIP can tell twins apart what they teach drowns in the rest.
    """
    image, text = image.unflatten(0, (-1, 2)), text.unflatten(0, (-1, 2))  # n, 2, D
    logits = scale * torch.einsum("nid,njd->nij", image, text)  # n, 2, 2
    own = torch.arange(2, device=logits.device).expand(len(logits), 2)
    loss = (F.cross_entropy(logits.mT, own) + F.cross_entropy(logits, own)) / 2
    return loss, (logits.detach().argmax(dim=-1) == own).float().mean()


def drawn_loss(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of finding the true picture of a caption beside a drawn one, and among all; how often it is found.

    image: of n true pictures, then of those drawn for the same captions, normalised (2 n, D); text: of the captions
    (n, D).
    """
    logits = scale * text @ image.T  # n, 2 n
    rows = torch.arange(len(text), device=text.device)
    both = logits.unflatten(1, (2, -1))[rows, :, rows]  # n, 2
    first = torch.zeros_like(rows)
    own = F.cross_entropy(both, first)
    among = (F.cross_entropy(logits, rows) + F.cross_entropy(logits[:, : len(text)].T, rows)) / 2
    return own + among, (both.detach().argmax(dim=1) == first).float().mean()


@torch.no_grad()
def degrade(pixels: Tensor, probability: float, generator: torch.Generator, dvae: DVAE | None = None) -> Tensor:
    """Blur and noise on a random share of pictures (B, 3, H, W) in [0, 1]: CLIP will judge drawn ones, too.

    dvae: that many are also turned into its tokens and back first.
    """
    if probability <= 0:
        return pixels
    if dvae is not None:
        rows = torch.rand(len(pixels), generator=generator, device=generator.device).to(pixels.device) < probability
        if rows.any():
            pixels = pixels.clone()
            pixels[rows] = dvae.decode(dvae.encode(pixels[rows])).to(pixels)
    draws = torch.rand(4, len(pixels), generator=generator, device=generator.device).to(pixels.device)
    noise = torch.randn(pixels.shape, generator=generator, device=generator.device).to(pixels.device)
    small = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    blur = torch.where(draws[0] < probability, draws[1], torch.zeros_like(draws[1]))[:, None, None, None]
    level = torch.where(draws[2] < probability, 0.08 * draws[3], torch.zeros_like(draws[3]))[:, None, None, None]
    return (torch.lerp(pixels, small, blur) + level * noise).clamp(0, 1)
