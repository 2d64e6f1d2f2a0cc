"""How well zero-shot classification does: top-1, top-5, per class, confusions (CLIP, arXiv 2103.00020, section 3.1).

`python -m genpipe.evaluation.zero_shot CLIP_FOLDER` measures a CLIP on held-out single-object emoji scenes.
Legend: B pictures, C classes, D embedding width.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genpipe.clip.model import CLIP
from genpipe.clip.retrieval import read_for_clip
from genpipe.clip.templates import TEMPLATE_SETS, choose_templates
from genpipe.clip.zero_shot import ZeroShotClassifier, build_classifier, embed_pictures
from genpipe.data.labelled import LabelledPictures
from genpipe.data.scenes import EmojiScenes, Split, find_font
from genpipe.data.vocabulary import vocabulary
from genpipe.errors import InputError
from genpipe.evaluation.confusion import draw_confusion
from genpipe.images import save_png, stack_levels, to_unit
from genpipe.parts import load_part

TOP = 5


@dataclass(frozen=True)
class ClassFigures:
    """One class: how many pictures showed it, and of how many it came first and among the first five."""

    name: str
    count: int
    top1: int
    top5: int


@dataclass(frozen=True)
class ZeroShotFigures:
    """What was counted. `confusions[true, chosen]`: pictures, by numbers of classes; pairs that never occurred lack.

    `skipped`: reason -> pictures that could not be read or had no label.
    """

    classes: tuple[ClassFigures, ...]
    confusions: dict[tuple[int, int], int]
    skipped: dict[str, int]

    @property
    def count(self) -> int:
        """Pictures that were classified."""
        return sum(each.count for each in self.classes)

    @property
    def top1(self) -> float:
        """Share of pictures whose class came first."""
        return sum(each.top1 for each in self.classes) / self.count

    @property
    def top5(self) -> float:
        """Share of pictures whose class was among the first five; with five classes or fewer that is all."""
        return sum(each.top5 for each in self.classes) / self.count

    @property
    def mean_per_class(self) -> float:
        """Top-1 share of each class that has pictures, averaged over these classes."""
        shares = [each.top1 / each.count for each in self.classes if each.count]
        return sum(shares) / len(shares)

    def worst_confusions(self, limit: int = 10) -> list[tuple[str, str, int]]:
        """(true class, class chosen for it, pictures), the most frequent errors first."""
        wrong = [(count, pair) for pair, count in self.confusions.items() if pair[0] != pair[1]]
        wrong.sort(key=lambda entry: (-entry[0], entry[1]))
        return [(self.classes[true].name, self.classes[chosen].name, count) for count, (true, chosen) in wrong[:limit]]

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON; confusions as [true, chosen, pictures] by numbers of classes."""
        return {
            "pictures": self.count,
            "top1": self.top1,
            "top5": self.top5,
            "mean_per_class": self.mean_per_class,
            "per_class": [
                {
                    "class": each.name,
                    "pictures": each.count,
                    "top1": each.top1 / each.count if each.count else None,
                    "top5": each.top5 / each.count if each.count else None,
                }
                for each in self.classes
            ],
            "confusions": [[true, chosen, count] for (true, chosen), count in sorted(self.confusions.items())],
            "skipped": dict(self.skipped),
        }

    def to_text(self) -> str:
        """A few lines for people: the shares, the ten worst classes, the ten most frequent confusions."""
        seen = [each for each in self.classes if each.count]
        lines = [
            f"top-1 {self.top1:.1%}, top-5 {self.top5:.1%} of {self.count:,} pictures among {len(self.classes):,} "
            f"classes; mean of the {len(seen):,} classes with pictures {self.mean_per_class:.1%}"
        ]
        for each in sorted(seen, key=lambda each: (each.top1 / each.count, -each.count, each.name))[:10]:
            lines.append(f"  {each.top1 / each.count:6.1%} of {each.count:,} {each.name}")
        lines += [f"  {true} taken for {chosen}: {count:,}" for true, chosen, count in self.worst_confusions()]
        return "\n".join(lines)


class Tally:
    """Counts first and first-five choices, chunk by chunk."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)
        self._counted: tuple[Counter[int], Counter[int], Counter[int]] = (Counter(), Counter(), Counter())
        self._confusions: Counter[tuple[int, int]] = Counter()

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Logits (B, C) and the true classes (B,)."""
        best = logits.topk(min(TOP, len(self.names))).indices.cpu()  # B, 5
        among = best == labels.cpu()[:, None]
        for label, first, in_1, in_5 in zip(
            labels.tolist(), best[:, 0].tolist(), among[:, 0].tolist(), among.any(dim=1).tolist(), strict=True
        ):
            for counter, hit in zip(self._counted, (1, in_1, in_5), strict=True):
                counter[label] += int(hit)
            self._confusions[label, first] += 1

    def figures(self, skipped: dict[str, int] | None = None) -> ZeroShotFigures:
        """What was counted so far; raises InputError if that is nothing."""
        if not self._confusions:
            raise InputError("There was no picture to classify.")
        count, top1, top5 = self._counted
        classes = tuple(ClassFigures(name, count[i], top1[i], top5[i]) for i, name in enumerate(self.names))
        return ZeroShotFigures(classes, dict(self._confusions), dict(skipped or {}))


