"""JSON objects of strangers: looked at before anything in them is used."""

import json
from pathlib import Path
from typing import Any

from genpipe.errors import InputError

JSON_LIMIT = 10_000_000  # bytes; published configs have a few thousand, an index of weights some hundred thousand


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises InputError, one sentence that names it, for anything else."""
    try:
        if path.stat().st_size > JSON_LIMIT:
            raise InputError(f"{path} is larger than {JSON_LIMIT:,} bytes; it is no config.")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}); get the folder again.") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read as JSON ({error}); get the folder again.") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is no config: it holds a {type(value).__name__}; get the folder again.")
    return value


def peek_json(path: Path) -> dict[str, Any]:
    """As `read_json`, but empty where there is no such object: for telling what a folder holds. Never raises."""
    try:
        return read_json(path)
    except (InputError, ValueError):  # a path that no file can have is a ValueError
        return {}
