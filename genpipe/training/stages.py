"""Stages: one per trained part. A stage builds its modules and turns a batch into a loss; it knows nothing of optimisers.

Legend: B pictures, S side, L text positions, N image tokens.
"""

import math
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from genpipe.clip.loss import contrastive_loss
from genpipe.clip.model import CLIP
from genpipe.dalle1.dvae import DVAE, gumbel_noise
from genpipe.dalle1.losses import relaxed_elbo_loss, text_image_loss
from genpipe.dalle1.sampling import generate_tokens
from genpipe.dalle1.transformer import DALLE1Transformer
from genpipe.data.scenes import EmojiScenes
from genpipe.errors import InputError
from genpipe.evaluation.clip import TWIN_KINDS, retrieval_accuracy, twin_accuracy
from genpipe.evaluation.reconstruction import reconstruction_figures
from genpipe.images import make_grid, stack_levels, to_pil, to_unit
from genpipe.parts import load_part
from genpipe.tokenizer import FILE_NAME, CaptionTokenizer
from genpipe.training.config import DataConfig, Recipe
from genpipe.training.data import Batch, captions_of

Logs = dict[str, Tensor]


class Stage(Protocol):
    """What the loop asks of a stage. `model` is the trained part; other modules are frozen."""

    part: str  # folder name of the part inside a family
    model: nn.Module

    def collate(self, pictures: np.ndarray, captions: list[str], generator: np.random.Generator) -> Batch:
        """uint8 pictures (B, 3, S, S) and captions -> tensors of one batch."""
        ...

    def before_step(self, batch: Batch, step: int, generator: torch.Generator) -> None:
        """Changes to the model outside of gradient descent."""
        ...

    def loss(self, model: nn.Module, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, Logs]:
        """Scalar loss and detached figures; `model` is self.model, possibly wrapped for several processes."""
        ...

    def validate(self) -> dict[str, float]:
        """Figures on held-out data."""
        ...

    def sample(self) -> Image.Image:
        """A picture that shows what the part can do now."""
        ...

    def frozen(self) -> list[nn.Module]:
        """Modules that must be on the training device but are not trained."""
        ...


def scene_validation(data: DataConfig) -> EmojiScenes | None:
    """Held-out emoji scenes of the training size, or None for other sources."""
    return EmojiScenes(size=data.size, split="heldout", seed=data.seed) if data.source == "scenes" else None


def tokenizer_for(recipe: Recipe, folder: Path) -> CaptionTokenizer:
    """The run's tokenizer: from objective.tokenizer (a part's folder), from `folder` when resuming, else trained on captions."""
    given = recipe.objective.get("tokenizer", "")
    if given:
        return CaptionTokenizer.load(given)
    if not (folder / FILE_NAME).is_file():
        captions = captions_of(recipe.data, recipe.objective["tokenizer_captions"])
        tokenizer = CaptionTokenizer.train(captions, vocab_size=recipe.objective["vocab_size"])
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(folder)
    return CaptionTokenizer.load(folder)


def schedule(start: float, end: float, step: int, steps: int) -> float:
    """Cosine from `start` at step 0 to `end` at `steps`, constant afterwards (2102.12092, A.2)."""
    progress = min(max(step / max(steps, 1), 0.0), 1.0)
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


