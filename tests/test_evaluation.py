"""Figures: values by hand, and the bookkeeping around CLIP against a plain loop."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_dvae, tiny_parts
from PIL import Image

from genpipe.clip.model import CLIP
from genpipe.data.scenes import EmojiScenes
from genpipe.errors import InputError
from genpipe.evaluation.best_of_n import best_of_n_curve, expected_best, plot_curve
from genpipe.evaluation.clip import TWIN_KINDS, embed_pairs, retrieval_accuracy, retrieval_share, twin_accuracy
from genpipe.evaluation.reconstruction import psnr, reconstruction_figures
from genpipe.images import to_unit


@pytest.fixture(scope="module")
def clip() -> CLIP:
    clip = tiny_parts()["clip"]
    assert isinstance(clip, CLIP)
    return clip


def similarity(clip: CLIP, picture: np.ndarray, caption: str) -> float:
    """One picture uint8 (S, S, 3), one caption: cosine similarity, without batches."""
    with torch.no_grad():
        pixels = to_unit(np.ascontiguousarray(picture.transpose(2, 0, 1))[None])
        image, text = clip.encode_image(pixels).embedding[0], clip.encode_text(caption).embedding[0]
    return float(image @ text / image.norm() / text.norm())


def test_psnr_by_hand() -> None:
    black = torch.zeros(2, 3, 4, 4)
    grey = torch.stack([torch.full((3, 4, 4), 0.1), torch.full((3, 4, 4), 0.5)])
    assert psnr(black, grey).tolist() == pytest.approx([20.0, 6.0206], abs=1e-4)
    assert psnr(grey, grey).tolist() == [100.0, 100.0]  # equal pictures are not infinite
    half = black.clone()
    half[0, :, :2] = 1.0
    assert float(psnr(black, half)[0]) == pytest.approx(3.0103, abs=1e-4)


def test_reconstruction_counts_pictures_and_codes() -> None:
    torch.manual_seed(0)
    dvae = tiny_dvae(num_codes=16).eval()
    pixels = torch.rand(5, 3, 16, 16)
    before = pixels.clone()
    figures = reconstruction_figures(dvae, pixels, chunk_size=2)
    with torch.no_grad():
        tokens = torch.cat([dvae.encode(pixels[i : i + 1]) for i in range(5)])
        restored = torch.cat([dvae.decode(tokens[i : i + 1]) for i in range(5)])
    errors = [float((pixels[i] - restored[i]).square().mean()) for i in range(5)]
    assert figures["mse"] == pytest.approx(np.mean(errors), rel=1e-4)
    assert figures["psnr"] == pytest.approx(np.mean([-10 * np.log10(error) for error in errors]), rel=1e-4)
    shares = np.bincount(tokens.flatten().numpy(), minlength=16) / tokens.numel()
    used = shares[shares > 0]
    assert figures["perplexity"] == pytest.approx(np.exp(-(used * np.log(used)).sum()), rel=1e-6)
    assert figures["dead_codes"] == (shares == 0).sum()
    assert torch.equal(pixels, before)


def test_one_code_for_everything_is_a_perplexity_of_one() -> None:
    dvae = tiny_dvae(num_codes=16).eval()
    with torch.no_grad():
        dvae.codebook.fill_(1e3)
        dvae.codebook[3] = 0.0
    figures = reconstruction_figures(dvae, torch.rand(2, 3, 16, 16))
    assert (figures["perplexity"], figures["dead_codes"]) == (pytest.approx(1.0), 15)


@pytest.mark.parametrize("kind", TWIN_KINDS)
def test_twin_accuracy_is_the_share_that_a_plain_loop_counts(clip: CLIP, kind: str) -> None:
    scenes = EmojiScenes(size=16, split="heldout", seed=2)
    right = 0
    for index in range(4, 14):
        twins = scenes.twins(index, kind=kind)  # type: ignore[arg-type]
        pairs = (
            (twins.pixels, twins.caption, twins.twin_caption),
            (twins.twin_pixels, twins.twin_caption, twins.caption),
        )
        right += sum(similarity(clip, p, own) > similarity(clip, p, other) for p, own, other in pairs)
    assert twin_accuracy(clip, scenes, kind, 10, first=4) == right / 20  # type: ignore[arg-type]


def test_retrieval_is_the_share_that_a_plain_loop_counts(clip: CLIP) -> None:
    scenes = EmojiScenes(size=16, split="heldout", seed=2)
    right = 0
    for group in ([3, 4, 5, 6], [7, 8, 9, 10]):
        examples = [scenes.example(i) for i in group]
        for example in examples:
            best = max(examples, key=lambda other: similarity(clip, example.pixels, other.caption))
            right += best.caption == example.caption
    assert retrieval_accuracy(clip, scenes, 4, groups=2, first=3) == right / 8


def test_retrieval_counts_a_caption_that_two_pictures_share(clip: CLIP) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, size=(5, 3, 16, 16), dtype=np.uint8)
    assert retrieval_share(clip, pictures, ["a cat"] * 5) == 1.0
    assert retrieval_share(clip, pictures, list("abcde"), among=1) == 1.0
    assert retrieval_share(clip, pictures, list("abcde"), among=2) >= 0.2  # the last group has one picture
    with pytest.raises(InputError, match="at least one picture"):
        retrieval_share(clip, pictures[:0], [])


def test_chunks_change_no_embedding(clip: CLIP) -> None:
    pictures, captions = EmojiScenes(size=16).batch(0, 5)
    whole, chunks = embed_pairs(clip, pictures, captions), embed_pairs(clip, pictures, captions, chunk_size=2)
    for one, other in zip(whole, chunks, strict=True):
        assert one.shape == (5, 16) and torch.allclose(one.norm(dim=1), torch.ones(5))
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_the_best_of_n_by_hand() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0], [0.0, 0.0, 6.0]])
    assert expected_best(scores, 1).tolist() == [2.0, 2.0]
    assert expected_best(scores, 2).tolist() == pytest.approx([(3 + 3 + 2) / 3, (6 + 6 + 0) / 3])
    assert expected_best(scores, 3).tolist() == [3.0, 6.0]
    for n in (0, 4):
        with pytest.raises(InputError, match="choose 1 to 3"):
            expected_best(scores, n)
    scores = torch.tensor([[3.0, 1.0, 2.0], [0.1, 0.2, 6.0]])
    right = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    # Of the pairs, (3, 1) and (3, 2) have a right best one in the first row, (0.1, 0.2) alone in the second.
    for n, expected in ((1, [1 / 3, 1 / 3]), (2, [2 / 3, 1 / 3]), (3, [1.0, 0.0])):
        assert expected_best(scores, n, right).tolist() == pytest.approx(expected)
    curve = best_of_n_curve(torch.arange(8.0).view(2, 4))
    assert [point["n"] for point in curve] == [1, 2, 4] and [point["score"] for point in curve][::2] == [3.5, 5.0]
    assert curve[0]["standard_error"] == pytest.approx(2.0) and best_of_n_curve(scores[:1])[0]["standard_error"] == 0.0


def test_the_curve_is_a_picture(tmp_path: Path) -> None:
    plot_curve(best_of_n_curve(torch.rand(3, 4)), tmp_path / "curve.png", reference=0.9)
    assert Image.open(tmp_path / "curve.png").size == (600, 384)


@pytest.mark.slow
def test_the_figures_of_a_family(tiny_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "genpipe.evaluation", str(tiny_folder), "--out", str(tmp_path / "figures")]
    small = ["--count", "8", "--prompts", "2", "--candidates", "4"]
    done = subprocess.run([*command, *small], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures" / "figures.json").read_text())
    assert json.loads(done.stdout) == figures and set(figures) == {"dvae", "clip", "best_of_n"}
    assert [point["n"] for point in figures["best_of_n"]["curve"]] == [1, 2, 4]
    refused = subprocess.run([*command, "--count", "0"], capture_output=True, text=True, timeout=300)
    assert refused.returncode == 2 and refused.stderr == "error: --count is 0; it must be at least 1.\n"
