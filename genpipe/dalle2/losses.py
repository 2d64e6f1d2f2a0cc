"""Diffusion: noising, training targets and losses of all parts (2204.06125, 2; 2006.11239; 2102.09672).

Legend: B rows; a row is a picture (C, H, W) or an embedding (D,). alpha_bar (B) is the cumulative product at each row's
time step: 1 is clean, 0 is noise.
"""

import math

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from genpipe.errors import InputError

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")  # diffusers' names of noise, x_0 and v
# Steps at and above this signal-to-noise ratio count as clean: there is nothing to predict.
_MAX_SNR = 1e8


def cumulative_alphas(beta_schedule: str, num_train_timesteps: int) -> Tensor:
    """alpha_bar_t of every time step, (T,), for a schedule by diffusers' name ("squaredcos_cap_v2" is the cosine one).

    Raises InputError for a schedule that diffusers does not know.
    """
    try:
        return DDPMScheduler(num_train_timesteps, beta_schedule=beta_schedule).alphas_cumprod
    except NotImplementedError as error:
        raise InputError(f"there is no noise schedule {beta_schedule!r}; try squaredcos_cap_v2.") from error


def stratified_timesteps(rows: int, num_train_timesteps: int, generator: torch.Generator, shift: float = 1.0) -> Tensor:
    """Time steps (B,), each uniform in [0, T), spread evenly over the batch: the loss of a batch varies less.

    shift: s in u -> s u / (1 + (s - 1) u) for u in [0, 1) (2403.03206, 5.3.2): above 1, noisy steps come s times as
    often, clean ones as seldom.
    """
    u = torch.rand((), generator=generator, device=generator.device)
    places = (torch.arange(rows, device=generator.device) + u) / rows
    order = torch.randperm(rows, generator=generator, device=generator.device)
    u = places[order]
    u = shift * u / (1 + (shift - 1) * u)
    return (u * num_train_timesteps).long().clamp(max=num_train_timesteps - 1)


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, ...) with as many axes as `like`."""
    return values.to(like.device, like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def diffuse(x_0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise (2006.11239, equation 4)."""
    alpha_bar = per_row(alpha_bar, x_0)
    return alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise


def training_target(x_0: Tensor, noise: Tensor, alpha_bar: Tensor, prediction_type: str) -> Tensor:
    """What the network should answer: the noise, x_0, or v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x_0."""
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return x_0
    alpha_bar = per_row(alpha_bar, x_0)  # v_prediction: 2202.00512, appendix D
    return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x_0


def predicted_x_0(x_t: Tensor, prediction: Tensor, alpha_bar: Tensor, prediction_type: str) -> Tensor:
    """The clean x_0 that an answer of the network stands for."""
    alpha_bar = per_row(alpha_bar, x_t)
    if prediction_type == "sample":
        return prediction
    if prediction_type == "epsilon":
        return (x_t - (1 - alpha_bar).sqrt() * prediction) / alpha_bar.sqrt()
    return alpha_bar.sqrt() * x_t - (1 - alpha_bar).sqrt() * prediction


def min_snr_weight(alpha_bar: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Weight (B,) of each row's squared error: min(SNR, gamma) seen from x_0 (2303.09556, 3.4).

    An error of x_0 counts SNR times as much when it is measured on the noise, SNR + 1 times as much when on v.
    """
    snr = (alpha_bar / (1 - alpha_bar)).clamp(max=_MAX_SNR)
    measured = {"epsilon": snr, "sample": torch.ones_like(snr), "v_prediction": snr + 1}[prediction_type]
    return snr.clamp(max=gamma) / measured


def denoising_loss(
    prediction: Tensor,
    target: Tensor,
    alpha_bar: Tensor,
    prediction_type: str,
    min_snr_gamma: float | None = None,
    row_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean squared error over a batch, and that of every row (B,), detached and unweighted.

    min_snr_gamma: weight the rows by `min_snr_weight`; None leaves them equal, as in the papers. row_weight: (B,),
    beside that.
    """
    errors = (prediction.float() - target.float()).square().flatten(1).mean(dim=1)  # B
    weight = torch.ones_like(errors) if row_weight is None else row_weight.to(errors)
    if min_snr_gamma is not None:
        weight = weight * min_snr_weight(alpha_bar.to(errors), min_snr_gamma, prediction_type)
    return (weight * errors).mean(), errors.detach()


def posterior(x_0: Tensor, x_t: Tensor, t: Tensor, alphas_cumprod: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean of q(x_{t-1} | x_t, x_0), its log variance, and ln beta_t (2006.11239, equation 7).

    The log variance at t = 0, where the variance is 0, is that of t = 1 (2102.09672, 3.1). alphas_cumprod: (T,).
    """
    alphas_cumprod = alphas_cumprod.to(x_0.device, torch.float64)
    t = t.to(x_0.device)
    before = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
    beta = 1 - alphas_cumprod / before
    variance = beta * (1 - before) / (1 - alphas_cumprod)
    log_variance = torch.cat([variance[1:2], variance[1:]]).log()
    of_x_0 = beta * before.sqrt() / (1 - alphas_cumprod)
    of_x_t = (1 - before) * (1 - beta).sqrt() / (1 - alphas_cumprod)
    mean = per_row(of_x_0[t], x_0) * x_0 + per_row(of_x_t[t], x_t) * x_t
    return mean, per_row(log_variance[t], x_0), per_row(beta[t].log(), x_0)


def learned_range_loss(
    fraction: Tensor, x_0_hat: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor, alphas_cumprod: Tensor
) -> Tensor:
    """Variational bound in bits per dimension that trains the learned variance alone, (B,) (2102.09672, 3.1).

    fraction: the network's extra channels in [-1, 1], the log variance's place between its two bounds (equation 15).
    x_0_hat: the clean picture its prediction stands for; no gradient passes to it. x_0: pixels in [-1, 1].
    """
    true_mean, true_log_variance, log_beta = posterior(x_0, x_t, t, alphas_cumprod)
    mean, _, _ = posterior(x_0_hat.detach(), x_t, t, alphas_cumprod)
    v = (fraction + 1) / 2
    log_variance = v * log_beta + (1 - v) * true_log_variance
    kl = 0.5 * (
        log_variance
        - true_log_variance
        + (true_log_variance - log_variance).exp()
        + (true_mean - mean).square() * (-log_variance).exp()
        - 1
    )
    nll = -_discretised_log_likelihood(x_0, mean, 0.5 * log_variance)
    bits = torch.where(per_row(t == 0, x_0).bool(), nll, kl) / math.log(2.0)
    return bits.flatten(1).mean(dim=1)


def _discretised_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """ln of a Gaussian's mass on the 1/255-wide bin around each pixel in [-1, 1] (2006.11239, equation 13)."""
    scale = log_scale.exp()
    normal = torch.distributions.Normal(torch.zeros((), device=x.device), torch.ones((), device=x.device))
    upper = normal.cdf((x - mean + 1 / 255) / scale)
    lower = normal.cdf((x - mean - 1 / 255) / scale)
    upper = torch.where(x > 0.999, torch.ones_like(upper), upper)
    lower = torch.where(x < -0.999, torch.zeros_like(lower), lower)
    return (upper - lower).clamp(min=1e-12).log()
