"""Measures the three image-text heads on two tasks of emoji scenes, and prints the table.

python docs/image_text_heads.py [--clip CLIP] [--pairs 4000] [--seeds 3] [--tuned-seeds 1] [--out FILE.json]

Tasks. parts: which parts of the text are true of the picture, the object, the background, both or neither; each class
needs both. fits: does the text fit the picture, or is it the caption of its twin, which differs in order (swapped),
axis (turned), count (recounted) or background (recoloured) alone. Trained on the split "train", tested on "heldout".
"""

import argparse
import contextlib
import csv
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from genpipe.clip.image_text import ImageTextClassifier, build_sum_classifier, load_image_text_classifier
from genpipe.clip.model import CLIP
from genpipe.data.captions import Wording, write_caption
from genpipe.data.labelled_pairs import LabelledPairs
from genpipe.data.scenes import EmojiScenes, is_held_out
from genpipe.evaluation.clip import TWIN_KINDS
from genpipe.evaluation.image_text import PairTable, classify_pairs, tabulate
from genpipe.training.config import apply_overrides
from genpipe.training.loop import Trainer
from genpipe.training.recipes import recipe
from pipelines.ranking import load_clip

TASKS = ("parts", "fits")
HEADS = ("sum", "mlp", "transformer")
# A transformer sees nothing in the pairs for a long while, and then all at once; a tuned step costs as much as one of
# CLIP's own training, so tuning begins with the frozen run's head (2202.10054).
FROZEN_STEPS = {"sum": 2000, "mlp": 2000, "transformer": 3000}
TUNED_STEPS = 200


class Pair(NamedTuple):
    pixels: np.ndarray
    text: str
    label: str
    kind: str


def parts(scenes: EmojiScenes, index: int) -> Pair:
    """A single object or several of it, and the caption of a scene that may have another object or background."""
    generator = np.random.default_rng((scenes.seed, 10, index))
    scene = scenes.scene(int(generator.integers(1 << 30)))
    while scene.kind == "pair":
        scene = scenes.scene(int(generator.integers(1 << 30)))
    same = same_object, same_background = index % 4 < 2, index % 2 == 0
    while True:
        name, background = str(generator.choice(scenes.objects)), str(generator.choice(scenes.backgrounds))
        told = replace(
            scene,
            objects=scene.objects if same_object else (name,),
            background=scene.background if same_background else background,
        )
        found = (told.objects == scene.objects, told.background == scene.background)
        if found == same and (scenes.split != "train" or not is_held_out(told)):
            break
    label = (
        ("both" if same_background else "object") if same_object else ("background" if same_background else "neither")
    )
    return Pair(scenes.draw(scene), write_caption(told, Wording.draw(generator), True, False), label, label)


