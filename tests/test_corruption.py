"""What upsamplers are trained to see through: kernels by hand, ranges, determinism, every ingredient at work."""

import math

import numpy as np
import pytest
import torch

from genpipe.dalle2.corruption import filtered, gaussian_kernel, make_corruption, through_jpeg, with_noise
from genpipe.errors import InputError
from genpipe.images import resize

PAPER = {"kind": "blur", "kernel": 3, "sigma": [0.6, 0.6]}
CHAIN = {"kind": "bsr", "kernel": 7, "probability": 1.0}
# every ingredient at work, none of them doing anything: a test turns up one
QUIET = {
    "kind": "bsr", "kernel": 7, "isotropic": [0.0, 0.0], "anisotropic": [0.0, 0.0], "factor": [1.0, 1.0],
    "noise": [0.0, 0.0], "quality": [100, 100], "probability": 1.0,
}  # fmt: skip


def pictures(count: int = 2, height: int = 32, width: int = 32) -> torch.Tensor:
    """Smooth colours with a sharp square."""
    generator = torch.Generator().manual_seed(0)
    pixels = resize(torch.rand(count, 3, 4, 4, generator=generator), (height, width), clamp=True)
    pixels[:, :, 8:20, 10:24] = torch.tensor([0.9, 0.2, 0.1])[:, None, None]
    return pixels


def degraded(settings: dict, pixels: torch.Tensor, seed: int = 0, size: tuple[int, int] = (8, 8)) -> torch.Tensor:
    return make_corruption(settings).degrade(pixels, size, "bicubic", np.random.default_rng(seed))


def test_the_papers_kernel_by_hand() -> None:
    side = math.exp(-1 / (2 * 0.6**2))  # 0.2494, one pixel from the centre
    line = torch.tensor([side, 1.0, side]) / (1 + 2 * side)
    assert line.tolist() == pytest.approx([0.16638, 0.66724, 0.16638], abs=1e-5)
    torch.testing.assert_close(gaussian_kernel(3, 0.6), line[:, None] * line[None, :])
    assert torch.equal(gaussian_kernel(5, 0.0), torch.nn.functional.pad(torch.ones(1, 1), (2, 2, 2, 2)))


def test_a_turned_kernel_lies_along_its_angle() -> None:
    flat = gaussian_kernel(9, 2.0, 0.5)
    assert flat[4, 7] > 10 * flat[7, 4] and float(flat.sum()) == pytest.approx(1)
    torch.testing.assert_close(gaussian_kernel(9, 2.0, 0.5, math.pi / 2), flat.T)
    diagonal = gaussian_kernel(9, 2.0, 0.5, math.pi / 4)  # y points down
    assert diagonal[6, 6] > 10 * diagonal[6, 2]


def test_a_filter_keeps_flat_pictures_and_convolves() -> None:
    flat = torch.full((2, 3, 5, 7), 0.3)
    torch.testing.assert_close(filtered(flat, gaussian_kernel(3, 0.6)), flat)
    spot = torch.zeros(1, 3, 5, 5)
    spot[:, 1, 2, 2] = 1
    blurred = filtered(spot, gaussian_kernel(3, 0.6))
    torch.testing.assert_close(blurred[0, 1, 1:4, 1:4], gaussian_kernel(3, 0.6))
    assert float(blurred[0, [0, 2]].abs().max()) == 0


def test_blur_is_the_resized_picture_through_the_kernel() -> None:
    pixels = pictures()
    low = resize(pixels, 8, clamp=True)
    torch.testing.assert_close(degraded(PAPER, pixels), filtered(low, gaussian_kernel(3, 0.6)))
    assert torch.equal(degraded({"kind": "none"}, pixels), low)


def test_drawing_sees_the_lightest_blur_of_training_only() -> None:
    low = pictures(2, 32, 32)
    torch.testing.assert_close(make_corruption(PAPER).lightest(low), filtered(low, gaussian_kernel(3, 0.6)))
    light = make_corruption({"kind": "blur", "sigma": [0.0, 0.8], "noise": [0.01, 0.03]})
    for corruption in (light, make_corruption(CHAIN), make_corruption({"kind": "none"})):
        assert torch.equal(corruption.lightest(low), low)