def evaluate(
    clip: CLIP,
    classifier: ZeroShotClassifier,
    data: LabelledPictures,
    chunk_size: int = 64,
    report: Callable[[int, int], None] | None = None,
) -> ZeroShotFigures:
    """Classify all pictures of `data`, listed with the classifier's names; broken ones are skipped and counted.

    `report(read, total)` is called after each picture. Raises InputError where the classes differ or no picture can be
    read.
    """
    if tuple(data.names) != classifier.names:
        raise InputError("The data are labelled with other classes than the classifier has; list them with its names.")

    def examples() -> Iterator[tuple[Tensor, int]]:
        for example in data.read(lambda path: read_for_clip(clip, path)):
            yield example
            if report is not None:
                report(data.report().read, len(data))

    figures = measure(clip, classifier, examples(), chunk_size)
    return ZeroShotFigures(figures.classes, figures.confusions, dict(data.report().skipped))


@torch.no_grad()
def measure(
    clip: CLIP, classifier: ZeroShotClassifier, examples: Iterable[tuple[Tensor, int]], chunk_size: int = 64
) -> ZeroShotFigures:
    """Classify a stream of (pixels (3, H, W) in [0, 1], number of the true class); one chunk is held at a time."""
    tally, labels = Tally(classifier.names), list[int]()

    def pictures() -> Iterator[Tensor]:
        for pixels, label in examples:
            labels.append(label)
            yield pixels

    for embedding in embed_pictures(clip, pictures(), chunk_size):
        tally.add(classifier(embedding), torch.tensor(labels))
        labels.clear()
    return tally.figures()


def zero_shot_of_scenes(
    clip: CLIP,
    templates: str | Iterable[str] = "plain",
    count: int = 1000,
    split: Split = "heldout",
    seed: int = 0,
    chunk_size: int = 64,
) -> ZeroShotFigures:
    """The first `count` single-object scenes of a split, classified among the usual names of all objects.

    Scenes are drawn at the side that `clip` sees. A tenth of the pairs of object and background is held out, so about a
    quarter of the objects has no held-out scene: it is a wrong answer only. Raises InputError for a count below 1.
    """
    if count < 1:
        raise InputError(f"The number of scenes must be at least 1, got {count}.")
    names = list(vocabulary().objects)
    classifier = build_classifier(clip, names, templates if isinstance(templates, str) else list(templates))
    scenes = EmojiScenes(size=min(clip.image_size), split=split, seed=seed)

    def examples() -> Iterator[tuple[Tensor, int]]:
        found, index = 0, 0
        while found < count:
            scene = scenes.scene(index)
            index += 1
            if scene.kind == "single":
                found += 1
                yield to_unit(stack_levels([scenes.draw(scene)]))[0], names.index(scene.objects[0])

    return measure(clip, classifier, examples(), chunk_size)


def main() -> None:
    parser = argparse.ArgumentParser(prog="genpipe.evaluation.zero_shot", description=zero_shot_of_scenes.__doc__)
    parser.add_argument("clip", type=Path, help="folder of a family, or of its CLIP")
    parser.add_argument(
        "--templates", action="append", help=f"{', '.join(TEMPLATE_SETS)}, or a text with {{}}; may be repeated (plain)"
    )
    parser.add_argument("--count", type=int, default=1000, help="single-object scenes")
    parser.add_argument("--split", choices=("heldout", "train", "all"), default="heldout")
    parser.add_argument("--seed", type=int, default=0, help="seed of the scenes")
    parser.add_argument("--confusion", type=Path, help="write the confusion matrix as a PNG file")
    arguments = parser.parse_args()
    try:
        chosen = choose_templates(arguments.templates or "plain")
        find_font()
        folder = arguments.clip / "clip" if (arguments.clip / "clip").is_dir() else arguments.clip
        clip = load_part(CLIP, folder)
        figures = zero_shot_of_scenes(clip, chosen, arguments.count, arguments.split, arguments.seed)
        if arguments.confusion is not None:
            save_confusion(figures, arguments.confusion)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(json.dumps({"templates": chosen, **figures.to_json()}))


def save_confusion(figures: ZeroShotFigures, path: Path) -> None:
    """Draw the confusion matrix into a PNG file; raises InputError where it cannot be drawn or written."""
    picture = draw_confusion([each.name for each in figures.classes], figures.confusions)
    save_png(picture, path, {"figure": "confusion matrix", "pictures": figures.count, "top1": figures.top1})


if __name__ == "__main__":
    main()
