"""What upsamplers are trained to see through: blur, or the BSR degradation chain (2204.06125, 2.1; 2103.14006, 3).

Legend: B pictures, H W their sides, h w those of the low-resolution picture, k side of a kernel. Pixels in [0, 1].
"""

import dataclasses
import io
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from genpipe.errors import InputError
from genpipe.images import resize, to_pil, to_unit

Range = tuple[float, float]  # lowest and highest of a number drawn evenly
_NO_BLUR = 1e-3  # pixels; a Gaussian narrower than this is the picture itself


class Corruption(ABC):
    """How a training picture becomes the low-resolution picture that an upsampler is conditioned on.

    Its numbers are stored in the upsampler's config, so that drawing knows what training did: when drawing, the given
    picture gets the lightest corruption that training knows and no other, see `lightest`.
    """

    def degrade(self, pixels: Tensor, size: tuple[int, int], mode: str, generator: np.random.Generator) -> Tensor:
        """Pixels (B, 3, H, W) -> corrupted (B, 3, h, w), both in [0, 1].

        size: (h, w). mode: of the one resize, `genpipe.images.resize`. Every row has a generator of its own, seeded
        from `generator`: a row's corruption does not depend on the pictures beside it.
        """
        rows = [np.random.default_rng(seed) for seed in generator.integers(2**63, size=len(pixels))]
        pairs = zip(pixels.split(1), rows, strict=True)
        return torch.cat([self._degrade(row, size, mode, own) for row, own in pairs])

    @abstractmethod
    def _degrade(self, pixels: Tensor, size: tuple[int, int], mode: str, generator: np.random.Generator) -> Tensor:
        """`degrade` for one picture (1, 3, H, W)."""

    def lightest(self, low: Tensor) -> Tensor:
        """A given low-resolution picture (B, 3, h, w) as it is shown to the network when drawing."""
        return low


@dataclass(frozen=True)
class Nothing(Corruption):
    """The low-resolution picture is the resized one."""

    def _degrade(self, pixels: Tensor, size: tuple[int, int], mode: str, generator: np.random.Generator) -> Tensor:
        return resize(pixels, size, mode=mode, clamp=True)


@dataclass(frozen=True)
class Blur(Corruption):
    """Gaussian blur of the low-resolution picture; the paper's first stage has kernel 3 and sigma 0.6 (2.1).

    kernel: side in pixels, odd. sigma: of the Gaussian in pixels, drawn from this range for every picture. noise:
    standard deviation of Gaussian noise on top, as a share of the range of pixels; none in the paper. When drawing, the
    picture is blurred with the lowest sigma: 0.6 for the paper's fixed one, not at all where the range begins at 0.
    """

    kernel: int = 3
    sigma: Range = (0.6, 0.6)
    noise: Range = (0.0, 0.0)

    def __post_init__(self) -> None:
        _check_kernel("blur", "kernel", self.kernel)
        _check_range("blur", "sigma", self.sigma, 0, 100)
        _check_range("blur", "noise", self.noise, 0, 1)

    def _degrade(self, pixels: Tensor, size: tuple[int, int], mode: str, generator: np.random.Generator) -> Tensor:
        low = resize(pixels, size, mode=mode, clamp=True)
        low = filtered(low, gaussian_kernel(self.kernel, generator.uniform(*self.sigma)))
        return with_noise(low, generator.uniform(*self.noise), False, generator)

    def lightest(self, low: Tensor) -> Tensor:
        return filtered(low, gaussian_kernel(self.kernel, self.sigma[0]))


@dataclass(frozen=True)
class BSR(Corruption):
    """Blurs, a resize, noise and JPEG in random order, then the resize to (h, w): the paper's second stage (2.1).

    The chain of 2103.14006 without its camera noise. All ranges are drawn from evenly, for every picture anew; lengths
    are in pixels of the picture that goes in. When drawing, the picture is taken as it is.

    kernel: side of the blurs' kernels, odd. isotropic, anisotropic: sigma of the round blur, and of either axis of the
    turned one. factor: of the resize, with a random filter of `filters`. noise: standard deviation, as a share of the
    range of pixels; grey: share of pictures whose noise is the same in all three channels. quality: JPEG's.
    probability: of every ingredient, independently.
    """

    kernel: int = 15
    isotropic: Range = (0.1, 2.8)
    anisotropic: Range = (0.5, 4.0)
    factor: Range = (0.25, 1.25)
    filters: tuple[str, ...] = ("area", "bilinear", "bicubic")
    noise: Range = (0.004, 0.1)
    grey: float = 0.5
    quality: Range = (30, 95)
    probability: float = 0.75

    def __post_init__(self) -> None:
        _check_kernel("bsr", "kernel", self.kernel)
        for name in ("isotropic", "anisotropic"):
            _check_range("bsr", name, getattr(self, name), 0, 100)
        _check_range("bsr", "factor", self.factor, 1 / 16, 4)
        _check_range("bsr", "noise", self.noise, 0, 1)
        _check_range("bsr", "quality", self.quality, 1, 100)
        _check_range("bsr", "grey", (self.grey, self.grey), 0, 1)
        _check_range("bsr", "probability", (self.probability, self.probability), 0, 1)
        known = ("area", "bilinear", "bicubic", "nearest")
        if not self.filters or not set(self.filters) <= set(known):
            raise InputError(f"corruption bsr: filters is {list(self.filters)}; choose from {', '.join(known)}.")

    def _degrade(self, pixels: Tensor, size: tuple[int, int], mode: str, generator: np.random.Generator) -> Tensor:
        chain = [self._round_blur, self._turned_blur, self._resize, self._noise, self._jpeg]
        for i in generator.permutation(len(chain)):
            if generator.random() < self.probability:
                pixels = chain[i](pixels, generator)
        return resize(pixels, size, mode=mode, clamp=True)

    def _round_blur(self, pixels: Tensor, generator: np.random.Generator) -> Tensor:
        return filtered(pixels, gaussian_kernel(self.kernel, generator.uniform(*self.isotropic)))

    def _turned_blur(self, pixels: Tensor, generator: np.random.Generator) -> Tensor:
        along, across = generator.uniform(*self.anisotropic, size=2)
        return filtered(pixels, gaussian_kernel(self.kernel, along, across, generator.uniform(0, math.pi)))

    def _resize(self, pixels: Tensor, generator: np.random.Generator) -> Tensor:
        factor = generator.uniform(*self.factor)
        height, width = (max(1, round(side * factor)) for side in pixels.shape[-2:])
        mode = self.filters[int(generator.integers(len(self.filters)))]
        return resize(pixels, (height, width), mode=mode, clamp=True)

    def _noise(self, pixels: Tensor, generator: np.random.Generator) -> Tensor:
        return with_noise(pixels, generator.uniform(*self.noise), bool(generator.random() < self.grey), generator)

    def _jpeg(self, pixels: Tensor, generator: np.random.Generator) -> Tensor:
        return through_jpeg(pixels, round(generator.uniform(*self.quality)))


