"""Draws docs/curves.png: what the best of N candidates are worth, by the judge and by CLIP, from reports.

genpipe evaluate nano --candidates 64 --per-task 10 --curve --out OUT
python docs/draw_curves.py OUT/dalle1-64-curve OUT/dalle2-64-curve
"""

import argparse
import json
from pathlib import Path

from genpipe.evaluation.best_of_n import plot_curves

LABELS = {"composition": "composition score", "clip_score": "CLIP score (cosine)"}


def main() -> None:
    parser = argparse.ArgumentParser(description="Rerank curves from the reports of genpipe evaluate --curve.")
    parser.add_argument("reports", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "curves.png")
    arguments = parser.parse_args()
    panels: dict[str, dict[str, list[dict[str, float]]]] = {label: {} for label in LABELS.values()}
    for folder in arguments.reports:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        for key, curve in report["curve"].items():
            panels[LABELS[key]][report["pipeline"]] = curve
            print(report["pipeline"], key, ", ".join(f"{p['score']:.3f} for {p['n']:.0f}" for p in curve))
    plot_curves(panels, arguments.out, {})


if __name__ == "__main__":
    main()
