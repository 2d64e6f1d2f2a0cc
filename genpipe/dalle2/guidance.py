"""Guidance and thresholding of predictions (2207.12598; GLIDE 2112.10741, 2.2-2.3; Imagen 2205.11487, 2.3).

Legend: R rows; a row is a picture (C, H, W) or an embedding (D,).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from genpipe.dalle2.losses import per_row


def classifier_free(conditional: Tensor, null: Tensor, scale: float) -> Tensor:
    """null + s (conditional - null) (2112.10741, 2.3); s = 1 is the conditional prediction alone, s = 0 the other.

    Linear, so that it means the same for predictions of the noise, of x_0 and of v at one time step.
    """
    return null + scale * (conditional - null)


def clip_gradient(
    encode_image: Callable[[Tensor, Tensor], Tensor], text_embedding: Tensor, scale: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """scale * gradient in x_t of f(x_t, t) . g(c), both of length 1 (2112.10741, 2.3), for `sampling.denoise`.

    Args:
        encode_image: a noise-aware CLIP: x_t (R, C, H, W), t () or (R,) -> embedding (R, D), of any length.
        text_embedding: g(c) (R, D), of any length. scale: guidance scale s times the CLIP's logit scale.
    """
    text = F.normalize(text_embedding.detach().float(), dim=-1)

    def gradient(x_t: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x_t.detach().requires_grad_(True)
            image = F.normalize(encode_image(x, t).float(), dim=-1)
            # Of each row's own cosine; scaled beforehand, so that little is lost in half precision.
            (slope,) = torch.autograd.grad(scale * (image * text).sum(), x)
        return slope

    return gradient


def toward(x_0: Tensor, gradient: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_0 (R, ...) that a noise prediction shifted by -sqrt(1 - alpha_bar) gradient stands for; alpha_bar: (R,).

    (2105.05233, algorithm 2.) For every scheduler: DDPM's have a mean that is shifted by variance * gradient instead
    (2112.10741, 2.2), which differs from this where steps are long.
    """
    a = per_row(alpha_bar, x_0)
    return x_0 + (1 - a) / a.sqrt() * gradient.to(x_0)


def dynamic_threshold(x_0: Tensor, percentile: float) -> Tensor:
    """x_0 (R, ...) clipped to [-s, s] and divided by s, per row, so that it lies in [-1, 1] (2205.11487, 2.3).

    s is the `percentile`, a share in (0, 1], of the row's absolute values, and at least 1. Strong guidance pushes
    pixels out of their range; clipping alone would flatten them into saturated areas.
    """
    # Row by row: torch.quantile takes no more than 2^24 numbers at once.
    shares = [torch.quantile(row.abs().flatten().float(), percentile) for row in x_0]
    s = torch.stack(shares).clamp(min=1).to(x_0.dtype).reshape(-1, *[1] * (x_0.ndim - 1))
    return x_0.clamp(-s, s) / s
