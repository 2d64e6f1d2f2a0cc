"""Published weights by name: where they lie on this disk, and their download, which happens only when asked for.

Hub ids go through huggingface_hub, everything else over plain HTTPS, resumed where it broke off, with its checksum
where one is known. Nothing here is read as weights.
"""

import os
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from genpipe.errors import InputError
from genpipe.published import glide, mindalle, openai_dvae

BLOCK = 1 << 20
SECONDS = 30.0  # that a server may be silent
HUB_ID = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}")
NO_PICKLES = ("*.json", "*.safetensors", "*.txt", "*.md", "LICENSE*", "*/*.json", "*/*.safetensors", "*/*.txt")

Report = Callable[[int, int], Any]  # bytes that are there, bytes of all


@dataclass(frozen=True)
class File:
    """One file over HTTPS: where it is, what it is called, and its checksum ("sha256" or "md5"), where one is known."""

    url: str
    name: str
    algorithm: str = ""
    checksum: str = ""


@dataclass(frozen=True)
class Download:
    """What belongs to a known name: repositories of the Hub, in sub-folders if there are several, or single files.

    hub: sub-folder -> repository; patterns: the files of them. gigabytes: about, of all. members: of the tar archive
    that the only file is. opened: the file or folder that the reader wants in place of the whole folder.
    """

    gigabytes: float
    hub: Mapping[str, str] = field(default_factory=dict)
    patterns: Sequence[str] = NO_PICKLES
    files: Sequence[File] = ()
    members: Sequence[str] = ()
    opened: str = ""


_MERGES = File(
    "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe",
    "vocab.bpe",
    "sha256",
    "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
)
_KARLO = "kakaobrain/karlo-v1-alpha"
_KANDINSKY = {name: f"kandinsky-community/kandinsky-2-2-{name}" for name in ("prior", "decoder")}
KNOWN: Mapping[str, Download] = {
    _KARLO: Download(13.7, {"": _KARLO}),
    # The one folder of which the main revision had pickles alone; they are read by their tensors, never run.
    f"{_KARLO}-image-variations": Download(
        10.9, {"": f"{_KARLO}-image-variations"}, (*NO_PICKLES, "*/diffusion_pytorch_model.bin", "*/pytorch_model.bin")
    ),
    _KANDINSKY["decoder"]: Download(15.9, _KANDINSKY),
    "minDALL-E": Download(
        4.9, files=[File(mindalle.URL, "1.3B.tar.gz", "md5", mindalle.MD5)], members=mindalle.FILES, opened="1.3B"
    ),
    "GLIDE": Download(
        3.8, files=[*(File(glide.WEIGHTS_URL + name, name) for name in (*glide.DRAWING, *glide.GUIDE)), _MERGES]
    ),
    "GLIDE-inpaint": Download(
        3.1, files=[*(File(glide.WEIGHTS_URL + name, name) for name in glide.FILLING), _MERGES]
    ),
    "OpenAI-dVAE": Download(0.4, files=[File(openai_dvae.URL + name, name) for name in openai_dvae.FILES]),
    "OpenAI-ViT-L-14": Download(
        0.9,
        files=[
            File(
                "https://openaipublic.azureedge.net/clip/models/"
                "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
                "ViT-L-14.pt",
                "sha256",
                "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
            )
        ],
        opened="ViT-L-14.pt",
    ),
}  # fmt: skip


def known(name: str) -> tuple[str, Download] | None:
    """The known download of a name, whatever its case, or any repository of the Hub; None for what is neither."""
    for each, download in KNOWN.items():
        if each.lower() == name.lower():
            return each, download
    return (name, Download(0.0, {"": name})) if HUB_ID.fullmatch(name) else None


def on_this_disk(name: str) -> Path | None:
    """Where an earlier download of this name lies, whole; None where there is none. Asks nobody."""
    found = known(name)
    if found is None:
        return None
    name, download = found
    if download.files:
        folder = _folder(name)
        needed = [download.opened] if download.members else [file.name for file in download.files]
        return folder / download.opened if all((folder / each).exists() for each in needed) else None
    from huggingface_hub import snapshot_download

    try:
        if len(download.hub) == 1:
            (repository,) = download.hub.values()
            return Path(snapshot_download(repository, **_chosen(download), local_files_only=True))
        return _folder(name) if (_folder(name) / DONE).is_file() else None
    except Exception:  # the client's own classes, which differ between its versions
        return None


DONE = ".complete"  # a file that says that several repositories were fetched to their end


