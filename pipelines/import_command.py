"""The verb `genpipe import`: published weights converted once to the project's own folder."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from genpipe.errors import InputError
from pipelines.options import JsonOption
from pipelines.terminal import INTERRUPTED, moving, progress_bar, say, show

DTYPES = ("float32", "float16", "bfloat16")


def register(app: typer.Typer) -> None:
    """Give the command this verb."""
    app.command("import")(import_weights)


def import_weights(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Published weights: a folder or file, a Hub id, or a name such as minDALL-E. What is not on this disk "
            "is downloaded.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Where the family goes.", show_default=False)],
    clip: Annotated[
        str | None,
        typer.Option(
            help="File, folder or Hub id of a CLIP to rank with, in place of the family's own.", show_default="none"
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help=f"Store weights as {', '.join(DTYPES)}.", show_default="as published")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Put it in the place of an existing family.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Convert published weights to a family that all other commands take: safetensors and JSON, licence, source hash.

    Nothing in the published files is run. What cannot be finished leaves nothing behind.
    """
    from pipelines.writing import check_target

    if dtype not in (None, *DTYPES):
        raise InputError(f"There is no type {str(dtype)[:40]!r} to store; choose from {', '.join(DTYPES)}.")
    check_target(out, replace)
    from pipelines.importing import clip_path, import_family, located

    try:
        with progress_bar("fetching") as bar:
            path = located(source, moving(bar))
            own_clip = None if clip is None else clip_path(clip, moving(bar))
        with progress_bar("converting") as bar:
            done: dict[str, Any] = import_family(path, out, own_clip, dtype, replace, moving(bar))
    except KeyboardInterrupt as stop:
        say("interrupted", "no family was written; what was downloaded is kept, and the next try goes on from there")
        raise typer.Exit(INTERRUPTED) from stop
    if as_json:
        show(json.dumps(done, indent=2))
        return
    conditions = done["conditions"]
    show(
        f"{done['folder']}: {done['name']} ({', '.join(done['parts'])}), {done['bytes'] / 1e9:.2f} GB\n"
        f"  licence {done['license']}{f': {conditions}' if conditions else ''}"
    )
