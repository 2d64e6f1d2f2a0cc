"""Published weights that are not read: recognised without running anything, refused in one sentence with the reason."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from genpipe.errors import InputError
from genpipe.published import refused
from genpipe.published.registry import find
from pipelines.family import load_family
from pipelines.importing import import_family, located


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def state(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(2) for name in names}


def laion_prior(folder: Path) -> Path:
    (folder / "prior_config.json").write_text("{}")
    names = state("noise_scheduler.betas", "net.causal_transformer.layers.0.0.norm.g", "clip.clip.logit_scale")
    torch.save({"model": names, "version": "0.26", "trap": Touch(folder / "run")}, folder / "latest.pth")
    return folder


def laion_decoder_file(folder: Path) -> Path:
    torch.save(state("noise_schedulers.0.betas", "unets.0.init_conv.weight"), folder / "latest.pth")
    return folder / "latest.pth"


def dalle_pytorch(folder: Path) -> Path:
    path = folder / "dalle.pt"
    whole = {
        "hparams": {"dim": 8},
        "vae_params": None,
        "weights": state("text_emb.weight"),
        "trap": Touch(folder / "run"),
    }
    torch.save(whole, path)
    return path


def dalle_pytorch_before_zip(folder: Path) -> Path:
    path = folder / "old.pt"
    whole = {"hparams": {}, "vae_params": {}, "weights": state("to_logits.1.weight"), "trap": Touch(folder / "run")}
    torch.save(whole, path, _use_new_zipfile_serialization=False)
    return path


def rudalle(folder: Path) -> Path:
    names = ("text_pos_embeddings.weight", "image_row_embeddings.weight", "to_logits.1.weight", "transformer.row_mask")
    torch.save(state(*names), folder / "pytorch_model_v3.bin")
    return folder


def diffusers_folder(name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "model_index.json").write_text(json.dumps({"_class_name": name, "unet": ["os", "system"]}))
        return folder

    return write


def stable_diffusion(folder: Path) -> Path:
    path = folder / "v1-5-pruned.safetensors"
    save_file(state("model.diffusion_model.time_embed.0.weight", "first_stage_model.encoder.conv_in.weight"), path)
    return path


def stable_unclip_file(folder: Path) -> Path:
    path = folder / "sd21-unclip-l.ckpt"
    torch.save({"state_dict": state("model.diffusion_model.out.2.bias", "noise_augmentor.data_mean")}, path)
    return path


@pytest.mark.parametrize(
    ("write", "told"),
    [
        (laion_prior, ("DALLE2-pytorch", "Karlo")),
        (laion_decoder_file, ("DALLE2-pytorch", "Karlo")),
        (dalle_pytorch, ("DALLE-pytorch", "minDALL-E")),
        (dalle_pytorch_before_zip, ("DALLE-pytorch", "minDALL-E")),
        (rudalle, ("ru-DALL-E", "minDALL-E")),
        (stable_diffusion, ("Stable Diffusion", "Kandinsky 2.2")),
        (stable_unclip_file, ("unCLIP decoder", "Kandinsky 2.2")),
        (diffusers_folder("StableDiffusionPipeline"), ("Stable Diffusion", "diffusers")),
        (diffusers_folder("StableUnCLIPImg2ImgPipeline"), ("unCLIP decoder", "withdrawn")),
        (diffusers_folder("FluxPipeline"), ("FluxPipeline", "Karlo")),
    ],
)
def test_each_kind_is_refused_with_its_reason_and_nothing_runs(
    tmp_path: Path, write: Callable[[Path], Path], told: tuple[str, ...]
) -> None:
    source = write(tmp_path)
    before = sorted(tmp_path.iterdir())
    for attempt in (find, load_family, lambda path: import_family(str(path), tmp_path / "out")):
        with pytest.raises(InputError) as caught:
            attempt(source)
        message = str(caught.value)
        assert message.count(". ") == 0 and message.endswith(".") and "\n" not in message
        assert repr(str(source)) in message and all(each in message for each in told), message
    assert sorted(tmp_path.iterdir()) == before  # not run, nothing written


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("laion/DALLE2-PyTorch", "DALLE2-pytorch"),
        ("ai-forever/rudalle-Malevich", "ru-DALL-E"),
        ("runwayml/stable-diffusion-v1-5", "Stable Diffusion"),
        ("stabilityai/stable-diffusion-2-1-unclip-small", "unCLIP decoder"),
    ],
)
def test_known_repositories_are_refused_before_anything_is_fetched(name: str, told: str) -> None:
    for attempt in (load_family, lambda each: load_family(each, download=True), lambda each: located(each, print)):
        with pytest.raises(InputError, match=told):
            attempt(name)
    assert refused.reason_by_name("somebody/nano-family") is None


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\3\4 not a zip", b"\x80\2", pickle.dumps({"a": 1}), b"\xff" * 9, b"\x10\0\0\0\0\0\0\0{not json at all"],
)
def test_what_is_of_no_known_kind_has_no_reason(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "weights.pt").write_bytes(content)
    (tmp_path / "model_index.json").write_bytes(content)
    assert refused.reason(tmp_path / "weights.pt") is None and refused.reason(tmp_path / "nothing") is None
    with pytest.raises(InputError, match="no published weights that genpipe knows"):
        find(tmp_path)
