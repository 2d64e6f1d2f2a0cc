"""The judge's eye: a small fully convolutional detector of the emoji scenes' objects, by heat maps (1904.07850, 3).

It shares nothing with the models that it judges: other data (objects strewn at random), other network, no CLIP. Two
maps lie over the picture, one cell for every 4 x 4 pixels: how sure it is that an object's centre lies in the cell, and
which object that is.

Legend: B pictures, S side, G = S / 4 cells a side, K kinds of objects, W width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from genpipe.errors import InputError
from genpipe.images import resize

CELL = 4  # pixels
STRIDE = 4 * CELL  # pixels of a cell of the coarsest level
_GROUPS = 8


@dataclass(frozen=True)
class Detection:
    """An object that was seen: its name, centre (x to the right, y down) as shares of the side, how sure (0 to 1)."""

    name: str
    x: float
    y: float
    confidence: float


class _Block(nn.Module):
    """Pre-activation residual block of two convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(_GROUPS, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(_GROUPS, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class SceneDetector(ModelMixin, ConfigMixin):
    """Pictures in, two maps out: see the head of this file.

    Arguments (all stored in config.json):
        names: the K objects, in the order of the class map.
        size: S, of the pictures that it looks at; others are resized. A multiple of 16.
        width: W, of the finest level; the two coarser ones, of half and a quarter of the cells, are twice as wide.
    Raises InputError for sizes that do not fit.
    """

    @register_to_config
    def __init__(self, names: list[str], size: int = 64, width: int = 64) -> None:
        super().__init__()
        if size % STRIDE or width % _GROUPS or not names:
            raise InputError(
                f"a detector needs names, a size that is a multiple of {STRIDE} and a width of {_GROUPS}, not "
                f"{size} and {width}."
            )
        wide = 2 * width
        self.stem = nn.Conv2d(3 * CELL**2, width, 3, padding=1)
        self.fine = nn.Sequential(_Block(width), _Block(width))
        self.down = nn.Conv2d(width, wide, 3, stride=2, padding=1)
        self.middle = nn.Sequential(_Block(wide), _Block(wide))
        self.down_again = nn.Conv2d(wide, wide, 3, stride=2, padding=1)
        self.coarse = nn.Sequential(_Block(wide), _Block(wide))
        self.up = nn.Conv2d(wide, wide, 1)
        self.up_again = nn.Conv2d(wide, width, 1)
        self.last = nn.Sequential(_Block(width), _Block(width), nn.GroupNorm(_GROUPS, width), nn.SiLU())
        self.centre = nn.Conv2d(width, 1, 1)
        assert self.centre.bias is not None
        self.kind = nn.Sequential(nn.Conv2d(width, wide, 1), nn.SiLU(), nn.Conv2d(wide, len(names), 1))
        nn.init.constant_(self.centre.bias, -4.0)  # nearly all cells hold no centre (1708.02002, 3.3)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3, S, S) in [0, 1] -> logits of centres (B, G, G) and of kinds (B, K, G, G)."""
        fine = self.maps(pixels)[-1]
        return self.centre(fine)[:, 0], self.kind(fine)

    def maps(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pixels (B, 3, S, S) in [0, 1] -> its inner maps, in the order in which they come about.

        Fine (B, W, G, G), middle (B, 2 W, G / 2, G / 2), coarse (B, 2 W, G / 4, G / 4); last, the fine one that knows
        of all levels (B, W, G, G).
        """
        x = F.pixel_unshuffle(2 * pixels - 1, CELL).contiguous(memory_format=torch.channels_last)
        fine = self.fine(self.stem(x))  # B, W, G, G
        middle = self.middle(self.down(fine))
        coarse = self.coarse(self.down_again(middle))
        merged = middle + F.interpolate(self.up(coarse), scale_factor=2.0, mode="nearest")
        last = self.last(fine + F.interpolate(self.up_again(merged), scale_factor=2.0, mode="nearest"))
        return fine, middle, coarse, last

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, S, S) in [0, 1] -> (B, 2 W): mean and largest value of each channel of the last map.

        Of the maps tried, the one that tells changed pictures from real ones best, beside what two sets of real ones
        differ by.
        """
        last = self.maps(pixels)[-1]
        return torch.cat([last.mean(dim=(2, 3)), last.amax(dim=(2, 3))], dim=1)

    @torch.no_grad()
    def detect(self, pixels: Tensor, threshold: float = 0.3) -> list[list[Detection]]:
        """Pixels (B, 3, H, W) in [0, 1], any size -> what is seen in each picture, surest first.

        threshold: least confidence, which is that of the centre times that of the kind. Two objects are told apart from
        2 cells (an eighth of a picture of 64 pixels) on. Raises InputError for other shapes.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise InputError(f"pixels (B, 3, H, W) are needed, got {list(pixels.shape)}.")
        side = self.config.size
        given = resize(pixels.to(self.device), (side, side), mode="bicubic", clamp=True)
        centres, kinds = self(given)
        sure, index = kinds.softmax(dim=1).max(dim=1)  # B, G, G
        heat = centres.sigmoid()
        peaks = (heat == F.max_pool2d(heat, 3, stride=1, padding=1)) & (heat * sure >= threshold)
        return [
            self._read(heat[row], sure[row], index[row], peaks[row].nonzero().tolist()) for row in range(len(pixels))
        ]

    def _read(self, heat: Tensor, sure: Tensor, index: Tensor, peaks: list[list[int]]) -> list[Detection]:
        """The detections at the peaks of one picture; of two that touch only the surer one."""
        cells = heat.shape[-1]
        found: list[tuple[float, int, int]] = sorted(((float(heat[y, x]), y, x) for y, x in peaks), reverse=True)
        kept: list[tuple[float, int, int]] = []
        for value, y, x in found:
            if all((y - b) ** 2 + (x - a) ** 2 >= 4 for _, b, a in kept):
                kept.append((value, y, x))
        names = self.config.names
        seen = [
            Detection(names[int(index[y, x])], (x + 0.5) / cells, (y + 0.5) / cells, value * float(sure[y, x]))
            for value, y, x in kept
        ]
        return sorted(seen, key=lambda each: -each.confidence)


def detector_loss(centres: Tensor, kinds: Tensor, heat: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Penalty-reduced focal loss of the centres and cross-entropy of the kinds (1904.07850, 3, equation 1).

    centres (B, G, G), kinds (B, K, G, G): logits. heat (B, G, G): 1 at a centre's cell, falling off around it. labels
    (B, G, G): the kind where a cell belongs to a centre, -1 elsewhere. Returns the sum, and the two it is made of.
    """
    alpha, beta = 2.0, 4.0
    p, at = centres.sigmoid(), heat == 1
    hit = (1 - p) ** alpha * F.logsigmoid(centres)
    miss = (1 - heat) ** beta * p**alpha * F.logsigmoid(-centres)
    focal = -torch.where(at, hit, miss).sum() / at.sum().clamp(min=1)
    kind = F.cross_entropy(kinds, labels, ignore_index=-1, reduction="sum") / (labels >= 0).sum().clamp(min=1)
    return focal + kind, focal, kind
