"""A tiny Karlo in random weights: the folder that diffusers writes, and the original checkpoints of the same."""

import json
import shutil
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from diffusers import PriorTransformer, UnCLIPScheduler, UNet2DConditionModel, UNet2DModel
from published_files import random_tensors, randomised, write_image_encoder, write_json, write_text_encoder
from safetensors.torch import load_file, save_file
from torch import Tensor

from genpipe.dalle2.sampling import step_generators
from genpipe.published import karlo
from genpipe.published.fitting import give_back
from genpipe.published.guided_diffusion import Rules

D, E, X = 16, 32, 24  # CLIP's width, the time embedding's, the context's
_UNET = {"block_out_channels": [8, 16], "layers_per_block": 2, "norm_num_groups": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "prior": {
        "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "embedding_dim": D, "num_embeddings": 77,
    },
    "decoder": {
        **karlo.CONFIGS["decoder"], **_UNET, "sample_size": 8, "attention_head_dim": 4, "cross_attention_dim": X,
        "down_block_types": ["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"],
        "up_block_types": ["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
    },
    "text_proj": {
        "clip_embeddings_dim": D, "clip_extra_context_tokens": 4, "cross_attention_dim": X, "time_embed_dim": E,
    },
    "super_res_first": {
        **karlo.CONFIGS["super_res_first"], **_UNET, "sample_size": 32,
        "down_block_types": ["ResnetDownsampleBlock2D"] * 2, "up_block_types": ["ResnetUpsampleBlock2D"] * 2,
    },
}  # fmt: skip
TEXT_PROJ = {
    "learned_classifier_free_guidance_embeddings": [D],
    "embedding_proj.weight": [E, D],
    "embedding_proj.bias": [E],
    "clip_image_embeddings_project_to_time_embeddings.weight": [E, D],
    "clip_image_embeddings_project_to_time_embeddings.bias": [E],
    "clip_extra_context_tokens_proj.weight": [4 * X, D],
    "clip_extra_context_tokens_proj.bias": [4 * X],
    "encoder_hidden_states_proj.weight": [X, D],
    "encoder_hidden_states_proj.bias": [X],
    "text_encoder_hidden_states_norm.weight": [X],
    "text_encoder_hidden_states_norm.bias": [X],
}
SCHEDULERS = {
    "prior_scheduler": UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0),
    "decoder_scheduler": UnCLIPScheduler(variance_type="learned_range"),
    "super_res_scheduler": UnCLIPScheduler(),
}


def write_folder(folder: Path) -> Path:
    """A text-to-image folder as diffusers has it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        networks: dict[str, Any] = {
            "prior": PriorTransformer(**CONFIGS["prior"]),
            "decoder": UNet2DConditionModel(**CONFIGS["decoder"]),
            "super_res_first": UNet2DModel(**CONFIGS["super_res_first"]),
            "super_res_last": UNet2DModel(**{**CONFIGS["super_res_first"], "sample_size": None}),
        }
    for number, (name, network) in enumerate(networks.items()):
        randomised(network, number)
        if name == "prior":
            network.clip_std.data.abs_().add_(0.5)
        network.save_pretrained(folder / name)
    for name, scheduler in SCHEDULERS.items():
        scheduler.save_pretrained(folder / name)
    write_json(folder / "text_proj" / "config.json", {"_class_name": "UnCLIPTextProjModel", **CONFIGS["text_proj"]})
    save_file(random_tensors(TEXT_PROJ, 5, 0.3), folder / "text_proj" / "diffusion_pytorch_model.safetensors")
    write_text_encoder(folder / "text_encoder", width=D, embed_dim=D)
    index: dict[str, Any] = {name: ["diffusers", type(network).__name__] for name, network in networks.items()}
    index |= {name: ["diffusers", "UnCLIPScheduler"] for name in SCHEDULERS}
    index |= {"text_proj": ["unclip", "UnCLIPTextProjModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    index |= {"text_encoder": ["transformers", "CLIPTextModelWithProjection"], "_class_name": "UnCLIPPipeline"}
    write_json(folder / "model_index.json", index)
    return folder


def write_variations(text_to_image: Path, folder: Path) -> Path:
    """The image-variations folder with the same decoder, in pickled files, as it was published."""
    shutil.copytree(text_to_image, folder, ignore=shutil.ignore_patterns("prior*"))
    write_image_encoder(folder / "image_encoder", width=D, embed_dim=D, side=32, patch=16)
    index = json.loads((folder / "model_index.json").read_text())
    del index["prior"], index["prior_scheduler"]
    index |= {"_class_name": "UnCLIPImageVariationPipeline"}
    index |= {"image_encoder": ["transformers", "CLIPVisionModelWithProjection"]}
    index |= {"feature_extractor": ["transformers", "CLIPFeatureExtractor"]}
    write_json(folder / "model_index.json", index)
    for path in folder.glob("*/*.safetensors"):
        encoder = path.parent.name.endswith("_encoder")
        torch.save(load_file(path), path.with_name("pytorch_model.bin" if encoder else f"{path.stem}.bin"))
        path.unlink()
    return folder


def original_tensors(rules: Rules, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under our names -> those of the file that the rules are for: the rules backwards."""
    grouped: dict[str, list[tuple[tuple[str, ...], Tensor]]] = {}
    for ours, (theirs, operations) in rules.items():
        grouped.setdefault(theirs, []).append((operations, tensors[ours]))
    whole: dict[str, Tensor] = {}
    for theirs, parts in grouped.items():
        first = parts[0][0]
        joined = give_back([(operations[-1], part) for operations, part in parts]) if first else parts[0][1]
        whole[theirs] = reduce(lambda tensor, operation: give_back([(operation, tensor)]), first[-2::-1], joined)
    return whole


