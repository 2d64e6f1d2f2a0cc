"""Published CLIP weights (arXiv 2103.00020) -> genpipe's CLIP, each with the activation that it was trained with.

OpenAI's TorchScript archives, open_clip's files, and Hugging Face folders of CLIPModel, CLIPTextModelWithProjection and
CLIPVisionModelWithProjection.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch

from genpipe.clip.architecture import published_config
from genpipe.clip.model import CLIP
from genpipe.errors import InputError
from genpipe.json_files import read_json
from genpipe.parts import load_part
from genpipe.published.clip_names import (
    ACTIVATIONS,
    from_hugging_face,
    half_of,
    openai_architecture,
    text_cfg,
    vision_cfg,
)
from genpipe.published.containers import find_weights, is_torch_script, read_tensors
from genpipe.published.fitting import assign, on_meta
from genpipe.published.weight_names import (
    HUGGING_FACE_STEMS,
    OPEN_CLIP_CONFIG,
    OPEN_CLIP_STEMS,
    clip_stems,
    weights_file,
)

PLAIN_TOKENIZER = "ViT-L-14"  # open_clip's byte BPE of 49,408 entries, which all of them were trained with
PLAIN_VOCABULARY = 49408
OPENAI_SCALARS = ("input_resolution", "context_length", "vocab_size")
PREPROCESSORS = (".", "../feature_extractor", "../image_processor")


def read_clip(
    source: Path | tuple[Path, Path], dtype: torch.dtype | None = None, model_name: str | None = None
) -> CLIP:
    """A published CLIP in eval mode, its weights as `dtype`; None keeps the file's, or float32 where it mixes types.

    source: OpenAI's TorchScript archive; an open_clip weights file or folder with open_clip_config.json, or a weights
        file with its open_clip `model_name` (which says its activation); a Hugging Face folder of either tower or of
        both; a pair of them (text folder, image folder), which becomes one CLIP; or the folder of a genpipe CLIP.

    A half without the learned scale gets 100, at which all of OpenAI's ended. Tokens are open_clip's byte BPE: id 0
    pads, and the mask runs from the start token to the end token. Raises InputError, one sentence that names the file.
    """
    if isinstance(source, tuple):
        return _from_hugging_face(source, dtype)
    if source.is_dir():
        config = source / "config.json"
        if config.is_file() and read_json(config).get("_class_name") == "CLIP":
            return load_part(CLIP, source, dtype or torch.float32)
        if (source / OPEN_CLIP_CONFIG).is_file() and _has_open_clip_weights(source):
            return _from_open_clip(find_weights(source, *OPEN_CLIP_STEMS), source / OPEN_CLIP_CONFIG, dtype)
        if config.is_file():
            return _from_hugging_face((source,), dtype)
        raise InputError(f"{source} holds no CLIP: neither {OPEN_CLIP_CONFIG} nor config.json with weights is there.")
    if not source.is_file():
        raise InputError(f"{source} does not exist; give a CLIP's weights file or folder.")
    if model_name is not None:
        return _from_named(source, model_name, dtype)
    if is_torch_script(source):
        return _from_openai(source, dtype)
    if (source.parent / OPEN_CLIP_CONFIG).is_file() and source.name.startswith(OPEN_CLIP_STEMS):
        return _from_open_clip(source, source.parent / OPEN_CLIP_CONFIG, dtype)
    if (source.parent / "config.json").is_file() and source.name.startswith(HUGGING_FACE_STEMS):
        return _from_hugging_face((source.parent,), dtype)
    raise InputError(
        f"{source} does not say which CLIP it is and which activation it was trained with; give its open_clip name "
        "too, as in ViT-B-32-quickgelu:FILE, or its folder with open_clip_config.json or config.json."
    )


def _from_openai(path: Path, dtype: torch.dtype | None) -> CLIP:
    tensors = {name: tensor for name, tensor in _read(path, dtype).items() if name not in OPENAI_SCALARS}
    config = {"architecture": openai_architecture(tensors, path), "tokenizer_name": PLAIN_TOKENIZER}
    return _filled(config, tensors, path)


def _from_named(path: Path, model_name: str, dtype: torch.dtype | None) -> CLIP:
    return _filled(published_config(model_name), _without_wrapper(_read(path, dtype)), path)


def _from_open_clip(path: Path, config_path: Path, dtype: torch.dtype | None) -> CLIP:
    described = read_json(config_path)
    architecture, preprocess = described.get("model_cfg"), described.get("preprocess_cfg", {})
    if not isinstance(architecture, dict) or not isinstance(preprocess, dict):
        raise InputError(f"{config_path} is no config of open_clip: it has no model_cfg.")
    defaults = {**open_clip.transform.PreprocessCfg().__dict__, **preprocess}
    config = {
        "architecture": architecture,
        "image_mean": list(defaults["mean"]),
        "image_std": list(defaults["std"]),
        "interpolation": defaults["interpolation"],
        "resize_mode": defaults["resize_mode"],
        "tokenizer_name": _open_clip_tokenizer(architecture.get("text_cfg"), config_path),
    }
    return _filled(config, _without_wrapper(_read(path, dtype)), path)


def _open_clip_tokenizer(text: Any, config_path: Path) -> str:
    """open_clip's model name whose tokenizer a text config asks for."""
    if not isinstance(text, dict):
        raise InputError(f"{config_path} is no config of open_clip: it has no text_cfg.")
    special = [key for key in text if "tokenizer" in key]
    if not special and text.get("vocab_size", PLAIN_VOCABULARY) == PLAIN_VOCABULARY:
        return PLAIN_TOKENIZER
    for name in open_clip.list_models():
        known = open_clip.get_model_config(name)["text_cfg"]
        if {key: known.get(key) for key in ("vocab_size", *special)} == {
            key: text.get(key) for key in ("vocab_size", *special)
        }:
            return str(name)
    raise InputError(f"{config_path} asks for a tokenizer that none of open_clip's models has.")


