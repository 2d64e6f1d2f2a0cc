"""`genpipe generate`: prompt after prompt drawn, saved with its recipes, and told about."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import genpipe
from pipelines.family import Family
from pipelines.output import OutputFolder, SavedPictures
from pipelines.recipe import recipe_of_call
from pipelines.request import Progress
from pipelines.terminal import polite_interrupt, progress_bar


@dataclass(frozen=True)
class Drawn:
    """What became of one prompt; `complete` is False where Ctrl-C stopped it before all candidates were drawn."""

    prompt: str
    saved: SavedPictures
    scores: list[float]
    seeds: list[int]
    complete: bool

    def to_json(self) -> dict[str, Any]:
        """For --json."""
        rows = zip(self.saved.pictures, self.scores, self.seeds, strict=True)
        return {
            "prompt": self.prompt,
            "complete": self.complete,
            "grid": str(self.saved.grid) if self.saved.grid is not None else None,
            "pictures": [{"path": str(path), "score": round(score, 6), "seed": seed} for path, score, seed in rows],
        }

    def to_text(self) -> str:
        """For a person."""
        rows = zip(self.saved.pictures, self.scores, self.seeds, strict=True)
        lines = [f"  {path}  score {score:.4f}  seed {seed}" for path, score, seed in rows]
        return "\n".join([self.prompt, *lines, *([f"  {self.saved.grid}"] if self.saved.grid is not None else [])])


def draw(
    family: Family,
    pipeline_name: str,
    prompts: Sequence[str],
    folder: OutputFolder,
    *,
    candidates: int,
    keep: int,
    seed: int,
    settings: Mapping[str, Any],
) -> Iterator[Drawn]:
    """Draw and save one prompt after another, with a progress bar. Ctrl-C ends it after what is finished was saved.

    `settings`: the pipeline's sampling settings, None where its default is to be used. Raises InputError as the
    pipeline does, and where a picture cannot be written.
    """
    pipeline = family.pipeline(pipeline_name)
    sampling = pipeline.resolve_sampling(**settings)
    with polite_interrupt() as interrupt, progress_bar("drawing", total=len(prompts)) as bar:
        for number, prompt in enumerate(prompts):

            def follow(progress: Progress, number: int = number) -> bool:
                bar.n = number + progress.fraction
                bar.refresh()
                return interrupt.pressed

            output = pipeline(prompt, candidates, keep, seed, **settings, callback=follow)
            recipe = recipe_of_call(family, pipeline_name, sampling, prompt, seed, candidates)
            ranked = list(zip(output.scores[0], output.seeds[0], strict=True))
            recipes = [dataclasses.replace(recipe, seed=each, score=score) for score, each in ranked]
            saved = folder.save(output.images[0], recipes) if ranked else SavedPictures([], None)
            yield Drawn(prompt, saved, output.scores[0], output.seeds[0], output.complete)
            if interrupt.pressed:
                return


def report(
    family: Family, pipeline_name: str, settings: Mapping[str, Any], drawn: Sequence[Drawn], complete: bool
) -> dict[str, Any]:
    """The whole call as one JSON document; `complete` is False where Ctrl-C left prompts or candidates undone."""
    return {
        "genpipe": genpipe.__version__,
        "family": {"name": family.name, "hash": family.hash_of(pipeline_name)},
        "pipeline": pipeline_name,
        "settings": dataclasses.asdict(family.pipeline(pipeline_name).resolve_sampling(**settings)),
        "complete": complete,
        "results": [each.to_json() for each in drawn],
    }
