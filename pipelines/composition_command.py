"""`genpipe evaluate FAMILY`: draws pictures of held-out prompts, has them judged, writes the report."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from genpipe.errors import InputError
from pipelines import request
from pipelines.options import DeviceOption, JsonOption, ObjectsOption
from pipelines.terminal import INTERRUPTED, Interrupt, polite_interrupt, progress_bar, say, show

if TYPE_CHECKING:
    from genpipe.data.scenes import Objects
    from genpipe.evaluation.composition import TaskPrompt
    from genpipe.evaluation.detector import SceneDetector
    from genpipe.evaluation.report import RunFolder
    from pipelines.family_info import FamilyInfo

PICTURES = 4  # of each prompt that are judged (2310.11513, 3)
PROMPTS_AT_ONCE = 4
LONGEST_FILE = 10_000_000  # bytes of a file of prompts


def evaluate_family(
    family: Annotated[str, typer.Argument(metavar="FAMILY", help="A shipped family, a folder, or a Hub id.")] = "nano",
    pipeline: Annotated[str | None, typer.Option(help="dalle1 or dalle2.", show_default="all that it has")] = None,
    candidates: Annotated[
        int, typer.Option(help=f"Pictures drawn per prompt; the best {PICTURES} as they are ranked are judged, or all.")
    ] = 16,
    per_task: Annotated[int, typer.Option(help="Prompts for each of the six tasks.")] = 100,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Draw the lines of this text file instead; only CLIP judges.", show_default=False),
    ] = None,
    objects: ObjectsOption = "common",
    curve: Annotated[
        bool,
        typer.Option("--curve", help="Judge every candidate, before upsampling: what the best of 1, 2, 4 ... are."),
    ] = False,
    summary: Annotated[
        Path | None, typer.Option(help="JSON list that the figures are added to.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the prompts, and of the first candidate of each.")] = 0,
    out: Annotated[
        Path, typer.Option(help="Folder of the reports; the same command goes on where it was cut short.")
    ] = Path("genpipe-evaluation"),
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Whether a family's pictures show what their prompts say, on six tasks of held-out emoji scenes.

    Single object, two objects, counting, background, position, all together. With 1 candidate nothing is ranked: four
    pictures are drawn and judged as they come.
    """
    request.check_positive("The number of prompts per task", per_task)
    request.check_positive("The number of candidates", candidates)
    request.check_counts(max(candidates, PICTURES), PICTURES, seed, None)
    texts = None if prompts is None else prompts_of(prompts)
    check_summary(summary, curve, texts is not None)
    from genpipe.evaluation.composition import detector_accuracy, load_detector, task_prompts
    from genpipe.evaluation.summary import add_to_summary
    from genpipe.identity import weights_identity
    from pipelines.family_info import describe_family

    kind = cast("Objects", objects)
    judged = task_prompts(per_task, seed, kind) if texts is None else None
    described = describe_family(family)
    names = described.pipelines if pipeline is None else [pipeline]
    for name in names:
        described.check_has(name)
    detector = load_detector() if judged is not None else None
    settings = {
        "candidates": candidates, "seed": seed, "prompts": per_task if texts is None else texts,
        "objects": objects if texts is None else None, "curve": curve,
        "judge": None if detector is None else weights_identity(detector),
    }  # fmt: skip
    folders = {name: run_folder(out, described, name, settings) for name in names}
    from pipelines.devices import choose_device
    from pipelines.family import load_family

    accuracy = {} if detector is None else detector_accuracy(detector, objects=kind)
    loaded = load_family(described.folder, device=choose_device(device), pipelines=names)
    texts = texts or [each.prompt for each in judged or []]
    summaries = []
    with polite_interrupt() as interrupt:
        for name in names:
            if curve and not loaded.pipeline(name).ranks:
                raise InputError(f"{described.name} has no CLIP that ranks its pictures; leave --curve out.")
            drawn = draw(loaded.pipeline(name), texts, judged, detector, folders[name], candidates, seed, interrupt)
            if not drawn:
                say("interrupted", f"{out} keeps what is finished; the same command goes on there")
                raise typer.Exit(INTERRUPTED)
            summaries.append(folders[name].finish(texts, judged, accuracy))
    if summary is not None:
        add_to_summary(summary, summaries)
    show(json.dumps(summaries, indent=2) if as_json else "\n".join(as_text(each) for each in summaries))
    if not as_json:
        show(f"reports: {', '.join(str(folder.folder / 'report.html') for folder in folders.values())}")


