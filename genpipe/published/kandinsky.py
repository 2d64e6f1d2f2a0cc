"""Kandinsky 2.2: a prior of Karlo's kind for CLIP ViT-bigG/14 and a latent decoder, read from their two folders in
diffusers' layout.

Light: a folder is recognised without torch; kandinsky_parts.py builds the networks.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genpipe.errors import InputError
from genpipe.published.diffusers_folder import (
    INDEX,
    clip_builder,
    clip_files,
    component_config,
    components,
    needed,
    pipeline_class,
    stems_of,
)
from genpipe.published.registry import Licence, Published
from genpipe.published.weight_names import weights_files

if TYPE_CHECKING:
    import torch
    from diffusers import ModelMixin

LICENCE = Licence("Apache-2.0", "https://www.apache.org/licenses/LICENSE-2.0", "keep the notice of the licence")
PIPELINES = {"KandinskyV22PriorPipeline": "prior", "KandinskyV22Pipeline": "decoder"}
CLASSES: dict[str, dict[str, set[str]]] = {
    "prior": {
        "prior": {"PriorTransformer"},
        "image_encoder": {"CLIPVisionModelWithProjection"},
        "text_encoder": {"CLIPTextModelWithProjection"},
        "tokenizer": {"CLIPTokenizer", "CLIPTokenizerFast"},
        "image_processor": {"CLIPImageProcessor"},
        "scheduler": {"UnCLIPScheduler"},
    },
    "decoder": {"unet": {"UNet2DConditionModel"}, "movq": {"VQModel"}, "scheduler": {"DDPMScheduler"}},
}
NETWORKS = {"prior": ("prior", "text_encoder", "image_encoder"), "decoder": ("unet", "movq")}
# Steps of the decoder: diffusers' pipeline takes 100 if none are named, the authors' example 50.
SAMPLING: dict[str, Any] = {
    "guidance_scale": 4.0,
    "num_inference_steps": 50,
    "scheduler": "ddpm-leading",
    "prior_guidance_scale": 4.0,
    "prior_steps": 25,
    "prior_draws": 1,
    "prior_scheduler": "unclip",
}


def folders(source: Path) -> dict[str, Path]:
    """The "prior" and the "decoder" folder, as far as they are there.

    `source` is a folder that holds both, or one of the two: then the other lies beside it under the same name but for
    the word (kandinsky-2-2-prior, kandinsky-2-2-decoder). Never raises.
    """
    own = PIPELINES.get(str(pipeline_class(source)))
    if own is not None:
        other = "decoder" if own == "prior" else "prior"
        beside = source.parent / source.name.replace(own, other)
        found = PIPELINES.get(str(pipeline_class(beside)))
        return {own: source, **({other: beside} if found == other else {})}
    try:
        inside = sorted(path for path in source.iterdir() if path.is_dir())
    except (OSError, ValueError):
        return {}
    kinds = {path: PIPELINES.get(str(pipeline_class(path))) for path in inside}
    return {kind: path for path, kind in kinds.items() if kind is not None}


def recognises(source: Path) -> bool:
    """A folder of the prior or the decoder, or one that holds either."""
    return bool(folders(source))


def missing(source: Path) -> list[str]:
    """Files that are needed and not there; a folder that is not there counts as its model_index.json."""
    found = folders(source)
    lacking = [f"{kind}/{INDEX}" for kind in NETWORKS if kind not in found]
    for kind, folder in found.items():
        names = {f"{name}/config.json" for name in NETWORKS[kind]} | {"scheduler/scheduler_config.json"}
        lacking += [f"{folder.name}/{name}" for name in sorted(names) if not (folder / name).is_file()]
        for name in NETWORKS[kind]:
            if not weights_files(folder / name, stems_of(name)):
                lacking.append(f"{folder.name}/{name}/{stems_of(name)[0]}.safetensors")
    return lacking


def read(source: Path, dtype: torch.dtype | None = None, clip: Path | None = None) -> Published:
    """The parts of Kandinsky 2.2; see `folders` for what `source` may be.

    clip: a CLIP in place of the prior's own, whose files are then not needed. Raises InputError for what is missing,
    and for classes that Kandinsky does not have.
    """
    lacking = [file for file in missing(source) if clip is None or "_encoder/" not in file]
    if lacking:
        raise InputError(
            f"{str(source)!r} is incomplete, it lacks {', '.join(lacking)}; the prior and the decoder are two folders, "
            "side by side (kandinsky-2-2-prior, kandinsky-2-2-decoder) or in one."
        )
    found = folders(source)
    networks = {
        kind: [name for name in names if clip is None or "_encoder" not in name] for kind, names in NETWORKS.items()
    }
    for kind, folder in found.items():
        absent = {*networks[kind], "scheduler"} - components(folder, CLASSES[kind])
        if absent:
            raise InputError(f"{folder / INDEX} does not list {', '.join(sorted(absent))}; get the folder again.")

    def build(part: str) -> Callable[[], ModelMixin]:
        def built() -> ModelMixin:
            from genpipe.published import kandinsky_parts

            return getattr(kandinsky_parts, f"{part}_of_folder")(found[part], dtype)

        return built

    files = clip_files(clip)
    for kind, folder in found.items():
        files += [folder / INDEX, folder / "scheduler" / "scheduler_config.json"]
        for name in networks[kind]:
            files += [folder / name / "config.json", *weights_files(folder / name, stems_of(name))]
    towers = [found["prior"] / name for name in ("text_encoder", "image_encoder")]
    unet, movq = (component_config(found["decoder"], name, CLASSES["decoder"]) for name in ("unet", "movq"))
    side = needed(unet, "sample_size", found["decoder"] / "unet" / "config.json")
    return Published(
        name="kandinsky-2.2",
        family="kandinsky",
        licence=LICENCE,
        description="latent unCLIP by Sber AI: pictures of any subject from texts, 512 pixels",
        parts={"clip": clip_builder(towers, clip, dtype), **{part: build(part) for part in ("prior", "decoder")}},
        defaults={"dalle2": SAMPLING},
        files=files,
        resolution=side * 2 ** (len(movq.get("block_out_channels", [0])) - 1),
        notes=["The decoder takes 50 steps if a drawing names none, as its authors' example; diffusers takes 100."],
    )
