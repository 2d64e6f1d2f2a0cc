"""The `genpipe` command: its entry point, and the verbs train, assemble, info; the others are in *_commands.py.

Everything heavy is imported inside the commands.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from genpipe.errors import InputError
from pipelines import (
    average_command,
    classify_commands,
    clip_commands,
    data_commands,
    demo_command,
    draw_commands,
    evaluate_commands,
    import_command,
)
from pipelines.options import JsonOption
from pipelines.terminal import INTERRUPTED, leave_closed_pipe, plain_warnings, say, show

app = typer.Typer(
    name="genpipe",
    help="Draw pictures from a prompt with DALL-E, rank pictures with CLIP, train both.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        import genpipe

        print(genpipe.__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())


for commands in (
    draw_commands, demo_command, clip_commands, classify_commands, evaluate_commands, import_command, data_commands,
    average_command,
):  # fmt: skip
    commands.register(app)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a shipped recipe.", show_default=False)],
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting; may be repeated.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="What to train on: a folder, a list or shards; the same as --set data.source=FILE."),
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop, with a checkpoint, after this many minutes.")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Stop after this many steps; the same as --set run.steps=N.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run.", show_default="runs/RECIPE")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoint in the folder, if there is one.")] = True,
) -> None:
    """Train one part of a family, from scratch or on from a checkpoint."""
    from genpipe.training.__main__ import run

    aliases = {"run.steps": steps, "data.source": data}
    overrides = [*(changes or []), *(f"{key}={value}" for key, value in aliases.items() if value is not None)]
    run(recipe, overrides, minutes, out, resume)


@app.command()
def assemble(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the family goes.", show_default=False)],
    runs: Annotated[Path, typer.Option(help="Folder of the runs that `genpipe train` wrote.")] = Path("runs"),
    clip: Annotated[Path | None, typer.Option(help="Folder of the CLIP.", show_default="RUNS/clip/clip")] = None,
    dvae: Annotated[Path | None, typer.Option(help="Folder of the dVAE.", show_default="RUNS/dvae/dvae")] = None,
    transformer: Annotated[
        Path | None, typer.Option(help="Folder of the transformer.", show_default="RUNS/dalle1/transformer")
    ] = None,
    decoder: Annotated[
        Path | None, typer.Option(help="Folder of the decoder.", show_default="RUNS/decoder/decoder")
    ] = None,
    prior: Annotated[Path | None, typer.Option(help="Folder of the prior.", show_default="RUNS/prior/prior")] = None,
    upsampler: Annotated[
        Path | None, typer.Option(help="Folder of the upsampler.", show_default="RUNS/upsampler/upsampler")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The family's name.", show_default="the folder's name")] = None,
    licence: Annotated[str, typer.Option("--license", help="Licence of the weights.")] = "unknown",
    description: Annotated[str, typer.Option(help="One sentence: what it draws.")] = "",
    guidance: Annotated[float, typer.Option(help="dalle1: guidance where a call gives none.")] = 2.0,
    temperature: Annotated[float, typer.Option(help="dalle1: temperature where a call gives none.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="dalle1: top-p where a call gives none.")] = 0.95,
    defaults: Annotated[
        list[str] | None,
        typer.Option(
            "--default",
            metavar="PIPELINE.SETTING=VALUE",
            help="What holds where a call gives nothing, as in dalle2.num_inference_steps=25; may be repeated.",
        ),
    ] = None,
    card: Annotated[Path | None, typer.Option(help="Text file of the model card.", show_default="none")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Put it in the place of an existing folder.")] = False,
) -> None:
    """Put trained parts together to a family that `generate --family FOLDER` draws with.

    Parts that are not there are left out, if the others make a pipeline.
    """
    from pipelines import assembly

    given = {"clip": clip, "dvae": dvae, "transformer": transformer}
    folders = assembly.part_folders(runs, {**given, "prior": prior, "decoder": decoder, "upsampler": upsampler})
    chosen = assembly.parsed_defaults(defaults or [])
    if "transformer" in folders:
        plain = {"guidance_scale": guidance, "temperature": temperature, "top_p": top_p}
        chosen = {**chosen, "dalle1": {**plain, **chosen.get("dalle1", {})}}
    text = ""
    if card is not None:
        try:
            text = card.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"The model card {str(card)!r} cannot be read as text ({error}).") from error
    about = {
        "name": name or folder.absolute().name,
        "license": licence,
        "description": description,
        "defaults": chosen,
    }
    assembly.assemble(folder, folders, about, text, replace)
    show(str(folder))


@app.command()
def info(
    family: Annotated[
        str | None,
        typer.Argument(
            metavar="FAMILY", help="A family's name or Hub id, or any folder or file.", show_default="all shipped"
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show families, their parts, sizes and licences, versions of libraries, and devices; or what a folder holds.

    A folder may be a family, published weights, one part or a training run. No weights are read.
    """
    from pipelines.family_info import describe_family, located_family, shipped_families
    from pipelines.folder_info import describe_folder
    from pipelines.report import as_text, describe

    if family is None:
        report = describe([describe_family(name) for name in shipped_families()])
    else:
        path, own = located_family(family)
        report = describe([describe_family(path)]) if own else describe([], [describe_folder(path)])
    show(json.dumps(report, indent=2) if as_json else as_text(report))


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command. Whatever a person can cause ends in one line on standard error and an exit code."""
    with plain_warnings():
        sys.exit(_run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    try:
        code = app(args=arguments, prog_name="genpipe", standalone_mode=False) or 0
        sys.stdout.flush()  # here, where a closed pipe is expected
        return code
    except InputError as error:
        say("error", error)
        return 2
    except FloatingPointError as error:  # NaN in a model's output: damaged weights, or a training that diverged
        say("error", error)
        return 1
    except (KeyboardInterrupt, typer.Abort):
        say("interrupted", "what was finished before is kept")
        return INTERRUPTED
    except BrokenPipeError:
        leave_closed_pipe()
        return 1
    except Exception as error:
        # Usage errors of typer, whose class has moved between modules over its versions.
        if not (hasattr(error, "format_message") and hasattr(error, "exit_code")):
            raise
        command = getattr(getattr(error, "ctx", None), "command_path", "genpipe")
        say("error", f"{error.format_message().rstrip('.')}; see {command} --help.")
        return int(error.exit_code)