def write_originals(folder: Path, parts: Mapping[str, Any], rules: Mapping[str, Rules]) -> Path:
    """The original checkpoints of some parts, without CLIP: zip files, and one of the container before torch 1.6."""
    folder.mkdir(parents=True)
    states = {name: part.state_dict() for name, part in parts.items()}
    for part, file in (("prior", "prior"), ("decoder", "decoder"), ("upsampler", "super_res")):
        tensors = {name: tensor.clone() for name, tensor in original_tensors(rules[part], states[part]).items()}
        content = {"state_dict": tensors, "epoch": 3, "global_step": 1_000_000}
        torch.save(content, folder / karlo.ORIGINALS[file], _use_new_zipfile_serialization=part != "upsampler")
    statistics = states["prior"]["mean"].clone(), states["prior"]["std"].clone()
    torch.save(statistics, folder / karlo.ORIGINALS["clip_stats"])
    return folder


class Walk:
    """One of the reference's denoising loops: its scheduler, from pure noise, with the noise of our seeds.

    Its table of alpha_bar is diffusers' own, but computed with in double precision, as in the original sampler: in
    single precision the first step is off by 2e-4 and the last one multiplies the picture by 0.9995.
    """

    def __init__(self, folder: Path, name: str, steps: int, seeds: Sequence[int]) -> None:
        self.seeds = seeds
        self.scheduler = UnCLIPScheduler.from_pretrained(folder / name)
        self.scheduler.alphas_cumprod = self.scheduler.alphas_cumprod.double()
        self.scheduler.alphas = self.scheduler.alphas_cumprod[:1]  # only the last step, at t = 0, looks at these two
        self.scheduler.betas = 1 - self.scheduler.alphas
        self.scheduler.set_timesteps(steps)

    def __call__(self, predict: Any, x: Tensor, stream: int) -> Tensor:
        generators, times = step_generators(self.seeds, stream), self.scheduler.timesteps
        for i, t in enumerate(times):
            last = i + 1 == len(times)
            prediction = predict(x, t, last)
            before = None if last else times[i + 1]
            x = self.scheduler.step(prediction, t, x, prev_timestep=before, generator=generators).prev_sample
        return x


def guided(answer: Tensor, scale: float, channels: int) -> Tensor:
    """Of the null and the conditional rows; a learned variance is the conditional one's."""
    null, conditional = answer.chunk(2)
    guided = null[:, :channels] + scale * (conditional[:, :channels] - null[:, :channels])
    return torch.cat([guided, conditional[:, channels:]], dim=1)
