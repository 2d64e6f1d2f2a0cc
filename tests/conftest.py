"""A family of tiny, real, untrained parts, built and saved once: seconds of work for all tests that draw."""

import shutil
import warnings
from pathlib import Path

import pytest
import torch

from genpipe.clip.architecture import nano_architecture
from genpipe.clip.model import CLIP
from genpipe.dalle1.dvae import DVAE
from genpipe.dalle1.transformer import DALLE1Transformer
from genpipe.tokenizer import CaptionTokenizer
from pipelines.family import Family, load_family, save_family

torch.set_num_threads(1)  # for tensors as small as here, a second thread costs more than it brings

WORDS = "a the cat dog dogs on red blue background two three strawberries above below left of right white".split()
TINY_INFO = {
    "name": "tiny",
    "license": "Apache-2.0",
    "description": "untrained parts for tests",
    "resolution": 16,
    "words": WORDS,
    "defaults": {"guidance_scale": 2.0},
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


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family folder that no test may change: see `tiny_copy`."""
    folder = tmp_path_factory.mktemp("families") / "tiny"
    save_family(folder, tiny_parts(), TINY_INFO, card="# tiny\n")
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
