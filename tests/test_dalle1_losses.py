"""The losses of DALL-E 1 against values worked out by hand (2102.12092, 2 and A.3)."""

import math

import pytest
import torch

from genpipe.dalle1.losses import (
    kl_to_uniform,
    logit_laplace_nll,
    relaxed_elbo_loss,
    squeeze_pixels,
    text_image_loss,
    unsqueeze_pixels,
)


@pytest.mark.parametrize(("mu", "b"), [(0.0, 0.5), (1.5, 0.3), (-2.0, 0.1), (0.3, 0.8)])
def test_the_logit_laplace_density_integrates_to_one(mu: float, b: float) -> None:
    count = 400_000
    x = (torch.arange(count, dtype=torch.float64) + 0.5) / count  # midpoints of (0, 1)
    nll = logit_laplace_nll(x, torch.full_like(x, mu), torch.full_like(x, math.log(b)))
    assert float((-nll).exp().mean()) == pytest.approx(1, abs=1e-3)


def test_the_logit_laplace_density_by_hand() -> None:
    # x = 1/2: logit 0, 1 / (2 b x (1 - x)) = 1 for b = 2, times exp(-|0 - 1| / 2)
    # x = 4/5: logit ln 4, 1 / (2 x (1 - x)) = 25 / 8 for b = 1, times exp(-ln 4) = 1/4
    x = torch.tensor([0.5, 0.8])
    nll = logit_laplace_nll(x, torch.tensor([1.0, 0.0]), torch.tensor([math.log(2), 0.0]))
    assert nll.tolist() == pytest.approx([0.5, -math.log(25 / 32)], rel=1e-6)


def test_pixels_are_squeezed_off_the_borders_and_back() -> None:
    pixels = torch.tensor([0.0, 0.25, 0.5, 1.0])
    before = pixels.clone()
    squeezed = squeeze_pixels(pixels)
    assert squeezed.tolist() == pytest.approx([0.1, 0.3, 0.5, 0.9])
    assert unsqueeze_pixels(squeezed).tolist() == pytest.approx(pixels.tolist(), abs=1e-7)
    assert unsqueeze_pixels(torch.tensor([0.0, 0.05, 0.95, 1.0])).tolist() == [0, 0, 1, 1]
    assert torch.equal(pixels, before)


def test_kl_to_uniform_by_hand() -> None:
    uniform = torch.full((4,), 7.0)
    one_hot = torch.tensor([0.0, 90.0, 0.0, 0.0])
    two_of_four = torch.tensor([50.0, -50.0, 50.0, -50.0])
    logits = torch.stack([uniform, one_hot, two_of_four], dim=1)[None, :, None]  # 1, V = 4, 1, 3
    kl = kl_to_uniform(logits)
    assert kl.shape == (1, 1, 3)
    assert kl.flatten().tolist() == pytest.approx([0, math.log(4), math.log(2)], abs=1e-6)