class DVAEStage:
    """The discrete VAE: relaxed ELBO with the paper's schedules of temperature and KL weight (2102.12092, 2.1, A.2)."""

    part = "dvae"

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe = recipe
        self.model = load_part(DVAE, recipe.init) if recipe.init else DVAE(**recipe.model)
        self.scenes = scene_validation(recipe.data)
        self.warm_up = 0 if recipe.init or self.model.config.head == "linear" else recipe.objective["warm_up_steps"]

    def frozen(self) -> list[nn.Module]:
        return []

    def collate(self, pictures: np.ndarray, captions: list[str], generator: np.random.Generator) -> Batch:
        return {"pixels": torch.from_numpy(np.ascontiguousarray(pictures))}

    @torch.no_grad()
    def before_step(self, batch: Batch, step: int, generator: torch.Generator) -> None:
        if self.warm_up and step == self.warm_up:
            features = self.model.encode_features(to_unit(batch["pixels"]))
            self.model.initialise_codebook(features, generator)

    def loss(self, model: nn.Module, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, Logs]:
        o = self.recipe.objective
        step = step - self.warm_up
        pixels = to_unit(batch["pixels"])
        temperature = schedule(o["temperature"], o["final_temperature"], step, o["temperature_steps"])
        beta = schedule(0.0, o["kl_weight"], step, o["kl_steps"])
        quantise = step >= 0
        gumbel = None
        if quantise:
            config = self.model.config
            cells = pixels.shape[-1] // self.model.factor
            gumbel = gumbel_noise((len(pixels), config.num_codes, cells, cells), generator, pixels)
        output = model(pixels, temperature=temperature, gumbel=gumbel, quantise=quantise)
        beta = beta if quantise else 0.0
        loss, logs = relaxed_elbo_loss(pixels, output.mu, output.ln_b, output.logits, beta, o["squared_error"])
        return loss, {**logs, "temperature": torch.tensor(temperature), "beta": torch.tensor(beta)}

    def _held_out(self, count: int) -> Tensor:
        if self.scenes is None:
            raise InputError("held-out pictures are known for emoji scenes only")
        pictures = stack_levels([self.scenes.example(i).pixels for i in range(count)])
        return to_unit(pictures).to(self.model.device)

    def validate(self) -> dict[str, float]:
        return reconstruction_figures(self.model, self._held_out(256)) if self.scenes else {}

    @torch.no_grad()
    def sample(self) -> Image.Image:
        pixels = self._held_out(16)
        restored = self.model.decode(self.model.encode(pixels))
        return make_grid(to_pil(torch.cat([pixels, restored])), columns=16, scale=2)


class ClipStage:
    """CLIP: symmetric contrastive loss over pairs, twins of scenes among them as hard negatives (2103.00020, 2.3)."""

    part = "clip"

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe = recipe
        if recipe.init:
            self.model = load_part(CLIP, recipe.init)
        else:
            tokenizer = tokenizer_for(recipe, folder)
            model = dict(recipe.model)
            architecture = model.pop("architecture")
            text = {**architecture["text_cfg"], "vocab_size": tokenizer.vocab_size}
            self.model = CLIP(architecture={**architecture, "text_cfg": text}, **model)
            self.model.tokenizer = tokenizer
        self.scenes = scene_validation(recipe.data)

    def frozen(self) -> list[nn.Module]:
        return []

    def collate(self, pictures: np.ndarray, captions: list[str], generator: np.random.Generator) -> Batch:
        tokens = self.model.tokenizer(captions, self.model.context_length)
        return {"pixels": torch.from_numpy(np.ascontiguousarray(pictures)), "ids": tokens.ids, "mask": tokens.mask}

    def before_step(self, batch: Batch, step: int, generator: torch.Generator) -> None:
        return None

    def loss(self, model: nn.Module, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, Logs]:
        pixels = degrade(to_unit(batch["pixels"]), self.recipe.objective["degrade"], generator)
        image, text, scale = model(pixels, batch["ids"], batch["mask"])
        loss = contrastive_loss(image, text, scale, local_loss=self.recipe.objective["local_loss"])
        with torch.no_grad():
            right = (image @ text.T).argmax(dim=1) == torch.arange(len(image), device=image.device)
        return loss, {"accuracy": right.float().mean(), "logit_scale": scale.detach()}

    def validate(self) -> dict[str, float]:
        if self.scenes is None:
            return {}
        figures = {f"twin_{kind}": twin_accuracy(self.model, self.scenes, kind, 100) for kind in TWIN_KINDS}
        return {**figures, "retrieval": retrieval_accuracy(self.model, self.scenes, 100, 2)}

    @torch.no_grad()
    def sample(self) -> Image.Image:
        """Held-out pictures under the caption, out of 100, that scores best."""
        if self.scenes is None:
            raise InputError("sample pictures are known for emoji scenes only")
        examples = [self.scenes.example(i) for i in range(100)]
        pixels = to_unit(stack_levels([e.pixels for e in examples[:16]])).to(self.model.device)
        text = self.model.encode_text([e.caption for e in examples]).normalized
        best = (self.model.encode_image(pixels).normalized @ text.T).argmax(dim=1).tolist()
        return make_grid(to_pil(pixels), columns=8, labels=[examples[b].caption for b in best], scale=4)


