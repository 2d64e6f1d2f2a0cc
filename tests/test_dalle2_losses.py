"""The diffusion losses against values worked out by hand and against torch.distributions (2006.11239; 2102.09672)."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from genpipe.dalle2.losses import (
    PREDICTION_TYPES,
    cumulative_alphas,
    denoising_loss,
    diffuse,
    learned_range_loss,
    min_snr_weight,
    per_row,
    posterior,
    predicted_x_0,
    stratified_timesteps,
    training_target,
)
from genpipe.errors import InputError

COSINE = cumulative_alphas("squaredcos_cap_v2", 1000)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_cosine_schedule_by_its_formula() -> None:
    # 2102.09672, equation 17: f(t) = cos((t / T + 0.008) / 1.008 * pi / 2)^2
    def f(share: float) -> float:
        return math.cos((share + 0.008) / 1.008 * math.pi / 2) ** 2

    assert COSINE.shape == (1000,)
    for t in (0, 1, 250, 500, 900):
        assert float(COSINE[t]) == pytest.approx(f((t + 1) / 1000) / f(0), rel=1e-4)
    assert bool((COSINE.diff() < 0).all()) and 0 < float(COSINE[-1]) < 1e-8
    assert float(cumulative_alphas("linear", 1000)[1]) == pytest.approx((1 - 1e-4) * (1 - 1e-4 - 0.0199 / 999))


def test_noising_and_targets_by_hand() -> None:
    x_0, noise, alpha_bar = torch.tensor([[2.0], [3.0]]), torch.tensor([[-1.0], [5.0]]), torch.tensor([0.64, 1.0])
    before = x_0.clone(), noise.clone(), alpha_bar.clone()
    # 0.8 * 2 + 0.6 * -1, and no noise at all
    assert diffuse(x_0, noise, alpha_bar).flatten().tolist() == pytest.approx([1, 3])
    # v = 0.8 * -1 - 0.6 * 2, and the noise alone
    assert training_target(x_0, noise, alpha_bar, "v_prediction").flatten().tolist() == pytest.approx([-2, 5])
    assert torch.equal(training_target(x_0, noise, alpha_bar, "epsilon"), noise)
    assert torch.equal(training_target(x_0, noise, alpha_bar, "sample"), x_0)
    assert all(torch.equal(a, b) for a, b in zip((x_0, noise, alpha_bar), before, strict=True))


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("shape", [(50, 3, 4, 4), (50, 7)])
def test_the_target_stands_for_x_0(kind: str, shape: tuple[int, ...]) -> None:
    x_0, noise = torch.randn(shape, generator=generator(0)), torch.randn(shape, generator=generator(1))
    alpha_bar = COSINE[torch.arange(0, 1000, 20)]
    x_t = diffuse(x_0, noise, alpha_bar)
    back = predicted_x_0(x_t, training_target(x_0, noise, alpha_bar, kind), alpha_bar, kind)
    torch.testing.assert_close(back, x_0, rtol=1e-4, atol=1e-4)


def test_min_snr_weights_by_hand() -> None:
    alpha_bar = torch.tensor([0.5, 0.8, 10 / 11, 1.0])  # signal to noise 1, 4, 10, beyond measure
    weight = {kind: min_snr_weight(alpha_bar, 5.0, kind).tolist() for kind in PREDICTION_TYPES}
    assert weight["sample"] == pytest.approx([1, 4, 5, 5])
    assert weight["epsilon"] == pytest.approx([1, 1, 0.5, 0], abs=1e-6)
    assert weight["v_prediction"] == pytest.approx([0.5, 0.8, 5 / 11, 0], abs=1e-6)


def test_min_snr_weighs_the_same_mistake_the_same_however_it_is_predicted() -> None:
    x_0, noise = torch.randn(9, 4, generator=generator(0)), torch.randn(9, 4, generator=generator(1))
    mistaken = x_0 + torch.randn(9, 4, generator=generator(2))
    alpha_bar = torch.linspace(0.05, 0.95, 9)
    x_t = diffuse(x_0, noise, alpha_bar)
    a = per_row(alpha_bar, x_0)
    its_noise = (x_t - a.sqrt() * mistaken) / (1 - a).sqrt()
    losses = [
        float(
            denoising_loss(
                training_target(mistaken, its_noise, alpha_bar, kind),
                training_target(x_0, noise, alpha_bar, kind),
                alpha_bar,
                kind,
                min_snr_gamma=5.0,
            )[0]
        )
        for kind in PREDICTION_TYPES
    ]
    snr = (alpha_bar / (1 - alpha_bar)).clamp(max=5)
    expected = float((snr * (mistaken - x_0).square().mean(dim=1)).mean())
    assert losses == pytest.approx([expected] * 3, rel=1e-4)


def test_the_loss_and_its_rows_by_hand() -> None:
    prediction = torch.tensor([[1.0, 2.0], [0.0, 0.0]], requires_grad=True)
    target = torch.tensor([[0.0, 0.0], [0.0, 4.0]])
    loss, rows = denoising_loss(prediction, target, torch.tensor([0.5, 0.8]), "sample")
    assert float(loss) == pytest.approx(5.25) and rows.tolist() == pytest.approx([2.5, 8]) and not rows.requires_grad
    weighted, rows = denoising_loss(prediction, target, torch.tensor([0.5, 0.8]), "sample", min_snr_gamma=3.0)
    assert float(weighted) == pytest.approx((1 * 2.5 + 3 * 8) / 2) and rows.tolist() == pytest.approx([2.5, 8])
    rows_weighted, _ = denoising_loss(
        prediction, target, torch.tensor([0.5, 0.8]), "sample", min_snr_gamma=3.0, row_weight=torch.tensor([1.5, 0.5])
    )
    assert float(rows_weighted) == pytest.approx((1.5 * 1 * 2.5 + 0.5 * 3 * 8) / 2)
    loss.backward()
    assert prediction.grad is not None and prediction.grad.flatten().tolist() == pytest.approx([0.5, 1, 0, -2])


@pytest.mark.parametrize(("rows", "steps"), [(8, 1000), (7, 50), (1, 1000), (4, 4), (100, 10)])
def test_time_steps_cover_the_schedule_evenly(rows: int, steps: int) -> None:
    counts = torch.zeros(steps)
    for seed in range(400):
        t = stratified_timesteps(rows, steps, generator(seed))
        assert t.shape == (rows,) and t.dtype == torch.int64 and int(t.min()) >= 0 and int(t.max()) < steps
        gaps = t.sort().values.diff()
        assert rows == 1 or (int(gaps.min()) >= steps // rows and int(gaps.max()) <= -(-steps // rows))
        counts += torch.bincount(t, minlength=steps)
    tenths = counts.reshape(min(steps, 10), -1).sum(dim=1) if steps % 10 == 0 else counts
    expected = 400 * rows / len(tenths)
    assert float((tenths - expected).abs().max()) < (5 * expected**0.5 if rows == 1 else 0.3 * expected)


def test_time_steps_come_in_a_random_order_from_their_generator() -> None:
    t = stratified_timesteps(64, 1000, generator(3))
    assert torch.equal(t, stratified_timesteps(64, 1000, generator(3)))
    assert not torch.equal(t, stratified_timesteps(64, 1000, generator(4)))
    assert not torch.equal(t, t.sort().values)
    first = torch.stack([stratified_timesteps(4, 4, generator(seed))[0] for seed in range(60)])
    assert set(first.tolist()) == {0, 1, 2, 3}  # no row always gets the same part of the schedule


def test_shifted_time_steps_are_noisy_more_often() -> None:
    # u -> 3 u / (1 + 2 u): half of the schedule is reached at u = 1/4, three quarters at u = 1/2.
    plain, shifted = (stratified_timesteps(1000, 1000, generator(0), shift) for shift in (1.0, 3.0))
    assert torch.equal(plain, stratified_timesteps(1000, 1000, generator(0)))
    assert int((shifted >= 500).sum()) == pytest.approx(750, abs=2)
    assert int((shifted >= 750).sum()) == pytest.approx(500, abs=2)
    assert int(shifted.min()) >= 0 and 997 <= int(shifted.max()) < 1000
    mapped = 3 * plain.double() / (1 + 2 * plain.double() / 1000)
    assert float((shifted - mapped).abs().max()) <= 4  # row by row: at most 3 steps per step, and the rounding


def test_unknown_noise_schedules_are_refused() -> None:
    with pytest.raises(InputError, match="no noise schedule 'cosine'; try squaredcos_cap_v2"):
        cumulative_alphas("cosine", 10)


def test_the_posterior_by_hand() -> None:
    # alpha_bar 0.9, 0.5: beta_1 = 1 - 5/9 = 4/9, its variance 4/9 * 0.1 / 0.5 = 4/45
    x_0, x_t = torch.tensor([[2.0], [2.0]]), torch.tensor([[1.0], [1.0]])
    mean, log_variance, log_beta = posterior(x_0, x_t, torch.tensor([0, 1]), torch.tensor([0.9, 0.5]))
    expected = 4 / 9 * math.sqrt(0.9) / 0.5 * 2 + 0.1 * math.sqrt(5 / 9) / 0.5
    assert mean.flatten().tolist() == pytest.approx([2, expected])
    assert log_variance.flatten().tolist() == pytest.approx([math.log(4 / 45)] * 2)  # at t = 0 that of t = 1
    assert log_beta.flatten().tolist() == pytest.approx([math.log(0.1), math.log(4 / 9)])


@pytest.mark.parametrize("t", [1, 10, 500, 998, 999])
def test_the_posterior_is_the_mean_of_diffusers_step(t: int) -> None:
    x_0, x_t = torch.randn(2, 3, 4, 4, generator=generator(0)), torch.randn(2, 3, 4, 4, generator=generator(1))
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample", clip_sample=False)
    scheduler.set_timesteps(1000)
    noise = torch.randn(2, 3, 4, 4, generator=generator(2))
    theirs = scheduler.step(x_0, torch.tensor(t), x_t, generator=generator(2)).prev_sample
    mean, log_variance, _ = posterior(x_0, x_t, torch.full((2,), t), COSINE)
    torch.testing.assert_close(mean + (0.5 * log_variance).exp() * noise, theirs, rtol=1e-4, atol=1e-4)


def example(t: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_0 in [-1, 1], a near guess of it, x_t, t."""
    x_0 = torch.rand(len(t), 3, 2, 2, generator=generator(0)) * 2 - 1
    guess = x_0 + 0.1 * torch.randn(x_0.shape, generator=generator(1))
    steps = torch.tensor(t)
    return x_0, guess, diffuse(x_0, torch.randn(x_0.shape, generator=generator(2)), COSINE[steps]), steps


