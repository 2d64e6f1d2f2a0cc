"""`genpipe evaluate distance`: how far a folder of drawn pictures lies from real ones."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from genpipe.errors import InputError
from pipelines import request
from pipelines.options import DeviceOption, JsonOption, ObjectsOption
from pipelines.terminal import moving, progress_bar, say, show

if TYPE_CHECKING:
    from genpipe.data.scenes import Objects
    from genpipe.evaluation.features import Eye, FileFeatures

SCENES = "scenes"
LEAST_SCENES = 256
SIDES = 8, 2048  # of pictures of scenes


def evaluate_distance(
    drawn: Annotated[
        Path, typer.Argument(metavar="DRAWN", help="A folder of drawn pictures, sub-folders too.", show_default=False)
    ],
    real: Annotated[
        str,
        typer.Argument(
            metavar="REAL",
            help="A folder of real ones, or the word scenes for held-out emoji scenes, as many as were drawn, at least "
            f"{LEAST_SCENES}.",
            show_default=False,
        ),
    ],
    features: Annotated[
        str,
        typer.Option(
            help="What looks at the pictures: judge (emoji scenes), inception (FID's; needs the package torch-fidelity "
            "and its weights), or a CLIP as `genpipe rerank` takes it."
        ),
    ] = "judge",
    objects: ObjectsOption = "common",
    k: Annotated[int, typer.Option(help="Neighbours that span the manifolds of precision and recall.")] = 3,
    one_each: Annotated[
        bool,
        typer.Option(
            "--one-each", help="DRAWN is a report of `genpipe evaluate FAMILY`: take one picture a prompt, unranked."
        ),
    ] = False,
    inception: Annotated[
        Path | None,
        typer.Option(help="File of InceptionV3's weights.", show_default="where torch keeps its downloads"),
    ] = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Frechet distance (FID's formula), CMMD, precision and recall of drawn pictures against real ones.

    With inception the first is FID; with a CLIP the second is the paper's CMMD, with others its formula. Compare only
    runs of as many pictures of the same prompts.
    """
    request.check_positive("The number of neighbours", k)
    scenes = real == SCENES and not Path(real).exists()
    from genpipe.data.scenes import EmojiScenes, find_font
    from genpipe.images import find_pictures

    drawn_files = first_of_each(drawn) if one_each else find_pictures([_folder(drawn)])
    real_files = None if scenes else find_pictures([_folder(Path(real))])
    if scenes:
        find_font()
        EmojiScenes(objects=cast("Objects", objects))  # others are refused before anything is looked at
    from genpipe.evaluation.distribution import distribution_figures

    warn_of_the_own_clip(features, drawn, drawn_files[0])
    eye = load_eye(features, inception, device)
    ours, theirs = look_at_both(eye, drawn_files, real_files, cast("Objects", objects))
    counts = {"drawn": len(ours.features), "real": len(theirs.features)}
    width = ours.features.shape[1]
    figures = distribution_figures(theirs.features, ours.features, k)
    if min(counts.values()) <= width:
        say(
            "warning",
            f"{min(counts.values())} pictures are few for {width} features each; the Frechet distance comes out too "
            "large, so compare it with that of as many others only.",
        )
    document = {
        "drawn": str(drawn), "real": real, "features": features, "width": width, "pictures": counts,
        "skipped": {"drawn": len(ours.skipped), "real": len(theirs.skipped)}, **figures, "k": k,
    }  # fmt: skip
    show(json.dumps(document, indent=2) if as_json else as_text(document))


def as_text(document: dict[str, Any]) -> str:
    """The figures for a person."""
    counts = document["pictures"]
    return (
        f"{counts['drawn']:,} drawn, {counts['real']:,} real pictures; {document['width']} features each "
        f"({document['features']})\n"
        f"Frechet distance  {document['frechet_distance']:.4g}\n"
        f"CMMD              {document['cmmd']:.4g}\n"
        f"precision         {document['precision']:.3f}\n"
        f"recall            {document['recall']:.3f}"
    )


