"""OpenAI's dVAE of DALL-E 1 (2102.12092; encoder.pkl, decoder.pkl) into DVAE: the stage before a transformer.

Each file is one pickled module, read as data: its classes are never imported. No transformer was published with it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genpipe.published.registry import Licence, Published

if TYPE_CHECKING:  # torch takes seconds to import, and files are recognised without it
    import torch

    from genpipe.dalle1.dvae import DVAE

LICENCE = Licence(
    "Modified MIT (OpenAI)",
    "https://github.com/openai/DALL-E/blob/master/LICENSE",
    "The copyright notice and the licence go with copies of the weights; OpenAI asks that the use of its dVAE be "
    "indicated. Pictures made with it need no notice.",
)
FILES = ("encoder.pkl", "decoder.pkl")
URL = "https://cdn.openai.com/dall-e/"
CONFIG: dict[str, Any] = {
    "resolution": 256,
    "num_codes": 8192,
    "widths": (256, 512, 1024, 2048),
    "blocks_per_group": 2,
    "code_width": 128,
    "space_to_depth": 1,
    "first_kernel": 7,
    "head": "linear",
    "bottleneck": 4,
    "branch_gain": None,
}
# Classes that the pickles mention; what else a pickle of tensors needs is known to the reader of containers.
STAND_INS = (
    "dall_e.encoder.Encoder",
    "dall_e.encoder.EncoderBlock",
    "dall_e.decoder.Decoder",
    "dall_e.decoder.DecoderBlock",
    "dall_e.utils.Conv2d",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.activation.ReLU",
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.pooling.MaxPool2d",
    "torch.nn.modules.upsampling.Upsample",
)
_NUMBERED = re.compile(r"blocks\.group_([1-9]\d*)\.block_([1-9]\d*)\.(?:res_path\.conv_([1-9]\d*)|id_path)\.([wb])")
_KINDS = {"w": "weight", "b": "bias"}


def recognises(source: Path) -> bool:
    """Whether `source` is the folder of the two files, or one of them."""
    return any((_folder(source) / name).is_file() for name in FILES) and (source.is_dir() or source.name in FILES)


def missing(source: Path) -> list[str]:
    """Those of the two files that are not there."""
    return [name for name in FILES if not (_folder(source) / name).is_file()]


def read(source: Path, dtype: torch.dtype | None = None, clip: Path | None = None) -> Published:
    """The dVAE as a family of one part, from which a transformer can be trained. `clip` adds a CLIP."""
    folder = _folder(source)
    parts: dict[str, Any] = {"dvae": partial(load, folder, CONFIG, dtype)}
    if clip is not None:
        from genpipe.published.clip import read_clip

        parts["clip"] = partial(read_clip, clip, dtype)
    return Published(
        name="openai-dvae",
        family="openai_dvae",
        licence=LICENCE,
        description="OpenAI's discrete VAE of DALL-E 1: pictures to 32 x 32 tokens of 8,192 codes and back, at 256 "
        "pixels; a transformer that draws with it has to be trained.",
        parts=parts,
        defaults={},
        files=[folder / name for name in FILES],
        resolution=256,
        notes=[
            "The decoder looks code vectors up where the published one convolves a one-hot map: the same numbers.",
            "The published code computes most convolutions in half precision on an accelerator, this one in the type "
            "of the weights.",
        ],
    )


def _folder(source: Path) -> Path:
    return source.parent if source.is_file() else source


def load(folder: Path, config: Mapping[str, Any] = CONFIG, dtype: torch.dtype | None = None) -> DVAE:
    """The two files in `folder` -> DVAE of the shape `config`, in eval mode. Raises InputError, see read_tensors."""
    from genpipe.dalle1.dvae import DVAE
    from genpipe.published.containers import read_tensors
    from genpipe.published.fitting import assign, on_meta

    encoder, decoder = (read_tensors(folder / name, stand_ins=STAND_INS, dtype=dtype) for name in FILES)
    model = on_meta(lambda: DVAE(**config))
    assign(model, mapped(encoder, decoder), f"{folder} ({' and '.join(FILES)})", dtype)
    return model.eval()


def mapped(encoder: Mapping[str, torch.Tensor], decoder: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of the published modules -> those of DVAE; names that are not known stay as they are."""
    import torch

    ours = {_renamed(name, "encoder"): tensor for name, tensor in encoder.items()}
    for name, tensor in decoder.items():
        if name == "blocks.input.w" and tensor.shape[2:] == (1, 1):
            # The 1x1 convolution over a one-hot map is a table of code vectors: V columns become V rows.
            tensor = tensor[:, :, 0, 0].T.contiguous()
        ours[_renamed(name, "decoder")] = tensor
    # DVAE has it with either head; the linear one does not use it.
    return {**ours, "log_scale": torch.zeros((), dtype=next(iter(ours.values())).dtype if ours else None)}


def _renamed(name: str, half: str) -> str:
    """ "blocks.group_2.block_1.res_path.conv_3.w" of the decoder -> "decoder.2.0.convs.2.weight"."""
    found = _NUMBERED.fullmatch(name)
    if found is not None:
        group, block, conv, kind = found.groups()
        place = 2 * (int(group) - 1) + (half == "encoder")  # between two groups lies what halves or doubles the sides
        layer = "skip" if conv is None else f"convs.{int(conv) - 1}"
        return f"{half}.{place}.{int(block) - 1}.{layer}.{_KINDS[kind]}"
    ends = {
        "encoder": {"blocks.input": "encoder.0", "blocks.output.conv": "to_codes"},
        "decoder": {"blocks.output.conv": "decoder.8"},
    }[half]
    stem, _, kind = name.rpartition(".")
    if half == "decoder" and name in ("blocks.input.w", "blocks.input.b"):
        return "codebook" if kind == "w" else "code_bias"
    return f"{ends[stem]}.{_KINDS[kind]}" if stem in ends and kind in _KINDS else f"{half} {name}"
