"""The `genpipe` command in a test: what it said, and the one sentence of a refusal."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


Run = Callable[..., Result]


def refused(result: Result) -> str:
    """The one sentence of a refusal; fails unless the command ended as a refused one must."""
    assert result.code == 2 and result.out == "", result
    (line,) = [line for line in result.err.splitlines() if not line.startswith(("warning: ", "skipped: "))]
    assert line.startswith("error: ")
    return line


def picture(path: Path, side: int = 20, colour: tuple[int, int, int] = (200, 30, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), colour).save(path)
    return path
