"""The verb `genpipe average`: the mean of the weights of several trainings of one part."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from genpipe.errors import InputError
from pipelines.terminal import show


def register(app: typer.Typer) -> None:
    """Give the command this verb."""
    app.command("average")(average)


def average(
    parts: Annotated[
        list[Path],
        typer.Argument(
            metavar="PART PART...", help="Folders of the part, as runs/dalle1/transformer.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option(help="Where the averaged part goes.", show_default=False)],
    shares: Annotated[
        list[float] | None,
        typer.Option(
            "--share", help="How much a folder counts, one for each, in their order.", show_default="all the same"
        ),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Put it in the place of an existing part.")] = False,
) -> None:
    """Average the weights of several trainings of one part, each of which went on from another.

    The mean is often better than any of them: `genpipe train ... init=PART` goes on from it, `assemble` takes it.
    """
    if out.exists() and not replace:
        raise InputError(f"{out} is there already; give --replace to put the average in its place.")
    cls = _class_in(parts[0])
    from genpipe.averaging import average_parts
    from genpipe.parts import save_part

    save_part(average_parts(cls, parts, shares), out)
    _note_origin(out, parts)
    show(str(out))


def _class_in(folder: Path) -> Any:
    """The class of the part in a folder, as its config.json names it. Raises InputError where none is."""
    from genpipe.json_files import peek_json
    from pipelines.family_info import PART_CLASSES, class_of

    named = str(peek_json(folder / "config.json").get("_class_name"))
    for part, paths in PART_CLASSES.items():
        if named in {path.rpartition(".")[2] for path in paths}:
            return class_of(part, named)
    raise InputError(f"{folder} holds no trained part; name folders as runs/dalle1/transformer.")


def _note_origin(out: Path, parts: Sequence[Path]) -> None:
    """Write into the new folder what `assemble` asks a run for: the data that the parts were trained on."""
    from pipelines.assembly import source_of, styled

    data = {"source": ", ".join(sorted({source_of(part) for part in parts})), "styles": all(map(styled, parts))}
    try:
        (out / "recipe.json").write_text(json.dumps({"data": data}, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{out / 'recipe.json'} cannot be written ({error.strerror}); the weights are.") from error
