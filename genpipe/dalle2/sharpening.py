"""Sharper edges without halos, for small upsamplers, which answer an edge they are not sure of with a mean of edges.

Unsharp masking, held between the values around each pixel, as a shock filter steepens an edge and overshoots nowhere
(Osher and Rudin 1990). The paper needs none: its upsamplers (2204.06125, C) are a thousand times as large.
"""

import torch.nn.functional as F
from torch import Tensor

from genpipe.dalle2.corruption import filtered, gaussian_kernel
from genpipe.errors import InputError

_SIGMA, _KERNEL = 0.7, 5  # pixels; the width of what a fourfold upsampler leaves unsure
_AROUND = 3  # side, in pixels, of the square whose lowest and highest value bound the one in its middle
MOST = 4.0


def check_amount(amount: float) -> None:
    """Raises InputError for an amount that is no number from 0 to `MOST`."""
    if not 0 <= amount <= MOST:
        raise InputError(f"sharpening is {amount}; it must be from 0, none, to {MOST:g}.")


def sharpened(pixels: Tensor, amount: float) -> Tensor:
    """Pixels (B, C, H, W), any range, plus `amount` times what a Gaussian takes from them, within their neighbourhood.

    Plain areas and the range of values stay as they are. Raises InputError as `check_amount` does.
    """
    check_amount(amount)
    if amount == 0:
        return pixels
    detail = pixels - filtered(pixels, gaussian_kernel(_KERNEL, _SIGMA))
    around = F.pad(pixels, (_AROUND // 2,) * 4, mode="replicate")
    highest, lowest = F.max_pool2d(around, _AROUND, 1), -F.max_pool2d(-around, _AROUND, 1)
    return (pixels + amount * detail).clamp(lowest, highest)
