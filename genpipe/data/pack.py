"""`genpipe data pack`: captioned pictures of a folder or list -> webdataset shards in img2dataset's layout."""

import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from genpipe import images
from genpipe.data.image_text import ImageTextFolder
from genpipe.data.read_ahead import read_ahead
from genpipe.data.samples import BrokenSample, Report
from genpipe.data.tar_index import CAPTION_LIMIT, MEMBER_LIMIT
from genpipe.errors import InputError
from genpipe.picture_files import one_line, open_file, read_header

SAMPLES = 10_000  # of a shard, as img2dataset has it
BYTES = 2**30
# Pillow's names of formats -> how shards name such files; MPO is a JPEG with a second one behind it.
SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_SHARD_DIGITS = 5
_BLOCK = 512  # a tar is made of such blocks


@dataclass(frozen=True)
class Packed:
    """The shards that were written, in order; the pairs in them, and what was left out and why."""

    shards: list[Path]
    bytes: int
    report: Report

    @property
    def pattern(self) -> str:
        """The shards as one brace expression, for training, checking and searching."""
        first, last = (str(self.shards[number])[: -len(".tar")] for number in (0, -1))
        if len(self.shards) == 1:
            return f"{first}.tar"
        stem, digits = first[:-_SHARD_DIGITS], len(first) - _SHARD_DIGITS
        return f"{stem}{{{first[digits:]}..{last[digits:]}}}.tar"


@dataclass(frozen=True)
class _Picture:
    """A picture file as it lies on the disk, known to be readable; size (width, height)."""

    data: bytes
    suffix: str
    size: tuple[int, int]


def pack(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    max_samples: int = SAMPLES,
    max_bytes: int = BYTES,
    seed: int | None = 0,
    max_pixels: int = images.MAX_PIXELS,
    report: Callable[[int, int], None] | None = None,
) -> Packed:
    """Write the captioned pictures of `source` (as `ImageTextFolder` finds them) as shards target-00000.tar, ...

    A `target` that is a folder, or ends with a slash, gets 00000.tar, ... inside. A shard has at most `max_samples`
    samples, and at most `max_bytes` bytes unless one sample alone has more. A sample is key.jpg | png | webp, the
    file's own bytes, never encoded again; key.txt, the caption on one line; key.json with caption, key, status, width,
    height, sha256 (of the picture's bytes) and file (where it came from). A key is the shard's number and the sample's,
    with zeros in front. The samples are shuffled by `seed`, because a stream mixes only a few shards at a time; with
    None they keep their order. The same source and settings give the same bytes.

    Pictures that cannot be read, of other formats, or too large for a reader are left out and counted; `report(done,
    total)` is called after each. All shards appear at the end, or none. Raises InputError for a source without
    captioned pictures, shards that are there already, and where nothing can be written.
    """
    if min(max_samples, max_bytes) < 1:
        raise InputError(f"A shard needs at least 1 sample and 1 byte, got the limits {max_samples} and {max_bytes}.")
    folder, prefix = _place(os.fspath(target))
    pictures = ImageTextFolder(Path(source), size=1)
    count = len(pictures)
    order = range(count) if seed is None else np.random.default_rng(seed).permutation(count).tolist()
    base = source if os.path.isdir(source) else os.path.dirname(source)
    left_out = pictures.report()
    made = not folder.exists()
    scratch = folder / f".genpipe-{uuid.uuid4().hex}.tmp"
    try:
        scratch.mkdir(parents=True)
        writer = _Writer(scratch, prefix, max_samples, max_bytes)
        try:
            reading = read_ahead(order, lambda number: _read(pictures.paths[number], max_pixels))
            for done, (number, future) in enumerate(reading, start=1):
                name = os.path.relpath(pictures.paths[number], base)
                try:
                    writer.add(future.result(), pictures.captions[number], Path(name).as_posix())
                    left_out.read += 1
                except BrokenSample as error:
                    left_out.skip(error.reason, name)
                if report is not None:
                    report(done, count)
        finally:
            writer.close()
        if not writer.shards:
            raise InputError(f"None of the {count} pictures in {str(source)!r} can go into a shard ({left_out}).")
        return Packed(_publish(writer.shards, folder), writer.bytes, left_out)
    except OSError as error:
        raise InputError(f"Shards cannot be written to {str(folder)!r} ({one_line(error)}).") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if made and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _place(target: str) -> tuple[Path, str]:
    """The folder of the shards and what their names begin with. Raises InputError for a name that is taken or none."""
    name = os.path.basename(target)
    if not target or "{" in target or "::" in target or "://" in target or name.endswith(".tar"):
        raise InputError(
            f"{target!r} is no name for new shards; give what they begin with, as out/cats for out/cats-00000.tar."
        )
    folder, prefix = (Path(target), "") if not name or os.path.isdir(target) else (Path(target).parent, f"{name}-")
    pattern = re.compile(re.escape(prefix) + r"\d{5,}\.tar")
    taken = sorted(other for other in os.listdir(folder) if pattern.fullmatch(other)) if folder.is_dir() else []
    if taken:
        raise InputError(f"There are shards already, such as {str(folder / taken[0])!r}; choose another name.")
    return folder, prefix


