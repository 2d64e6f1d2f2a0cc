"""One webdataset shard in img2dataset's layout (a tar with key.jpg, key.txt, key.json): indexed once, read by position.

Nothing is extracted and nothing is executed: of all members only pictures, captions and JSON are ever looked at.
"""

import io
import json
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from PIL import Image
from webdataset.tariterators import base_plus_ext

from genpipe import images
from genpipe.data.samples import BrokenSample, read_caption
from genpipe.errors import InputError

PICTURE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
MEMBER_LIMIT = 256 * 2**20  # bytes of a picture file
CAPTION_LIMIT = 2**20  # bytes of a caption or JSON file
_BLOCK = 512  # a tar is made of such blocks


class Member(NamedTuple):
    """Where a member's bytes lie in the tar."""

    offset: int
    size: int


class Entry(NamedTuple):
    """One sample of a shard: its picture, its caption as plain text or inside JSON, and the JSON that it may have."""

    key: str
    picture: Member
    caption: Member
    caption_is_json: bool
    record: Member | None = None


@dataclass(frozen=True)
class ShardIndex:
    """The samples of a shard in file order, and (reason, key) of those known to be broken without reading them."""

    path: Path
    entries: tuple[Entry, ...]
    broken: tuple[tuple[str, str], ...]


def index_shard(path: Path) -> ShardIndex:
    """Read a tar's headers. Damage never raises: it is listed in `broken`, and what precedes it is kept.

    Keys and suffixes are split as webdataset does, at the first dot of the file name. Of samples with one key the first
    counts.
    """
    groups: list[tuple[str, dict[str, Member]]] = []
    broken: list[tuple[str, str]] = []
    try:
        for name, member in _members(path):
            key, suffix = base_plus_ext(name)
            if key is None:
                continue
            suffix = suffix.lower()
            if not groups or groups[-1][0] != key or suffix in groups[-1][1]:
                groups.append((key, {}))
            groups[-1][1][suffix] = member
    except Exception as error:  # Python's tarfile raises many kinds on hostile headers
        cut = groups.pop()[0] if groups and _entry(*groups[-1]) is None else ""
        broken.append(("shard damaged or cut short", f"{cut} ({error})".strip()))

    entries: dict[str, Entry] = {}
    for key, members in groups:
        entry = _entry(key, members)
        if key in entries:
            broken.append(("duplicate key", key))
        elif entry is not None:
            entries[key] = entry
        else:
            has_picture = any(suffix in members for suffix in PICTURE_SUFFIXES)
            broken.append(("no caption" if has_picture else "no picture", key))
    return ShardIndex(path, tuple(entries.values()), tuple(broken))


def _entry(key: str, members: dict[str, Member]) -> Entry | None:
    picture = next((members[suffix] for suffix in PICTURE_SUFFIXES if suffix in members), None)
    caption = members.get("txt") or members.get("json")
    if picture is None or caption is None:
        return None
    return Entry(key, picture, caption, "txt" not in members, members.get("json"))


def _members(path: Path) -> Iterator[tuple[str, Member]]:
    """Names and places of the regular files in a tar; raises tarfile.ReadError where it is damaged or ends early."""
    with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        length = file.seek(0, io.SEEK_END)
        end = 0
        while (header := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # or tarfile keeps every header in memory
            if header.size < 0 or header.offset < end:  # a header that leads backwards would be read for ever
                raise tarfile.ReadError("a header is damaged")
            end = header.offset_data + -(-header.size // _BLOCK) * _BLOCK
            if header.isreg() and not header.issparse():
                if header.offset_data + header.size > length:
                    raise tarfile.ReadError("the file ends early")
                yield header.name, Member(header.offset_data, header.size)
        # tarfile takes half a header or rubbish for the end: the true end is a block of zeros.
        file.seek(end)
        if file.read(_BLOCK) != bytes(_BLOCK):
            raise tarfile.ReadError("the file ends early")


def read_entry(file: IO[bytes], entry: Entry, max_pixels: int = images.MAX_PIXELS) -> tuple[Image.Image, str]:
    """Picture and caption of one sample of the open shard `file`; raises BrokenSample."""
    caption = read_text(file, entry)
    data = _read(file, entry.picture, MEMBER_LIMIT)
    try:
        return images.decode_picture(io.BytesIO(data), entry.key, max_pixels), caption
    except InputError as error:
        raise BrokenSample("picture cannot be read", str(error)) from error


def read_text(file: IO[bytes], entry: Entry) -> str:
    """The caption of one sample of the open shard `file`; raises BrokenSample."""
    return read_caption(_read(file, entry.caption, CAPTION_LIMIT), entry.caption_is_json)


def read_record(file: IO[bytes], entry: Entry) -> dict[str, Any]:
    """What the JSON of one sample of the open shard `file` says, {} where it has none; raises BrokenSample."""
    if entry.record is None:
        return {}
    try:
        record = json.loads(_read(file, entry.record, CAPTION_LIMIT).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise BrokenSample("JSON cannot be read", str(error)) from error
    return record if isinstance(record, dict) else {}


def picture_crc(file: IO[bytes], entry: Entry) -> int:
    """CRC-32 of a sample's picture as it lies in the open shard `file`; raises BrokenSample."""
    return zlib.crc32(_read(file, entry.picture, MEMBER_LIMIT))


def _read(file: IO[bytes], member: Member, limit: int) -> bytes:
    if member.size > limit:
        raise BrokenSample("member too large", f"{member.size:,} bytes, the limit is {limit:,}")
    try:
        file.seek(member.offset)
        data = file.read(member.size)
    except OSError as error:
        raise BrokenSample("shard damaged or cut short", str(error)) from error
    if len(data) != member.size:
        raise BrokenSample("shard damaged or cut short", "it became shorter while it was read")
    return data
