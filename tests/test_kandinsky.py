"""Kandinsky 2.2: names and shapes, its two folders, and that it draws what diffusers draws with the same weights."""

import gzip
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, PriorTransformer, UnCLIPScheduler, UNet2DConditionModel, VQModel
from karlo_files import Walk, guided
from published_files import (
    MemoryPeak,
    randomised,
    rewrite,
    write_image_encoder,
    write_json,
    write_sparse,
    write_text_encoder,
)
from safetensors.torch import load_file
from torch import Tensor

from genpipe.dalle2.latent_decoder import LatentDecoder
from genpipe.dalle2.sampling import DECODER, PRIOR, noise_of, scheduler_for, step_generators
from genpipe.errors import InputError
from genpipe.images import to_pil
from genpipe.parts import load_part, save_part
from genpipe.published import kandinsky, kandinsky_parts, karlo_parts
from genpipe.published.registry import find
from pipelines.candidates import Block
from pipelines.dalle2 import DALLE2Pipeline

MANIFEST: dict[str, Any] = json.loads(
    gzip.decompress(Path(__file__).with_name("manifests").joinpath("kandinsky22.json.gz").read_bytes())
)
STEM = "diffusion_pytorch_model.safetensors"
D, SEEDS, PROMPT = 16, [5, 6], "two cats on a red mat"
CONFIGS: dict[str, dict[str, Any]] = {
    "prior": {
        "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "embedding_dim": D, "num_embeddings": 77,
    },
    "unet": {
        **MANIFEST["configs"]["unet"], "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4,
        "attention_head_dim": 4, "cross_attention_dim": 12, "encoder_hid_dim": D, "sample_size": 8,
        "down_block_types": ["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"],
        "up_block_types": ["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
    },
    "movq": {
        **MANIFEST["configs"]["movq"], "block_out_channels": [32, 32], "layers_per_block": 1,  # 32 groups in its norms
        "num_vq_embeddings": 16, "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
    },
}  # fmt: skip
SCHEDULER = {key: value for key, value in MANIFEST["configs"]["decoder_scheduler"].items() if key != "class"}


def write_folders(top: Path) -> Path:
    """The prior's and the decoder's folder side by side; the decoder's is returned."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        networks = {
            "prior": PriorTransformer(**CONFIGS["prior"]),
            "unet": UNet2DConditionModel(**CONFIGS["unet"]),
            "movq": VQModel(**CONFIGS["movq"]),
        }
    networks["prior"].clip_std.data.fill_(1)
    # Nothing limits latents, and random networks draw large ones: 20 times smaller where MoVQ reads them.
    for name, parameter in networks["movq"].named_parameters():
        if name.endswith(("conv_y.weight", "conv_b.weight", "post_quant_conv.weight")):
            parameter.data.mul_(0.05)
    prior, decoder = top / "kandinsky-2-2-prior", top / "kandinsky-2-2-decoder"
    for number, (name, network) in enumerate(networks.items()):
        randomised(network, number).save_pretrained((prior if name == "prior" else decoder) / name)
    UnCLIPScheduler(prediction_type="sample", clip_sample_range=10.0).save_pretrained(prior / "scheduler")
    DDPMScheduler(**SCHEDULER).save_pretrained(decoder / "scheduler")
    write_text_encoder(prior / "text_encoder", D, D, hidden_act="gelu")
    write_image_encoder(prior / "image_encoder", D, D, 32, 16, hidden_act="gelu")
    rewrite(prior / "image_encoder" / "model.safetensors", lambda t: {name: each.half() for name, each in t.items()})
    index = {"prior": {"_class_name": "KandinskyV22PriorPipeline"}, "decoder": {"_class_name": "KandinskyV22Pipeline"}}
    for kind, folder in (("prior", prior), ("decoder", decoder)):
        classes = {name: ["diffusers", min(known)] for name, known in kandinsky.CLASSES[kind].items()}
        write_json(folder / "model_index.json", {**index[kind], **classes})
    return decoder


@pytest.fixture(scope="module")
def decoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folders(tmp_path_factory.mktemp("kandinsky"))


@pytest.fixture
def copy(decoder_folder: Path, tmp_path: Path) -> Path:
    """The decoder's folder, beside a prior's, that a test may damage."""
    return Path(shutil.copytree(decoder_folder.parent, tmp_path / "copy")) / decoder_folder.name


def parts_of(source: Path, **options: Any) -> dict[str, Any]:
    return {part: build() for part, build in kandinsky.read(source, **options).parts.items()}


# Names, shapes and values ---------------------------------------------------------------------------------------------


def test_every_published_tensor_has_its_place() -> None:
    tensors = {
        name: {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        for name, shapes in MANIFEST["tensors"].items()
    }
    configs = MANIFEST["configs"]
    prior = karlo_parts.empty_prior(configs["prior"], 10.0, Path("prior"))
    karlo_parts.filled_prior(prior, tensors["prior"], "prior")
    decoder = kandinsky_parts.empty_decoder(configs["unet"], configs["movq"], SCHEDULER, Path("decoder"))
    kandinsky_parts.filled_decoder(decoder, tensors["unet"], tensors["movq"], "decoder")
    assert len(decoder.state_dict()) == 724 + 431
    assert (decoder.latent_shape, decoder.resolution_of_pixels, decoder.clamp) == ((4, 64, 64), 512, None)
    old = {old_name(name): tensor for name, tensor in tensors["movq"].items()}
    assert old.keys() != tensors["movq"].keys()
    kandinsky_parts.filled_decoder(decoder, tensors["unet"], old, "decoder")
    for name, shapes in MANIFEST["tensors"].items():
        assert sum(4 * torch.Size(shape).numel() for shape in shapes.values()) == MANIFEST["bytes"][name]


def old_name(name: str) -> str:
    """As diffusers spelt the attentions of autoencoders before May 2023."""
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        name = re.sub(rf"(attentions\.\d\.){re.escape(new)}\.", rf"\g<1>{old}.", name)
    return name


def test_two_folders_are_read_bit_for_bit(decoder_folder: Path, tmp_path: Path) -> None:
    parts, prior = parts_of(decoder_folder), decoder_folder.with_name("kandinsky-2-2-prior")
    state = parts["decoder"].state_dict()
    for name in ("unet", "movq"):
        tensors = load_file(decoder_folder / name / STEM)
        assert {key for key in state if key.startswith(f"{name}.")} == {f"{name}.{key}" for key in tensors}
        assert all(torch.equal(state[f"{name}.{key}"], tensor) for key, tensor in tensors.items())
    assert torch.equal(parts["prior"].mean, load_file(prior / "prior" / STEM)["clip_mean"][0])
    assert parts["prior"].config.clamp == 10.0
    clip = parts["clip"]
    assert clip.dtype == torch.float32 and clip.has_image and not clip.config["architecture"]["quick_gelu"]
    for source in (prior, decoder_folder.parent):  # either folder, or what holds both
        read = kandinsky.read(source)
        assert find(source) is kandinsky and read.resolution == 16 and len(read.files) == 14
    rewrite_old = shutil.copytree(decoder_folder.parent, tmp_path / "old") / decoder_folder.name
    rewrite(rewrite_old / "movq" / STEM, lambda tensors: {old_name(name): each for name, each in tensors.items()})
    old = parts_of(rewrite_old)["decoder"].state_dict()
    assert all(torch.equal(old[name], tensor) for name, tensor in state.items())


def test_a_latent_decoder_is_saved_and_loaded_and_casts(decoder_folder: Path, tmp_path: Path) -> None:
    decoder = parts_of(decoder_folder)["decoder"]
    save_part(decoder, tmp_path / "decoder")
    loaded = load_part(LatentDecoder, tmp_path / "decoder")
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in decoder.state_dict().items())
    x, image = torch.randn(1, 4, 8, 8), torch.randn(1, D)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x, torch.tensor(3), image), decoder(x, torch.tensor(3), image))
        half = parts_of(decoder_folder, dtype=torch.bfloat16)["decoder"]
        assert half(x, torch.tensor(3), image).dtype == torch.bfloat16 and half.to_pixels(x).dtype == torch.float32
    scheduler = scheduler_for("ddpm-leading", loaded)
    assert float(scheduler.betas[-1]) == pytest.approx(0.012) and scheduler.config.variance_type == "fixed_small"
    with pytest.raises(InputError, match="draws from image embeddings alone"):
        loaded.condition(None, image, image, image)
    with pytest.raises(InputError, match="a resolution that is a multiple of 4, not 10"):
        LatentDecoder(**{**dict(loaded.config.items()), "resolution": 10})


def test_the_whole_unet_loads_without_a_copy(tmp_path: Path) -> None:
    for name in ("unet", "movq"):
        write_json(
            tmp_path / name / "config.json",
            {"_class_name": min(kandinsky.CLASSES["decoder"][name]), **MANIFEST["configs"][name]},
        )
        write_sparse(tmp_path / name / STEM, MANIFEST["tensors"][name])
    write_json(tmp_path / "scheduler" / "scheduler_config.json", {"_class_name": "DDPMScheduler", **SCHEDULER})
    with MemoryPeak() as memory:
        decoder = kandinsky_parts.decoder_of_folder(tmp_path, None)
        assert sum(parameter.numel() for parameter in decoder.parameters()) == 1_253_057_288 + 67_832_495
    assert memory.rise < 0.3e9  # of 5.28 GB


# Refusals -------------------------------------------------------------------------------------------------------------


def changed(path: Path, **values: Any) -> None:
    write_json(path, {**json.loads(path.read_text()), **values})


def test_what_is_missing_is_listed(copy: Path) -> None:
    prior = copy.with_name("kandinsky-2-2-prior")
    (prior / "image_encoder" / "model.safetensors").unlink()
    assert kandinsky.missing(copy) == ["kandinsky-2-2-prior/image_encoder/model.safetensors"]
    with pytest.raises(InputError, match=r"lacks kandinsky-2-2-prior/image_encoder/model\.safetensors; "):
        kandinsky.read(copy)
    assert set(kandinsky.read(copy, clip=prior / "text_encoder").parts) == {"clip", "prior", "decoder"}
    shutil.rmtree(prior)
    assert kandinsky.recognises(copy) and kandinsky.missing(copy) == ["prior/model_index.json"]
    assert not kandinsky.recognises(copy / "unet") and not kandinsky.recognises(copy / "nowhere")


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("model_index.json", {"unet": ["os", "system"]}, "names the class 'system' for 'unet'"),
        ("unet/config.json", {"in_channels": 9}, "has in_channels '9'; genpipe runs these weights with 4"),
        ("unet/config.json", {"addition_embed_type": "text_image"}, "has addition_embed_type 'text_image'"),
        ("scheduler/scheduler_config.json", {"timestep_spacing": "trailing"}, "has timestep_spacing 'trailing'"),
        ("movq/config.json", {"layers_per_block": 2}, r"missing movq\.encoder.*; missing movq\.decoder"),
    ],
)
def test_what_is_not_kandinskys_is_refused(copy: Path, file: str, values: Mapping[str, Any], message: str) -> None:
    changed(copy / file, **values)
    with pytest.raises(InputError, match=message):
        parts_of(copy)


# Parity ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_texts_are_drawn_as_diffusers_draws_them(decoder_folder: Path) -> None:
    pipeline = DALLE2Pipeline(**parts_of(decoder_folder), defaults=kandinsky.SAMPLING)
    clip, rows, prior_folder = pipeline.clip, len(SEEDS), decoder_folder.with_name("kandinsky-2-2-prior")
    assert clip is not None
    sampling = pipeline.resolve_sampling({"prior_steps": 5, "num_inference_steps": 6})
    encoded, block = pipeline.encode_prompts([PROMPT]), Block(range(1), range(rows))
    embedding = pipeline.image_embeddings(encoded, block, SEEDS[0], sampling)
    pixels = pipeline.decode(encoded, embedding, block, SEEDS[0], sampling)[0]

    both = [clip.encode_text([text] * rows) for text in ("", PROMPT)]
    read = [torch.cat(pair) for pair in zip(*[(text.embedding, text.states, text.mask) for text in both], strict=True)]
    prior = PriorTransformer.from_pretrained(prior_folder / "prior").eval()

    def predict(x: Tensor, t: Tensor, last: bool) -> Tensor:
        return guided(prior(torch.cat([x, x]), t, *read).predicted_image_embedding, 4.0, D)

    noise = noise_of(SEEDS, (1, D), PRIOR)[:, 0]
    theirs = prior.post_process_latents(Walk(prior_folder, "scheduler", 5, SEEDS)(predict, noise, PRIOR))
    assert embedding is not None
    torch.testing.assert_close(embedding[0], theirs, rtol=0, atol=1e-5)
    # The null embedding: of an all-zero input of the image tower, past any preprocessing.
    empty = clip.towers.encode_image(torch.zeros(1, 3, 32, 32)).expand(rows, -1)
    drawn = reference_decoder(decoder_folder, empty, theirs, 6)
    torch.testing.assert_close(pixels, drawn, rtol=0, atol=1e-4)
    assert float(drawn.std()) > 0.1 and float((drawn[0] - drawn[1]).abs().mean()) > 0.1

    output = pipeline(PROMPT, num_candidates=rows, keep=rows, seed=SEEDS[0], sampling=sampling)
    pictures = dict(zip(output.seeds[0], output.images[0], strict=True))
    for seed, wanted in zip(SEEDS, to_pil(drawn), strict=True):
        assert np.abs(np.asarray(pictures[seed], int) - np.asarray(wanted, int)).max() <= 1


def reference_decoder(folder: Path, null: Tensor, image_embedding: Tensor, steps: int) -> Tensor:
    """Pixels in [0, 1], as KandinskyV22Pipeline wires its components."""
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").eval()
    movq = VQModel.from_pretrained(folder / "movq").eval()
    scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(steps)
    x, generators = noise_of(SEEDS, (4, 8, 8), DECODER), step_generators(SEEDS, DECODER)
    for t in scheduler.timesteps:
        images = torch.cat([null, image_embedding])
        answer = unet(torch.cat([x, x]), t, None, added_cond_kwargs={"image_embeds": images}, return_dict=False)[0]
        x = scheduler.step(guided(answer, 4.0, 4)[:, :4], t, x, generator=generators, return_dict=False)[0]
    return (movq.decode(x, force_not_quantize=True).sample * 0.5 + 0.5).clamp(0, 1)
