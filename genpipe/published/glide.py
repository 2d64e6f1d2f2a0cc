"""GLIDE (filtered), the released small models of 2112.10741: base, upsampler, both for filling holes, and the CLIP
that knows noise, from a folder with OpenAI's files.

Light: a folder is recognised without torch; glide_parts.py builds the networks.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genpipe.errors import InputError
from genpipe.published.registry import Licence, Published

if TYPE_CHECKING:
    import torch
    from diffusers import ModelMixin

LICENCE = Licence(
    "MIT",
    "https://github.com/openai/glide-text2im/blob/main/LICENSE",
    "the licence's text must be passed on; the model card advises research use only and against commercial use",
)
DESCRIPTION = "GLIDE (filtered) by OpenAI: pictures from English captions, without people, 64 pixels enlarged to 256"
WEIGHTS_URL = "https://openaipublic.blob.core.windows.net/diffusion/dec-2021/"
# The usual pair and the one that fills holes: base and upsampler.
DRAWING, FILLING = ("base.pt", "upsample.pt"), ("base_inpaint.pt", "upsample_inpaint.pt")
GUIDE = ("clip_image_enc.pt", "clip_text_enc.pt")
# GPT-2's merges do not lie beside the weights; the reference's repository and every copy of GPT-2 has them.
MERGES = ("vocab.bpe", "vocab.bpe.gz", "merges.txt")
MERGES_LIMIT = 10_000_000  # bytes; GPT-2's have half a million
_ATTENDING = {"down": "SimpleCrossAttnDownBlock2D", "up": "SimpleCrossAttnUpBlock2D"}
_PLAIN = {"down": "ResnetDownsampleBlock2D", "up": "ResnetUpsampleBlock2D"}
_TEXT = {"vocab_size": 50257, "context_length": 128, "width": 512, "layers": 16, "heads": 8}


def _unet(widths: list[int], layers: int, plain: int, head_width: int = 64) -> dict[str, Any]:
    """Arguments of diffusers' UNet: its widths, blocks of each level, and how many levels do not attend."""
    attending = len(widths) - plain
    return {
        "block_out_channels": widths,
        "layers_per_block": layers,
        "attention_head_dim": head_width,
        "resnet_time_scale_shift": "scale_shift",
        "down_block_types": [_PLAIN["down"]] * plain + [_ATTENDING["down"]] * attending,
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": [_ATTENDING["up"]] * attending + [_PLAIN["up"]] * plain,
    }


# What the files do not say: the sizes of their networks, as the classes of genpipe take them.
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "decoder": {"resolution": 64, "unet_config": _unet([192, 384, 576, 768], 3, 1), "text_config": _TEXT},
    "upsampler": {
        "resolution": 256,
        "unet_config": _unet([192, 192, 384, 384, 768, 768], 2, 3),
        "text_config": _TEXT,
    },
    "guide": {},
}
SAMPLING = {
    "mode": "caption",
    "guidance_scale": 3.0,
    "num_inference_steps": 100,
    "scheduler": "unclip",  # DDPM with the learned variance through evenly spaced steps, both ends included
    "upsampler_steps": 27,
}
FILLING_SAMPLING = {**SAMPLING, "guidance_scale": 5.0}


def recognises(source: Path) -> bool:
    """A folder with a base model under its published name beside something else that is GLIDE's, or that file in it."""
    folder = _folder(source)
    others = (DRAWING[1], FILLING[1], *GUIDE, *MERGES)
    based = any(_has(folder, base) for base, _ in (DRAWING, FILLING))
    return based and any(_has(folder, name) for name in others)


def missing(source: Path) -> list[str]:
    """Files that are needed and not there; the noise-aware CLIP is not, but half of it lacks the other half."""
    folder = _folder(source)
    wanted = [*chosen(source), *(GUIDE if any(_has(folder, name) for name in GUIDE) else ())]
    merges = [] if any(_has(folder, name) for name in MERGES) else [MERGES[0]]
    return [name for name in wanted if not _has(folder, name)] + merges


