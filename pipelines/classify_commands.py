"""The verbs that classify and measure with CLIP: classify, and `genpipe evaluate zero-shot | retrieval`."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from genpipe.errors import InputError
from pipelines.options import ClipOption, DeviceOption, JsonOption
from pipelines.terminal import moving, progress_bar, say, show

if TYPE_CHECKING:
    from genpipe.clip.model import CLIP
    from genpipe.clip.zero_shot import ZeroShotClassifier

ClassesOption = Annotated[
    str | None, typer.Option(help='Names of the classes, separated by commas: "cat, dog".', show_default=False)
]
ClassesFileOption = Annotated[
    Path | None, typer.Option(help="Text file with one class name a line.", show_default=False)
]
ClassifierOption = Annotated[
    Path | None, typer.Option(help="Folder of a classifier that --save-classifier wrote.", show_default=False)
]
TemplatesOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME|TEXT",
        help="plain, simple (7), openai-imagenet (80), or a text with {} for the name; may be repeated.",
        show_default="the family's, or plain",
    ),
]

evaluate = typer.Typer(
    help="Measure a CLIP.", no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]}
)


def register(app: typer.Typer) -> None:
    """Give the command these verbs."""
    app.command()(classify)
    app.add_typer(evaluate, name="evaluate")


def chosen_classes(classes: str | None, classes_file: Path | None, needed: bool) -> tuple[str, ...] | None:
    """The names given by --classes or --classes-file, checked; None where neither was given and none is `needed`."""
    from genpipe.data.labelled import parse_class_names, read_class_names

    if classes is not None and classes_file is not None:
        raise InputError("Both --classes and --classes-file were given; give one of them.")
    if classes is not None:
        return parse_class_names(classes)
    if classes_file is not None:
        return read_class_names(classes_file)
    if needed:
        raise InputError('No classes were given; name them with --classes "cat, dog", --classes-file or --classifier.')
    return None


def chosen_templates(templates: list[str] | None, clip: str) -> tuple[str, ...]:
    """The templates asked for, else those that the family recommends ("templates" in family.json), else plain."""
    from genpipe.clip.templates import choose_templates
    from pipelines.family_info import INFO_FILE, describe_family, shipped_families

    if templates:
        return choose_templates(templates)
    if clip in shipped_families() or os.path.isfile(os.path.join(clip, INFO_FILE)):
        recommended = describe_family(clip).info.get("templates")
        if isinstance(recommended, list) and all(isinstance(text, str) for text in recommended):
            return choose_templates(recommended)
    return choose_templates("plain")


def refuse_double(classifier: Path | None, **others: Any) -> None:
    """Raise InputError where --classifier stands beside a flag that it makes meaningless."""
    given = [f"--{name.replace('_', '-')}" for name, value in others.items() if value]
    if classifier is not None and given:
        raise InputError(f"A saved classifier has its classes and templates already; leave out {' and '.join(given)}.")


def ready_classifier(
    model: "CLIP", loaded: "ZeroShotClassifier | None", names: Sequence[str] | None, templates: tuple[str, ...]
) -> "ZeroShotClassifier":
    """The loaded classifier, checked against the CLIP, or a new one."""
    from genpipe.clip.zero_shot import build_classifier

    if loaded is not None:
        loaded.check_clip(model)
        return loaded.to(model.device)
    with progress_bar("reading the class names") as bar:
        return build_classifier(model, names or (), templates, report=moving(bar))


def classify(
    pictures: Annotated[
        list[Path], typer.Argument(metavar="PICTURES", help="Picture files, or folders of them.", show_default=False)
    ],
    classes: ClassesOption = None,
    classes_file: ClassesFileOption = None,
    classifier: ClassifierOption = None,
    save_classifier: Annotated[
        Path | None, typer.Option(help="Folder to keep the classifier in, for --classifier.", show_default=False)
    ] = None,
    templates: TemplatesOption = None,
    top: Annotated[int, typer.Option(help="Classes to show per picture, likeliest first.")] = 5,
    clip: ClipOption = "nano",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Say which of the named classes pictures show, without training: CLIP compares them with the classes' names."""
    from pipelines import request

    refuse_double(
        classifier, classes=classes, classes_file=classes_file, templates=templates, save_classifier=save_classifier
    )
    request.check_positive("The number of classes to show", top)
    names = chosen_classes(classes, classes_file, needed=classifier is None)
    texts = chosen_templates(templates, clip) if classifier is None else ()
    from genpipe.images import find_pictures

    find_pictures(pictures)
    from genpipe.clip import zero_shot
    from pipelines.devices import choose_device
    from pipelines.ranking import load_clip

    if save_classifier is not None:
        zero_shot.check_classifier_folder(save_classifier)
    loaded = zero_shot.load_classifier(classifier) if classifier is not None else None
    model = load_clip(clip).to(choose_device(device))
    ready = ready_classifier(model, loaded, names, texts)
    if save_classifier is not None:
        zero_shot.save_classifier(ready, save_classifier)
    with progress_bar("classifying") as bar:
        found = zero_shot.classify_files(model, ready, pictures, top, report=moving(bar))
    for _, reason in found.skipped:
        say("skipped", reason)
    if as_json:
        entries = [
            {"path": str(path), "classes": [{"name": name, "probability": round(value, 6)} for name, value in likely]}
            for path, likely in found.pictures
        ]
        skipped = [{"path": str(path), "reason": reason} for path, reason in found.skipped]
        document = {"clip": clip, "classes": list(ready.names), "templates": list(ready.templates)}
        show(json.dumps({**document, "pictures": entries, "skipped": skipped}, indent=2))
    else:
        for path, likely in found.pictures:
            show(f"{path}\n" + "\n".join(f"  {value:6.1%}  {name}" for name, value in likely))


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
