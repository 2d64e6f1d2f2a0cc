"""The verbs that draw: generate, reproduce. Everything heavy is imported inside them; see pipelines.clip_commands."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from genpipe.errors import InputError
from pipelines import request
from pipelines.options import DeviceOption, FamilyOption, JsonOption
from pipelines.settings import SAMPLINGS, names_of, sampling_of
from pipelines.terminal import INTERRUPTED, say, show

BOTH = "both"
# Settings of a sampling that have a flag; the rest is for Python and for family.json.
FLAGS = {
    "temperature": "--temperature",
    "top_k": "--top-k",
    "top_p": "--top-p",
    "guidance_scale": "--guidance",
    "decoder_weight": "--decoder-weight",
    "num_inference_steps": "--steps",
    "scheduler": "--scheduler",
    "negative_prompt": "--negative",
    "mode": "--mode",
    "prior_guidance_scale": "--prior-guidance",
    "clip_guidance_scale": "--clip-guidance",
    "upsample": "--upsample",
}


def register(app: typer.Typer) -> None:
    """Give the command these verbs."""
    app.command()(generate)
    app.command()(reproduce)


def generate(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPTS", help="One or several sentences, each in quotes.", show_default=False),
    ] = None,
    family: FamilyOption = "nano",
    pipeline: Annotated[
        str | None,
        typer.Option(
            help="The system that draws: dalle1, dalle2 or both.", show_default="dalle1, if the family has it"
        ),
    ] = None,
    candidates: Annotated[int, typer.Option(help="Pictures to draw per prompt.")] = 16,
    keep: Annotated[
        int | None,
        typer.Option(
            help="Best pictures to keep per prompt, as they are ranked.", show_default="4, or all if fewer are drawn"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first candidate; the others count up from it.")] = 0,
    guidance: Annotated[float | None, typer.Option(help="Pull towards the prompt; 1 is none.")] = None,
    temperature: Annotated[float | None, typer.Option(help="dalle1: below 1 safer, above 1 wilder.")] = None,
    top_k: Annotated[int | None, typer.Option(help="dalle1: draw among the K likeliest image tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="dalle1: draw among the likeliest tokens of this total chance.")
    ] = None,
    decoder_weight: Annotated[
        float | None, typer.Option(help="dalle1: the say of dalle2's decoder in the ranking; 0: CLIP ranks alone.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="dalle2: denoising steps of the decoder.")] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            help="dalle2: ddpm, ddim, ddim-shifted, dpm-solver++, unipc, euler, unclip or ddpm-leading.",
        ),
    ] = None,
    negative: Annotated[str | None, typer.Option(help="dalle2: what the pictures should be led away from.")] = None,
    mode: Annotated[
        str | None,
        typer.Option(help="dalle2: prior; caption: no image embedding; text: the text's embedding in its place."),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(help="dalle2: draw from this picture's embedding; without PROMPTS, variations of it."),
    ] = None,
    fill: Annotated[
        Path | None,
        typer.Option(help="dalle2: a mask of --image's size: what is white there is drawn anew, the rest kept."),
    ] = None,
    clip_guidance: Annotated[
        float | None, typer.Option(help="dalle2: pull of a CLIP that knows noise, where the family has one; 0 is none.")
    ] = None,
    prior_guidance: Annotated[float | None, typer.Option(help="dalle2: pull of the prior towards the prompt.")] = None,
    upsample: Annotated[
        bool | None,
        typer.Option("--upsample/--no-upsample", help="Enlarge the kept pictures.", show_default="if the family can"),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the pictures; files in it are never replaced.")] = Path(
        "genpipe-out"
    ),
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Draw pictures from prompts, keep the best, save them as PNG files that carry their recipe."""
    from pipelines.family_info import describe_family
    from pipelines.output import OutputFolder

    # All that can be refused is refused before weights are loaded and before anything is written.
    keep = min(4, candidates) if keep is None else keep
    request.check_counts(candidates, keep, seed, None)
    check_choice(pipeline)
    texts = [""] if image is not None and not prompts else request.check_prompts(prompts or [])
    given = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance_scale": guidance,
        "decoder_weight": decoder_weight,
        "num_inference_steps": steps, "scheduler": scheduler, "negative_prompt": negative, "mode": mode,
        "prior_guidance_scale": prior_guidance, "clip_guidance_scale": clip_guidance, "upsample": upsample,
    }  # fmt: skip
    described = describe_family(family)
    described.check_draws()
    names = list(SAMPLINGS) if pipeline == BOTH else [pipeline or described.pipelines[0]]
    settings = settings_of_flags(names, given)
    for name in names:
        described.check_has(name)
    if image is not None and names != ["dalle2"]:
        raise InputError("--image belongs to dalle2 alone; choose --pipeline dalle2.")
    if fill is not None and image is None:
        raise InputError("--fill needs the picture whose holes it shows; give it with --image.")
    from genpipe.images import open_picture

    picture, mask = (None if path is None else open_picture(path) for path in (image, fill))
    folder = OutputFolder(out)
    try:
        from pipelines.devices import choose_device
        from pipelines.drawing import Job, draw_and_show
        from pipelines.family import load_family

        loaded = load_family(described.folder, device=choose_device(device), pipelines=names)
        job = Job(settings, texts, candidates, keep, seed, picture, mask)
        complete, kept = draw_and_show(loaded, job, folder, as_json)
    finally:
        folder.discard_if_empty()
    if not complete:
        finished = f"the {kept} pictures named above were finished and are kept" if kept else "nothing was finished"
        say("interrupted", finished)
        raise typer.Exit(INTERRUPTED)