def degrade(pixels: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Blur and noise on a random share of pictures (B, 3, H, W) in [0, 1]: CLIP will judge drawn pictures, not only clean ones."""
    if probability <= 0:
        return pixels
    draws = torch.rand(4, len(pixels), generator=generator, device=generator.device).to(pixels.device)
    noise = torch.randn(pixels.shape, generator=generator, device=generator.device).to(pixels.device)
    small = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    blur = torch.where(draws[0] < probability, draws[1], torch.zeros_like(draws[1]))[:, None, None, None]
    level = torch.where(draws[2] < probability, 0.08 * draws[3], torch.zeros_like(draws[3]))[:, None, None, None]
    return (torch.lerp(pixels, small, blur) + level * noise).clamp(0, 1)


class DALLE1Stage:
    """The transformer over text and image tokens of a frozen dVAE (2102.12092, 2.2)."""

    part = "transformer"

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe = recipe
        if not recipe.objective["dvae"]:
            raise InputError("the transformer reads a trained dVAE; name its folder with --set objective.dvae=FOLDER")
        self.dvae = load_part(DVAE, recipe.objective["dvae"]).requires_grad_(False)
        if recipe.init:
            self.model = load_part(DALLE1Transformer, recipe.init)
        else:
            tokenizer = tokenizer_for(recipe, folder)
            shape = {"num_image_tokens": self.dvae.num_codes, "grid_size": recipe.data.size // self.dvae.factor}
            self.model = DALLE1Transformer(vocab_size=tokenizer.vocab_size, **shape, **recipe.model)
            self.model.tokenizer = tokenizer
        self.scenes = scene_validation(recipe.data)

    def frozen(self) -> list[nn.Module]:
        return [self.dvae]

    def _tokens(self, captions: list[str], dropout: float = 0.0, generator: Any = None) -> tuple[Tensor, Tensor]:
        tokens = self.model.tokenizer(captions, self.model.config.text_length, dropout=dropout, generator=generator)
        return tokens.ids, tokens.mask

    def collate(self, pictures: np.ndarray, captions: list[str], generator: np.random.Generator) -> Batch:
        o = self.recipe.objective
        dropped = generator.random(len(captions)) < o["caption_dropout"]
        kept = ["" if drop else caption for caption, drop in zip(captions, dropped, strict=True)]
        ids, mask = self._tokens(kept, o["bpe_dropout"], generator)
        return {"pixels": torch.from_numpy(np.ascontiguousarray(pictures)), "ids": ids, "mask": mask}

    def before_step(self, batch: Batch, step: int, generator: torch.Generator) -> None:
        return None

    def loss(self, model: nn.Module, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, Logs]:
        with torch.no_grad():
            image_tokens = self.dvae.encode(to_unit(batch["pixels"]))
        text_logits, image_logits = model(batch["ids"], batch["mask"], image_tokens)
        weight = self.recipe.objective["text_weight"]
        return text_image_loss(text_logits, image_logits, batch["ids"], batch["mask"], image_tokens, weight)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        if self.scenes is None:
            return {}
        examples = [self.scenes.example(i) for i in range(128)]
        device = self.model.device
        ids, mask = (x.to(device) for x in self._tokens([e.caption for e in examples]))
        tokens = self.dvae.encode(to_unit(stack_levels([e.pixels for e in examples])).to(device))
        _, logs = text_image_loss(*self.model(ids, mask, tokens), ids, mask, tokens)
        return {"heldout_text": float(logs["text"]), "heldout_image": float(logs["image"])}

    @torch.no_grad()
    def sample(self) -> Image.Image:
        if self.scenes is None:
            raise InputError("sample pictures are known for emoji scenes only")
        captions = [self.scenes.example(i).caption for i in range(16)]
        device = self.model.device
        ids, mask = (x.to(device) for x in self._tokens(captions))
        null_text = tuple(x.to(device) for x in self._tokens([""]))
        tokens = generate_tokens(
            self.model, ids, mask, [[0, 1]] * len(captions), guidance_scale=2.0, null_text=(null_text[0], null_text[1])
        )
        pictures = to_pil(self.dvae.decode(tokens.flatten(0, 1)))
        return make_grid(pictures, columns=8, labels=[c for caption in captions for c in (caption, "")], scale=3)


STAGES = {"dvae": DVAEStage, "clip": ClipStage, "dalle1": DALLE1Stage}
