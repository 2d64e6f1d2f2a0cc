"""Published weights that genpipe does not read: known by their names, refused with the reason and what to do."""

from pathlib import Path


def reason(source: Path) -> str | None:
    """Why a folder or file cannot be read, in one sentence; None where it is of no kind that is known here."""
    return None
