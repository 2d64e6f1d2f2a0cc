"""CLIP embeddings made beforehand: for a shard NAME.tar the files NAME.embeddings.npy and .json, joined by key.

The array is float16 (n, D), as CLIP gives it, not normalised; row i belongs to the sample whose key is `keys[i]` in the
JSON file. Half precision, because a CLIP's identity is told in half precision too, and half the disk and memory is
worth more than digits that no training sees. n embeddings, D embedding width.
"""

import hashlib
import io
import json
import os
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import IO

import numpy as np

from genpipe.data.samples import BrokenSample
from genpipe.data.tar_index import Entry, picture_crc
from genpipe.errors import InputError

FORMAT_VERSION = 1
NO_EMBEDDING = "no embedding"  # the reason for which a sample is skipped
_ATTEMPTS = 10


@dataclass(frozen=True)
class EmbeddingsHeader:
    """What the JSON file says: whose embeddings of which pictures.

    clip_identity: `genpipe.identity.weights_identity` of the CLIP. embedding_dim: D. shard_bytes, shard_modified_ns,
    shard_sha256: of the shard when it was read. keys, picture_crcs: of the samples, in the array's order; the CRC-32 of
    a picture's bytes tells whether it is still the same. skipped: by reason, samples that have no embedding.
    array_sha256: of the .npy file, filled in when that is written.
    """

    clip_identity: str
    embedding_dim: int
    shard_bytes: int
    shard_modified_ns: int
    shard_sha256: str
    keys: list[str] = field(repr=False)
    picture_crcs: list[int] = field(repr=False)
    skipped: dict[str, int] = field(default_factory=dict)
    array_sha256: str = ""

    def __post_init__(self) -> None:
        """Raise ValueError for entries of another type, or lists that cannot belong together."""
        texts = (self.clip_identity, self.shard_sha256, self.array_sha256, *self.keys, *self.skipped)
        sizes = (self.embedding_dim, self.shard_bytes, *self.picture_crcs, *self.skipped.values())
        if not (isinstance(self.keys, list) and isinstance(self.picture_crcs, list) and isinstance(self.skipped, dict)):
            raise ValueError("a list is no list")
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("a text is no text")
        if not all(isinstance(size, int) and size >= 0 for size in (*sizes, abs(self.shard_modified_ns))):
            raise ValueError("a number is no whole number")
        if len(self.keys) != len(self.picture_crcs) or len(set(self.keys)) != len(self.keys):
            raise ValueError("the keys are not one for each picture")


class ShardEmbeddings:
    """The embeddings of one shard's pictures, in memory."""

    def __init__(self, shard: Path, header: EmbeddingsHeader, values: np.ndarray) -> None:
        self.shard, self.header, self.values = shard, header, values
        self._rows = {key: row for row, key in enumerate(header.keys)}

    def of(self, file: IO[bytes], entry: Entry) -> np.ndarray:
        """The embedding, float32 (D,), of a sample of the open shard `file`.

        Raises BrokenSample where the sample has none, InputError where its picture is not the one that was embedded.
        """
        row = self._rows.get(entry.key)
        if row is None:
            raise BrokenSample(NO_EMBEDDING)
        if picture_crc(file, entry) != self.header.picture_crcs[row]:
            raise InputError(
                f"The picture {entry.key[:100]!r} of the shard {str(self.shard)!r} has changed since the shard's "
                "embeddings were made; run `genpipe embed` on it again."
            )
        return self.values[row].astype(np.float32)


