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

    The mean is often better than any of them: `genpipe train ... --set init=PART` goes on from it, `assemble` takes it.
    """
    if out.exists() and not replace:
        raise InputError(f"{out} is there already; give --replace to put the average in its place.")
    from genpipe.averaging import average_parts
    from genpipe.json_files import peek_json
    from genpipe.parts import save_part
    from pipelines.family_info import class_of, part_of

    named = str(peek_json(parts[0] / "config.json").get("_class_name"))
    part = part_of(named)
    if part is None:
        raise InputError(f"{parts[0]} holds no trained part; name folders as runs/dalle1/transformer.")
    origin = _origin(parts)  # before one of them is replaced
    save_part(average_parts(class_of(part, named), parts, shares), out)
    _note(origin, out)
    show(str(out))


def _origin(parts: Sequence[Path]) -> dict[str, Any]:
    """What `assemble` asks a recipe for: the data that the parts were trained on."""
    from pipelines.assembly import recorded_data, sources_in

    data = [recorded_data(part) for part in parts]
    return {"data": {"source": ", ".join(sources_in(data)), "styles": all(bool(each.get("styles")) for each in data)}}


def _note(origin: dict[str, Any], out: Path) -> None:
    from pipelines.folder_info import RECIPE_NAME

    try:
        (out / RECIPE_NAME).write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{out / RECIPE_NAME} cannot be written ({error.strerror}); the weights are.") from error
