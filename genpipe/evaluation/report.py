"""The report of a composition run: a folder of pictures, verdicts.jsonl as it grows, report.json and report.html.

A run that was cut short goes on where it stopped: prompts whose verdicts are written are not drawn again.
"""

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from PIL import Image

from genpipe.errors import InputError
from genpipe.evaluation.best_of_n import best_of_n_curve
from genpipe.evaluation.composition import TaskPrompt, Verdict, scores

_VERDICTS, _SETTINGS = "verdicts.jsonl", "settings.json"
_STYLE = (
    "body{font:15px sans-serif;margin:2em;max-width:90em}figure{display:inline-block;width:150px;margin:6px;"
    "vertical-align:top}img{width:150px;image-rendering:pixelated;border:3px solid #2a2}.wrong img{border-color:#c22}"
    "figcaption{font-size:12px}td,th{padding:2px 12px;text-align:right}"
)


class RunFolder:
    """The folder of one run: what it holds so far, and where more is written.

    settings: everything that the pictures depend on; a folder with other settings is refused. Raises InputError for
    that, and where the folder cannot be used.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder, self.settings = folder, dict(settings)
        path = folder / _SETTINGS
        try:
            (folder / "pictures").mkdir(parents=True, exist_ok=True)
            if path.is_file():
                if json.loads(path.read_text(encoding="utf-8")) != json.loads(json.dumps(self.settings)):
                    raise InputError(f"{folder} holds a report of other settings; choose another --out.")
            else:
                path.write_text(json.dumps(self.settings, indent=1) + "\n", encoding="utf-8")
        except (OSError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{folder} cannot be used for a report ({error}); choose another --out.") from error

    def done(self) -> dict[int, list[dict[str, Any]]]:
        """Number of a prompt -> its pictures' records, of those that are finished. A line cut short does not count."""
        found = {}
        path = self.folder / _VERDICTS
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            try:
                entry = json.loads(line)
                found[int(entry["number"])] = entry["pictures"]
            except (ValueError, LookupError, TypeError):
                continue
        return found

    def add(self, number: int, pictures: Sequence[Image.Image], records: Sequence[Mapping[str, Any]]) -> None:
        """Keep a finished prompt: its pictures, and what is known of each of them."""
        kept: list[dict[str, Any]] = []
        try:
            for place, (picture, record) in enumerate(zip(pictures, records, strict=True)):
                name = f"pictures/{number:05d}-{place}.png"
                picture.save(self.folder / name)
                kept.append({**record, "file": name})
            entry = {"number": number, "pictures": kept}
            with (self.folder / _VERDICTS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise InputError(
                f"{self.folder} cannot be written ({error}); what it holds is kept, and the same command goes on."
            ) from error

    def finish(
        self, prompts: Sequence[str], judged: Sequence[TaskPrompt] | None, detector: Mapping[str, float]
    ) -> dict[str, Any]:
        """Write report.json and report.html of a whole run, and return the former's content without the pictures.

        judged: the prompts with what they ask for; None where nobody judged, and CLIP's scores are all there is.
        detector: how good the judge is, see `composition.detector_accuracy`.
        """
        done = self.done()
        rows: list[dict[str, Any]] = [
            {"prompt": prompt, "pictures": done[number]} for number, prompt in enumerate(prompts)
        ]
        clip = [picture["score"] for row in rows for picture in row["pictures"] if picture["score"] is not None]
        summary = {**self.settings, "clip_score": mean(clip) if clip else None}
        if judged is not None:
            verdicts = [[Verdict(**picture["verdict"]) for picture in row["pictures"]] for row in rows]
            tasks = scores(judged, verdicts)
            if self.settings["candidates"] > 1 and not self.settings.get("curve"):  # pictures come best first
                summary["best_alone"] = scores(judged, [own[:1] for own in verdicts])
            summary |= {"detector_accuracy": dict(detector), "overall": tasks.pop("overall"), "tasks": tasks}
            rows = [{**row, "task": prompt.task} for row, prompt in zip(rows, judged, strict=True)]
        if self.settings.get("curve"):
            summary["curve"] = _curves(rows, judged is not None)
        self._write("report.json", json.dumps({**summary, "pictures": rows}, indent=1) + "\n")
        self._write("report.html", _page(summary, rows))
        return summary

    def _write(self, name: str, text: str) -> None:
        try:
            (self.folder / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise InputError(f"{self.folder / name} cannot be written ({error}).") from error


def _curves(rows: Sequence[Mapping[str, Any]], judged: bool) -> dict[str, list[dict[str, float]]]:
    """What the best of N candidates are worth: CLIP's score, and where judged the share of right ones."""
    score = torch.tensor([[picture["score"] for picture in row["pictures"]] for row in rows])
    place = -torch.arange(score.shape[1], dtype=torch.float32).expand_as(score)  # best first, not by CLIP's score alone
    curves = {"clip_score": best_of_n_curve(place, score)}
    if not judged:
        return curves
    right = torch.tensor([[float(picture["verdict"]["right"]) for picture in row["pictures"]] for row in rows])
    return {"composition": best_of_n_curve(place, right), **curves}


def record(verdict: Verdict | None, score: float | None, seed: int) -> dict[str, Any]:
    """What is kept of a picture beside its file."""
    return {"verdict": None if verdict is None else asdict(verdict), "score": score, "seed": seed}


def _page(summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The report as a page, wrong pictures first."""
    title = html.escape(f"{summary['family']}, {summary['pipeline']}, best of {summary['candidates']}")
    head = f"CLIP's mean score {summary['clip_score']:.3f}" if summary["clip_score"] is not None else "not ranked"
    if "tasks" in summary:
        table = "".join(f"<tr><td>{html.escape(k)}</td><td>{v:.3f}</td></tr>" for k, v in summary["tasks"].items())
        judge = ", ".join(f"{html.escape(k)} {v:.3f}" for k, v in summary["detector_accuracy"].items())
        head = (
            f"<b>{summary['overall']:.3f}</b> overall, {head}<table>{table}</table>The judge on real scenes, which "
            f"should be 1, and on wrong prompts and noise, which should be 0: {judge}"
        )
    figures = [(picture, row) for row in rows for picture in row["pictures"]]
    figures.sort(key=lambda each: each[0]["verdict"] is None or each[0]["verdict"]["right"])
    shown = "".join(_figure(picture, row) for picture, row in figures)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"<h1>{title}</h1><p>{head}</p>{shown}</html>\n"
    )


def _figure(picture: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    verdict, said = picture["verdict"], ""
    if verdict is not None:
        said = f"<br>{html.escape(row['task'])}: {'right' if verdict['right'] else html.escape(verdict['reason'])}"
    kind = "wrong" if verdict is not None and not verdict["right"] else "right"
    return (
        f'<figure class="{kind}"><img src="{html.escape(picture["file"])}" alt="">'
        f"<figcaption>{html.escape(row['prompt'])}{said}</figcaption></figure>"
    )