def look_at_both(
    eye: "Eye", drawn: list[Path], real: list[Path] | None, objects: "Objects"
) -> "tuple[FileFeatures, FileFeatures]":
    """Features of drawn and of real pictures; real is None for emoji scenes. Names the files that cannot be read."""
    from genpipe.evaluation.features import FileFeatures, features_of_files, features_of_scenes

    with progress_bar("drawn pictures") as bar:
        ours = features_of_files(eye, drawn, moving(bar))
    with progress_bar("real pictures") as bar:
        if real is None:
            count = max(LEAST_SCENES, len(ours.features))
            theirs = FileFeatures(features_of_scenes(eye, count, _side_of(drawn), objects, moving(bar)), [])
        else:
            theirs = features_of_files(eye, real, moving(bar))
    for _, reason in [*ours.skipped, *theirs.skipped]:
        say("skipped", reason)
    return ours, theirs


def load_eye(features: str, inception: Path | None, device: str) -> "Eye":
    """What --features names. Raises InputError for a CLIP that is none, and what is not installed."""
    from genpipe.evaluation import features as eyes
    from genpipe.evaluation.composition import load_detector
    from pipelines.devices import choose_device
    from pipelines.ranking import load_clip

    place = choose_device(device)
    if inception is not None and features != "inception":
        raise InputError("--inception names the weights of --features inception; give both, or neither.")
    if features == "inception":
        return eyes.inception_eye(inception, place)
    if features == "judge":
        return eyes.judge_eye(load_detector().to(place))
    return eyes.clip_eye(load_clip(features).to(place))


def warn_of_the_own_clip(features: str, drawn: Path, picture: Path) -> None:
    """Say so where the pictures are known to be of the very family whose CLIP looks at them."""
    family = _drawn_by(drawn, picture)
    named = features
    if (Path(features) / "family.json").is_file():
        from pipelines.family import describe_family

        named = describe_family(features).name
    if family is not None and named == family:
        say("warning", f"the CLIP of {family} ranked or guided these pictures; it is no independent judge of them")


def _drawn_by(drawn: Path, picture: Path) -> str | None:
    """The name of the family that drew a folder of pictures, as its report or the recipe of a picture tells it."""
    from genpipe.images import read_recipe
    from genpipe.json_files import peek_json

    for folder in (drawn, drawn.parent):
        settings = peek_json(folder / "settings.json")
        if isinstance(settings.get("family"), str) and "pipeline" in settings:
            return settings["family"]
    try:
        family = read_recipe(picture).get("family")
    except InputError:
        return None
    name = family.get("name") if isinstance(family, dict) else None
    return name if isinstance(name, str) else None


def first_of_each(folder: Path) -> list[Path]:
    """Of a report of `genpipe evaluate` the first candidate of each prompt, whatever CLIP thinks of it.

    Raises InputError for any other folder, and where only the best of more candidates were kept.
    """
    from genpipe.json_files import peek_json

    seed = peek_json(folder / "settings.json").get("seed")
    found: dict[int, Path] = {}
    try:
        for line in (folder / "verdicts.jsonl").read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # a run that was cut short there, and went on
                continue
            files = [picture["file"] for picture in entry["pictures"] if picture["seed"] == seed]
            if not files:
                raise InputError(
                    f"The report {str(folder)!r} kept only the best of its candidates; draw with --candidates 1."
                )
            found[entry["number"]] = folder / "pictures" / Path(files[0]).name
    except (OSError, LookupError, TypeError, UnicodeDecodeError) as error:
        raise InputError(
            f"{str(folder)!r} is no report of genpipe evaluate, which --one-each needs; give such a folder."
        ) from error
    if not found:
        raise InputError(f"The report {str(folder)!r} holds no pictures yet.")
    return [found[number] for number in sorted(found)]


def _folder(path: Path) -> Path:
    if path.exists() and not path.is_dir():
        raise InputError(f"{str(path)!r} is a file; give a folder of pictures.")
    return path


def _side_of(files: list[Path]) -> int:
    """The side of the first picture that can be read: scenes drawn at it pass through the same resize."""
    from genpipe.images import open_picture

    for path in files:
        try:
            return min(max(min(open_picture(path).size), SIDES[0]), SIDES[1])
        except InputError:
            continue
    return SIDES[0]