@dataclass(frozen=True)
class StoredEmbeddings:
    """Where the embeddings of shards lie, `folder` (None: beside each shard), and whose they must be.

    identity: of the CLIP; None takes any. All methods raise InputError, one sentence that names the file.
    """

    folder: Path | None = None
    identity: str | None = None

    def files(self, shard: Path) -> tuple[Path, Path]:
        """The .npy and the .json file of a shard."""
        folder = shard.parent if self.folder is None else self.folder
        name = shard.name.removesuffix(".tar")
        return folder / f"{name}.embeddings.npy", folder / f"{name}.embeddings.json"

    def exist(self, shard: Path) -> bool:
        """Whether a shard has both files, whatever is in them."""
        return all(path.is_file() for path in self.files(shard))

    def header(self, shard: Path) -> EmbeddingsHeader:
        """What the embeddings of a shard are. Refused: none, damaged, of another CLIP, of a shard of another size."""
        array, path = self.files(shard)
        if not self.exist(shard):
            missing = path if array.is_file() else array
            raise InputError(
                f"The shard {str(shard)!r} has no embeddings: {str(missing)!r} is missing; make them with "
                "`genpipe embed`."
            )
        try:
            record = json.loads(path.read_bytes())
            if record["format_version"] > FORMAT_VERSION:
                raise InputError(
                    f"The embeddings {str(path)!r} have format version {record['format_version']}, this genpipe reads "
                    f"up to {FORMAT_VERSION}; install a newer genpipe."
                )
            header = EmbeddingsHeader(**{each.name: record[each.name] for each in fields(EmbeddingsHeader)})
            now = shard.stat().st_size
        except InputError:
            raise
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"The embeddings {str(path)!r} cannot be read ({error}); run `genpipe embed` on this shard again."
            ) from error
        if self.identity is not None and header.clip_identity != self.identity:
            raise InputError(
                f"The embeddings {str(path)!r} were made with another CLIP ({header.clip_identity[:12]}...) than the "
                f"one in use ({self.identity[:12]}...); run `genpipe embed` with that CLIP."
            )
        if header.shard_bytes != now:
            raise InputError(
                f"The shard {str(shard)!r} has changed since its embeddings were made ({header.shard_bytes:,} bytes "
                f"then, {now:,} now); run `genpipe embed` on it again."
            )
        return header

    def load(self, shard: Path) -> ShardEmbeddings:
        """The embeddings of a shard, 2 n D bytes in memory; refused as in `header`, and where the array is damaged."""
        header = self.header(shard)
        path = self.files(shard)[0]
        try:
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() != header.array_sha256:
                raise ValueError("it is not the array that its .json file describes")
            values = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
            if values.dtype != np.float16 or values.shape != (len(header.keys), header.embedding_dim):
                raise ValueError(f"it holds {values.dtype} of shape {values.shape}")
        except (OSError, ValueError, EOFError) as error:
            raise InputError(
                f"The embeddings {str(path)!r} cannot be read ({error}); run `genpipe embed` on this shard again."
            ) from error
        return ShardEmbeddings(shard, header, values)

    def save(self, shard: Path, header: EmbeddingsHeader, values: np.ndarray) -> None:
        """Write both files of a shard, whole or not at all.

        Two files cannot be replaced at once. So that two processes that write the same ones never leave the array of
        the one beside the JSON of the other, each looks at what lies there in the end and writes again until it fits.
        """
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(values, dtype=np.float16), allow_pickle=False)
        array = buffer.getvalue()
        header = replace(header, array_sha256=hashlib.sha256(array).hexdigest())
        record = {"format_version": FORMAT_VERSION, **asdict(header)}
        for _ in range(_ATTEMPTS):
            self._publish(shard, array, json.dumps(record, indent=0).encode())
            try:
                self.load(shard)
                return
            except InputError:  # another process is at it
                continue

    def _publish(self, shard: Path, *contents: bytes) -> None:
        """Both files in full under other names first: a full disk leaves what was there before."""
        targets = self.files(shard)
        fresh = [path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.new") for path in targets]
        try:
            targets[0].parent.mkdir(parents=True, exist_ok=True)
            for path, data in zip(fresh, contents, strict=True):
                with open(path, "xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            for path, target in zip(fresh, targets, strict=True):
                os.replace(path, target)
        except OSError as error:
            raise InputError(
                f"The embeddings {str(targets[0])!r} cannot be written ({error.strerror or error}); finished shards "
                "are kept, so make room or choose another folder with --out and run again to go on."
            ) from error
        finally:
            for path in fresh:
                with suppress(OSError):
                    path.unlink(missing_ok=True)
