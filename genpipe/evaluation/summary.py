"""The scores of several judged runs as one JSON list: what lies beside a family's weights as composition.json."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from genpipe.errors import InputError

_RUN = ("pipeline", "candidates", "seed", "objects")  # a later run of the same takes the place of an earlier one
_SCORES = ("prompts", "detector_accuracy", "tasks", "overall")
_WHERE_RANKED = ("best_alone", "clip_score")

Entry = dict[str, Any]


def read_summary(path: Path) -> list[Entry]:
    """The entries of a summary, none where there is no file yet. Raises InputError for any other file."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be used for the summary ({error}); name another --summary.") from error
    if not isinstance(entries, list) or not all(isinstance(each, dict) and {*_RUN} <= each.keys() for each in entries):
        raise InputError(f"{path} cannot be used for the summary: it is no list of runs; name another --summary.")
    return entries


def add_to_summary(path: Path, reports: Sequence[Mapping[str, Any]]) -> None:
    """Put the scores of judged runs, as `RunFolder.finish` returns them, into a summary.

    Raises InputError as `read_summary`, and where the file cannot be written.
    """
    added = [
        {key: report[key] for key in (*_RUN, *_SCORES, *_WHERE_RANKED) if key in report or key not in _WHERE_RANKED}
        for report in reports
    ]
    new = [_run(entry) for entry in added]
    kept = [entry for entry in read_summary(path) if _run(entry) not in new]
    try:
        path.write_text(json.dumps([*kept, *added], indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be used for the summary ({error}); name another --summary.") from error


def _run(entry: Mapping[str, Any]) -> list[Any]:
    return [entry[name] for name in _RUN]
