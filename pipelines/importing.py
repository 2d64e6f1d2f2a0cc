"""Published weights -> a family in a folder of ours: parts one after another, licence, model card, source hash."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import genpipe
from genpipe.errors import InputError
from pipelines.family import put_together
from pipelines.family_info import FamilyInfo, check_name, class_of, describe_family, shipped_families
from pipelines.published_source import fingerprint, sizes_of
from pipelines.writing import write_family

if TYPE_CHECKING:
    import torch
    from diffusers import ModelMixin

FILE_BYTES = 2_000_000_000  # of one file of weights, at most
CHECKING_SHARE = 0.3  # of the work; the rest is converting
LICENCE_FILE = "LICENSE.md"

Report = Callable[[float, float], Any]


def located(source: str, report: Report) -> str:
    """A folder, a file or a shipped name as it is; what has another name, on this disk, downloaded if need be."""
    from genpipe.published.download import fetch, on_this_disk

    if source in shipped_families() or Path(source).exists():
        return source
    check_name(source)
    return str(on_this_disk(source) or fetch(source, report))


def clip_path(source: str, report: Report) -> Path:
    """Where a CLIP lies: a file or folder, or what a Hub id or known name stands for, downloaded if need be."""
    from genpipe.published.download import fetch, on_this_disk

    if Path(source).exists():
        return Path(source)
    return on_this_disk(source) or fetch(source, report)


def import_family(
    source: str,
    out: Path,
    clip: Path | None = None,
    dtype: str | None = None,
    replace: bool = False,
    report: Report = lambda done, total: None,
) -> dict[str, Any]:
    """Convert the weights in a folder or file; returns what was made, as JSON values.

    Each part is built, written and given up before the next one, so that no more than the largest is in memory. The
    weights are stored as `dtype`, or as they were published. The folder is read back before it takes its place.
    Raises InputError for weights that cannot be read, and where the folder cannot be written; nothing is left then.
    """
    import torch

    kind = None if dtype is None else getattr(torch, dtype)
    described = describe_family(source, dtype=kind, clip=clip)
    if described.source is None and clip is not None:
        raise InputError(f"{source!r} is a family of genpipe already; a CLIP of its own cannot be exchanged.")
    report(0.0, 1.0)
    info = _information(described, dtype, lambda read, all_: report(CHECKING_SHARE * read / max(all_, 1), 1.0))
    build = {
        part: partial(_built, described, part, kind, partial(report, _share(number, len(described.parts)), 1.0))
        for number, part in enumerate(described.parts)
    }
    write_family(
        out,
        build,
        info,
        card=_card(info, described),
        replace=replace,
        file_bytes=FILE_BYTES,
        texts=_licence(info, described),
        check=partial(_check, described.defaults),
    )
    report(1.0, 1.0)
    return {
        "genpipe": genpipe.__version__,
        "folder": str(out),
        **{key: info.get(key, "") for key in ("name", "license", "conditions")},
        "parts": described.parts,
        "pipelines": described.pipelines,
        "bytes": sum(file.stat().st_size for file in out.rglob("*") if file.is_file()),
        "source": info.get("source"),
    }


def _share(number: int, count: int) -> float:
    return CHECKING_SHARE + (1 - CHECKING_SHARE) * number / count


def _built(described: FamilyInfo, part: str, dtype: "torch.dtype | None", begun: Callable[[], Any]) -> "ModelMixin":
    """A part as it is to be stored; readers and `load_part` cast while they read."""
    begun()
    if described.source is not None:
        return described.source.build(part)
    from genpipe.parts import load_part

    return load_part(class_of(part, described.info["parts"][part]["class"]), described.folder / part, dtype)


def _information(described: FamilyInfo, dtype: str | None, report: Report) -> dict[str, Any]:
    """What family.json says."""
    info = {key: value for key, value in described.info.items() if key not in ("parts", "genpipe_format")}
    source = described.source
    if source is None:
        return info
    about = source.published
    return {
        **info,
        "license_url": about.licence.url,
        "conditions": about.licence.conditions,
        "notes": list(about.notes),
        "source": {
            "family": source.family,
            "sha256": fingerprint(about.files, source.path, report),
            "files": dict(sizes_of(about.files, source.path)),
            "stored_as": dtype or "as published",
        },
    }


def _licence(info: Mapping[str, Any], described: FamilyInfo) -> dict[str, str]:
    """The licence note, and the licence itself where it lay beside the weights."""
    folder = described.folder if described.folder.is_dir() else described.folder.parent
    texts = {}
    for file in sorted(folder.glob("LICENSE*")):
        if file.is_file() and file.stat().st_size < 1_000_000:
            texts[file.name] = file.read_text(encoding="utf-8", errors="replace")
    if described.source is not None:
        note = (
            f"# Licence of these weights\n\n{info['name']}: **{info['license']}**, {info['license_url']}\n\n"
            f"To be passed on with them: {info['conditions']}\n"
        )
        texts[LICENCE_FILE] = note + (f"\n---\n\n{texts[LICENCE_FILE]}" if LICENCE_FILE in texts else "")
    return texts


def _card(info: Mapping[str, Any], described: FamilyInfo) -> str:
    """The model card: what it is, whose it is, what was done to it."""
    source = described.source
    if source is None:
        readme = described.folder / "README.md"
        return readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    stored = info["source"]["stored_as"]
    changed = "their numbers are those of the published files" if stored == "as published" else f"stored as {stored}"
    files = "\n".join(f"- `{name}`, {size:,} bytes" for name, size in info["source"]["files"].items())
    notes = "\n".join(f"- {note}" for note in info["notes"])
    return f"""# {info["name"]}

{str(info["description"]).rstrip(".")}.

These weights were published by others. Their licence: {info["license"]} ({info["license_url"]}), see `{LICENCE_FILE}`.
To be passed on with them: {info["conditions"]}

{notes}

## What was done to them

Converted by genpipe {genpipe.__version__} from the files below to safetensors under its own names; {changed}.
SHA-256 of the files together: `{info["source"]["sha256"]}`.

{files}

## Use

    genpipe generate "a prompt" --family FOLDER
"""


def _check(defaults: Mapping[str, Any], folder: Path) -> None:
    """Raises InputError where the family in `folder` does not load; the weights are mapped, not read."""
    from genpipe.parts import load_part

    described = describe_family(folder)
    parts = {
        part: load_part(class_of(part, described.info["parts"][part]["class"]), folder / part, None)
        for part in described.parts
    }
    put_together(described, parts, described.pipelines)
