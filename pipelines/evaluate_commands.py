"""The verbs that measure: `genpipe evaluate FAMILY | distance`, and of a CLIP `... zero-shot | retrieval | clip`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from genpipe.errors import InputError
from pipelines.classify_commands import (
    ClassesFileOption,
    ClassesOption,
    ClassifierOption,
    TemplatesOption,
    chosen_classes,
    chosen_templates,
    ready_classifier,
    refuse_double,
)
from pipelines.composition_command import evaluate_family
from pipelines.distance_command import evaluate_distance
from pipelines.options import ClipOption, DeviceOption, JsonOption
from pipelines.terminal import moving, progress_bar, say, show

_HELP_OPTIONS = ["-h", "--help"]
_FAMILY = "family"


class _FamilyByDefault(TyperGroup):
    """`evaluate nano` and `evaluate --prompts FILE` are `evaluate family nano` and so on."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, *_HELP_OPTIONS):
            args = [_FAMILY, *args]
        return super().parse_args(ctx, args)


evaluate = typer.Typer(
    cls=_FamilyByDefault,
    help="Measure a family's pictures (genpipe evaluate FAMILY), folders of pictures (distance), or a CLIP.",
    no_args_is_help=True,
    context_settings={"help_option_names": _HELP_OPTIONS},
)
evaluate.command(_FAMILY)(evaluate_family)
evaluate.command("distance")(evaluate_distance)


def register(app: typer.Typer) -> None:
    """Give the command these verbs."""
    app.add_typer(evaluate, name="evaluate")


@evaluate.command("zero-shot")
def evaluate_zero_shot(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="A folder with one sub-folder of pictures per class, a CSV, TSV or JSONL file (columns image, label), "
            "or the word scenes for held-out emoji scenes.",
            show_default=False,
        ),
    ],
    classes: ClassesOption = None,
    classes_file: ClassesFileOption = None,
    classifier: ClassifierOption = None,
    templates: TemplatesOption = None,
    confusion: Annotated[
        Path | None, typer.Option(help="Write the confusion matrix to this PNG file.", show_default=False)
    ] = None,
    count: Annotated[int, typer.Option(help="Single-object scenes, where DATA is scenes.")] = 1000,
    clip: ClipOption = "nano",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Zero-shot accuracy on labelled pictures: top-1, top-5, per class, and which class is taken for which."""
    from pipelines import request

    request.check_positive("The number of scenes", count)
    refuse_double(classifier, classes=classes, classes_file=classes_file, templates=templates)
    names = chosen_classes(classes, classes_file, needed=False)
    texts = chosen_templates(templates, clip)
    scenes = data == "scenes" and not Path(data).exists()
    if scenes and (names or classifier):
        raise InputError("The scenes have classes of their own; leave out --classes, --classes-file and --classifier.")
    from genpipe.data.labelled import LabelledPictures
    from genpipe.data.scenes import find_font

    labelled = None
    if scenes:
        find_font()
    elif classifier is None:
        labelled = LabelledPictures(data, names)
    from genpipe.clip.zero_shot import load_classifier
    from genpipe.evaluation import zero_shot
    from pipelines.devices import choose_device
    from pipelines.ranking import load_clip

    loaded = load_classifier(classifier) if classifier is not None else None
    if loaded is not None:
        labelled = LabelledPictures(data, loaded.names)
    model = load_clip(clip).to(choose_device(device))
    if labelled is None:
        figures = zero_shot.zero_shot_of_scenes(model, texts, count)
    else:
        ready = ready_classifier(model, loaded, labelled.names, texts)
        texts = ready.templates
        with progress_bar("classifying") as bar:
            figures = zero_shot.evaluate(model, ready, labelled, report=moving(bar))
        if figures.skipped:
            say("skipped", str(labelled.report()))
    if confusion is not None:
        zero_shot.save_confusion(figures, confusion)
    if as_json:
        show(json.dumps({"clip": clip, "templates": list(texts), **figures.to_json()}, indent=2))
    else:
        show(figures.to_text())


@evaluate.command("retrieval")
def evaluate_retrieval(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA", help='Shards, a folder or list of captioned pictures, or "scenes".', show_default=False
        ),
    ],
    clip: ClipOption = "nano",
    count: Annotated[int | None, typer.Option(help="Take the first N pairs.", show_default="all")] = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Recall@1, 5, 10 and median rank of pictures among captions and of captions among pictures."""
    from pipelines import request

    if count is not None:
        request.check_positive("The number of pairs", count)
    from genpipe.evaluation.retrieval import open_source, retrieval_figures
    from pipelines.devices import choose_device
    from pipelines.ranking import load_clip

    model = load_clip(clip).to(choose_device(device))
    source = open_source(model, data, count)
    figures = retrieval_figures(model, source.pairs)
    if source.report.skipped:
        say("skipped", source.report)
    if as_json:
        show(json.dumps({"data": data, "clip": clip, **figures, "skipped": source.report.skipped}, indent=2))
        return
    for way in ("picture_to_caption", "caption_to_picture"):
        figure = ", ".join(f"{name} {value:.3f}" for name, value in figures[way].items())
        show(f"{way.replace('_', ' ')}: {figure}")
    show(f"{figures['pairs']:,} pairs, {figures['distinct_captions']:,} distinct captions")


@evaluate.command("clip")
def evaluate_clip(
    clip: Annotated[
        list[str] | None,
        typer.Option(
            "--clip",
            "--family",
            help="A family, a folder, or an open_clip model and its weights as in ViT-B-32:openai; may be repeated, "
            "for one column each.",
            show_default="nano",
        ),
    ] = None,
    count: Annotated[int, typer.Option(help="Questions of each kind.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the scenes.")] = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """What CLIP is known to be weak at: counting, positions, binding. How often it picks a caption among its twins.

    Held-out emoji scenes, drawn at the size that the model sees; each question's captions differ in one fact only.
    Positions also one by one: against the opposite one, against the objects exchanged (the same words), and whether the
    right axis was chosen. Binding: own or another object on the own or another background. Object: the easy control.
    """
    from pipelines import request

    request.check_positive("The number of questions", count)
    from genpipe.data.scenes import EmojiScenes, find_font

    EmojiScenes(seed=seed)  # a seed that cannot be is refused before weights are loaded
    find_font()
    from genpipe.evaluation.weakness import table, weakness_figures
    from pipelines.devices import choose_device
    from pipelines.ranking import load_clip

    place = choose_device(device)
    models = [(name, load_clip(name)) for name in clip or ["nano"]]
    columns = []
    for name, model in models:
        with progress_bar(f"asking {name}") as bar:
            columns.append((name, weakness_figures(model.to(place), count, seed, report=moving(bar))))
        model.to("cpu")
    if as_json:
        described = [
            {
                "clip": name,
                "picture_size": min(model.image_size),
                "figures": {row: share.to_json() for row, share in figures.items()},
            }
            for (name, model), (_, figures) in zip(models, columns, strict=True)
        ]
        document = {"questions": count, "seed": seed, "split": "heldout", "models": described}
        show(json.dumps(document, indent=2))
    else:
        show(table(columns))
