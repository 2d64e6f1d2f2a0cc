"""Weights by contrast, for the losses of pixels: of dVAE, decoder and upsampler. A departure from the papers.

Legend: B pictures, H W pixels.
"""

from torch import Tensor

_LEAST_CONTRAST = 0.02  # of a picture whose weight still grows; about three levels of 255


def contrast_weight(x_0: Tensor, power: float) -> Tensor:
    """Weight (B,) of each row's loss: its picture's contrast to the power -`power`, scaled to a mean of 1.

    Contrast is the RMS distance of pixels (B, 3, H, W) in [-1, 1] from their mean colour: what has nearly the colour of
    its background hardly moves a squared error, and is learned last.
    """
    contrast = (x_0 - x_0.mean(dim=(2, 3), keepdim=True)).square().flatten(1).mean(dim=1).sqrt()
    weight = contrast.clamp(min=_LEAST_CONTRAST).pow(-power)
    return weight / weight.mean()