def chosen(source: Path) -> tuple[str, str]:
    """Base and upsampler: the pair of the file that was named; of a folder, the drawing one before the filling one.

    A complete pair goes before one that is not.
    """
    folder = _folder(source)
    if folder != source:
        return FILLING if source.name == FILLING[0] else DRAWING
    complete = [pair for pair in (DRAWING, FILLING) if all(_has(folder, name) for name in pair)]
    begun = [pair for pair in (DRAWING, FILLING) if _has(folder, pair[0])]
    return (complete or begun or [DRAWING])[0]


def read(
    source: Path,
    dtype: torch.dtype | None = None,
    clip: Path | None = None,
    configs: Mapping[str, Mapping[str, Any]] = CONFIGS,
) -> Published:
    """The parts of a folder with GLIDE's files: decoder, upsampler, and the guide where its two files are there.

    source: the folder, or base.pt or base_inpaint.pt in it, which says which pair is meant, see `chosen`. clip: one to
    rank pictures with, of which GLIDE has none. configs: of the networks. Raises InputError for what is missing.
    """
    folder, lacking = _folder(source), missing(source)
    if MERGES[0] in lacking:
        raise InputError(
            f"{str(folder)!r} has no {MERGES[0]}: GLIDE reads texts with GPT-2's byte BPE, whose merges do not lie "
            f"beside the weights; put {', '.join(MERGES[:-1])} or {MERGES[-1]} there, from the repository "
            "openai/glide-text2im or from any copy of GPT-2."
        )
    if lacking:
        raise InputError(
            f"{str(folder)!r} is incomplete, it lacks {', '.join(lacking)}; get the rest from {WEIGHTS_URL}."
        )
    base, upsample = (folder / name for name in chosen(source))
    merges = folder / next(name for name in MERGES if _has(folder, name))
    guide = [folder / name for name in GUIDE if _has(folder, name)]

    def build(part: str, *files: Path) -> Callable[[], ModelMixin]:
        def built() -> ModelMixin:
            from genpipe.published import glide_parts

            return getattr(glide_parts, part)(*files, configs[part], dtype)

        return built

    parts = {"decoder": build("decoder", base, merges), "upsampler": build("upsampler", upsample, merges)}
    if guide:
        parts["guide"] = build("guide", *guide)
    if clip is not None:
        parts["clip"] = _clip(clip, dtype)
    fills = base.name == FILLING[0]
    return Published(
        name="glide-filtered-inpaint" if fills else "glide-filtered",
        family="glide",
        licence=LICENCE,
        description=DESCRIPTION,
        parts=parts,
        defaults={"dalle2": FILLING_SAMPLING if fills else SAMPLING},
        files=[base, upsample, *guide, merges],
        resolution=int(configs["decoder"]["resolution"]),
        notes=_notes(fills, bool(guide), clip is not None, all(_has(folder, name) for name in FILLING)),
    )


def read_merges(path: Path) -> str:
    """The text of a file of merges, compressed or not. Raises InputError for one that is damaged or too large."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(MERGES_LIMIT + 1)
        if len(content) > MERGES_LIMIT:
            raise InputError(f"{path} has more than {MERGES_LIMIT:,} bytes, so it does not hold GPT-2's merges.")
        return content.decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); get GPT-2's merges again.") from error


def _clip(source: Path, dtype: torch.dtype | None) -> Callable[[], ModelMixin]:
    def built() -> ModelMixin:
        from genpipe.published.clip import read_clip

        return read_clip(source, dtype)

    return built


def _notes(fills: bool, guided: bool, ranked: bool, both: bool) -> list[str]:
    notes = ["Pictures of people are left out of what it was trained on, and it cannot draw them."]
    if not ranked:
        notes.append("It has no CLIP that ranks pictures; import it again together with one to have them ranked.")
    if fills:
        notes.append("It fills holes of a given picture, and draws whole pictures as well.")
    elif both:
        notes.append(f"The models that fill holes were left aside; import the folder's {FILLING[0]} for those.")
    if guided:
        notes.append(
            "Its noise-aware CLIP can guide the drawing in place of classifier-free guidance, at a scale of 3."
        )
    return notes


def _folder(source: Path) -> Path:
    """The folder itself, or that of a base model that was named."""
    named = source.name in (DRAWING[0], FILLING[0]) and _has(source.parent, source.name)
    return source.parent if named else source


def _has(source: Path, name: str) -> bool:
    try:
        return (source / name).is_file()
    except (OSError, ValueError):
        return False
