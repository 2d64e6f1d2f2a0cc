"""A family folder written whole or not at all, its parts one after another."""

import json
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genpipe.errors import InputError
from pipelines.family_info import FORMAT_VERSION, INFO_FILE, check_info

if TYPE_CHECKING:
    import torch
    from diffusers import ModelMixin

FILE_BYTES = 16_000_000  # of one file of weights, at most: hosts and version control dislike larger ones


def write_family(
    target: Path,
    build: "Mapping[str, Callable[[], ModelMixin]]",
    info: Mapping[str, Any],
    card: str = "",
    replace: bool = False,
    dtype: "torch.dtype | None" = None,
    file_bytes: int = FILE_BYTES,
    texts: Mapping[str, str] | None = None,
    check: Callable[[Path], Any] | None = None,
) -> None:
    """Write a family folder; a temporary one beside it takes its place at the end, or is removed.

    Args:
        build: part -> what gives it; each is asked when the one before was written and given up.
        info: what family.json says beside format version, classes and checksums.
        card: text of README.md. texts: name -> content of more files.
        dtype: of the stored floating-point weights; None: as they are. file_bytes: of one file of weights, at most.
        check: called with the folder when all is written, before it takes its place; what it raises leaves nothing.
    Raises InputError for an existing folder unless `replace`, an unusable `info`, and a folder that cannot be written.
    """
    from genpipe.parts import save_part, sha256_of

    check_target(target, replace)
    building = target.with_name(f".{target.name}-{uuid.uuid4().hex}.tmp")
    try:
        building.mkdir(parents=True)
        entries = {}
        for part, built in build.items():
            model = built()
            entries[part] = {"class": type(model).__name__}
            save_part(model, building / part, dtype, file_bytes)
            del model  # before the next one is built
            entries[part]["sha256"] = sha256_of(building / part)
        whole = {**info, "genpipe_format": FORMAT_VERSION, "parts": entries}
        check_info(whole, "The information about the family")
        (building / INFO_FILE).write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for name, text in {**(texts or {}), **({"README.md": card} if card else {})}.items():
            (building / name).write_text(text, encoding="utf-8")
        if check is not None:
            check(building)
        _put_in_place(building, target)
    except OSError as error:
        raise InputError(f"The family {str(target)!r} cannot be written: {error.strerror}.") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def check_target(target: Path, replace: bool) -> None:
    """Raises InputError where something is there that must not be replaced: a folder that is no family never is."""
    if not target.exists():
        return
    if not replace:
        raise InputError(f"{str(target)!r} exists already; choose another folder or say that it may be replaced.")
    if not target.is_dir() or (any(target.iterdir()) and not (target / INFO_FILE).is_file()):
        raise InputError(f"{str(target)!r} is no family's folder and is not replaced; choose another one.")


def _put_in_place(building: Path, target: Path) -> None:
    if not target.exists():
        building.rename(target)
        return
    old = building.with_suffix(".old")
    target.rename(old)
    try:
        building.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)
