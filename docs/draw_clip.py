"""Draws docs/confusion.png, and prints what CLIP is good for and what it is weak at, on held-out emoji scenes.

python docs/draw_clip.py [--clip nano] [--clip ANOTHER] [--count 1000]

Zero-shot classification of single objects (2103.00020, 3.1), retrieval, and the weakness table of `genpipe evaluate
clip`. The picture is the first CLIP's confusion matrix of the classes that are mixed up most, with one more column for
all others: the whole matrix of 198 is nearly all blank (`genpipe evaluate zero-shot scenes --confusion` draws it).
"""

import argparse
from collections import Counter
from pathlib import Path

from genpipe.clip.model import CLIP
from genpipe.evaluation.confusion import draw_confusion
from genpipe.evaluation.retrieval import open_source, retrieval_figures
from genpipe.evaluation.weakness import table, weakness_figures
from genpipe.evaluation.zero_shot import ZeroShotFigures, zero_shot_of_scenes
from genpipe.images import save_png
from pipelines.classify_commands import chosen_templates
from pipelines.ranking import load_clip

SHOWN = 24


def most_confused(figures: ZeroShotFigures, shown: int = SHOWN) -> tuple[list[str], Counter[tuple[int, int]]]:
    """The classes of the most frequent errors, confused ones side by side, and a last one for all the others."""
    wrong = sorted((-n, pair) for pair, n in figures.confusions.items() if pair[0] != pair[1])
    numbers = list(dict.fromkeys(number for _, pair in wrong for number in pair))[:shown]
    place = {number: i for i, number in enumerate(numbers)}
    cells: Counter[tuple[int, int]] = Counter()
    for (true, chosen), n in figures.confusions.items():
        if true in place:
            cells[place[true], place.get(chosen, len(numbers))] += n
    return [*(figures.classes[number].name for number in numbers), "any other class"], cells


def print_retrieval(name: str, clip: CLIP, count: int) -> None:
    """Recall and median rank, both ways."""
    figures = retrieval_figures(clip, open_source(clip, "scenes", count).pairs)
    for way in ("picture_to_caption", "caption_to_picture"):
        print(
            f"{name}, {way.replace('_', ' ')}:", ", ".join(f"{key} {value:.3f}" for key, value in figures[way].items())
        )
    print(f"{figures['pairs']:,} pairs, {figures['distinct_captions']:,} distinct captions")


def main() -> None:
    parser = argparse.ArgumentParser(description="What CLIP is good for, and weak at.")
    parser.add_argument("--clip", action="append", help="a family, a folder, or NAME:WEIGHTS; may be repeated (nano)")
    parser.add_argument("--count", type=int, default=1000, help="scenes, pairs, and questions of each kind")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "confusion.png")
    arguments = parser.parse_args()
    clips = [(name, load_clip(name)) for name in arguments.clip or ["nano"]]
    for number, (name, clip) in enumerate(clips):
        figures = zero_shot_of_scenes(clip, chosen_templates(None, name), arguments.count)
        print(f"{name}, zero-shot: {figures.to_text()}")
        if number == 0:
            about = {"figure": "confusion matrix", "pictures": figures.count, "top1": figures.top1}
            save_png(draw_confusion(*most_confused(figures)), arguments.out, about)
        print_retrieval(name, clip, arguments.count)
    print(table([(name, weakness_figures(clip, arguments.count)) for name, clip in clips]))


if __name__ == "__main__":
    main()
