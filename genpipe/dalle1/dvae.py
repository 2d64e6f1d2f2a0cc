"""The discrete VAE: pictures <-> grids of code-book indices (DALL-E 1, 2102.12092, 2.1 and A; the released shape).

Legend: B pictures, H W pixels, h w token grid, N = h w tokens, V codes, D width of a code vector.

Two heads turn encoder features into logits over the code book:
  * "linear", the paper's: a 1x1 convolution to V logits. The code book is the decoder's first 1x1 convolution.
  * "distance": logits = -scale * |z - e_v|^2 with the decoder's own code book e, which is initialised from encoder
    outputs after a short continuous warm-up. A departure from the paper, made because small models trained for minutes
    use only a few dozen codes with the linear head, and most of the code book with this one.

Small models also learn faster with a larger gain on the residual branches than the paper's 1 / layers^2
(`branch_gain`).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from einops import rearrange
from torch import Tensor, nn

from genpipe.dalle1.losses import squeeze_pixels, unsqueeze_pixels
from genpipe.errors import InputError

Kernels = tuple[int, int, int, int]


@dataclass
class DVAEOutput:
    """Encoder logits (B, V, h, w) and the decoder's logit-Laplace maps mu, ln_b (B, 3, H, W)."""

    logits: Tensor
    mu: Tensor
    ln_b: Tensor


