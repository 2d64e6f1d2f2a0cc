"""How well a dVAE keeps pictures, and how much of its code book it uses."""

import torch
from torch import Tensor

from genpipe.dalle1.dvae import DVAE, code_statistics
from genpipe.evaluation.detector import SceneDetector
from genpipe.evaluation.feature_distance import feature_distance


def psnr(reference: Tensor, picture: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB per picture; both (B, 3, H, W) in [0, 1], peak 1."""
    error = (reference - picture).square().flatten(1).mean(dim=1)
    return -10 * torch.log10(error.clamp(min=1e-10))


@torch.no_grad()
def reconstruction_figures(
    dvae: DVAE, pixels: Tensor, chunk_size: int = 64, detector: SceneDetector | None = None
) -> dict[str, float]:
    """Mean PSNR (dB), mean squared error, code perplexity and dead codes over pictures (B, 3, H, W) in [0, 1].

    With a detector also `feature_distance`, the mean of that.
    """
    tokens, decibels, errors, distances = [], [], [], []
    for chunk in pixels.split(chunk_size):
        codes = dvae.encode(chunk)
        restored = dvae.decode(codes)
        tokens.append(codes)
        decibels.append(psnr(chunk, restored))
        errors.append((chunk - restored).square().flatten(1).mean(dim=1))
        if detector is not None:
            distances.append(feature_distance(detector, chunk, restored))
    return {
        "psnr": float(torch.cat(decibels).mean()),
        "mse": float(torch.cat(errors).mean()),
        **({"feature_distance": float(torch.cat(distances).mean())} if distances else {}),
        **code_statistics(torch.cat(tokens), dvae.num_codes),
    }