def fits(scenes: EmojiScenes, index: int) -> Pair:
    """A scene or its twin, and the caption of one of the two."""
    kind = TWIN_KINDS[index // 4 % len(TWIN_KINDS)]
    twins = scenes.twins(index, kind)
    first, fitting = index % 2 == 0, index % 4 < 2
    text = twins.caption if first == fitting else twins.twin_caption
    return Pair(twins.pixels if first else twins.twin_pixels, text, "yes" if fitting else "no", kind)


def write_pairs(folder: Path, task: str, split: str, count: int, first: int = 0) -> tuple[Path, list[str]]:
    """A folder of PNG files with pairs.csv, as anybody's own pairs would come; and the kinds of the pairs."""
    folder.mkdir(parents=True)
    scenes = EmojiScenes(split=split)
    kinds = []
    with open(folder / "pairs.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "text", "label"])
        for index in range(first, first + count):
            pair = {"parts": parts, "fits": fits}[task](scenes, index)
            Image.fromarray(pair.pixels).save(folder / f"{index}.png")
            rows.writerow([f"{index}.png", pair.text, pair.label])
            kinds.append(pair.kind)
    return folder / "pairs.csv", kinds


class Task(NamedTuple):
    """Files of a task, and CLIP's features of them, computed once for all frozen heads."""

    name: str
    train: Path
    validation: Path
    test: LabelledPairs
    kinds: list[str]
    tables: list[PairTable]  # of train, validation, test


def prepare(clip: CLIP, folder: Path, name: str, pairs: int) -> Task:
    train, _ = write_pairs(folder / "train", name, "train", pairs)
    validation, _ = write_pairs(folder / "validation", name, "train", max(pairs // 8, 40), first=10**6)
    test, kinds = write_pairs(folder / "test", name, "heldout", max(pairs // 4, 80))
    sets = [LabelledPairs(file) for file in (train, validation, test)]
    tables = [tabulate(clip, pairs, range(len(pairs)), states=True) for pairs in sets]
    return Task(name, train, validation, sets[2], kinds, tables)


def accuracies(logits: torch.Tensor, task: Task) -> dict[str, float]:
    """Of all test pairs, and of those of each kind."""
    right = logits.argmax(dim=1) == task.tables[2].labels
    kinds = np.array(task.kinds)
    return {"all": float(right.float().mean())} | {
        kind: float(right[torch.from_numpy(kinds == kind)].float().mean()) for kind in dict.fromkeys(task.kinds)
    }


@torch.no_grad()
def of_table(classifier: ImageTextClassifier, table: PairTable) -> torch.Tensor:
    places = torch.arange(len(table.labels)).split(256)
    return torch.cat([classifier.head(table.at(place, classifier.clip.device)) for place in places])


def train(
    task: Task, clip: CLIP, clip_name: str, kind: str, init: Path | None, seed: int, folder: Path
) -> dict[str, float]:
    """One run of the recipe, whose best head is tested; with `init`, a head, that one and its CLIP are tuned."""
    tune = init is not None
    steps = TUNED_STEPS if tune else FROZEN_STEPS[kind]
    changes = {
        "data.source": task.train,
        "data.validation": task.validation,
        "objective.clip": clip_name,
        "objective.head": kind,
        "objective.tune": str(tune).lower(),
        "run.seed": seed,
        "data.seed": seed,
        "init": init or "",
        "model.width": 64 if kind == "transformer" else 128,
        "optimizer.learning_rate": 3e-4 if tune else 1e-3,
        "objective.patience": 0,  # a plateau would end a transformer's run; the best weights count all the same
        "run.steps": steps,
        "run.validate_every": steps // 10,
        "run.batch_size": 32,
        "run.threads": torch.get_num_threads(),
    }
    settings = apply_overrides(recipe("image-text"), [f"{key}={value}" for key, value in changes.items()])
    with open(f"{folder}.log", "w") as log, contextlib.redirect_stderr(log):
        trainer = Trainer(settings, folder)
        if not tune:  # what the stage would compute itself
            trainer.stage.table, trainer.stage.held_table = task.tables[:2]
        result = trainer.run()
    if result.interrupted:  # half a run is no figure
        raise KeyboardInterrupt
    classifier = load_image_text_classifier(result.part, None if tune else clip)
    logits = classify_pairs(classifier, task.test)[0] if tune else of_table(classifier, task.tables[2])
    return {**accuracies(logits, task), "step": result.step}


def untrained(task: Task, clip: CLIP) -> Iterator[tuple[str, dict[str, float]]]:
    """What needs no head to be trained: class prompts, and for `fits` a threshold on CLIP's own similarity."""
    names = task.test.names
    head = build_sum_classifier(clip, names)
    yield "sum, class prompts", accuracies(of_table(ImageTextClassifier(clip, head), task.tables[2]), task)
    if task.name != "fits":
        return
    cosines = [(t.features.image_embedding * t.features.text_embedding).sum(dim=1) for t in task.tables]
    yes = names.index("yes")
    bounds = cosines[0].sort().values
    hits = [((cosines[0] > bound) == (task.tables[0].labels == yes)).float().mean() for bound in bounds]
    says_yes = cosines[2] > bounds[int(torch.stack(hits).argmax())]
    logits = torch.stack([says_yes if number == yes else ~says_yes for number in range(2)], dim=1).float()
    yield "CLIP's similarity, one threshold", accuracies(logits, task)


def shown(runs: list[dict[str, float]], key: str) -> str:
    """Mean and, of several runs, the standard deviation, in per cent."""
    values = 100 * np.array([run[key] for run in runs])
    return f"{values.mean():.1f}" + (f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the image-text heads.")
    parser.add_argument("--clip", default="nano", help="a family or the folder of a CLIP")
    parser.add_argument("--pairs", type=int, default=4000, help="to train on; an eighth to validate, a quarter to test")
    parser.add_argument("--seeds", type=int, default=3, help="of every frozen head")
    parser.add_argument("--tuned-seeds", type=int, default=1, help="of every head with a fine-tuned CLIP")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=HEADS)
    parser.add_argument("--out", type=Path, help="write all figures to this JSON file")
    arguments = parser.parse_args()
    clip, figures = load_clip(arguments.clip), {}
    with tempfile.TemporaryDirectory() as root:
        for name in arguments.tasks:
            began = time.monotonic()
            task = prepare(clip, Path(root) / name, name, arguments.pairs)
            kinds = ["all", *dict.fromkeys(task.kinds)]
            print(f"\n{name}: {len(task.tables[0].labels)} pairs to train on, {len(task.kinds)} to test\n")
            print(
                f"| head | CLIP | seeds | {' | '.join(kinds)} | minutes |\n|{' --- |' * (len(kinds) + 4)}", flush=True
            )
            rows = {(label, "frozen"): [found] for label, found in untrained(task, clip)}
            for key, found in rows.items():
                print("| " + " | ".join([*key, "", *(shown(found, kind) for kind in kinds), ""]) + " |", flush=True)
            for head in arguments.heads:
                for tune, seeds in ((False, arguments.seeds), (True, arguments.tuned_seeds)):
                    began, key = time.monotonic(), (head, "tuned" if tune else "frozen")
                    rows[key] = []
                    for seed in range(seeds):
                        frozen = Path(root) / f"{name}-{head}-{seed}"
                        init, folder = (frozen / "head", Path(f"{frozen}-tuned")) if tune else (None, frozen)
                        rows[key].append(train(task, clip, arguments.clip, head, init, seed, folder))
                    figures[name] = {", ".join(key): found for key, found in rows.items()}
                    if arguments.out is not None:
                        arguments.out.write_text(json.dumps({"clip": arguments.clip, **figures}, indent=1))
                    if seeds:
                        cells = [*key, str(seeds), *(shown(rows[key], kind) for kind in kinds)]
                        minutes = f"{(time.monotonic() - began) / 60:.1f}"
                        print("| " + " | ".join([*cells, minutes]) + " |", flush=True)


if __name__ == "__main__":
    main()
