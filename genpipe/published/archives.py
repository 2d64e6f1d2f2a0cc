"""Archives and checksums: exactly the members that were expected leave a tar file, and nothing before all were seen."""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
import uuid
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from genpipe.errors import InputError

MAX_MEMBERS = 10_000
MAX_MEMBER_BYTES = 16 << 30
_BLOCK = 1 << 20  # bytes that are read at once


def open_tar(path: str | os.PathLike[str], expected: Sequence[str], folder: str | os.PathLike[str]) -> list[Path]:
    """Unpack the members `expected` (names ending so, e.g. "tokenizer/vocab.json") of a tar file into `folder`.

    Returns their paths in the order given, each `folder` / its expected name. Every member is looked at first; nothing
    is written if one has a name that leaves the folder, is a link or a device, was not expected (plain folders may be
    there), is too large, or if an expected one is missing or there twice. Raises InputError.
    """
    archive, target = Path(path), Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} exists and is not an empty folder; choose another or remove it.")
    fresh = target.parent / f".{target.name}.new-{uuid.uuid4().hex[:8]}"
    try:
        with tarfile.open(archive) as opened:
            chosen = _chosen(opened, archive, expected)
            for name, member in chosen.items():
                # not by tarfile's own extraction, whose filters the first releases of Python 3.10 and 3.11 lack
                source, unpacked = opened.extractfile(member), fresh / name
                assert source is not None  # it is None only for what is no regular file
                unpacked.parent.mkdir(parents=True, exist_ok=True)
                with source, unpacked.open("wb") as written:
                    shutil.copyfileobj(source, written, _BLOCK)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            target.rmdir()
        fresh.rename(target)
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise InputError(f"{archive} cannot be unpacked ({error}); it may be truncated, get it again.") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return [target / name for name in expected]


def _chosen(opened: tarfile.TarFile, archive: Path, expected: Sequence[str]) -> dict[str, tarfile.TarInfo]:
    """Expected name -> its member, after a look at all members. Raises InputError for anything that is not expected."""
    chosen: dict[str, tarfile.TarInfo] = {}
    for count, member in enumerate(opened, start=1):
        shown = member.name[:100]
        parts = PurePosixPath(member.name).parts
        if count > MAX_MEMBERS:
            raise InputError(f"{archive} has more than {MAX_MEMBERS} members and is refused.")
        if member.name.startswith("/") or ".." in parts or "\\" in member.name or ":" in member.name:
            raise InputError(f"{archive} is refused: its member {shown!r} would be written outside the folder.")
        if member.isdir():
            continue
        if not member.isfile():
            raise InputError(f"{archive} is refused: its member {shown!r} is a link or a device.")
        names = [name for name in expected if parts[-name.count("/") - 1 :] == PurePosixPath(name).parts]
        if len(names) != 1 or names[0] in chosen or member.size > MAX_MEMBER_BYTES:
            reason = "is there twice" if names and names[0] in chosen else "was not expected"
            raise InputError(f"{archive} is refused: its member {shown!r} ({member.size} bytes) {reason}.")
        chosen[names[0]] = member
    missing = [name for name in expected if name not in chosen]
    if missing:
        raise InputError(f"{archive} lacks {', '.join(missing)}; it is not the published file.")
    return chosen


def checksum(
    path: str | os.PathLike[str],
    algorithm: str,
    expected: str,
    report: Callable[[int, int], None] | None = None,
) -> None:
    """Raise InputError unless the file's `algorithm` ("sha256", "md5", ...) is `expected`, in hex.

    `report(read, total)`, in bytes, is called after each block.
    """
    file = Path(path)
    total = file.stat().st_size
    digest = hashlib.new(algorithm, usedforsecurity=False)
    read = 0
    with file.open("rb") as opened:
        while block := opened.read(_BLOCK):
            digest.update(block)
            read += len(block)
            if report is not None:
                report(read, total)
    if digest.hexdigest() != expected.lower():
        raise InputError(
            f"{file} has the {algorithm} {digest.hexdigest()} instead of {expected.lower()}: it is damaged or not the "
            "published file; remove it and get it again."
        )
