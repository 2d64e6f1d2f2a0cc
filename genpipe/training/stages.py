"""The stages: dVAE and the transformer of DALL-E 1 here, the others beside this file.

Legend: B pictures, S side, L text positions, N image tokens.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from genpipe.dalle1.dvae import DVAE, gumbel_noise
from genpipe.dalle1.losses import relaxed_elbo_loss, text_image_loss
from genpipe.dalle1.mindalle import MinDALLETransformer
from genpipe.dalle1.sampling import generate_tokens
from genpipe.dalle1.transformer import DALLE1Transformer
from genpipe.dalle1.vqgan import VQGAN
from genpipe.errors import InputError
from genpipe.evaluation.reconstruction import reconstruction_figures
from genpipe.images import make_grid, to_pil, to_unit, unit_to_signed
from genpipe.parts import load_one_of, load_part
from genpipe.training.clip_stage import ClipStage
from genpipe.training.config import Recipe
from genpipe.training.contrast import contrast_weight
from genpipe.training.data import Batch
from genpipe.training.decoder_stage import DecoderStage
from genpipe.training.detector_stage import DetectorStage
from genpipe.training.image_text_stage import ImageTextStage
from genpipe.training.prior_stage import PriorStage
from genpipe.training.stage import Logs, Stage, build, tokenizer_for
from genpipe.training.upsampler_stage import UpsamplerStage
from genpipe.training.validation import Validation

_TOKENS = 1e-6  # temperature at which the relaxation is the arg-max code itself


def schedule(start: float, end: float, step: int, steps: int) -> float:
    """Cosine from `start` at step 0 to `end` at `steps`, constant afterwards (2102.12092, A.2)."""
    progress = min(max(step / max(steps, 1), 0.0), 1.0)
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def _pixels(pictures: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pictures))


class DVAEStage(Stage):
    """The discrete VAE: relaxed ELBO with the paper's schedules of temperature and KL weight (2102.12092, 2.1, A.2).

    objective.freeze_codes leaves encoder and code book as they are and trains the decoder on the tokens themselves: a
    transformer that was trained beside this dVAE still fits. objective.keep_codes, a weight, lets the encoder learn but
    adds the cross-entropy with the tokens that it wrote at the start, so that they change where much is won by it.
    """

    part = "dvae"

    def __init__(self, recipe: Recipe, resumed: Path | None) -> None:
        self.objective = recipe.objective
        if self.objective["freeze_codes"] and not recipe.init:
            raise InputError("objective.freeze_codes leaves tokens as they are; name a trained dVAE with init=FOLDER.")
        self.model = load_part(DVAE, recipe.init) if recipe.init else build(DVAE, recipe.model)
        self.first: DVAE | None = None
        if self.objective["keep_codes"]:
            if not recipe.init:
                raise InputError("objective.keep_codes holds on to tokens; name a trained dVAE with init=FOLDER.")
            if self.objective["freeze_codes"]:
                raise InputError("objective.freeze_codes keeps every token already; leave objective.keep_codes at 0.")
            self.first = load_part(DVAE, recipe.init).requires_grad_(False)
        if self.objective["freeze_codes"]:
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(name.startswith("decoder."))
        size, native = recipe.data.size, self.model.config.resolution
        if size != native:
            raise InputError(f"data.size is {size}, but the dVAE's resolution is {native}; make both the same.")
        trained = recipe.init or self.model.config.head == "linear"
        self.warm_up = 0 if trained else self.objective["warm_up_steps"]
        cells = recipe.run.batch_size * self.model.grid_size**2
        if self.warm_up and cells < self.model.num_codes:
            raise InputError(
                f"the {self.model.num_codes} codes are initialised from one batch, which has {cells} cells; raise "
                "run.batch_size or lower model.num_codes."
            )
        self.validation = Validation(recipe.data, 256)

    def collate(self, pictures: np.ndarray, captions: list[str], generator: np.random.Generator) -> Batch:
        return {"pixels": _pixels(pictures)}

    @torch.no_grad()
    def before_step(self, batch: Batch, step: int, generator: torch.Generator) -> None:
        """The code book from encoder outputs, once the continuous warm-up is over."""
        if self.warm_up and step == self.warm_up:
            features = self.model.encode_features(to_unit(batch["pixels"]))
            self.model.initialise_codebook(features, generator)

    def loss(self, model: nn.Module, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, Logs]:
        o = self.objective
        step = step - self.warm_up
        quantise = step >= 0
        pixels = to_unit(batch["pixels"])
        temperature = schedule(o["temperature"], o["final_temperature"], step, o["temperature_steps"])
        beta = schedule(0.0, o["kl_weight"], step, o["kl_steps"]) if quantise else 0.0
        gumbel = None
        if o["freeze_codes"]:
            temperature = _TOKENS
        elif quantise:
            cells = pixels.shape[-1] // self.model.factor
            gumbel = gumbel_noise((len(pixels), self.model.num_codes, cells, cells), generator, pixels)
        output = model(pixels, temperature=temperature, gumbel=gumbel, quantise=quantise)
        weight = contrast_weight(unit_to_signed(pixels), o["contrast_power"])
        loss, logs = relaxed_elbo_loss(pixels, output.mu, output.ln_b, output.logits, beta, o["squared_error"], weight)
        if self.first is not None:
            with torch.no_grad():
                tokens = self.first.to(pixels.device).encode(pixels)  # B, N
            kept = (output.logits.detach().argmax(dim=1).flatten(1) == tokens).float().mean()
            loss = loss + o["keep_codes"] * F.cross_entropy(output.logits.float().flatten(2), tokens)
            logs = {**logs, "kept": kept}
        return loss, {**logs, "temperature": torch.tensor(temperature), "beta": torch.tensor(beta)}

    def _validation_pixels(self) -> Tensor:
        return to_unit(self.validation.pairs()[0]).to(self.model.device)

    def validate(self) -> dict[str, float]:
        figures = reconstruction_figures(self.model, self._validation_pixels())
        return {f"{self.validation.kind}_{name}": value for name, value in figures.items()}

    @torch.no_grad()
    def sample(self) -> Image.Image:
        """Sixteen pictures above what is left of them."""
        pixels = self._validation_pixels()[:16]
        restored = self.model.decode(self.model.encode(pixels))
        return make_grid(to_pil(torch.cat([pixels, restored])), columns=len(pixels), scale=2)


class DALLE1Stage(Stage):
    """The transformer over text and image tokens of a frozen dVAE (2102.12092, 2.2)."""

    part = "transformer"

    def __init__(self, recipe: Recipe, resumed: Path | None) -> None:
        self.objective = recipe.objective
        if not self.objective["dvae"]:
            raise InputError("the transformer reads a trained dVAE; name its folder with --set objective.dvae=FOLDER.")
        self.dvae = load_one_of((DVAE, VQGAN), self.objective["dvae"]).requires_grad_(False)
        if recipe.data.size % self.dvae.factor:
            raise InputError(f"data.size is {recipe.data.size}; this dVAE needs a multiple of {self.dvae.factor}.")
        shape = {"num_image_tokens": self.dvae.num_codes, "grid_size": recipe.data.size // self.dvae.factor}
        if recipe.init:
            self.model = load_one_of((DALLE1Transformer, MinDALLETransformer), recipe.init)
            other = {key: self.model.config[key] for key in shape if self.model.config[key] != shape[key]}
            if other:
                raise InputError(f"{recipe.init} was made for another dVAE or data.size: it has {other}, not {shape}.")
        else:
            tokenizer = tokenizer_for(recipe, resumed)
            settings = {"vocab_size": tokenizer.vocab_size, **shape, **recipe.model}
            self.model = build(DALLE1Transformer, settings)
            self.model.tokenizer = tokenizer
            if self.objective["codebook_init"]:
                seeded = torch.Generator().manual_seed(recipe.run.seed)
                self.model.initialise_image_tokens(self.dvae.codebook, seeded)
        self.validation = Validation(recipe.data, 128)

    def frozen(self) -> list[nn.Module]:
        return [self.dvae]

    def _tokens(self, captions: list[str], dropout: float = 0.0, generator: Any = None) -> tuple[Tensor, Tensor]:
        tokens = self.model.tokenizer(captions, self.model.config.text_length, dropout=dropout, generator=generator)
        return tokens.ids, tokens.mask

    def collate(self, pictures: np.ndarray, captions: list[str], generator: np.random.Generator) -> Batch:
        o = self.objective
        dropped = generator.random(len(captions)) < o["caption_dropout"]
        kept = ["" if drop else caption for caption, drop in zip(captions, dropped, strict=True)]
        ids, mask = self._tokens(kept, o["bpe_dropout"], generator)
        return {"pixels": _pixels(pictures), "ids": ids, "mask": mask}

    def loss(self, model: nn.Module, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, Logs]:
        with torch.no_grad():
            image_tokens = self.dvae.encode(to_unit(batch["pixels"]))
        text_logits, image_logits = model(batch["ids"], batch["mask"], image_tokens)
        weight = self.objective["text_weight"]
        return text_image_loss(text_logits, image_logits, batch["ids"], batch["mask"], image_tokens, weight)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        pictures, captions = self.validation.pairs()
        device = self.model.device
        ids, mask = (x.to(device) for x in self._tokens(captions))
        tokens = self.dvae.encode(to_unit(pictures).to(device))
        text_logits, image_logits = self.model(ids, mask, tokens)
        _, logs = text_image_loss(text_logits, image_logits, ids, mask, tokens)
        return {f"{self.validation.kind}_{name}": float(logs[name]) for name in ("text", "image")}

    @torch.no_grad()
    def sample(self) -> Image.Image:
        """Sixteen captions, two candidates each."""
        captions = self.validation.pairs()[1][:16]
        device = self.model.device
        ids, mask = (x.to(device) for x in self._tokens(captions))
        null_ids, null_mask = (x.to(device) for x in self._tokens([""]))
        seeds = [[0, 1]] * len(captions)
        tokens = generate_tokens(self.model, ids, mask, seeds, guidance_scale=2.0, null_text=(null_ids, null_mask))
        pictures = to_pil(self.dvae.decode(tokens.flatten(0, 1)))
        return make_grid(pictures, columns=8, labels=[c for caption in captions for c in (caption, "")], scale=3)


STAGES: dict[str, Callable[[Recipe, Path | None], Stage]] = {
    "dvae": DVAEStage,
    "clip": ClipStage,
    "dalle1": DALLE1Stage,
    "decoder": DecoderStage,
    "prior": PriorStage,
    "upsampler": UpsamplerStage,
    "image_text": ImageTextStage,
    "detector": DetectorStage,
}
