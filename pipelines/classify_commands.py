"""The verb that classifies with CLIP: classify."""

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
    from genpipe.clip.zero_shot import ClassifiedFiles, ZeroShotClassifier

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


def register(app: typer.Typer) -> None:
    """Give the command this verb."""
    app.command()(classify)


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


def check_head(head: Path | None, text: str | None, **others: Any) -> None:
    """Raise InputError unless --head and --text come together, and without flags that a head makes meaningless."""
    if head is None and text is None:
        return
    if text is None:
        raise InputError('A head reads a picture and a text together; give the text with --text "...".')
    if head is None:
        raise InputError("--text needs a head that reads it; name its folder with --head.")
    given = [f"--{name.replace('_', '-')}" for name, value in others.items() if value]
    if given:
        raise InputError(f"A head has its classes already; leave out {' and '.join(given)}.")


def classify_pairs(
    pictures: list[Path], text: str, head: Path, clip: str, device: str, top: int
) -> "tuple[ClassifiedFiles, dict[str, Any]]":
    """The classes that an image-text head gives the pictures together with the text; and what else JSON says of it."""
    from genpipe.clip import image_text
    from pipelines.devices import choose_device
    from pipelines.ranking import load_clip
    from pipelines.request import check_prompts

    (text,) = check_prompts(text)
    image_text.load_head(head)  # complains before a CLIP is loaded
    own = image_text.has_own_clip(head)
    if own and clip != "nano":
        raise InputError(f"The head in {str(head)!r} has a CLIP of its own, tuned with it; leave out --clip.")
    classifier = image_text.load_image_text_classifier(head, None if own else load_clip(clip)).to(choose_device(device))
    with progress_bar("classifying") as bar:
        found = image_text.classify_files_with_text(classifier, pictures, text, top, report=moving(bar))
    used = str(head / image_text.CLIP_FOLDER) if own else clip
    return found, {"clip": used, "head": str(head), "text": text, "classes": list(classifier.head.names)}


def show_classified(found: "ClassifiedFiles", document: dict[str, Any], as_json: bool) -> None:
    """The likeliest classes of each picture; in JSON behind the entries of `document`."""
    for _, reason in found.skipped:
        say("skipped", reason)
    if as_json:
        entries = [
            {"path": str(path), "classes": [{"name": name, "probability": round(value, 6)} for name, value in likely]}
            for path, likely in found.pictures
        ]
        skipped = [{"path": str(path), "reason": reason} for path, reason in found.skipped]
        show(json.dumps({**document, "pictures": entries, "skipped": skipped}, indent=2))
    else:
        for path, likely in found.pictures:
            show(f"{path}\n" + "\n".join(f"  {value:6.1%}  {name}" for name, value in likely))


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
    head: Annotated[
        Path | None, typer.Option(help="Folder of a head that `train image-text` made.", show_default=False)
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="With --head: the text that belongs to the pictures.", show_default=False)
    ] = None,
    top: Annotated[int, typer.Option(help="Classes to show per picture, likeliest first.")] = 5,
    clip: ClipOption = "nano",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Say which of the named classes pictures show, without training: CLIP compares them with the classes' names.

    With --head and --text: which of its classes a trained head gives to each picture together with the text.
    """
    from pipelines import request

    check_head(
        head,
        text,
        classes=classes,
        classes_file=classes_file,
        classifier=classifier,
        save_classifier=save_classifier,
        templates=templates,
    )
    refuse_double(
        classifier, classes=classes, classes_file=classes_file, templates=templates, save_classifier=save_classifier
    )
    request.check_positive("The number of classes to show", top)
    if head is not None and text is not None:
        show_classified(*classify_pairs(pictures, text, head, clip, device, top), as_json)
        return
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
    document = {"clip": clip, "classes": list(ready.names), "templates": list(ready.templates)}
    show_classified(found, document, as_json)
