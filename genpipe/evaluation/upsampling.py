"""How good an upsampler's pictures are: closeness, sharpness, mean colour, each beside the plain resize's."""

from collections.abc import Sequence

import torch
from torch import Tensor

from genpipe.dalle2.upsampler import Upsampler, upsample
from genpipe.evaluation.detector import SceneDetector
from genpipe.evaluation.feature_distance import feature_distance
from genpipe.evaluation.reconstruction import psnr
from genpipe.images import resize


def gradient_energy(pixels: Tensor) -> Tensor:
    """Mean squared difference between neighbours to the right and below, per picture (B,); pixels (B, 3, H, W)."""
    across = (pixels[..., 1:] - pixels[..., :-1]).square().flatten(1).mean(dim=1)
    down = (pixels[..., 1:, :] - pixels[..., :-1, :]).square().flatten(1).mean(dim=1)
    return across + down


def sharpness(pixels: Tensor, reference: Tensor) -> float:
    """Gradient energy as a share of the reference's, both (B, 3, H, W): 1 is as sharp, below is softer."""
    return float(gradient_energy(pixels).mean() / gradient_energy(reference).mean().clamp(min=1e-12))


def colour_difference(pixels: Tensor, low: Tensor) -> float:
    """Largest difference of a channel's mean between (B, 3, H, W) and (B, 3, h, w), in [0, 1]; in levels of 255."""
    return float((pixels.mean(dim=(2, 3)) - low.mean(dim=(2, 3))).abs().max() * 255)


def shrink(model: Upsampler, pixels: Tensor) -> Tensor:
    """Pixels (B, 3, f h, f w) -> (B, 3, h, w) in [0, 1] by the one resize, as in the model's training."""
    height, width = (side // model.config.factor for side in pixels.shape[-2:])
    return resize(pixels, (height, width), mode=model.config.resize_mode, clamp=True)


@torch.no_grad()
def upsampling_figures(
    model: Upsampler,
    pixels: Tensor,
    seeds: Sequence[int],
    num_inference_steps: int | None = None,
    detector: SceneDetector | None = None,
) -> dict[str, float]:
    """Pictures (B, 3, f h, f w) in [0, 1], shrunk and drawn large again.

    psnr, sharpness, and with a detector feature_distance: against the pictures, of the drawn ones and (`_bicubic`, or
    whatever the model's resize is) of those that were merely enlarged; colour: `colour_difference` to the small ones.
    """
    low = shrink(model, pixels)
    drawn = upsample(model, low, seeds, num_inference_steps)
    plain = model.enlarge(low).clamp(0, 1)
    mode = model.config.resize_mode
    looks = {}
    if detector is not None:
        looks["feature_distance"] = float(feature_distance(detector, pixels, drawn).mean())
        looks[f"feature_distance_{mode}"] = float(feature_distance(detector, pixels, plain).mean())
    return {
        "psnr": float(psnr(pixels, drawn).mean()),
        f"psnr_{mode}": float(psnr(pixels, plain).mean()),
        "sharpness": sharpness(drawn, pixels),
        f"sharpness_{mode}": sharpness(plain, pixels),
        "colour": colour_difference(drawn, low),
        **looks,
    }