def test_the_variational_bound_is_the_divergence_of_two_gaussians() -> None:
    x_0, guess, x_t, t = example([1, 5, 300, 999])
    fraction = torch.rand(x_0.shape, generator=generator(3)) * 2 - 1
    bits = learned_range_loss(fraction, guess, x_0, x_t, t, COSINE)
    assert bits.shape == (4,)
    for row in range(4):
        now, before = COSINE[t[row]].double(), COSINE[t[row] - 1].double()
        beta = 1 - now / before
        smallest = beta * (1 - before) / (1 - now)
        share = (fraction[row].double() + 1) / 2
        scale = (share * beta.log() + (1 - share) * smallest.log()).exp().sqrt()
        # The means differ in x_0 alone, by its coefficient in the posterior.
        apart = before.sqrt() * beta / (1 - now) * (x_0[row] - guess[row])
        expected = kl_divergence(Normal(torch.zeros_like(scale), smallest.sqrt()), Normal(apart, scale))
        assert float(bits[row]) == pytest.approx(float(expected.mean()) / math.log(2), rel=1e-3, abs=1e-7)


def test_the_right_variance_costs_nothing_and_others_something() -> None:
    x_0, _, x_t, t = example([1, 5, 20, 300])
    lowest = torch.full_like(x_0, -1.0)  # the posterior's own variance
    assert learned_range_loss(lowest, x_0, x_0, x_t, t, COSINE).tolist() == pytest.approx([0] * 4, abs=1e-6)
    assert bool((learned_range_loss(-lowest, x_0, x_0, x_t, t, COSINE) > 1e-8).all())


