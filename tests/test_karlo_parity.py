"""Karlo's weights draw what diffusers draws with them: its components, wired here as its unCLIP pipelines wire them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import PriorTransformer, UNet2DConditionModel, UNet2DModel
from karlo_files import Walk, guided, write_folder, write_variations
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from genpipe.dalle2.sampling import DECODER, PRIOR, UPSAMPLER, noise_of
from genpipe.images import to_pil, to_unit
from genpipe.published import karlo
from pipelines.candidates import Block
from pipelines.dalle2 import DALLE2Pipeline
from pipelines.enlarging import Enlarging
from pipelines.settings import DALLE2Sampling

SEEDS = [5, 6, 7]
PROMPT = "two cats on a red mat"
STEPS = {"prior_steps": 6, "num_inference_steps": 6}  # a few, of each; guidance and the rest are Karlo's own
Text = tuple[Tensor, Tensor, Tensor]  # embedding (1, D), states (1, L, D), mask (1, L)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("karlo") / "karlo-v1-alpha")


@pytest.fixture(scope="module")
def variations(folder: Path) -> Path:
    return write_variations(folder, folder.parent / "variations")


def pipeline_of(source: Path, clip: Path | None = None) -> DALLE2Pipeline:
    read = karlo.read(source, clip=clip)
    parts: dict[str, Any] = {part: build() for part, build in read.parts.items()}
    return DALLE2Pipeline(**parts, defaults=read.defaults["dalle2"])


def reference_prior(folder: Path, null: Text, text: Text) -> Tensor:
    prior = PriorTransformer.from_pretrained(folder / "prior").eval()
    embedding, states, mask = (
        torch.cat([a.repeat(3, *[1] * (a.ndim - 1)) for a in pair]) for pair in zip(null, text, strict=True)
    )

    def predict(x: Tensor, t: Tensor, last: bool) -> Tensor:
        answer = prior(
            torch.cat([x, x]), timestep=t, proj_embedding=embedding, encoder_hidden_states=states, attention_mask=mask
        ).predicted_image_embedding
        return guided(answer, 4.0, x.shape[1])

    noise = noise_of(SEEDS, (1, embedding.shape[1]), PRIOR)[:, 0]
    return prior.post_process_latents(Walk(folder, "prior_scheduler", 6, SEEDS)(predict, noise, PRIOR))


def text_projection(folder: Path, image_embedding: Tensor, embedding: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    """The text projection of unCLIP for null rows, then conditional ones: context (2 R, 4 + L, X), time (2 R, E)."""
    w = load_file(folder / "text_proj" / "diffusion_pytorch_model.safetensors")

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    null = w["learned_classifier_free_guidance_embeddings"].expand(len(image_embedding), -1)
    image = torch.cat([null, image_embedding])
    time = linear("clip_image_embeddings_project_to_time_embeddings", image) + linear("embedding_proj", embedding)
    extra = linear("clip_extra_context_tokens_proj", image).reshape(len(image), -1, 4).permute(0, 2, 1)
    norm = [w[f"text_encoder_hidden_states_norm.{kind}"] for kind in ("weight", "bias")]
    text = F.layer_norm(linear("encoder_hidden_states_proj", states), norm[0].shape, *norm)
    return torch.cat([extra, text], dim=1), time


def reference_decoder(folder: Path, image_embedding: Tensor, null: Text, text: Text) -> Tensor:
    unet = UNet2DConditionModel.from_pretrained(folder / "decoder").eval()
    embedding, states, mask = (
        torch.cat([a.repeat(3, *[1] * (a.ndim - 1)) for a in pair]) for pair in zip(null, text, strict=True)
    )
    context, time = text_projection(folder, image_embedding, embedding, states)
    mask = F.pad(mask, (4, 0), value=True)

    def predict(x: Tensor, t: Tensor, last: bool) -> Tensor:
        answer = unet(
            torch.cat([x, x]), timestep=t, encoder_hidden_states=context, class_labels=time, attention_mask=mask
        ).sample
        return guided(answer, 8.0, 3)

    x = Walk(folder, "decoder_scheduler", 6, SEEDS)(predict, noise_of(SEEDS, (3, 8, 8), DECODER), DECODER)
    return x.clamp(-1, 1)


def reference_super_resolution(folder: Path, small: Tensor) -> Tensor:
    first, last_one = (UNet2DModel.from_pretrained(folder / f"super_res_{name}").eval() for name in ("first", "last"))
    low = F.interpolate(small, size=[32, 32], mode="bicubic", align_corners=False, antialias=True)

    def predict(x: Tensor, t: Tensor, last: bool) -> Tensor:
        return (last_one if last else first)(torch.cat([x, low], dim=1), t).sample

    walk = Walk(folder, "super_res_scheduler", 7, SEEDS)
    return walk(predict, noise_of(SEEDS, (3, 32, 32), UPSAMPLER), UPSAMPLER)


def drawn(pipeline: DALLE2Pipeline, prompt: str, image: Image.Image | None = None) -> tuple[Any, Tensor, Tensor]:
    """What the pipeline draws of three candidates: image embeddings (3, D), small and large pixels (3, 3, H, W)."""
    sampling = pipeline.resolve_sampling(STEPS, image=image)
    encoded = pipeline.encode_prompts([prompt], image=image)
    block, enlarging = Block(range(1), range(3)), Enlarging.of(pipeline.upsampler, sampling)
    assert enlarging is not None
    embedding = pipeline.image_embeddings(encoded, block, SEEDS[0], sampling)
    small = pipeline.decode(encoded, embedding, block, SEEDS[0], sampling)
    large = pipeline.upsample(small, [prompt], block, SEEDS[0], enlarging)
    return embedding, small[0], large[0]


def encoded(pipeline: DALLE2Pipeline, prompt: str) -> Text:
    assert pipeline.clip is not None
    text = pipeline.clip.encode_text([prompt])
    return text.embedding, text.states, text.mask


@torch.no_grad()
def test_texts_are_drawn_as_diffusers_draws_them(folder: Path, variations: Path) -> None:
    pipeline = pipeline_of(folder, clip=variations / "image_encoder")
    embedding, small, large = drawn(pipeline, PROMPT)
    null, text = encoded(pipeline, ""), encoded(pipeline, PROMPT)
    theirs = reference_prior(folder, null, text)
    torch.testing.assert_close(embedding[0], theirs, rtol=0, atol=1e-5)
    their_small = reference_decoder(folder, theirs, null, text)
    torch.testing.assert_close(small, their_small * 0.5 + 0.5, rtol=0, atol=1e-4)
    their_large = (reference_super_resolution(folder, their_small) * 0.5 + 0.5).clamp(0, 1)
    torch.testing.assert_close(large, their_large, rtol=0, atol=1e-4)
    assert 0.2 < float(large.std()) and float((large - large.mean(dim=0)).abs().mean()) > 0.1  # pictures that differ

    output = pipeline(
        PROMPT, num_candidates=3, keep=3, seed=SEEDS[0], sampling=DALLE2Sampling(**{**karlo.SAMPLING, **STEPS})
    )
    pictures = dict(zip(output.seeds[0], output.images[0], strict=True))
    for seed, wanted in zip(SEEDS, to_pil(their_large), strict=True):
        assert np.abs(np.asarray(pictures[seed], int) - np.asarray(wanted, int)).max() <= 1


@torch.no_grad()
def test_variations_are_drawn_as_diffusers_draws_them(folder: Path, variations: Path) -> None:
    pipeline = pipeline_of(variations)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    _, small, large = drawn(pipeline, "", image)
    null = encoded(pipeline, "")
    assert pipeline.clip is not None
    given = pipeline.clip.embed_image(to_unit([image])).expand(3, -1)
    their_small = reference_decoder(folder, given, null, null)
    torch.testing.assert_close(small, their_small * 0.5 + 0.5, rtol=0, atol=1e-4)
    their_large = (reference_super_resolution(folder, their_small) * 0.5 + 0.5).clamp(0, 1)
    torch.testing.assert_close(large, their_large, rtol=0, atol=1e-4)


@torch.no_grad()
def test_without_an_image_tower_the_same_pictures_come_in_order(folder: Path) -> None:
    pipeline = pipeline_of(folder)
    sampling = pipeline.resolve_sampling(STEPS)
    output = pipeline(PROMPT, num_candidates=4, keep=3, seed=SEEDS[0], sampling=sampling)
    assert output.seeds == [SEEDS] and output.scores == [[None] * 3]
    null, text = encoded(pipeline, ""), encoded(pipeline, PROMPT)
    small = reference_decoder(folder, reference_prior(folder, null, text), null, text)
    for ours, theirs in zip(
        output.images[0], to_pil(reference_super_resolution(folder, small) * 0.5 + 0.5), strict=True
    ):
        assert ours.size == (32, 32) and np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1
