"""Losses of DALL-E 1: the relaxed ELBO of the dVAE, the weighted cross-entropy of the transformer (2102.12092, 2, A.3).

Legend: B pictures, C channels, H W pixels, V codebook size, h w token grid, L text positions, N image tokens.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Pixels are squeezed into [eps, 1 - eps] because the logit-Laplace density is defined on the open interval only (A.3).
LOGIT_LAPLACE_EPS = 0.1


def squeeze_pixels(pixels: Tensor, eps: float = LOGIT_LAPLACE_EPS) -> Tensor:
    """phi(x) = (1 - 2 eps) x + eps: [0, 1] -> [eps, 1 - eps] (2102.12092, A.3)."""
    return (1 - 2 * eps) * pixels + eps


def unsqueeze_pixels(squeezed: Tensor, eps: float = LOGIT_LAPLACE_EPS) -> Tensor:
    """The inverse of :func:`squeeze_pixels`, clamped to [0, 1]."""
    return ((squeezed - eps) / (1 - 2 * eps)).clamp(0, 1)


def logit_laplace_nll(x: Tensor, mu: Tensor, ln_b: Tensor) -> Tensor:
    """-ln f(x | mu, b) with f = 1 / (2 b x (1 - x)) exp(-|logit(x) - mu| / b), element by element (2102.12092, A.3).

    Args: x in (0, 1), mu and ln_b of the same shape, any real. Returns nats, the same shape.
    """
    return math.log(2.0) + ln_b + torch.log(x * (1 - x)) + (torch.logit(x) - mu).abs() * torch.exp(-ln_b)


def kl_to_uniform(logits: Tensor) -> Tensor:
    """KL(q || uniform) of each grid cell in nats, from encoder logits (B, V, h, w) -> (B, h, w).

    Taken on the categorical posterior itself, without Gumbel noise (2102.12092, A.2).
    """
    log_q = F.log_softmax(logits, dim=1)
    return (log_q.exp() * (log_q + math.log(logits.shape[1]))).sum(dim=1)


def relaxed_elbo_loss(
    pixels: Tensor,
    mu: Tensor,
    ln_b: Tensor,
    logits: Tensor,
    beta: float,
    squared_error: float = 0.0,
    row_weight: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative ELBO per pixel channel: (-ln p(x | z) + beta KL) / (C H W), batch mean (2102.12092, 2.1 and A.3).

    Reconstruction and KL are *summed* over the picture and the grid first and divided by C H W together, so at 256 px
    and a 32 x 32 grid a mean-per-pixel and mean-per-cell formula would need beta / 192.

    Args:
        pixels: (B, C, H, W) in [0, 1].
        mu, ln_b: (B, C, H, W), the decoder's maps.
        logits: (B, V, h, w), the encoder's.
        beta: weight of the KL term (the paper goes from 0 to 6.6).
        squared_error: weight of an additional mean squared error of the squeezed pixels; 0 in the paper. The learned b
            makes the likelihood forgive exactly the edges and details that are hard to predict, and a small model
            trained for minutes then stays blurred: in a trial of 400 steps it reached 20.1 dB with the likelihood,
            22.7 dB with the squared error.
        row_weight: (B,), weight of each picture; None leaves them equal, as in the paper.
    Returns: the scalar loss in nats per pixel channel, and its terms, detached: "reconstruction" (nats per pixel
        channel), "kl" (nats per grid cell) and "mse" (of the squeezed pixels).
    """
    values = pixels[0].numel()  # C H W
    nll = logit_laplace_nll(squeeze_pixels(pixels), mu, ln_b).sum(dim=(1, 2, 3))  # B
    kl = kl_to_uniform(logits)  # B h w
    mse = (torch.sigmoid(mu) - squeeze_pixels(pixels)).square().mean(dim=(1, 2, 3))  # B
    losses = (nll + beta * kl.sum(dim=(1, 2))) / values + squared_error * mse
    loss = losses.mean() if row_weight is None else (row_weight.to(losses) * losses).mean()
    figures = {"reconstruction": nll.mean() / values, "kl": kl.mean(), "mse": mse.mean()}
    return loss, {name: figure.detach() for name, figure in figures.items()}


def text_image_loss(
    text_logits: Tensor,
    image_logits: Tensor,
    ids: Tensor,
    mask: Tensor,
    image_tokens: Tensor,
    text_weight: float = 1 / 8,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Text and image cross-entropies, each averaged over its own tokens, weighted 1/8 and 7/8 (2102.12092, 2.2).

    Text padding is no target: which positions are padded is known as soon as the end token has been read.

    Args:
        text_logits: (B, L - 1, V_text), position l predicts ids[:, l + 1].
        image_logits: (B, N, V_image), position n predicts image_tokens[:, n].
        ids, mask: (B, L), mask True on real tokens (start ... end).
        image_tokens: (B, N).
    """
    text = F.cross_entropy(text_logits.float().transpose(1, 2), ids[:, 1:], reduction="none")  # B, L - 1
    real = mask[:, 1:].float()
    text_mean = (text * real).sum() / real.sum().clamp(min=1)
    image_mean = F.cross_entropy(image_logits.float().flatten(0, 1), image_tokens.flatten())
    loss = text_weight * text_mean + (1 - text_weight) * image_mean
    return loss, {"text": text_mean.detach(), "image": image_mean.detach()}
