"""The upsampler's stage: crops of pictures from their small, corrupted selves (2204.06125, 2.1).

Legend: B pictures, S side of a training picture, C side of its crop, f the factor.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from genpipe.dalle1.dvae import DVAE
from genpipe.dalle2.losses import (
    cumulative_alphas,
    denoising_loss,
    diffuse,
    stratified_timesteps,
    training_target,
)
from genpipe.dalle2.upsampler import Upsampler, upsample
from genpipe.errors import InputError
from genpipe.evaluation.upsampling import shrink, upsampling_figures
from genpipe.images import make_grid, resize, to_pil, to_unit, unit_to_signed
from genpipe.parts import load_part
from genpipe.training.config import Recipe
from genpipe.training.contrast import contrast_weight
from genpipe.training.data import Batch
from genpipe.training.stage import Logs, Stage, build
from genpipe.training.validation import Validation

_SHOWN = 6  # pictures of a sample
_VALIDATED = 32


class UpsamplerStage(Stage):
    """One upsampler: every picture gives a random crop, and the crop the small picture that the UNet sees beside it.

    The paper's crops have a quarter of the picture's side; objective.crop is a side in pixels of the large picture.
    With objective.dvae a share of the small pictures, objective.dvae_share, went through that discrete VAE's tokens: an
    upsampler that DALL-E 1 shares then learns to put right what those lose. Tokens stand for whole pictures, not crops.
    """

    part = "upsampler"

    def __init__(self, recipe: Recipe, resumed: Path | None) -> None:
        self.objective, self.crop = recipe.objective, recipe.objective["crop"]
        self.model = load_part(Upsampler, recipe.init) if recipe.init else build(Upsampler, recipe.model)
        multiple, size = self.model.multiple, recipe.data.size
        if self.crop > size or self.crop % multiple or size % multiple:
            raise InputError(
                f"objective.crop is {self.crop} and data.size {size}; both must be multiples of {multiple} for this "
                "upsampler, and the crop no larger than the picture."
            )
        self.dvae = load_part(DVAE, self.objective["dvae"]).requires_grad_(False) if self.objective["dvae"] else None
        if self.dvae is not None and {self.crop, size} != {self.dvae.config.resolution * self.factor}:
            side = self.dvae.config.resolution
            raise InputError(
                f"objective.crop is {self.crop} and data.size {size}; pictures of {side} pixels that went through "
                f"objective.dvae are enlarged whole: set both to {side * self.factor}."
            )
        self.alphas = cumulative_alphas(self.model.config.beta_schedule, self.model.config.num_train_timesteps)
        self.validation = Validation(recipe.data, _VALIDATED)

    @property
    def factor(self) -> int:
        """How many times larger the drawn picture is."""
        return self.model.config.factor

    def frozen(self) -> list[nn.Module]:
        return [] if self.dvae is None else [self.dvae]

    def collate(self, pictures: np.ndarray, captions: list[str], generator: np.random.Generator) -> Batch:
        """Crops uint8 (B, 3, C, C) and their small pictures, float (B, 3, C / f, C / f) in [0, 1]; no captions."""
        places = generator.integers(pictures.shape[-1] - self.crop + 1, size=(len(pictures), 2))
        crops = np.stack(
            [picture[:, y : y + self.crop, x : x + self.crop] for picture, (y, x) in zip(pictures, places, strict=True)]
        )
        pixels, side = torch.from_numpy(crops), self.crop // self.factor
        mode = self.model.config.resize_mode
        low = self.model.degradation.degrade(to_unit(pixels), (side, side), mode, generator)
        return {"pixels": pixels, "low": low}

    @torch.no_grad()
    def _low(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """The batch's small pictures (B, 3, C / f, C / f), a share of them as the dVAE's tokens have them."""
        low = batch["low"]
        if self.dvae is None:
            return low
        rows = torch.rand(len(low), generator=generator, device=generator.device) < self.objective["dvae_share"]
        if rows.any():
            rows, low = rows.to(low.device), low.clone()
            low[rows] = self.dvae.decode(self.dvae.encode(shrink(self.model, to_unit(batch["pixels"][rows]))))
        return low

    def loss(self, model: nn.Module, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, Logs]:
        c = self.model.config
        x_0, low = unit_to_signed(to_unit(batch["pixels"])), unit_to_signed(self._low(batch, generator))
        t = stratified_timesteps(len(x_0), c.num_train_timesteps, generator)
        noise = torch.randn(x_0.shape, generator=generator).to(x_0)
        alpha_bar, t = self.alphas[t].to(x_0), t.to(x_0.device)
        prediction = model(diffuse(x_0, noise, alpha_bar), t, low)
        target = training_target(x_0, noise, alpha_bar, c.prediction_type)
        gamma = self.objective["min_snr_gamma"] or None
        weight = contrast_weight(x_0, self.objective["contrast_power"])
        loss, errors = denoising_loss(prediction, target, alpha_bar, c.prediction_type, gamma, weight)
        logs = {"mse": errors.mean()}
        for quarter, name in enumerate(("clean", "light", "heavy", "noise")):
            rows = t * 4 // c.num_train_timesteps == quarter
            logs[f"mse_{name}"] = errors[rows].mean() if rows.any() else errors.new_tensor(float("nan"))
        return loss, logs

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Whole pictures, shrunk and drawn again in the model's own number of steps: see `upsampling_figures`."""
        pixels = to_unit(self.validation.pairs()[0]).to(self.model.device)
        figures = upsampling_figures(self.model, pixels, range(len(pixels)))
        return {f"{self.validation.kind}_{name}": value for name, value in figures.items()}

    @torch.no_grad()
    def sample(self) -> Image.Image:
        """Rows of the small picture (its pixels enlarged), the merely resized one, the drawn one, and the true one."""
        pictures, captions = self.validation.pairs()
        pixels = to_unit(pictures[:_SHOWN]).to(self.model.device)
        low = shrink(self.model, pixels)
        drawn = upsample(self.model, low, range(len(low)))
        blocks = resize(low, (pixels.shape[-2], pixels.shape[-1]), mode="nearest")
        rows = torch.cat([blocks, self.model.enlarge(low).clamp(0, 1), drawn, pixels])
        labels = [f"{kind}: {caption}" for kind in ("low", "resized", "ours", "true") for caption in captions[:_SHOWN]]
        return make_grid(to_pil(rows), columns=len(low), labels=labels)