def check_choice(pipeline: str | None) -> None:
    """Raises InputError for what is neither a pipeline nor "both"."""
    if pipeline not in (None, BOTH, *SAMPLINGS):
        raise InputError(f"There is no pipeline {pipeline!r}; choose from {', '.join([*SAMPLINGS, BOTH])}.")


def settings_of_flags(pipelines: Sequence[str], flags: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Pipeline -> its settings, from the flags that were given (None: not given).

    Raises InputError for a flag that none of the pipelines knows, and for values out of range.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    settings: dict[str, dict[str, Any]] = {pipeline: {} for pipeline in pipelines}
    for name, value in given.items():
        knowing = [pipeline for pipeline in SAMPLINGS if name in names_of(pipeline)]
        for pipeline in knowing:
            if pipeline in settings:
                settings[pipeline][name] = value
        if not set(knowing).intersection(pipelines):
            raise InputError(
                f"{FLAGS[name]} belongs to {knowing[0]}, not to {pipelines[0]}; leave it out or choose --pipeline "
                f"{knowing[0]}."
            )
    for pipeline, own in settings.items():
        sampling_of(pipeline, own)
    return settings


def reproduce(
    picture: Annotated[
        Path, typer.Argument(metavar="FILE.png", help="A PNG file that genpipe wrote.", show_default=False)
    ],
    family: Annotated[
        str | None, typer.Option(help="Where its weights lie, if they did not come with genpipe.", show_default=False)
    ] = None,
    image: Annotated[
        Path | None, typer.Option(help="The picture that it was drawn from, if it was.", show_default=False)
    ] = None,
    fill: Annotated[
        Path | None, typer.Option(help="The mask of the holes it was drawn into, if it was.", show_default=False)
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
    given, mask = (None if path is None else open_picture(path) for path in (image, fill))
    recipe.check_image(given, mask)
    from pipelines.devices import same_machine
    from pipelines.recipe import redraw

    device = same_machine(recipe.device, recipe.threads)
    loaded = load_family(described.folder, device=device, pipelines=[recipe.pipeline])
    again, identical = redraw(loaded, recipe, original, given, mask)
    if out is not None:
        save_png(again, out, recipe.to_json())
        show(str(out))
    show("identical: every pixel is the same" if identical else "different: not every pixel is the same")
    if not identical:
        raise typer.Exit(1)