def test_the_last_step_is_the_likelihood_of_the_pixels_256_bins() -> None:
    bins = torch.arange(256) / 127.5 - 1
    x_0 = bins.reshape(-1, 1, 1, 1)
    t, guess, fraction = torch.zeros(256, dtype=torch.long), torch.full_like(x_0, 0.1), torch.zeros_like(x_0)
    bits = learned_range_loss(fraction, guess, x_0, x_0, t, COSINE)
    for mean in (guess, guess * 0 + 1, guess * 0 - 1):  # what lies beyond -1 and 1 belongs to the outermost bins
        masses = (-learned_range_loss(fraction, mean, x_0, x_0, t, COSINE) * math.log(2)).exp()
        assert float(masses.sum()) == pytest.approx(1, abs=1e-4)
    # By hand at one bin: the mean is the guess, the variance half way (of logarithms) from that of t = 1 to beta_0.
    first, second = COSINE[0].double(), COSINE[1].double()
    smallest = (1 - second / first) * (1 - first) / (1 - second)
    scale = float((0.5 * (1 - first).log() + 0.5 * smallest.log()).exp().sqrt())
    here = int((bins - 0.1).abs().argmin())
    normal = Normal(torch.tensor(0.1), torch.tensor(scale))
    mass = normal.cdf(bins[here] + 1 / 255) - normal.cdf(bins[here] - 1 / 255)
    assert float(bits[here]) == pytest.approx(-math.log2(float(mass)), rel=1e-3)


def test_only_the_variance_learns_from_the_bound() -> None:
    x_0, guess, x_t, t = example([0, 1, 400, 999])
    fraction = torch.zeros_like(x_0).requires_grad_()
    guess.requires_grad_()
    learned_range_loss(fraction, guess, x_0, x_t, t, COSINE).sum().backward()
    assert guess.grad is None
    assert fraction.grad is not None and bool(fraction.grad.isfinite().all())
    assert bool((fraction.grad.flatten(1).abs().sum(dim=1) > 0).all())


def test_inputs_of_the_bound_are_unchanged() -> None:
    x_0, guess, x_t, t = example([0, 999])
    inputs = [torch.zeros_like(x_0), guess, x_0, x_t, t, COSINE]
    before = [tensor.clone() for tensor in inputs]
    assert bool(learned_range_loss(*inputs).isfinite().all())
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
