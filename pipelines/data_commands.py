"""The verbs of data sets: `genpipe data check | pack`, and embed, which writes CLIP's embeddings beside shards."""

import json
from pathlib import Path
from typing import Annotated

import typer

from genpipe.errors import InputError
from pipelines.drawn_command import draw_data
from pipelines.options import ClipOption, DeviceOption, JsonOption
from pipelines.terminal import moving, progress_bar, say, show

data_app = typer.Typer(context_settings={"help_option_names": ["-h", "--help"]})
data_app.command("draw")(draw_data)


def register(app: typer.Typer) -> None:
    """Give the command these verbs."""
    app.command()(embed)
    app.add_typer(data_app, name="data")


@data_app.callback(invoke_without_command=True)
def data_root(context: typer.Context) -> None:
    """Check and write webdataset shards of captioned pictures."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@data_app.command("check")
def check_data(
    shards: Annotated[
        list[str],
        typer.Argument(
            metavar="SHARDS", help='Tar files, a folder of them, or "laion/{00000..00099}.tar".', show_default=False
        ),
    ],
    headers_only: Annotated[
        bool,
        typer.Option("--headers-only", help="Read the tars' headers alone: fast, but blind to broken pictures."),
    ] = False,
    list_all: Annotated[
        bool, typer.Option("--list", help="Name every broken sample on standard error, not only the first of a kind.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Count the samples of webdataset shards and tell what is broken; exit code 0 if nothing is, 1 if something is."""
    from genpipe.data.check import check_shards

    def name(reason: str, where: str) -> None:
        say("broken", f"{where}: {reason}")

    with progress_bar("checking") as bar:
        result = check_shards(shards, headers_only, on_broken=name if list_all else None, report=moving(bar))
    show(json.dumps(result.to_json(), indent=2) if as_json else result.to_text())
    if not result.is_sound:
        raise typer.Exit(1)


@data_app.command("pack")
def pack_data(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="Pictures with a NAME.txt beside each or a metadata list, or a CSV, TSV or JSONL list.",
            show_default=False,
        ),
    ],
    shards: Annotated[
        str,
        typer.Argument(
            metavar="SHARDS",
            help="What the shards' names begin with: out/cats for out/cats-00000.tar, out/ for out/00000.tar.",
            show_default=False,
        ),
    ],
    samples: Annotated[int, typer.Option(help="Samples of a shard, at most.")] = 10_000,
    size: Annotated[int, typer.Option("--bytes", help="Bytes of a shard, at most.")] = 2**30,
    seed: Annotated[int, typer.Option(help="The samples are shuffled by this seed.")] = 0,
    keep_order: Annotated[bool, typer.Option("--keep-order", help="Do not shuffle the samples.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write captioned pictures as webdataset shards in img2dataset's layout; files are never encoded again."""
    from pipelines import request

    request.check_positive("The number of samples of a shard", samples)
    request.check_positive("The number of bytes of a shard", size)
    if seed < 0:
        raise InputError(f"The seed must be a whole number of at least 0, got {seed}.")
    from genpipe.data.pack import pack

    with progress_bar("packing") as bar:
        packed = pack(source, shards, samples, size, None if keep_order else seed, report=moving(bar))
    if as_json:
        document = {
            "shards": packed.pattern,
            "files": [str(path) for path in packed.shards],
            "bytes": packed.bytes,
            "samples": packed.report.read,
            "skipped": {
                reason: {"count": count, "first": packed.report.first[reason]}
                for reason, count in sorted(packed.report.skipped.items())
            },
        }
        show(json.dumps(document, indent=2))
        return
    show(packed.pattern)
    say("packed", f"{packed.report} ({len(packed.shards):,} shards, {packed.bytes / 1e6:,.1f} MB)")


def embed(
    shards: Annotated[
        list[str],
        typer.Argument(
            metavar="SHARDS", help='Tar files, a folder of them, or "laion/{00000..00099}.tar".', show_default=False
        ),
    ],
    clip: ClipOption = "nano",
    out: Annotated[
        Path | None, typer.Option(help="Folder for the embeddings.", show_default="beside each shard")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Pictures that CLIP sees at once, at most.")] = 64,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Write the CLIP embeddings of the pictures in webdataset shards, for training; what is there is left alone."""
    from pipelines import request

    request.check_positive("The batch size", batch_size)
    from genpipe.data.shards import expand_shards

    expand_shards(shards)  # shards that are not there are refused before weights are loaded
    from genpipe.training.embed import embed as embed_shards
    from pipelines.devices import choose_device
    from pipelines.ranking import load_clip

    model = load_clip(clip).to(choose_device(device))
    with progress_bar("embedding") as bar:
        report = embed_shards(shards, model, out, batch_size, moving(bar))
    if report.pairs.skipped:
        say("skipped", report.pairs)
    if as_json:
        show(json.dumps({"clip": clip, **report.to_dict()}, indent=2))
    else:
        show(f"{report.pairs.read:,} embeddings of {report.shards:,} shards, {report.written:,} of them written now")