def _chosen(download: Download) -> dict[str, Any]:
    """The files of a repository, as huggingface_hub takes them: without a second copy in half precision."""
    return {"allow_patterns": list(download.patterns), "ignore_patterns": ["*.fp16.*", "*.non_ema.*"]}


def fetch(name: str, report: Report | None = None) -> Path:
    """Download what belongs to a name, or go on with it where it broke off; returns what the reader wants.

    Raises InputError, one sentence, for a name that is not known, without a network, for a full disk, and for a file
    that is not the published one.
    """
    found = known(name)
    if found is None:
        raise InputError(
            f"{name[:100]!r} is no folder, no Hub id (owner/name) and no known name; those are {', '.join(KNOWN)}."
        )
    name, download = found
    if download.files:
        return _fetch_files(_folder(name), download, report)
    from huggingface_hub import snapshot_download

    places = {}
    for place, repository in download.hub.items():
        options: dict[str, Any] = {} if len(download.hub) == 1 else {"local_dir": _folder(name) / place}
        try:
            fetched = snapshot_download(repository, **_chosen(download), **options)
        except Exception as error:  # the client's own classes, httpx's and the system's, differing between its versions
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")
            raise InputError(
                f"{repository!r} could not be fetched from the Hub ({reason[:200]}); connect to the network and try "
                "again, which goes on where it broke off, or give a folder on this disk."
            ) from error
        places[place] = Path(fetched)
    if len(places) == 1:
        return next(iter(places.values()))
    (_folder(name) / DONE).touch()
    return _folder(name)


def _fetch_files(folder: Path, download: Download, report: Report | None) -> Path:
    opened = folder / download.opened
    if download.members and opened.is_dir():
        return opened
    for number, file in enumerate(download.files):
        fetch_file(file, folder / file.name, _among(report, number, len(download.files)))
    if download.members:
        from genpipe.published.archives import open_tar

        archive = folder / download.files[0].name
        open_tar(archive, download.members, opened)
        archive.unlink()  # its checksum was right, and what was in it takes the same room again
    return opened


def fetch_file(file: File, target: Path, report: Report | None = None) -> None:
    """Download one file, going on where an earlier attempt broke off; nothing under `target` until it is whole.

    Raises InputError where the server cannot be reached or has it not, the disk is full, or the checksum is wrong: what
    was fetched is then thrown away.
    """
    if target.is_file():
        return
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _receive(file.url, part, report)
        if file.algorithm:
            _check(part, file)
        os.replace(part, target)
    except InputError:
        part.unlink(missing_ok=True)
        raise
    except (OSError, ValueError) as error:  # also urllib's own; what is there by then is kept, to go on with
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"{file.url} could not be fetched ({str(reason).rstrip('.')}); try again, which goes on where it broke "
            f"off, or put the file into {target.parent} yourself."
        ) from error


def _receive(url: str, part: Path, report: Report | None) -> None:
    """Append to `part` what it lacks of the file behind a URL. Raises OSError where it does not come whole."""
    there = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={there}-"} if there else {})
    try:
        answer = urllib.request.urlopen(request, timeout=SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not there:
            raise
        part.unlink()  # nothing lies behind its end: whole already, or of another file; begun anew to be sure
        return _receive(url, part, report)
    with answer:
        if answer.status != 206:  # this server does not go on in the middle
            there = 0
        length = answer.headers.get("Content-Length")
        total = there + int(length) if length else 0
        if total and shutil.disk_usage(part.parent).free < total - there:
            raise InputError(
                f"{part.parent} has no room for the {total / 1e9:.1f} GB of {url}; make room and try again."
            )
        with part.open("ab" if there else "wb") as file:
            while block := answer.read(BLOCK):
                file.write(block)
                there += len(block)
                if report is not None:
                    report(there, total)
        if total and there != total:
            raise OSError(f"the connection broke off after {there:,} of {total:,} bytes")


def _check(part: Path, file: File) -> None:
    from genpipe.published.archives import checksum

    try:
        checksum(part, file.algorithm, file.checksum)
    except InputError as error:
        raise InputError(
            f"{file.url} gave another file than the published one (its {file.algorithm} is not {file.checksum}); it "
            "was thrown away, try again later."
        ) from error


def _among(report: Report | None, number: int, count: int) -> Report | None:
    """The report of one of several files as that of all: each counts as much as the others."""
    if report is None:
        return None
    return lambda there, total: report(number * (total or there) + there, count * (total or there))


def _folder(name: str) -> Path:
    """Where the files of a known name are kept: below $GENPIPE_CACHE, or the usual folder for such things."""
    base = os.environ.get("GENPIPE_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "genpipe"
    )
    return Path(base) / name.replace("/", "--")
