"""Guidance and thresholding of predictions (2207.12598; GLIDE 2112.10741, 2.3; Imagen 2205.11487, 2.3).

Legend: R rows; a row is a picture (C, H, W) or an embedding (D,).
"""

import torch
from torch import Tensor


def classifier_free(conditional: Tensor, null: Tensor, scale: float) -> Tensor:
    """null + s (conditional - null) (2112.10741, 2.3); s = 1 is the conditional prediction alone, s = 0 the other.

    Linear, so that it means the same for predictions of the noise, of x_0 and of v at one time step.
    """
    return null + scale * (conditional - null)


def dynamic_threshold(x_0: Tensor, percentile: float) -> Tensor:
    """x_0 (R, ...) clipped to [-s, s] and divided by s, per row, so that it lies in [-1, 1] (2205.11487, 2.3).

    s is the `percentile`, a share in (0, 1], of the row's absolute values, and at least 1. Strong guidance pushes
    pixels out of their range; clipping alone would flatten them into saturated areas.
    """
    # Row by row: torch.quantile takes no more than 2^24 numbers at once.
    shares = [torch.quantile(row.abs().flatten().float(), percentile) for row in x_0]
    s = torch.stack(shares).clamp(min=1).to(x_0.dtype).reshape(-1, *[1] * (x_0.ndim - 1))
    return x_0.clamp(-s, s) / s
