"""The `genpipe` command: generate, reproduce, rerank, train, info. Everything heavy is imported inside the commands."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from genpipe.errors import InputError
from pipelines.terminal import leave_closed_pipe, plain_warnings, progress_bar, say, show

INTERRUPTED = 130  # what a shell expects of a command that Ctrl-C ended

app = typer.Typer(
    name="genpipe",
    help="Draw pictures from a prompt with DALL-E, rank pictures with CLIP, train both.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

FamilyOption = Annotated[
    str, typer.Option(help="Weights to use: a shipped family, a folder, or a Hub id (owner/name).")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, or an accelerator as listed by `genpipe info`.")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document and nothing else on standard output.")
]


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        import genpipe

        print(genpipe.__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def generate(
    prompts: Annotated[
        list[str],
        typer.Argument(metavar="PROMPTS", help="One or several sentences, each in quotes.", show_default=False),
    ],
    family: FamilyOption = "nano",
    pipeline: Annotated[str, typer.Option(help="The system that draws: dalle1.")] = "dalle1",
    candidates: Annotated[int, typer.Option(help="Pictures to draw per prompt.")] = 16,
    keep: Annotated[
        int | None,
        typer.Option(
            help="Best pictures to keep per prompt, by CLIP's score.", show_default="4, or all if fewer are drawn"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first candidate; the others count up from it.")] = 0,
    temperature: Annotated[float | None, typer.Option(help="Below 1 safer, above 1 wilder.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw among the K likeliest image tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw among the likeliest tokens of this total chance.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Pull towards the prompt; 1 is none.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the pictures; files in it are never replaced.")] = Path(
        "genpipe-out"
    ),
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Draw pictures from prompts, keep the best, save them as PNG files that carry their recipe."""
    from pipelines import request
    from pipelines.family import check_pipeline, describe_family
    from pipelines.output import OutputFolder

    # All that can be refused is refused before weights are loaded and before anything is written.
    keep = min(4, candidates) if keep is None else keep
    request.check_counts(candidates, keep, seed, None)
    request.check_sampling(temperature, top_k, top_p, guidance)
    check_pipeline(pipeline)
    texts = request.check_prompts(prompts)
    described = describe_family(family)
    folder = OutputFolder(out)
    drawn = []
    try:
        from pipelines.devices import choose_device
        from pipelines.drawing import draw, report
        from pipelines.family import load_family

        loaded = load_family(described.folder, device=choose_device(device))
        settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance_scale": guidance}
        job = draw(loaded, pipeline, texts, folder, candidates=candidates, keep=keep, seed=seed, settings=settings)
        for each in job:
            drawn.append(each)
            if not as_json and each.saved.pictures:
                show(each.to_text())
    finally:
        folder.discard_if_empty()
    complete = len(drawn) == len(texts) and drawn[-1].complete
    if as_json:
        show(json.dumps(report(loaded, pipeline, settings, drawn, complete), indent=2))
    if not complete:
        kept = sum(len(each.saved.pictures) for each in drawn)
        say(
            "interrupted",
            f"the {kept} pictures named above were finished and are kept" if kept else "nothing was finished",
        )
        raise typer.Exit(INTERRUPTED)


@app.command()
def reproduce(
    picture: Annotated[
        Path, typer.Argument(metavar="FILE.png", help="A PNG file that genpipe wrote.", show_default=False)
    ],
    family: Annotated[
        str | None, typer.Option(help="Where its weights lie, if they did not come with genpipe.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the new picture here (a new PNG file).", show_default=False)
    ] = None,
) -> None:
    """Draw a picture again from the recipe in its file; exit code 0 if every pixel is the same, 1 if not."""
    from pipelines.family import load_family
    from pipelines.recipe import Recipe, family_of

    if out is not None and out.exists():
        raise InputError(f"{str(out)!r} exists already; choose another name with --out.")
    from genpipe.images import open_picture, read_recipe, save_png

    recipe = Recipe.from_json(read_recipe(picture), repr(str(picture)))
    original = open_picture(picture)
    described = family_of(recipe, family)
    from pipelines.devices import same_machine
    from pipelines.recipe import redraw

    device = same_machine(recipe.device, recipe.threads)
    again, identical = redraw(load_family(described.folder, device=device), recipe, original)
    if out is not None:
        save_png(again, out, recipe.to_json())
        show(str(out))
    show("identical: every pixel is the same" if identical else "different: not every pixel is the same")
    if not identical:
        raise typer.Exit(1)


@app.command()
def rerank(
    caption: Annotated[
        str, typer.Argument(metavar="CAPTION", help="What the pictures should show.", show_default=False)
    ],
    pictures: Annotated[
        list[Path], typer.Argument(metavar="PICTURES", help="Picture files, or folders of them.", show_default=False)
    ],
    top: Annotated[int | None, typer.Option(help="Print the best K only.", show_default="all")] = None,
    clip: Annotated[
        str, typer.Option(help="A family, a folder, or an open_clip model and its weights as in ViT-B-32:openai.")
    ] = "nano",
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

        def follow(done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.refresh()

        ranked = rank_files(model, text, pictures, top, follow)
    for _, reason in ranked.skipped:
        say("skipped", reason)
    if as_json:
        entries = [{"path": str(path), "score": round(value, 6)} for value, path in ranked.pictures]
        skipped = [{"path": str(path), "reason": reason} for path, reason in ranked.skipped]
        show(json.dumps({"caption": text, "clip": clip, "pictures": entries, "skipped": skipped}, indent=2))
    else:
        show("\n".join(f"{value:.4f}  {path}" for value, path in ranked.pictures))


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a shipped recipe.", show_default=False)],
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting; may be repeated.")
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

    overrides = [*(changes or []), *([f"run.steps={steps}"] if steps is not None else [])]
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
    name: Annotated[str | None, typer.Option(help="The family's name.", show_default="the folder's name")] = None,
    licence: Annotated[str, typer.Option("--license", help="Licence of the weights.")] = "unknown",
    description: Annotated[str, typer.Option(help="One sentence: what it draws.")] = "",
    guidance: Annotated[float, typer.Option(help="Guidance where a call gives none.")] = 2.0,
    temperature: Annotated[float, typer.Option(help="Temperature where a call gives none.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Top-p where a call gives none.")] = 0.95,
    card: Annotated[Path | None, typer.Option(help="Text file of the model card.", show_default="none")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Put it in the place of an existing folder.")] = False,
) -> None:
    """Put trained parts together to a family that `generate --family FOLDER` draws with."""
    from pipelines import assembly

    folders = assembly.part_folders(runs, {"clip": clip, "dvae": dvae, "transformer": transformer})
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
        "defaults": {"guidance_scale": guidance, "temperature": temperature, "top_p": top_p},
    }
    assembly.assemble(folder, folders, about, text, replace)
    show(str(folder))


@app.command()
def info(
    family: Annotated[
        str | None,
        typer.Argument(metavar="FAMILY", help="A family's name, folder or Hub id.", show_default="all shipped"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show families, their parts, sizes and licences, versions of libraries, and devices."""
    from pipelines.family import describe_family, shipped_families
    from pipelines.report import as_text, describe

    report = describe([describe_family(name) for name in ([family] if family is not None else shipped_families())])
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
