"""The verbs of CLIP on picture files: rerank, search.

To add one: write a function with typer's annotations (heavy imports inside it, shared options from pipelines.options)
and name it in `register`, which pipelines.cli calls. tests/test_architecture.py holds the list of all flags.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from genpipe.errors import InputError
from pipelines.options import ClipOption, DeviceOption, JsonOption
from pipelines.terminal import moving, progress_bar, say, show


def register(app: typer.Typer) -> None:
    """Give the command these verbs."""
    app.command()(rerank)
    app.command()(search)


def rerank(
    caption: Annotated[
        str, typer.Argument(metavar="CAPTION", help="What the pictures should show.", show_default=False)
    ],
    pictures: Annotated[
        list[Path], typer.Argument(metavar="PICTURES", help="Picture files, or folders of them.", show_default=False)
    ],
    top: Annotated[int | None, typer.Option(help="Print the best K only.", show_default="all")] = None,
    clip: ClipOption = "nano",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Order pictures by how well they match a caption, best first: CLIP's cosine similarity and the file."""
    from pipelines import request

    (text,) = request.check_prompts(caption)
    if top is not None:
        request.check_positive("The number of pictures to keep", top)
    from genpipe.images import find_pictures

    find_pictures(pictures)  # a path that is not there is refused before weights are loaded
    from pipelines.devices import choose_device
    from pipelines.ranking import load_clip, rank_files

    model = load_clip(clip).to(choose_device(device))
    with progress_bar("reading") as bar:
        ranked = rank_files(model, text, pictures, top, moving(bar))
    for _, reason in ranked.skipped:
        say("skipped", reason)
    if as_json:
        entries = [{"path": str(path), "score": round(value, 6)} for value, path in ranked.pictures]
        skipped = [{"path": str(path), "reason": reason} for path, reason in ranked.skipped]
        show(json.dumps({"caption": text, "clip": clip, "pictures": entries, "skipped": skipped}, indent=2))
    else:
        show("\n".join(f"{value:.4f}  {path}" for value, path in ranked.pictures))


def search(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Pictures to search, sub-folders too.", show_default=False)
    ],
    caption: Annotated[
        str, typer.Argument(metavar="CAPTION", help="What the pictures should show.", show_default=False)
    ],
    top: Annotated[int, typer.Option(help="Print the best K.")] = 10,
    clip: ClipOption = "nano",
    cache: Annotated[
        Path | None,
        typer.Option(help="Keep the embeddings in this folder.", show_default="a hidden file beside FOLDER"),
    ] = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Find the pictures of a folder that fit a caption; what CLIP makes of them is kept for the next search."""
    from pipelines import request

    (text,) = request.check_prompts(caption)
    request.check_positive("The number of pictures to find", top)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{str(folder)!r} is a file; give a folder of pictures.")
    from genpipe.images import find_pictures

    find_pictures([folder])  # a folder that is not there is refused before weights are loaded
    from genpipe.clip.retrieval import index_folder
    from genpipe.clip.retrieval import search as find
    from pipelines.devices import choose_device
    from pipelines.ranking import load_clip

    model = load_clip(clip).to(choose_device(device))
    with progress_bar("reading") as bar:
        index = index_folder(model, folder, cache, report=moving(bar))
    found = find(model, index, text, top)
    for _, reason in index.skipped:
        say("skipped", reason)
    if as_json:
        document = {
            "folder": str(folder),
            "caption": text,
            "clip": clip,
            "pictures": [{"path": str(path), "score": round(value, 6)} for value, path in found],
            "embedded": index.embedded,
            "reused": index.reused,
            "dropped": index.dropped,
            "skipped": [{"path": str(path), "reason": reason} for path, reason in index.skipped],
            "cache": None if index.cache is None else str(index.cache),
        }
        show(json.dumps(document, indent=2))
    else:
        show("\n".join(f"{value:.4f}  {path}" for value, path in found))
