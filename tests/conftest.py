"""A tiny family of real, untrained parts, built and saved once for all tests that draw; the command, run in process."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Result, Run

from genpipe.clip.architecture import nano_architecture
from genpipe.clip.model import CLIP
from genpipe.dalle1.dvae import DVAE
from genpipe.dalle1.transformer import DALLE1Transformer
from genpipe.dalle2.decoder import Decoder
from genpipe.dalle2.prior import Prior
from genpipe.dalle2.upsampler import Upsampler
from genpipe.identity import weights_identity
from genpipe.tokenizer import CaptionTokenizer
from pipelines.cli import main
from pipelines.family import Family, load_family, save_family

torch.set_num_threads(1)  # for tensors as small as here, a second thread costs more than it brings

WORDS = "a the cat dog dogs on red blue background two three strawberries above below left of right white".split()
TINY_INFO: dict[str, Any] = {
    "name": "tiny",
    "license": "Apache-2.0",
    "description": "untrained parts for tests",
    "resolution": 16,
    "words": WORDS,
    "defaults": {
        "dalle1": {"guidance_scale": 2.0, "upsample": False},
        "dalle2": {"guidance_scale": 1.5, "num_inference_steps": 2, "prior_steps": 2, "prior_guidance_scale": 1.5},
    },
}


def tiny_dvae(num_codes: int) -> DVAE:
    """16 x 16 pixels, 4 x 4 tokens."""
    return DVAE(16, num_codes, widths=(16,), blocks_per_group=1, code_width=8, space_to_depth=4)


def tiny_parts(seed: int = 0) -> dict[str, CLIP | DVAE | DALLE1Transformer]:
    """CLIP, dVAE (16 px, 4 x 4 tokens of 16 codes) and transformer, initialised from `seed`, in eval mode."""
    tokenizer = CaptionTokenizer.train([" ".join(WORDS)] * 3, vocab_size=350)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip = CLIP(
            nano_architecture(
                tokenizer.vocab_size,
                image_size=16,
                width=48,
                vision_layers=1,
                text_layers=1,
                context_length=32,
                embed_dim=16,
            )
        )
        dvae = tiny_dvae(num_codes=16)
        transformer = DALLE1Transformer(
            tokenizer.vocab_size, text_length=32, num_image_tokens=16, grid_size=4, width=32, num_layers=2, num_heads=2
        )
        with (
            torch.no_grad()
        ):  # a fresh transformer's logits are nearly equal: let the prompt and the tokens before count
            for parameter in transformer.parameters():
                parameter.mul_(8)
    clip.tokenizer = transformer.tokenizer = tokenizer
    return {"clip": clip.eval(), "dvae": dvae.eval(), "transformer": transformer.eval()}


def tiny_decoder(clip: CLIP, resolution: int = 16) -> Decoder:
    """Pixels folded to half the side, two levels, attention in the lower one; not initialised from a seed."""
    decoder = Decoder(
        resolution,
        clip_width=clip.embedding_dim,
        text_width=48,
        unet_config={
            "block_out_channels": [16, 16],
            "layers_per_block": 1,
            "down_block_types": ["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"],
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "up_block_types": ["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
            "attention_head_dim": 8,
            "norm_num_groups": 4,
            "resnet_time_scale_shift": "scale_shift",
        },
        patch_size=2,
        prediction_type="v_prediction",
        clip_identity=weights_identity(clip),
    )
    with torch.no_grad():  # fresh, it would hardly look at what it is conditioned on
        for layer in (decoder.image_to_time, decoder.text_to_time, decoder.unet.conv_out):
            layer.weight.mul_(5)
    return decoder.eval()


def tiny_dalle2_parts(clip: CLIP, seed: int = 0) -> dict[str, Any]:
    """Decoder (16 px), prior and upsampler (factor 2, 2 steps) beside a CLIP, from `seed`, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = tiny_decoder(clip)
        prior = Prior(
            clip.embedding_dim,
            text_width=48,
            text_length=clip.context_length,
            num_layers=1,
            num_heads=2,
            head_dim=8,
            text_projection=True,
            clip_identity=weights_identity(clip),
        )
        upsampler = Upsampler(
            unet_config={
                "block_out_channels": [8, 8],
                "layers_per_block": 1,
                "down_block_types": ["DownBlock2D", "DownBlock2D"],
                "up_block_types": ["UpBlock2D", "UpBlock2D"],
                "norm_num_groups": 4,
            },
            factor=2,
            patch_size=2,
            prediction_type="sample",
            residual=True,
            num_inference_steps=2,
        )
        torch.nn.init.normal_(upsampler.unet.conv_out.weight, std=0.2)  # fresh, it answers nothing
    return {"prior": prior.eval(), "decoder": decoder, "upsampler": upsampler.eval()}


def all_tiny_parts(seed: int = 0) -> dict[str, Any]:
    """The parts of both pipelines."""
    parts: dict[str, Any] = tiny_parts(seed)
    return {**parts, **tiny_dalle2_parts(parts["clip"], seed)}


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family folder that no test may change: see `tiny_copy`."""
    folder = tmp_path_factory.mktemp("families") / "tiny"
    save_family(folder, all_tiny_parts(), TINY_INFO, card="# tiny\n")
    return folder


@pytest.fixture
def tiny_copy(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the family folder that a test may damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "damaged"))


@pytest.fixture(scope="session")
def tiny_family(tiny_folder: Path) -> Family:
    """The loaded family."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_family(tiny_folder)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command in this process, in an empty working folder."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def command(*arguments: object) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(int(end.value.code or 0), captured.out, captured.err)

    return command