class BottleneckBlock(nn.Module):
    """Residual bottleneck of four convolutions, ReLU first, the branch scaled by `gain` (A.3)."""

    def __init__(self, in_width: int, out_width: int, kernels: Kernels, ratio: int, gain: float) -> None:
        super().__init__()
        hidden = out_width // ratio
        widths = (in_width, hidden, hidden, hidden, out_width)
        self.convs = nn.ModuleList(
            nn.Conv2d(widths[i], widths[i + 1], kernels[i], padding=kernels[i] // 2) for i in range(4)
        )
        self.skip = nn.Conv2d(in_width, out_width, 1) if in_width != out_width else nn.Identity()
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        branch = x
        for conv in self.convs:
            branch = conv(F.relu(branch))
        return self.skip(x) + self.gain * branch


def _group(in_width: int, out_width: int, blocks: int, kernels: Kernels, ratio: int, gain: float) -> nn.Sequential:
    return nn.Sequential(
        *(BottleneckBlock(in_width if i == 0 else out_width, out_width, kernels, ratio, gain) for i in range(blocks))
    )


class DVAE(ModelMixin, ConfigMixin):
    """Discrete VAE with one class for the family's small shape and the published one.

    Args:
        resolution: side of the native picture in pixels; other multiples of the factor work too.
        num_codes: V.
        widths: feature widths of the groups; between two groups the encoder max-pools and the decoder upsamples by 2.
        blocks_per_group: residual blocks in each group.
        code_width: width of a code vector, the input of the decoder (128 in the published decoder).
        space_to_depth: pixels of an s x s square folded into channels before the first convolution (1 in the paper).
        first_kernel: size of the encoder's first convolution (7 in the paper).
        head: "distance" or "linear", see the head of this file.
        bottleneck: a block's width divided by its hidden width (4 in the paper).
        branch_gain: factor on every residual branch; None is the paper's 1 / layers^2.

    The published shape is DVAE(256, 8192, (256, 512, 1024, 2048), 2, 128, 1, 7, "linear", 4, None).
    """

    @register_to_config
    def __init__(
        self,
        resolution: int = 32,
        num_codes: int = 1024,
        widths: tuple[int, ...] = (192,),
        blocks_per_group: int = 4,
        code_width: int = 32,
        space_to_depth: int = 4,
        first_kernel: int = 3,
        head: str = "distance",
        bottleneck: int = 2,
        branch_gain: float | None = 0.5,
    ) -> None:
        super().__init__()
        if head not in ("distance", "linear"):
            raise InputError(f'head is "{head}"; it must be "distance" or "linear".')
        if first_kernel % 2 == 0:
            raise InputError(f"first_kernel is {first_kernel}; it must be odd, or the grid would change its size.")
        self.factor = space_to_depth * 2 ** (len(widths) - 1)
        if resolution % self.factor:
            raise InputError(f"resolution {resolution} is not a multiple of the factor {self.factor}.")
        gain = 1 / (len(widths) * blocks_per_group) ** 2 if branch_gain is None else branch_gain
        widths = tuple(widths)

        first = nn.Conv2d(3 * space_to_depth**2, widths[0], first_kernel, padding=first_kernel // 2)
        encoder: list[nn.Module] = [first]
        for i, width in enumerate(widths):
            encoder.append(_group(widths[max(i - 1, 0)], width, blocks_per_group, (3, 3, 3, 1), bottleneck, gain))
            if i < len(widths) - 1:
                encoder.append(nn.MaxPool2d(2))
        encoder.append(nn.ReLU())
        self.encoder = nn.Sequential(*encoder)
        self.to_codes = nn.Conv2d(widths[-1], code_width if head == "distance" else num_codes, 1)

        # A table of rows e_v: looking up a row equals a 1x1 convolution over the one-hot map and is much cheaper.
        self.codebook = nn.Parameter(torch.randn(num_codes, code_width) / code_width**0.5)
        self.log_scale = nn.Parameter(torch.zeros(()), requires_grad=head == "distance")
        reverse = (code_width, *widths[::-1])
        decoder: list[nn.Module] = []
        if head == "linear":  # the bias of the 1x1 convolution that the table stands for
            self.code_bias = nn.Parameter(torch.zeros(code_width))
        for i in range(len(widths)):
            decoder.append(_group(reverse[i], reverse[i + 1], blocks_per_group, (1, 3, 3, 3), bottleneck, gain))
            if i < len(widths) - 1:
                decoder.append(nn.Upsample(scale_factor=2, mode="nearest"))
        decoder += [nn.ReLU(), nn.Conv2d(widths[0], 6 * space_to_depth**2, 1)]
        self.decoder = nn.Sequential(*decoder)

    @property
    def grid_size(self) -> int:
        """Tokens per side of a picture at the native resolution."""
        return self.config.resolution // self.factor

    @property
    def num_codes(self) -> int:
        return self.config.num_codes

    @apply_forward_hook
    def encode_features(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [0, 1] -> what the head reads: z (B, D, h, w), or logits with the linear head."""
        if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.shape[2] % self.factor or pixels.shape[3] % self.factor:
            raise InputError(
                f"pixels have shape {tuple(pixels.shape)}; (B, 3, H, W), sides divisible by {self.factor}, is needed."
            )
        s = self.config.space_to_depth
        x = rearrange(squeeze_pixels(pixels), "b c (h s) (w t) -> b (c s t) h w", s=s, t=s).to(self.codebook.dtype)
        x = x.contiguous(memory_format=torch.channels_last)  # twice as fast for small convolutions on CPUs
        hidden = self.encoder(x)
        if self.config.head == "distance":
            return self.to_codes(hidden)  # B, D, h, w
        # The two convolutions that touch the vocabulary ran in float32 in the released model, whatever the others did.
        weight, bias = self.to_codes.weight, self.to_codes.bias
        with torch.autocast(hidden.device.type, enabled=False):
            return F.conv2d(hidden.float(), weight.float(), None if bias is None else bias.float())  # B, V, h, w

    def logits_from_features(self, features: Tensor) -> Tensor:
        """-scale |z - e_v|^2 over the code book for the distance head, (B, V, h, w); the features themselves otherwise.

        In float32 whatever the autocast and the weights' type.
        """
        with torch.autocast(features.device.type, enabled=False):
            if self.config.head == "linear":
                return features.float()
            z, e = features.float(), self.codebook.float()
            squared = (
                z.square().sum(1, keepdim=True)  # B, 1, h, w
                - 2 * torch.einsum("bdhw,vd->bvhw", z, e)
                + e.square().sum(1)[:, None, None]  # V, 1, 1
            )
            return -self.log_scale.float().exp() * squared

    def encode_logits(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [0, 1] -> logits over the code book (B, V, h, w)."""
        return self.logits_from_features(self.encode_features(pixels))

    @apply_forward_hook
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [0, 1] -> image tokens (B, N) int64, the arg-max code of each cell in raster order."""
        return rearrange(self.encode_logits(pixels).argmax(dim=1), "b h w -> b (h w)")

    def decode_maps(self, code_vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Code vectors (B, D, h, w) -> mu, ln_b, each (B, 3, H, W): the parameters of the logit-Laplace likelihood."""
        if self.config.head == "linear":
            code_vectors = code_vectors + self.code_bias[:, None, None]
        s = self.config.space_to_depth
        code_vectors = code_vectors.to(self.codebook.dtype).contiguous(memory_format=torch.channels_last)
        maps = rearrange(self.decoder(code_vectors), "b (c s t) h w -> b c (h s) (w t)", s=s, t=s)
        mu, ln_b = maps.float().chunk(2, dim=1)
        return mu, ln_b

    @apply_forward_hook
    def decode(self, image_tokens: Tensor) -> Tensor:
        """Image tokens (B, N) in [0, V) of a square grid -> pixels (B, 3, H, W) in [0, 1] (b is ignored, A.3).

        Raises InputError where the tokens form no square grid.
        """
        side = math.isqrt(image_tokens.shape[-1])
        if image_tokens.ndim != 2 or side * side != image_tokens.shape[1]:
            raise InputError(f"image tokens of shape {tuple(image_tokens.shape)} do not form square grids (B, N).")
        vectors = rearrange(F.embedding(image_tokens, self.codebook), "b (h w) d -> b d h w", h=side)
        mu, _ = self.decode_maps(vectors)
        return unsqueeze_pixels(torch.sigmoid(mu))

    def forward(
        self, pixels: Tensor, temperature: float = 1.0, gumbel: Tensor | None = None, quantise: bool = True
    ) -> DVAEOutput:
        """One training pass: encode, relax with the Gumbel-softmax, decode (2102.12092, 2.1).

        Args:
            pixels: (B, 3, H, W) in [0, 1].
            temperature: tau of the relaxation, towards 1/16 at the end of training.
            gumbel: Gumbel noise (B, V, h, w), see :func:`gumbel_noise`; None relaxes without noise.
            quantise: False feeds the encoder's features straight to the decoder (distance head only), the warm-up.
        Raises InputError for quantise=False with the linear head, whose features are no code vectors.
        """
        if not quantise and self.config.head != "distance":
            raise InputError(
                "the continuous warm-up needs the distance head; set warm_up_steps to 0 for the linear one."
            )
        features = self.encode_features(pixels)
        logits = self.logits_from_features(features)
        if quantise:
            noisy = logits if gumbel is None else logits + gumbel
            soft = F.softmax(noisy / temperature, dim=1)  # B, V, h, w
            with torch.autocast(soft.device.type, enabled=False):  # the other convolution that touches the vocabulary
                vectors = torch.einsum("bvhw,vd->bdhw", soft, self.codebook.float())
        else:
            # The code book takes part with weight zero so that every parameter has a gradient on every rank.
            vectors = features + 0.0 * logits.mean()
        mu, ln_b = self.decode_maps(vectors)
        return DVAEOutput(logits=logits, mu=mu, ln_b=ln_b)

    @torch.no_grad()
    def initialise_codebook(self, features: Tensor, generator: torch.Generator) -> None:
        """Set the code vectors to distinct encoder outputs out of features (B, D, h, w), the scale to their spacing.

        With several processes, all of them take what the first one found. Raises InputError when there are fewer
        distinct feature vectors than codes; the code book is then as it was.
        """
        vectors = rearrange(features.float(), "b d h w -> (b h w) d")
        # Seeded as k-means++ is (Arthur and Vassilvitskii 2007): most cells are plain background, and a plain draw
        # would spend most codes on copies of it. A vector far from all chosen ones is likely to be chosen next.
        uniform = torch.rand(self.num_codes, generator=generator, device=generator.device).tolist()
        nearest = torch.full((len(vectors),), float("inf"), device=vectors.device)
        chosen = [int(uniform[0] * len(vectors))]
        while len(chosen) < self.num_codes:
            nearest = torch.minimum(nearest, (vectors - vectors[chosen[-1]]).square().sum(dim=1))
            mass = nearest.cpu().double().cumsum(dim=0)  # not every device has float64
            if not mass[-1] > 0:
                raise InputError(
                    f"{len(chosen)} distinct feature vectors cannot initialise {self.num_codes} codes; "
                    "use a larger batch."
                )
            # right: a vector without mass, which is one that equals a chosen one, is never the answer
            place = torch.searchsorted(mass, uniform[len(chosen)] * mass[-1], right=True)
            chosen.append(int(place.clamp(max=len(vectors) - 1)))
        self.codebook.copy_(vectors[chosen])
        gaps = torch.cdist(self.codebook.float(), self.codebook.float()).square()
        gaps.fill_diagonal_(float("inf"))
        self.log_scale.copy_((4 / gaps.min(dim=1).values.median().clamp(min=1e-6)).log())
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # Each process saw another batch, and later only gradients are averaged: differing code books would stay so.
            for parameter in (self.codebook, self.log_scale):
                torch.distributed.broadcast(parameter, src=0)


def gumbel_noise(shape: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
    """-ln(-ln u), u uniform on (0, 1), drawn on the generator's device and moved to `like`'s."""
    u = torch.rand(shape, generator=generator, device=generator.device).clamp(min=1e-20)
    return (-torch.log(-torch.log(u))).to(like.device)


def code_statistics(image_tokens: Tensor, num_codes: int) -> dict[str, float]:
    """Perplexity exp(H) of the code histogram and the number of codes never used, over tokens of any shape."""
    counts = torch.bincount(image_tokens.flatten(), minlength=num_codes).cpu().double()
    p = counts / counts.sum().clamp(min=1)
    entropy = -(p * p.clamp(min=1e-12).log()).sum()
    return {"perplexity": float(entropy.exp()), "dead_codes": float((counts == 0).sum())}
