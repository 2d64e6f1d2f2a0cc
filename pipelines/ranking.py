"""`genpipe rerank`: picture files of any kind, best first by how well CLIP finds that they match a caption."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from genpipe.clip.model import CLIP
from genpipe.clip.rerank import rerank
from genpipe.errors import InputError
from genpipe.images import find_pictures, open_picture, shrink, to_unit
from pipelines.family import INFO_FILE, describe_family, load_part_of, shipped_families
from pipelines.request import check_positive, check_prompts


@dataclass(frozen=True)
class RankedFiles:
    """`pictures`: (score, path), best first; `skipped`: (path, reason) of broken files found in folders."""

    pictures: list[tuple[float, Path]]
    skipped: list[tuple[Path, str]]


def load_clip(name: str) -> CLIP:
    """The CLIP that a name, file or folder stands for, in float32.

    A family's (name, folder or Hub id), a CLIP part's folder, a published open_clip model "NAME:WEIGHTS" (a tag or a
    file), one of OpenAI's archives, or a folder or Hub id of open_clip's or Hugging Face's making. Raises InputError
    for names that are none of these, damaged files, and weights that cannot be downloaded.
    """
    is_folder = os.path.isdir(name)
    if name in shipped_families() or (is_folder and os.path.isfile(os.path.join(name, INFO_FILE))):
        return load_part_of(describe_family(name), "clip")
    import open_clip
    import torch

    from genpipe.published.clip import read_clip

    if is_folder or os.path.isfile(name):
        return read_clip(Path(name), torch.float32)
    model, _, weights = name.partition(":")
    if model.replace("/", "-") in open_clip.list_models():
        if not weights:
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(model.replace("/", "-"))) or "none"
            raise InputError(f"{name!r} needs its weights named, as in {model}:WEIGHTS; open_clip has {tags}.")
        if os.path.isfile(weights):
            return read_clip(Path(weights), torch.float32, model)
        return CLIP.from_open_clip(model, weights)
    if "/" in name:
        from genpipe.published.clip_hub import fetch_clip

        folder = fetch_clip(name.removeprefix("hf-hub:"))
        return read_clip(folder, torch.float32) if folder else load_part_of(describe_family(name), "clip")
    raise InputError(
        f"There is no CLIP {name[:100]!r}; give a family ({', '.join(shipped_families()) or 'none is shipped'}), "
        "a folder or file of a published CLIP, or an open_clip model and its weights as in ViT-B-32:openai."
    )


def rank_files(
    clip: CLIP,
    caption: str,
    paths: Sequence[str | os.PathLike[str]],
    top: int | None = None,
    report: Callable[[int, int], None] | None = None,
) -> RankedFiles:
    """Score the pictures in `paths` (files, or folders searched through) against the caption, `top` of them kept.

    Pictures are read as they are scored, so that any number of them fits in memory; `report(read, total)` is called
    after each. Raises InputError for an empty caption, and for a broken picture that was named itself; found in a
    folder, it is skipped and listed.
    """
    (caption,) = check_prompts(caption)
    if top is not None:
        check_positive("The number of pictures to keep", top)
    files = find_pictures([Path(path) for path in paths])
    named = {Path(path) for path in paths}
    readable: list[Path] = []
    skipped: list[tuple[Path, str]] = []

    def pictures() -> Iterator[Tensor]:
        for number, path in enumerate(files, start=1):
            try:
                pixels = to_unit([shrink(open_picture(path), max(clip.image_size))])  # 1, 3, H, W
            except InputError as error:
                if path in named:
                    raise
                skipped.append((path, str(error)))
            else:
                readable.append(path)
                yield pixels
            if report is not None:
                report(number, len(files))

    ranking = rerank(clip, caption, pictures(), top or len(files), keep_pixels=False)
    if not readable:
        raise InputError(f"None of the {len(files)} pictures found can be read; the first: {skipped[0][1]}")
    return RankedFiles([(value, readable[index]) for index, value in ranking.pairs], skipped)
