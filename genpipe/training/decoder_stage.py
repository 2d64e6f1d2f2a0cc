"""The decoder's stage: pictures from their own CLIP embeddings and captions (2204.06125, 2.1).

Legend: B pictures, S side, L text positions.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from genpipe.clip.model import CLIP
from genpipe.dalle2.decoder import Decoder
from genpipe.dalle2.losses import (
    cumulative_alphas,
    denoising_loss,
    diffuse,
    learned_range_loss,
    predicted_x_0,
    stratified_timesteps,
    training_target,
)
from genpipe.dalle2.sampling import DECODER, denoise, noise_of, scheduler_for
from genpipe.errors import InputError
from genpipe.identity import weights_identity
from genpipe.images import make_grid, signed_to_unit, to_pil, to_unit, unit_to_signed
from genpipe.parts import load_part
from genpipe.tokenizer import TokenBatch
from genpipe.training.config import Recipe
from genpipe.training.contrast import contrast_weight
from genpipe.training.data import Batch, check_embeddings
from genpipe.training.stage import Logs, Stage, adopt_clip, build
from genpipe.training.validation import Validation

Condition = tuple[Tensor, Tensor, Tensor, Tensor]  # image and text embedding, text states, text mask


class DecoderStage(Stage):
    """The diffusion decoder, conditioned on what a frozen CLIP says of the picture and of its caption.

    The image embedding is dropped for 10 % of the rows and the caption for 50 %, independently (2.1): the learned null
    embedding and the empty caption take their places.
    """

    part = "decoder"

    def __init__(self, recipe: Recipe, resumed: Path | None) -> None:
        self.objective = recipe.objective
        if not self.objective["clip"]:
            raise InputError("the decoder reads a trained CLIP; name its folder with --set objective.clip=FOLDER.")
        self.clip = load_part(CLIP, self.objective["clip"]).requires_grad_(False)
        identity = weights_identity(self.clip)
        check_embeddings(recipe.data, identity)
        if recipe.init:
            self.model = load_part(Decoder, recipe.init)
            adopt_clip(self.model, identity, recipe)
        else:
            text_width = self.clip.encode_text([""]).states.shape[-1]
            shape = {"resolution": recipe.data.size, "clip_width": self.clip.embedding_dim, "text_width": text_width}
            self.model = build(Decoder, {**shape, "clip_identity": identity, **recipe.model})
        if self.model.config.resolution != recipe.data.size:
            raise InputError(
                f"data.size is {recipe.data.size}, but the decoder's resolution is {self.model.config.resolution}; "
                "make both the same."
            )
        self.alphas = cumulative_alphas(self.model.config.beta_schedule, self.model.config.num_train_timesteps)
        self.validation = Validation(recipe.data, 256)

    def frozen(self) -> list[nn.Module]:
        return [self.clip]

    def collate(self, pictures: np.ndarray, captions: list[str], generator: np.random.Generator) -> Batch:
        o = self.objective
        text_dropped = generator.random(len(captions)) < o["text_dropout"]
        image_kept = generator.random(len(captions)) >= o["image_dropout"]
        kept = ["" if drop else caption for caption, drop in zip(captions, text_dropped, strict=True)]
        tokens = self.clip.tokenize(kept)
        pixels = torch.from_numpy(np.ascontiguousarray(pictures))
        return {"pixels": pixels, "ids": tokens.ids, "mask": tokens.mask, "image_kept": torch.from_numpy(image_kept)}

    @torch.no_grad()
    def _condition(self, pixels: Tensor, ids: Tensor, mask: Tensor, image_embedding: Tensor | None = None) -> Condition:
        """`image_embedding`: of the pixels where it was stored, as CLIP gives it."""
        text = self.clip.encode_text(TokenBatch(ids, mask))
        longest = int(mask.any(dim=0).sum())  # what is padding in every row need not be attended to
        image = self.clip.embed_image(pixels) if image_embedding is None else image_embedding
        return image, text.embedding, text.states[:, :longest], text.mask[:, :longest]

    def loss(self, model: nn.Module, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, Logs]:
        c, o = self.model.config, self.objective
        pixels = to_unit(batch["pixels"])
        x_0 = unit_to_signed(pixels)
        t = stratified_timesteps(len(x_0), c.num_train_timesteps, generator, o["timestep_shift"])
        noise = torch.randn(x_0.shape, generator=generator).to(x_0)
        alpha_bar, t = self.alphas[t].to(x_0), t.to(x_0.device)
        x_t = diffuse(x_0, noise, alpha_bar)
        condition = self._condition(pixels, batch["ids"], batch["mask"], batch.get("image_embedding"))
        output = model(x_t, t, *condition, batch["image_kept"]).float()
        prediction, fraction = output[:, :3], output[:, 3:]
        target = training_target(x_0, noise, alpha_bar, c.prediction_type)
        gamma, weight = o["min_snr_gamma"] or None, contrast_weight(x_0, o["contrast_power"])
        loss, errors = denoising_loss(prediction, target, alpha_bar, c.prediction_type, gamma, weight)
        logs = {"mse": errors.mean()}
        for quarter, name in enumerate(("clean", "light", "heavy", "noise")):
            rows = t * 4 // c.num_train_timesteps == quarter
            logs[f"mse_{name}"] = errors[rows].mean() if rows.any() else errors.new_tensor(float("nan"))
        if c.learned_variance:
            x_0_hat = predicted_x_0(x_t, prediction, alpha_bar, c.prediction_type)
            bound = learned_range_loss(fraction, x_0_hat, x_0, x_t, t, self.alphas).mean()
            loss = loss + o["bound_weight"] * bound
            logs["bound"] = bound.detach()
        return loss, logs

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The loss on fixed noise and time steps with everything given, with the caption alone, the embedding alone."""
        pictures, captions = self.validation.pairs()
        pixels = to_unit(pictures).to(self.model.device)
        x_0, c = unit_to_signed(pixels), self.model.config
        generator = torch.Generator().manual_seed(0)
        t = stratified_timesteps(len(x_0), c.num_train_timesteps, generator)
        noise = torch.randn(x_0.shape, generator=generator).to(x_0)
        alpha_bar, t = self.alphas[t].to(x_0), t.to(x_0.device)
        x_t, target = diffuse(x_0, noise, alpha_bar), training_target(x_0, noise, alpha_bar, c.prediction_type)
        figures = {}
        for name, texts, kept in (
            ("both", captions, True),
            ("text", captions, False),
            ("image", [""] * len(x_0), True),
        ):
            tokens = self.clip.tokenize(texts)
            condition = self._condition(pixels, tokens.ids.to(x_0.device), tokens.mask.to(x_0.device))
            keep = torch.full((len(x_0),), kept, device=x_0.device)
            output = self.model(x_t, t, *condition, keep)
            loss, _ = denoising_loss(output[:, :3], target, alpha_bar, c.prediction_type)
            figures[f"{self.validation.kind}_mse_{name}"] = float(loss)
        return figures

    @torch.no_grad()
    def sample(self) -> Image.Image:
        """Sixteen pictures, drawn from their own embeddings and captions, each beside the original."""
        pictures, captions = self.validation.pairs()
        pixels = to_unit(pictures[:16]).to(self.model.device)
        tokens = self.clip.tokenize(captions[:16])
        args = self._condition(pixels, tokens.ids.to(pixels.device), tokens.mask.to(pixels.device))
        condition = self.model.condition(*args)
        noise = noise_of(range(len(pixels)), pixels.shape[1:], DECODER).to(pixels)
        x_0 = denoise(
            lambda x_t, t: self.model.denoise(x_t, t, condition),
            scheduler_for("dpm-solver++", self.model),
            noise,
            25,
            clamp=1.0,
            stream=DECODER,
        )
        drawn = signed_to_unit(x_0)
        both = torch.stack([pixels, drawn], dim=1).flatten(0, 1)
        labels = [text for caption in captions[:16] for text in (caption, "")]
        return make_grid(to_pil(both), columns=8, labels=labels, scale=3)
