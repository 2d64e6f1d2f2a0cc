"""Draws docs/failures.png: the first wrong pictures of each task, and what the judge says is wrong with them.

genpipe evaluate nano --out OUT
python docs/draw_failures.py OUT/dalle1-16 OUT/dalle2-16
"""

import argparse
import json
from pathlib import Path

from PIL import Image

from genpipe.evaluation.composition import TASKS
from genpipe.images import make_grid

CELL = 128  # pixels of a picture in the grid


def main() -> None:
    parser = argparse.ArgumentParser(description="Wrong pictures from the reports of genpipe evaluate.")
    parser.add_argument("reports", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--each", type=int, default=2, help="pictures per task, of different prompts")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "failures.png")
    arguments = parser.parse_args()
    pictures, labels = [], []
    for folder in arguments.reports:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        for task in TASKS:
            wrong = [
                (row["prompt"], picture)
                for row in report["pictures"]
                for picture in row["pictures"][:1]  # the best of the candidates
                if row["task"] == task and not picture["verdict"]["right"]
            ]
            for prompt, picture in wrong[: arguments.each]:
                pictures.append(Image.open(folder / picture["file"]))
                labels.append(f"{report['pipeline']}: {prompt}: {picture['verdict']['reason']}")
    make_grid(pictures, columns=6, labels=labels, scale=max(1, CELL // pictures[0].width)).save(arguments.out)


if __name__ == "__main__":
    main()
