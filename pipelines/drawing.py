"""`genpipe generate`: prompt after prompt drawn by one pipeline or both, saved with its recipes, and told about."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

import genpipe
from pipelines.family import Family
from pipelines.output import OutputFolder, SavedPictures
from pipelines.recipe import recipe_of_call
from pipelines.request import GenerationOutput, Progress
from pipelines.terminal import polite_interrupt, progress_bar, show


@dataclass(frozen=True)
class Job:
    """What `genpipe generate` was asked for; `settings`: pipeline -> the settings that were given for it."""

    settings: Mapping[str, Mapping[str, Any]]
    prompts: Sequence[str]
    candidates: int
    keep: int
    seed: int
    image: Image.Image | None = None  # whose embedding DALL-E 2 draws from, or with `fill` the picture with the holes
    fill: Image.Image | None = None

    @property
    def given(self) -> dict[str, Any]:
        """The pictures that were given, as the pipeline takes them."""
        pictures = {"image": self.image, "fill": self.fill}
        return {name: picture for name, picture in pictures.items() if picture is not None}


@dataclass(frozen=True)
class Drawn:
    """What one pipeline made of one prompt; `complete` is False where Ctrl-C stopped it before all was drawn.

    beside: the picture that shows this prompt by both pipelines, told about with the second of them.
    """

    pipeline: str
    prompt: str
    saved: SavedPictures
    output: GenerationOutput = field(repr=False)
    beside: Path | None = None

    @property
    def complete(self) -> bool:
        return self.output.complete

    def to_json(self) -> dict[str, Any]:
        """For --json."""
        rows = zip(self.saved.pictures, self.output.scores[0], self.output.seeds[0], strict=True)
        return {
            "prompt": self.prompt,
            "complete": self.complete,
            "grid": str(self.saved.grid) if self.saved.grid is not None else None,
            "pictures": [
                {"path": str(path), "score": None if score is None else round(score, 6), "seed": seed}
                for path, score, seed in rows
            ],
        }

    def to_text(self) -> str:
        """For a person."""
        rows = zip(self.saved.pictures, self.output.scores[0], self.output.seeds[0], strict=True)
        lines = [f"  {path}{_told(score)}  seed {seed}" for path, score, seed in rows]
        grids = [f"  {path}" for path in (self.saved.grid, self.beside) if path is not None]
        return "\n".join([f"{self.prompt or 'the given picture'}  ({self.pipeline})", *lines, *grids])


def _told(score: float | None) -> str:
    return "" if score is None else f"  score {score:.4f}"


def draw(family: Family, job: Job, folder: OutputFolder) -> Iterator[Drawn]:
    """Draw and save one prompt after another, with a progress bar. Ctrl-C ends it after what is finished was saved.

    Raises InputError as the pipelines do, and where a picture cannot be written.
    """
    pipelines: dict[str, Any] = {name: family.pipeline(name) for name in job.settings}
    extra = job.given
    samplings = {name: pipelines[name].resolve_sampling(given, **extra) for name, given in job.settings.items()}
    tasks = [(prompt, name) for prompt in job.prompts for name in pipelines]
    before: list[Drawn] = []  # of the same prompt
    with polite_interrupt() as interrupt, progress_bar("drawing", total=len(tasks)) as bar:
        for number, (prompt, name) in enumerate(tasks):

            def follow(progress: Progress, number: int = number) -> bool:
                bar.n = number + progress.fraction
                bar.refresh()
                return interrupt.pressed

            candidates = job.candidates if pipelines[name].ranks else job.keep  # as many as it draws
            output = pipelines[name](
                prompt, candidates, job.keep, job.seed, sampling=samplings[name], callback=follow, **extra
            )
            recipe = recipe_of_call(family, name, samplings[name], prompt, job.seed, candidates, **extra)
            ranked = list(zip(output.scores[0], output.seeds[0], strict=True))
            recipes = [dataclasses.replace(recipe, seed=seed, score=score) for score, seed in ranked]
            saved = folder.save(output.images[0], recipes) if ranked else SavedPictures([], None)
            drawn = Drawn(name, prompt, saved, output)
            before.append(drawn)
            if len(before) == len(pipelines):
                if len(before) > 1 and all(each.saved.pictures for each in before):
                    rows = {each.pipeline: (each.saved, each.output.images[0]) for each in before}
                    drawn = dataclasses.replace(drawn, beside=folder.save_beside(rows, recipe.to_json()))
                before = []
            yield drawn
            if interrupt.pressed:
                return


def draw_and_show(family: Family, job: Job, folder: OutputFolder, as_json: bool) -> tuple[bool, int]:
    """Do the job and tell a person about each prompt, or a program about all of them at the end, on standard output.

    Returns whether all was drawn, and how many pictures were written.
    """
    drawn = []
    for each in draw(family, job, folder):
        drawn.append(each)
        if not as_json and each.saved.pictures:
            show(each.to_text())
    complete = len(drawn) == len(job.prompts) * len(job.settings) and all(each.complete for each in drawn)
    if as_json:
        show(json.dumps(report(family, job, drawn, complete), indent=2))
    return complete, sum(len(each.saved.pictures) for each in drawn)


def report(family: Family, job: Job, drawn: Sequence[Drawn], complete: bool) -> dict[str, Any]:
    """The whole call as one JSON document; `complete` is False where Ctrl-C left prompts or candidates undone.

    Where several pipelines drew, one such document for each of them, and the pictures that show both.
    """
    names = list(job.settings)
    if len(names) == 1:
        return {"genpipe": genpipe.__version__, **_report_of(family, job, names[0], drawn, complete)}
    beside = [{"prompt": each.prompt, "path": str(each.beside)} for each in drawn if each.beside is not None]
    return {
        "genpipe": genpipe.__version__,
        "complete": complete,
        "pipelines": [_report_of(family, job, name, drawn, complete) for name in names],
        "side_by_side": beside,
    }


def _report_of(family: Family, job: Job, name: str, drawn: Sequence[Drawn], complete: bool) -> dict[str, Any]:
    pipeline: Any = family.pipeline(name)
    sampling = pipeline.resolve_sampling(job.settings[name], **job.given)
    return {
        "family": {"name": family.name, "hash": family.hash_of(name, bool(sampling.upsample))},
        "pipeline": name,
        "ranked": pipeline.ranks,
        "settings": dataclasses.asdict(sampling),
        "complete": complete,
        "results": [each.to_json() for each in drawn if each.pipeline == name],
    }