def grey(size: int, mu: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pixels 1/2, mu, and ln b = 0 of one picture."""
    pixels = torch.full((1, 3, size, size), 0.5)
    return pixels, torch.full_like(pixels, mu), torch.zeros_like(pixels)


def test_reconstruction_is_per_pixel_channel() -> None:
    # x = 1/2, b = 1: f = 2 exp(-|mu|); with mu = ln 3 the reconstruction is 3/4, a squared error of 1/16.
    flat = torch.zeros(1, 5, 2, 2)
    loss, terms = relaxed_elbo_loss(*grey(8), flat, beta=6.6)
    assert float(loss) == pytest.approx(-math.log(2), rel=1e-6)
    assert float(terms["mse"]) == 0 and float(terms["kl"]) == pytest.approx(0, abs=1e-6)
    loss, terms = relaxed_elbo_loss(*grey(8, math.log(3)), flat, beta=6.6)
    assert float(loss) == pytest.approx(math.log(3 / 2), rel=1e-6)
    assert float(terms["reconstruction"]) == pytest.approx(math.log(3 / 2), rel=1e-6)
    with_error, _ = relaxed_elbo_loss(*grey(8, math.log(3)), flat, beta=6.6, squared_error=10)
    assert float(with_error - loss) == pytest.approx(10 / 16, rel=1e-5)


def test_the_kl_term_is_divided_by_the_pixels_too() -> None:
    """At 256 px and a 32 x 32 grid, beta per picture is beta / 192 per mean pixel and mean cell."""
    logits = torch.zeros(1, 8, 32, 32)
    logits[:, 3] = 80  # one-hot posteriors: ln 8 nats in each cell
    picture = grey(256)
    without, _ = relaxed_elbo_loss(*picture, logits, beta=0)
    with_kl, terms = relaxed_elbo_loss(*picture, logits, beta=6.6)
    assert float(terms["kl"]) == pytest.approx(math.log(8), rel=1e-5)
    assert float(with_kl - without) == pytest.approx(6.6 / 192 * math.log(8), rel=1e-4)


def test_the_loss_is_a_mean_over_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 3, 8, 8, generator=generator)
    mu, ln_b = torch.randn(2, 2, 3, 8, 8, generator=generator)
    logits = torch.randn(2, 6, 2, 2, generator=generator)
    both, _ = relaxed_elbo_loss(pixels, mu, ln_b, logits, 2.0, 3.0)
    single = [
        relaxed_elbo_loss(pixels[i : i + 1], mu[i : i + 1], ln_b[i : i + 1], logits[i : i + 1], 2.0, 3.0)[0]
        for i in (0, 1)
    ]
    assert float(both) == pytest.approx(float(single[0] + single[1]) / 2, rel=1e-5)
    weighted, _ = relaxed_elbo_loss(pixels, mu, ln_b, logits, 2.0, 3.0, row_weight=torch.tensor([0.5, 1.5]))
    assert float(weighted) == pytest.approx(float(0.5 * single[0] + 1.5 * single[1]) / 2, rel=1e-5)


def test_text_and_image_are_weighted_one_to_seven() -> None:
    ids, mask = torch.tensor([[5, 1, 2, 6]]), torch.ones(1, 4, dtype=torch.bool)
    tokens = torch.tensor([[0, 1, 2, 3, 4]])
    loss, terms = text_image_loss(torch.zeros(1, 3, 7), torch.zeros(1, 5, 11), ids, mask, tokens)
    assert float(terms["text"]) == pytest.approx(math.log(7)) and float(terms["image"]) == pytest.approx(math.log(11))
    assert float(loss) == pytest.approx((math.log(7) + 7 * math.log(11)) / 8, rel=1e-6)
    loss, _ = text_image_loss(torch.zeros(1, 3, 7), torch.zeros(1, 5, 11), ids, mask, tokens, text_weight=0.5)
    assert float(loss) == pytest.approx((math.log(7) + math.log(11)) / 2, rel=1e-6)


def test_text_is_averaged_over_real_tokens_and_padding_is_no_target() -> None:
    # Three targets in the first row and one in the second; two entries, logit difference d: -ln sigmoid(+-d).
    ids = torch.tensor([[1, 0, 0, 0], [1, 0, 1, 1]])
    mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
    logits = torch.zeros(2, 3, 2, requires_grad=True)
    with torch.no_grad():
        logits[0, :, 0] = math.log(3)  # probability 3/4 of the right entry
        logits[1, :, 1] = math.log(4)  # probability 1/5
    image, tokens = torch.zeros(2, 1, 2), torch.zeros(2, 1, dtype=torch.long)
    loss, terms = text_image_loss(logits, image, ids, mask, tokens)
    assert float(terms["text"]) == pytest.approx((3 * math.log(4 / 3) + math.log(5)) / 4, rel=1e-6)

    loss.backward()
    gradient = logits.grad
    assert gradient is not None
    assert gradient[1, 1:].abs().max() == 0  # logits at positions 1 and 2 of row 1 predict padding
    assert gradient[1, 0].abs().min() > 0 and gradient[0].abs().min() > 0
    other = ids.clone()
    other[1, 2:] = 0
    assert text_image_loss(logits, image, other, mask, tokens)[0].item() == loss.item()


def test_no_real_text_is_no_error() -> None:
    empty = torch.zeros(1, 3, dtype=torch.bool)
    ids, tokens = torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 2, dtype=torch.long)
    loss, _ = text_image_loss(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), ids, empty, tokens)
    assert float(loss) == pytest.approx(7 / 8 * math.log(4), rel=1e-6)