def _from_hugging_face(folders: tuple[Path, ...], dtype: torch.dtype | None) -> CLIP:
    """One folder of either half or both, or a text folder and an image folder."""
    paths = [find_weights(folder, *HUGGING_FACE_STEMS) for folder in folders]
    read = [_read(path, dtype) for path in paths]
    kinds = {tensor.dtype for tensors in read for tensor in tensors.values() if tensor.is_floating_point()}
    if len(kinds) > 1:  # towers that were saved in different types, as Kandinsky's may be
        read = [_read(path, torch.float32) for path in paths]
    config, renamed = hugging_face_clip(
        [(folder, read_json(folder / "config.json"), tensors) for folder, tensors in zip(folders, read, strict=True)]
    )
    where = " and ".join(str(folder) for folder in folders)
    return _filled({**config, **_preprocessing(folders[-1])}, renamed, Path(where))


def hugging_face_clip(
    sources: Sequence[tuple[Path, Mapping[str, Any], dict[str, torch.Tensor]]],
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(folder, its config.json, its tensors), one or two of them -> CLIP's arguments and open_clip's tensors.

    Raises InputError unless there is one text tower, one image tower, or one of each that belong together.
    """
    architecture: dict[str, Any] = {"vision_cfg": {}, "text_cfg": {}}
    widths, activations, halves = set(), set(), []
    whole: dict[str, torch.Tensor] = {}
    for folder, config, tensors in sources:
        kind = str(config.get("model_type"))
        present = {half_of(name, kind) for name in tensors}
        for half, key, translate in (("text", "text_cfg", text_cfg), ("image", "vision_cfg", vision_cfg)):
            if half in present:
                architecture[key], width, activation = translate(config, folder / "config.json")
                widths.add(width)
                activations.add(activation)
                halves.append(half)
        whole |= from_hugging_face(tensors, kind)
    where = " and ".join(str(folder) for folder, *_ in sources)
    if not halves or len(set(halves)) != len(halves) or (len(sources) == 2 and len(halves) != 2):
        raise InputError(f"{where} must hold a text tower and an image tower of CLIP, or one of them, not {halves}.")
    if len(widths) != 1 or len(activations) != 1:
        raise InputError(
            f"{where} hold towers that do not belong together: embeddings of width {sorted(widths)}, activation "
            f"{' and '.join(sorted(activations))}."
        )
    if architecture["text_cfg"].get("vocab_size", PLAIN_VOCABULARY) != PLAIN_VOCABULARY:
        raise InputError(f"{where} has a vocabulary of its own, only CLIP's of {PLAIN_VOCABULARY} entries is known.")
    architecture |= {"embed_dim": widths.pop(), "quick_gelu": ACTIVATIONS[activations.pop()]}
    if len(halves) != 2 or len(sources) == 2:
        dtype = next((tensor.dtype for tensor in whole.values() if tensor.is_floating_point()), None)
        whole.setdefault("logit_scale", torch.tensor(math.log(100), dtype=dtype))
    chosen = "both" if len(halves) == 2 else halves[0]
    return {"architecture": architecture, "tokenizer_name": PLAIN_TOKENIZER, "halves": chosen}, whole


def _preprocessing(folder: Path) -> dict[str, Any]:
    """What preprocessor_config.json, in the folder or where pipelines keep it, says of mean, std and resizing."""
    found = [folder / where / "preprocessor_config.json" for where in PREPROCESSORS]
    path = next((path for path in found if path.is_file()), None)
    if path is None:
        return {}
    said = read_json(path)
    chosen: dict[str, Any] = {key: said[key] for key in ("image_mean", "image_std") if key in said}
    size, resample = said.get("size"), said.get("resample", 3)
    if resample not in (2, 3):
        raise InputError(f"{path} asks for a resampling that CLIP is not used with ({resample!r}).")
    squash = isinstance(size, dict) and "height" in size and not said.get("do_center_crop", True)
    chosen["interpolation"] = "bilinear" if resample == 2 else "bicubic"
    return {**chosen, "resize_mode": "squash" if squash else "shortest"}


def _filled(config: dict[str, Any], tensors: Mapping[str, torch.Tensor], source: Path) -> CLIP:
    model = on_meta(lambda: CLIP(**config)).eval()
    assign(model.towers, tensors, str(source), ignorable=("*position_ids",))
    return model


def _read(path: Path, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """The tensors of a file, all floating-point ones of one type: towers do not compute with several."""
    tensors = read_tensors(path, inside=("state_dict",), dtype=dtype)
    kinds = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    return tensors if len(kinds) < 2 else read_tensors(path, inside=("state_dict",), dtype=torch.float32)


def _without_wrapper(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names as the model has them: training on several devices puts "module." before all."""
    if all(name.startswith("module.") for name in tensors):
        return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def _has_open_clip_weights(folder: Path) -> bool:
    """Whether open_clip's file is the one to read, where Hugging Face's may lie beside it."""
    found = weights_file(folder, clip_stems(folder))
    return found is None or found.name.startswith(OPEN_CLIP_STEMS)
