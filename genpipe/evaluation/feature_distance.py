"""How different two pictures look to a network: the distance of LPIPS (1801.03924, 3, equation 1), without its weights.

The network is the judge's detector: it knows emoji scenes, and its numbers compare with no published LPIPS.
Legend: B pictures, C H W a map's channels and sides.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from genpipe.errors import InputError
from genpipe.evaluation.detector import STRIDE, SceneDetector
from genpipe.images import resize


def map_distance(maps: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """d(x, x_0) (B,) of the inner maps (B, C, H, W) of two pictures, one of each for every layer l.

    Mean over the layers, where the paper's sum has learned weights: 0 for equal maps, at most 4, as channels are
    normalised at each place.
    """
    distances = []
    for y, y_0 in zip(maps, others, strict=True):
        y, y_0 = (each / (each.norm(dim=1, keepdim=True) + 1e-10) for each in (y, y_0))
        distances.append((y - y_0).square().sum(dim=1).mean(dim=(1, 2)))  # over C, then over H and W
    return torch.stack(distances).mean(dim=0)


@torch.no_grad()
def feature_distance(detector: SceneDetector, pixels: Tensor, others: Tensor, chunk_size: int = 64) -> Tensor:
    """The distance (B,) of each pair of pixels (B, 3, H, W) in [0, 1]; 0 if equal, at most 4.

    Pictures that are smaller than the detector's, or whose sides it cannot halve twice, are resized to its size;
    others are looked at as they are, in all detail. Raises InputError for other shapes.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.shape != others.shape:
        raise InputError(f"Two sets of pixels (B, 3, H, W) are compared, not {[*pixels.shape]} and {[*others.shape]}.")
    size: int = detector.config.size
    fits = min(pixels.shape[-2:]) >= size and all(side % STRIDE == 0 for side in pixels.shape[-2:])
    found = []
    for pair in zip(pixels.split(chunk_size), others.split(chunk_size), strict=True):
        seen = [each.to(detector.device) for each in pair]
        if not fits:
            seen = [resize(each, size, clamp=True) for each in seen]
        found.append(map_distance(*(detector.maps(each) for each in seen)))
    return torch.cat(found)