def check_summary(path: Path | None, curve: bool, unjudged: bool) -> None:
    """Raise InputError, before anything is drawn, for a summary that cannot be written or has nothing to say."""
    from genpipe.evaluation.summary import read_summary

    if path is None:
        return
    if curve or unjudged:
        raise InputError("A summary holds the scores of kept pictures: give --summary without --curve and --prompts.")
    read_summary(path)


def run_folder(out: Path, family: "FamilyInfo", pipeline: str, settings: dict[str, Any]) -> "RunFolder":
    """Where the report of one pipeline goes, for all that its pictures and verdicts depend on."""
    from genpipe.evaluation.report import RunFolder

    whole = {
        "family": family.name, "hash": family.hash_of(pipeline, ranked=True), "pipeline": pipeline, **settings,
        "defaults": family.defaults.get(pipeline, {}),
    }  # fmt: skip
    return RunFolder(out / f"{pipeline}-{settings['candidates']}{'-curve' if settings['curve'] else ''}", whole)


def prompts_of(path: Path) -> list[str]:
    """The lines of a text file, empty ones left out. Raises InputError where there are none, or it is no text."""
    try:
        if path.stat().st_size > LONGEST_FILE:
            raise InputError(
                f"{str(path)!r} is larger than {LONGEST_FILE:,} bytes; give a file of prompts, one a line."
            )
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{str(path)!r} cannot be read as a file of prompts ({error}); it is UTF-8, one a line."
        ) from error
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise InputError(f"{str(path)!r} holds no prompt; write one on each line.")
    return request.check_prompts(texts)


def draw(
    pipeline: Any,
    texts: list[str],
    judged: "list[TaskPrompt] | None",
    detector: "SceneDetector | None",
    folder: "RunFolder",
    candidates: int,
    seed: int,
    interrupt: Interrupt,
) -> bool:
    """Draw and judge the prompts that the folder does not hold yet; False where Ctrl-C ended it."""
    from genpipe.evaluation.composition import judged as judge_pictures
    from genpipe.evaluation.report import record
    from genpipe.images import to_unit

    curve = bool(folder.settings["curve"])
    sampling = pipeline.resolve_sampling({"upsample": False}) if curve else None
    missing = [number for number in range(len(texts)) if number not in folder.done()]
    with progress_bar(f"{folder.settings['pipeline']}, best of {candidates}", len(texts)) as bar:
        bar.n = len(texts) - len(missing)
        bar.refresh()
        for start in range(0, len(missing), PROMPTS_AT_ONCE):
            numbers = missing[start : start + PROMPTS_AT_ONCE]
            output = pipeline(
                [texts[number] for number in numbers],
                num_candidates=max(candidates, PICTURES),
                keep=max(candidates, PICTURES) if curve else PICTURES,
                seed=seed,
                sampling=sampling,
                callback=lambda progress: interrupt.pressed,
            )
            if not output.complete:
                return False
            for row, number in enumerate(numbers):
                pictures = output.images[row]
                verdicts: list[Any] = [None] * len(pictures)
                if judged is not None and detector is not None:
                    verdicts = judge_pictures(detector, [judged[number]] * len(pictures), to_unit(pictures))
                records = [
                    record(verdict, score, own)
                    for verdict, score, own in zip(verdicts, output.scores[row], output.seeds[row], strict=True)
                ]
                folder.add(number, pictures, records)
            bar.update(len(numbers))
    return True


def as_text(summary: dict[str, Any]) -> str:
    """A summary for a person."""
    score = "not ranked" if summary["clip_score"] is None else f"CLIP's mean score {summary['clip_score']:.3f}"
    lines = [f"{summary['family']}, {summary['pipeline']}, best of {summary['candidates']}: {score}"]
    if "tasks" in summary:
        lines += [
            f"  {task:<14} {value:.3f}" for task, value in {**summary["tasks"], "overall": summary["overall"]}.items()
        ]
        judge = ", ".join(f"{name} {value:.3f}" for name, value in summary["detector_accuracy"].items())
        lines.append(f"  the judge on real scenes, wrong prompts and noise: {judge}")
    return "\n".join(lines)
