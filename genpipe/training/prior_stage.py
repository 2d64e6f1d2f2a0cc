"""The prior's stage: image embeddings from captions, both as a frozen CLIP gives them (2204.06125, 2.2).

Legend: B pictures, S side, D CLIP width, R noised embeddings of each picture in one update.
"""

from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from genpipe.clip.model import CLIP
from genpipe.dalle2.losses import cumulative_alphas, denoising_loss, diffuse, stratified_timesteps
from genpipe.dalle2.prior import Prior, TextCondition
from genpipe.errors import InputError
from genpipe.evaluation.prior import (
    EncodedPairs,
    cosine_figures,
    encode_pairs,
    nearest,
    null_text,
    predicted_embeddings,
    retrieval,
)
from genpipe.identity import weights_identity
from genpipe.images import make_grid, stack_levels, to_pil, to_unit
from genpipe.parts import load_part
from genpipe.tokenizer import TokenBatch
from genpipe.training.config import DataConfig, Recipe
from genpipe.training.data import Batch, check_embeddings, emoji_scenes, first_embeddings, pairs_of
from genpipe.training.stage import Logs, Stage, adopt_clip, build
from genpipe.training.validation import Validation


class PriorStage(Stage):
    """The diffusion prior: mean squared error of the clean, standardised image embedding, every noise level alike.

    The caption is dropped for 10 % of the pictures: the empty one takes its place, the noised embedding stays (2.2).
    The transformer reads each caption once for R noised embeddings of its picture, which differ in time and noise.
    """

    part = "prior"

    def __init__(self, recipe: Recipe, resumed: Path | None) -> None:
        self.objective, self.data = recipe.objective, recipe.data
        if not self.objective["clip"]:
            raise InputError("the prior reads a trained CLIP; name its folder with --set objective.clip=FOLDER.")
        self.clip = load_part(CLIP, self.objective["clip"]).requires_grad_(False)
        identity = weights_identity(self.clip)
        check_embeddings(recipe.data, identity)
        if self.objective["statistics_pairs"] == 1:
            raise InputError("objective.statistics_pairs is 1; one pair has no deviation, use 0 or 2 and above.")
        if recipe.init:
            self.model = load_part(Prior, recipe.init)
            adopt_clip(self.model, identity, recipe)
        else:
            width, text_width = self.clip.embedding_dim, self.clip.encode_text([""]).states.shape[-1]
            shape = {"embedding_dim": width, "text_width": text_width, "text_length": self.clip.context_length}
            own = {"text_projection": text_width != width, "clip_identity": identity}
            self.model = build(Prior, {**shape, **own, **recipe.model})
        self.fresh = not recipe.init or self.objective["new_clip"]
        self.alphas = cumulative_alphas(self.model.config.beta_schedule, self.model.config.num_train_timesteps)
        self.validation = Validation(recipe.data, 256)

    def frozen(self) -> list[nn.Module]:
        return [self.clip]

    def collate(self, pictures: np.ndarray, captions: list[str], generator: np.random.Generator) -> Batch:
        text_kept = generator.random(len(captions)) >= self.objective["text_dropout"]
        kept = [caption if keep else "" for caption, keep in zip(captions, text_kept, strict=True)]
        tokens = self.clip.tokenize(kept)
        pixels = torch.from_numpy(np.ascontiguousarray(pictures))
        return {"pixels": pixels, "ids": tokens.ids, "mask": tokens.mask, "text_kept": torch.from_numpy(text_kept)}

    @torch.no_grad()
    def before_step(self, batch: Batch, step: int, generator: torch.Generator) -> None:
        """Mean and deviation of the coordinates, from the first training pictures, before a fresh prior's first step.

        objective.statistics_pairs says how many; 0 keeps the paper's single scale.
        """
        count = self.objective["statistics_pairs"]
        if step == 0 and self.fresh and count and self.data.embeddings:
            stored = torch.from_numpy(first_embeddings(self.data, count))
            self.model.set_statistics(stored.to(self.clip.device))
        elif step == 0 and self.fresh and count:
            pictures = training_pictures(self.data, count)
            chunks = [to_unit(pictures[i : i + 128]).to(self.clip.device) for i in range(0, len(pictures), 128)]
            self.model.set_statistics(torch.cat([self.clip.embed_image(pixels) for pixels in chunks]))

    @torch.no_grad()
    def _embeddings(self, batch: Batch) -> tuple[Tensor, TextCondition]:
        """Image embeddings (B, D), stored ones where the batch has them, and the captions."""
        text = self.clip.encode_text(TokenBatch(batch["ids"], batch["mask"]))
        stored = batch.get("image_embedding")
        image = self.clip.embed_image(to_unit(batch["pixels"])) if stored is None else stored
        return image, (text.embedding, text.states, text.mask)

    def _noised(self, x_0: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Standardised embeddings (N, D) -> noised ones, their time steps (N,), on the device, and alpha_bar (N,)."""
        t = stratified_timesteps(len(x_0), self.model.config.num_train_timesteps, generator)
        noise = torch.randn(x_0.shape, generator=generator).to(x_0)
        alpha_bar = self.alphas[t].to(x_0)
        return diffuse(x_0, noise, alpha_bar), t.to(x_0.device), alpha_bar

    def loss(self, model: nn.Module, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, Logs]:
        repeats, most = self.objective["repeats"], self.model.config.num_train_timesteps
        image, text = self._embeddings(batch)
        x_0 = self.model.to_prior(image).repeat_interleave(repeats, dim=0)  # B R, D
        x_t, t, alpha_bar = self._noised(x_0, generator)
        groups = (-1, repeats)
        prediction = model(x_t.unflatten(0, groups), t.unflatten(0, groups), *text).flatten(0, 1).float()
        loss, errors = denoising_loss(prediction, x_0, alpha_bar, self.model.prediction_type)
        logs = {}
        for quarter, name in enumerate(("clean", "light", "heavy", "noise")):
            rows = t * 4 // most == quarter
            logs[f"mse_{name}"] = errors[rows].mean() if rows.any() else errors.new_tensor(float("nan"))
        predicted = self.model.from_prior(prediction.detach()).unflatten(0, groups)  # B, R, D
        kept = batch["text_kept"]  # a dropped caption says nothing of the picture
        for name, other in {"true": image, "text": text[0], "shuffled": image.roll(1, dims=0)}.items():
            logs[f"cosine_{name}"] = F.cosine_similarity(predicted[kept], other[kept, None].float(), dim=-1).mean()
        return loss, logs

    @cached_property
    def _pairs(self) -> EncodedPairs:
        """The validation pairs, encoded once."""
        return encode_pairs(self.clip, *self.validation.pairs())

    def _sampled(self, pairs: EncodedPairs) -> Tensor:
        """One image embedding (n, D) per caption, in ten steps, without guidance."""
        return predicted_embeddings(self.model, pairs, null_text(self.clip), 10)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Cosines and retrieval of sampled embeddings; loss and cosine of single steps on fixed noise and times."""
        pairs = self._pairs
        x_0 = self.model.to_prior(pairs.image)
        x_t, t, alpha_bar = self._noised(x_0, torch.Generator().manual_seed(0))
        prediction = self.model(x_t, t, pairs.text, pairs.states, pairs.mask).float()
        mse, _ = denoising_loss(prediction, x_0, alpha_bar, self.model.prediction_type)
        drawn = self._sampled(pairs)
        figures = {
            "mse": float(mse),
            "cosine_one_step": cosine_figures(self.model.from_prior(prediction), pairs)["cosine_true"],
            **cosine_figures(drawn, pairs),
            "retrieval": retrieval(drawn, pairs),
            "text_retrieval": retrieval(pairs.text, pairs),
        }
        return {f"{self.validation.kind}_{name}": value for name, value in figures.items()}

    @torch.no_grad()
    def sample(self) -> Image.Image:
        """Sixteen captions, each with its own picture and, beside it, the picture nearest to what the prior drew."""
        pictures, captions = self.validation.pairs()
        found = nearest(self._sampled(self._pairs[:16]), self._pairs.image).tolist()
        shown = [pictures[i] for pair in enumerate(found) for i in pair]
        labels = [text for caption in captions[:16] for text in (caption, "")]
        return make_grid(to_pil(to_unit(np.stack(shown))), columns=8, labels=labels, scale=3)


def training_pictures(data: DataConfig, count: int) -> np.ndarray:
    """Up to `count` training pictures, uint8 (n, 3, S, S), always the same ones."""
    if data.source == "scenes":
        scenes = emoji_scenes(data, data.split)
        return stack_levels([scenes.example(i).pixels for i in range(count)])
    return np.stack([picture for picture, _ in pairs_of(data.source, data.size, count)])
