"""Modules with the class names, attributes and tree of OpenAI's dVAE package, so that files like the published ones can
be written; and its published formulas, computed from a state dict without any of those classes."""

import sys
import types
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS, BLOCKS, CODES, CODE_WIDTH, KERNEL = (8, 12, 16, 20), 2, 24, 6, 7
CONFIG = {
    "resolution": 16, "num_codes": CODES, "widths": WIDTHS, "blocks_per_group": BLOCKS, "code_width": CODE_WIDTH,
    "space_to_depth": 1, "first_kernel": KERNEL, "head": "linear", "bottleneck": 4, "branch_gain": None,
}  # fmt: skip


class Conv2d(nn.Module):
    def __init__(self, n_in: int, n_out: int, kw: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(n_out, n_in, kw, kw))
        self.b = nn.Parameter(torch.empty(n_out))
        self.register_parameter("scale", None)
        self.use_float16, self.device = True, torch.device("cuda:0")


class EncoderBlock(nn.Module):
    kernels = (3, 3, 3, 1)

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        hidden = n_out // 4
        widths = (n_in, hidden, hidden, hidden, n_out)
        self.id_path = Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        convs = [(f"conv_{k + 1}", Conv2d(widths[k], widths[k + 1], self.kernels[k])) for k in range(4)]
        relus = [(f"relu_{k + 1}", nn.ReLU()) for k in range(4)]
        self.res_path = nn.Sequential(OrderedDict(x for pair in zip(relus, convs, strict=True) for x in pair))
        self.post_gain = 1 / 64


class DecoderBlock(EncoderBlock):
    kernels = (1, 3, 3, 3)


class Encoder(nn.Module):
    def __init__(self, widths: Sequence[int] = WIDTHS, codes: int = CODES) -> None:
        super().__init__()
        groups = _groups(EncoderBlock, (widths[0], *widths), lambda: ("pool", nn.MaxPool2d(2)))
        ends = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=Conv2d(widths[-1], codes, 1)))
        self.blocks = nn.Sequential(OrderedDict(input=Conv2d(3, widths[0], KERNEL), **groups, output=ends))


class Decoder(nn.Module):
    def __init__(self, widths: Sequence[int] = WIDTHS, codes: int = CODES, code_width: int = CODE_WIDTH) -> None:
        super().__init__()
        reverse = (code_width, *widths[::-1])
        groups = _groups(DecoderBlock, reverse, lambda: ("upsample", nn.Upsample(scale_factor=2, mode="nearest")))
        ends = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=Conv2d(widths[0], 6, 1)))
        self.blocks = nn.Sequential(OrderedDict(input=Conv2d(codes, code_width, 1), **groups, output=ends))


def _groups(block: type[EncoderBlock], widths: Sequence[int], between) -> dict[str, nn.Module]:  # type: ignore[no-untyped-def]
    groups: dict[str, nn.Module] = {}
    for g in range(1, 5):
        parts = [(f"block_{b}", block(widths[g - 1] if b == 1 else widths[g], widths[g])) for b in (1, BLOCKS)]
        groups[f"group_{g}"] = nn.Sequential(OrderedDict([*parts, between()] if g < 4 else parts))
    return groups


PUBLISHED = {"encoder": (Encoder, EncoderBlock), "decoder": (Decoder, DecoderBlock), "utils": (Conv2d,)}


@contextmanager
def registered() -> Iterator[None]:
    """The classes under their published dotted names, as long as files are written."""
    names = ["dall_e", *(f"dall_e.{name}" for name in PUBLISHED)]
    modules = {name: types.ModuleType(name) for name in names}
    homes = {cls: cls.__module__ for classes in PUBLISHED.values() for cls in classes}
    try:
        sys.modules.update(modules)
        for name, classes in PUBLISHED.items():
            for cls in classes:
                cls.__module__ = f"dall_e.{name}"
                setattr(modules[f"dall_e.{name}"], cls.__name__, cls)
        yield
    finally:
        for cls, home in homes.items():
            cls.__module__ = home
        for name in names:
            sys.modules.pop(name, None)


def randomised(module: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            # weights so large that the branches count, of gain 1/64, and pixels that are not all black or white
            size = 0.1 if parameter.ndim == 1 else 1.5 / parameter[0].numel() ** 0.5
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return module


# The published formulas. `s` is a state dict in published names.


def conv(s: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    w = s[f"{name}.w"]
    return F.conv2d(x, w, s[f"{name}.b"], padding=(w.shape[-1] - 1) // 2)


def block(s: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    branch = x
    for k in range(1, 5):
        branch = conv(s, f"{name}.res_path.conv_{k}", branch.relu())
    identity = conv(s, f"{name}.id_path", x) if f"{name}.id_path.w" in s else x
    return identity + branch / 64  # 4 groups of 2 blocks: 1 / 8^2


def encode(s: Mapping[str, Tensor], pixels: Tensor) -> Tensor:
    """Pixels in [0, 1] -> logits over the codes of each cell (B, V, h, w); its code is the arg-max."""
    x = conv(s, "blocks.input", ((1 - 2 * 0.1) * pixels + 0.1).contiguous(memory_format=torch.channels_last))
    for g in range(1, 5):
        for b in (1, 2):
            x = block(s, f"blocks.group_{g}.block_{b}", x)
        x = F.max_pool2d(x, 2) if g < 4 else x
    return conv(s, "blocks.output.conv", x.relu())


def decode(s: Mapping[str, Tensor], codes: Tensor) -> Tensor:
    """Codes (B, h, w) -> pixels in [0, 1], through a one-hot map of all codes."""
    one_hot = F.one_hot(codes, s["blocks.input.w"].shape[1]).permute(0, 3, 1, 2).float()
    x = conv(s, "blocks.input", one_hot).contiguous(memory_format=torch.channels_last)
    for g in range(1, 5):
        for b in (1, 2):
            x = block(s, f"blocks.group_{g}.block_{b}", x)
        x = F.interpolate(x, scale_factor=2, mode="nearest") if g < 4 else x
    mu = conv(s, "blocks.output.conv", x.relu())[:, :3]
    return ((torch.sigmoid(mu) - 0.1) / (1 - 2 * 0.1)).clamp(0, 1)