@pytest.mark.parametrize("settings", [PAPER | {"sigma": [0, 1], "noise": [0, 0.1]}, CHAIN], ids=["blur", "bsr"])
def test_deterministic_in_range_and_row_by_row(settings: dict) -> None:
    pixels = pictures(4)
    before = pixels.clone()
    first = degraded(settings, pixels)
    assert first.shape == (4, 3, 8, 8) and torch.equal(pixels, before)
    assert 0 <= float(first.min()) and float(first.max()) <= 1
    assert torch.equal(first, degraded(settings, pixels))
    assert not torch.equal(first, degraded(settings, pixels, seed=1))
    others = torch.cat([pixels[:2], 1 - pixels[2:]])
    assert torch.equal(degraded(settings, others)[:2], first[:2])
    same = pixels[:1].expand(4, -1, -1, -1)
    assert not torch.equal(degraded(settings, same)[0], degraded(settings, same)[1])


@pytest.mark.parametrize(
    "ingredient",
    [
        {"isotropic": [2.0, 2.0]}, {"anisotropic": [1.0, 3.0]}, {"factor": [0.3, 0.3]}, {"noise": [0.1, 0.1]},
        {"noise": [0.1, 0.1], "grey": 1.0}, {"quality": [5, 5]},
    ],
    ids=str,
)  # fmt: skip
def test_every_ingredient_of_the_chain_changes_the_picture(ingredient: dict) -> None:
    pixels = pictures()
    quiet = degraded(QUIET, pixels)
    torch.testing.assert_close(quiet, resize(pixels, 8, clamp=True), atol=0.05, rtol=0)
    changed = degraded(QUIET | ingredient, pixels)
    assert float((changed - quiet).abs().max()) > 0.02
    assert torch.equal(degraded(QUIET | ingredient | {"probability": 0.0}, pixels), resize(pixels, 8, clamp=True))


def test_the_chain_comes_in_more_than_one_order() -> None:
    strong = QUIET | {"noise": [0.2, 0.2], "isotropic": [3.0, 3.0]}  # noise before the blur is smoothed, after it stays
    flat = torch.full((16, 3, 32, 32), 0.5)
    spread = degraded(strong, flat, size=(32, 32)).std(dim=(1, 2, 3))
    assert float(spread.min()) < 0.08 and float(spread.max()) > 0.12


def test_grey_noise_is_the_same_in_all_channels() -> None:
    flat = torch.full((1, 3, 16, 16), 0.5)
    grey = with_noise(flat, 0.1, True, np.random.default_rng(0))
    assert torch.equal(grey[:, 0], grey[:, 1]) and torch.equal(grey[:, 0], grey[:, 2])
    colour = with_noise(flat, 0.1, False, np.random.default_rng(0))
    assert not torch.equal(colour[:, 0], colour[:, 1])
    assert float(colour.std()) == pytest.approx(0.1, rel=0.15)


def test_jpeg_loses_more_at_lower_quality() -> None:
    pixels = pictures()
    errors = [float((through_jpeg(pixels, quality) - pixels).square().mean()) for quality in (95, 50, 10)]
    assert 0 < errors[0] < errors[1] < errors[2] < 0.05


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"kind": "fog"}, "no corruption 'fog'"),
        ({}, "no corruption None"),
        ({"kind": "blur", "strength": 1}, "no setting strength"),
        ({"kind": "none", "sigma": [0, 1]}, "no setting sigma"),
        ({"kind": "blur", "kernel": 4}, "odd number"),
        ({"kind": "blur", "sigma": [1.0, 0.5]}, "lowest and highest"),
        ({"kind": "blur", "sigma": 0.6}, "two numbers"),
        ({"kind": "blur", "noise": [0, float("nan")]}, "two numbers"),
        ({"kind": "bsr", "quality": [0, 50]}, "from 1 to 100"),
        ({"kind": "bsr", "probability": 1.5}, "from 0 to 1"),
        ({"kind": "bsr", "filters": ["lanczos"]}, "choose from"),
        ({"kind": "bsr", "filters": []}, "choose from"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(InputError, match=words.replace("[", r"\[")):
        make_corruption(settings)