KINDS: dict[str, type[Corruption]] = {"none": Nothing, "blur": Blur, "bsr": BSR}


def make_corruption(settings: dict[str, Any]) -> Corruption:
    """{"kind": "none" | "blur" | "bsr", other fields} -> corruption. Raises InputError for what it does not know."""
    kind = settings.get("kind")
    if kind not in KINDS:
        raise InputError(f"there is no corruption {kind!r}; choose one of {', '.join(KINDS)}.")
    fields = {field.name: field for field in dataclasses.fields(KINDS[kind])}  # type: ignore[arg-type]
    given = {name: value for name, value in settings.items() if name != "kind"}
    if set(given) - set(fields):
        unknown = ", ".join(sorted(set(given) - set(fields)))
        raise InputError(f"corruption {kind} has no setting {unknown}; it has {', '.join(fields) or 'none'}.")
    # JSON knows lists only
    return KINDS[kind](**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def gaussian_kernel(size: int, along: float, across: float | None = None, angle: float = 0.0) -> Tensor:
    """Gaussian (k, k) that sums to 1; sigmas in pixels along and across a direction `angle` radians below the x axis.

    across: None is a round Gaussian. A sigma of 0 leaves that direction as it is.
    """
    places = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    y, x = torch.meshgrid(places, places, indexing="ij")
    u = math.cos(angle) * x + math.sin(angle) * y
    v = math.cos(angle) * y - math.sin(angle) * x
    wide, high = max(along, _NO_BLUR), max(along if across is None else across, _NO_BLUR)
    weight = torch.exp(-0.5 * ((u / wide) ** 2 + (v / high) ** 2))
    return (weight / weight.sum()).float()


def filtered(pixels: Tensor, kernel: Tensor) -> Tensor:
    """Pixels (B, C, H, W) convolved with one kernel (k, k); the border's pixels are repeated outwards."""
    margin, channels = kernel.shape[-1] // 2, pixels.shape[1]
    padded = F.pad(pixels, (margin,) * 4, mode="replicate")
    weight = kernel.to(pixels).expand(channels, 1, -1, -1)
    return F.conv2d(padded, weight, groups=channels)


def with_noise(pixels: Tensor, sigma: float, grey: bool, generator: np.random.Generator) -> Tensor:
    """Pixels (B, 3, H, W) with Gaussian noise, cut to [0, 1]; `grey`: the same noise in all channels."""
    rows, channels, height, width = pixels.shape
    noise = generator.standard_normal((rows, 1 if grey else channels, height, width), dtype=np.float32)
    return (pixels + sigma * torch.from_numpy(noise).to(pixels)).clamp(0, 1)


def through_jpeg(pixels: Tensor, quality: int) -> Tensor:
    """Pixels (B, 3, H, W) in [0, 1] written as JPEG of this quality, 1 to 100, and read again."""
    pictures = []
    for picture in to_pil(pixels):
        file = io.BytesIO()
        picture.save(file, format="JPEG", quality=quality)
        pictures.append(Image.open(file).convert("RGB"))
    return to_unit(pictures).to(pixels)


def _check_kernel(kind: str, name: str, size: Any) -> None:
    if not isinstance(size, int) or size < 1 or size % 2 == 0:
        raise InputError(f"corruption {kind}: {name} is {size!r}; it must be an odd number of pixels.")


def _check_range(kind: str, name: str, given: Any, lowest: float, highest: float) -> None:
    fits = isinstance(given, tuple) and len(given) == 2 and all(isinstance(end, int | float) for end in given)
    if not fits or not lowest <= given[0] <= given[1] <= highest:
        raise InputError(
            f"corruption {kind}: {name} is {given!r}; it must be two numbers, lowest and highest, from {lowest:g} to "
            f"{highest:g}."
        )