def _read(path: Path, max_pixels: int) -> _Picture:
    """A picture file's bytes, after making sure that a reader of the shards will be able to decode them."""
    try:
        with open_file(path) as file:
            data = file.read(MEMBER_LIMIT + 1)
        if len(data) > MEMBER_LIMIT:
            raise BrokenSample("member too large")
        header = read_header(io.BytesIO(data), repr(str(path)))
        if header.format not in SUFFIXES:
            raise BrokenSample("neither JPEG, PNG nor WebP")
        images.decode_picture(io.BytesIO(data), repr(str(path)), max_pixels)
    except (InputError, OSError) as error:
        raise BrokenSample("picture cannot be read", str(error)) from error
    return _Picture(data, SUFFIXES[header.format], header.size)


class _Writer:
    """Tars of samples in the folder `scratch`; a new one where the next sample would not fit."""

    def __init__(self, scratch: Path, prefix: str, max_samples: int, max_bytes: int) -> None:
        self.scratch, self.prefix = scratch, prefix
        self.max_samples, self.max_bytes = max_samples, max_bytes
        self.digits = max(4, len(str(max_samples - 1)))
        self.shards: list[Path] = []
        self.bytes = 0  # of finished shards
        self._count = self._size = 0  # of the shard being written
        self._file: IO[bytes] | None = None
        self._tar: tarfile.TarFile | None = None

    def add(self, picture: _Picture, caption: str, name: str) -> None:
        """Append one sample. Raises BrokenSample for a caption that readers would refuse for its length."""
        text = caption.encode("utf-8", "replace")
        if len(text) > CAPTION_LIMIT:
            raise BrokenSample("member too large")
        members = self._members(picture, text, name)
        size = sum(_BLOCK + -(-len(data) // _BLOCK) * _BLOCK for _, data in members)
        if self._tar is not None and (self._count == self.max_samples or _tar_size(self._size + size) > self.max_bytes):
            self.close()
        if self._tar is None:
            self._open()
            members = self._members(picture, text, name)
        assert self._tar is not None
        for member, data in members:
            header = tarfile.TarInfo(member)  # time 0 and no owner: the same samples are the same bytes
            header.size = len(data)
            self._tar.addfile(header, io.BytesIO(data))
        self._count += 1
        self._size += size

    def close(self) -> None:
        """Finish the shard being written, if there is one."""
        if self._tar is None or self._file is None:
            return
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self.bytes += self._file.tell()
        self._file.close()
        self._tar = self._file = None
        self._count = self._size = 0

    def _open(self) -> None:
        number = len(self.shards)
        if number == 10**_SHARD_DIGITS:
            raise InputError(f"There would be more than {number:,} shards; let each have more samples or bytes.")
        path = self.scratch / f"{self.prefix}{number:0{_SHARD_DIGITS}d}.tar"
        self._file = open(path, "xb")
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)
        self.shards.append(path)

    def _members(self, picture: _Picture, text: bytes, name: str) -> list[tuple[str, bytes]]:
        shard = len(self.shards) - (self._tar is not None)
        key = f"{shard:0{_SHARD_DIGITS}d}{self._count:0{self.digits}d}"
        about = {
            "caption": text.decode("utf-8"),
            "key": key,
            "status": "success",
            "width": picture.size[0],
            "height": picture.size[1],
            "sha256": hashlib.sha256(picture.data).hexdigest(),
            "file": name,
        }
        return [
            (f"{key}.{picture.suffix}", picture.data),
            (f"{key}.txt", text),
            (f"{key}.json", json.dumps(about).encode()),
        ]


def _tar_size(content: int) -> int:
    """Bytes of a whole tar with so many bytes of members: two empty blocks at its end, filled up to whole records."""
    return -(-(content + 2 * _BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def _publish(shards: list[Path], folder: Path) -> list[Path]:
    """Move the finished shards to their names: all of them or none, and none in the place of another file."""
    moved: list[Path] = []
    try:
        for shard in shards:
            final = folder / shard.name
            try:
                os.link(shard, final)  # unlike a renaming, this refuses to replace
            except FileExistsError as error:
                raise InputError(f"{str(final)!r} was written meanwhile; choose another name.") from error
            except OSError:  # a file system without links
                if final.exists():
                    raise InputError(f"{str(final)!r} was written meanwhile; choose another name.") from None
                os.rename(shard, final)
            moved.append(final)
    except BaseException:
        for path in moved:
            path.unlink(missing_ok=True)
        raise
    return moved
