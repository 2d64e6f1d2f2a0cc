"""Published weights that genpipe does not read: known by their names, refused with the reason and what to do.

Nothing in them is run: JSON is read as JSON, and of a pickle only the texts that stand in it are looked at.
"""

import json
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

from genpipe.json_files import JSON_LIMIT, peek_json

NAMES_LIMIT = 4_000_000  # bytes of a file that are looked through for names
NAME_LIMIT = 60  # characters of a name from a stranger's file that are shown
WEIGHTS = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")

# {0}: the folder or file.
LAION = (
    "{0} holds weights of the project DALLE2-pytorch (LAION's), whose module names changed from version to "
    "version while the files do not say theirs; use Karlo (kakaobrain/karlo-v1-alpha) instead."
)
DALLE_PYTORCH = (
    "{0} is a checkpoint of the project DALLE-pytorch, of which no model was ever published and whose network "
    "depends on the options of its training; use minDALL-E instead."
)
RUDALLE = (
    "{0} holds ru-DALL-E, whose tokenizer (YouTokenToMe) is no longer maintained and whose weights name no "
    "licence; use minDALL-E instead."
)
STABLE = (
    "{0} holds Stable Diffusion, which is neither of the two systems that genpipe runs; use diffusers for it, or "
    "Kandinsky 2.2 (kandinsky-community/kandinsky-2-2-decoder) instead."
)
STABLE_UNCLIP = (
    "{0} holds Stable Diffusion's unCLIP decoder, whose repositories were withdrawn and which genpipe does not "
    "run; use diffusers for it, or Kandinsky 2.2 (kandinsky-community/kandinsky-2-2-decoder) instead."
)
OTHER_PIPELINE = (
    "{0} holds a pipeline of diffusers ({1}) that genpipe does not run; it runs Karlo's and Kandinsky 2.2's, use "
    "one of them instead."
)
# The first kind of which all the beginnings are among the names in a file.
KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (DALLE_PYTORCH, ("hparams", "vae_params", "weights")),
    (LAION, ("noise_scheduler.", "net.causal_transformer.")),
    (LAION, ("noise_schedulers.0.", "unets.0.")),
    (LAION, ("decoder.noise_schedulers.0.", "decoder.unets.0.")),
    (STABLE_UNCLIP, ("model.diffusion_model.", "noise_augmentor.")),
    (STABLE, ("model.diffusion_model.", "first_stage_model.")),
    (RUDALLE, ("text_pos_embeddings.", "image_row_embeddings.", "to_logits.1.")),
)
# Beginnings of the names of repositories, without owner, so that nothing is fetched in vain.
REPOSITORIES = (
    (LAION, ("dalle2-pytorch",)),
    (RUDALLE, ("rudalle", "ru-dalle")),
    (STABLE_UNCLIP, ("stable-diffusion-2-1-unclip",)),
    (STABLE, ("stable-diffusion", "sdxl")),
)


def reason_by_name(name: str) -> str | None:
    """Why a repository of the Hub cannot be read, by its name alone; None where that says nothing."""
    repository = name.lower().rpartition("/")[2]
    found = next((kind for kind, beginnings in REPOSITORIES if repository.startswith(beginnings)), None)
    return None if found is None else found.format(repr(name))


def reason(source: Path) -> str | None:
    """Why a folder or file cannot be read, in one sentence; None where it is of no kind that is known here."""
    try:
        found, name = _kind(source)
    except (OSError, ValueError, RecursionError, zipfile.BadZipFile):
        return None
    return None if found is None else found.format(repr(str(source)), name)


def _kind(source: Path) -> tuple[str | None, str]:
    if source.is_file():
        return _kind_of_file(source), ""
    index = peek_json(source / "model_index.json")
    name = str(index.get("_class_name") or "")[:NAME_LIMIT]
    if name:
        if not name.startswith("Stable"):
            return OTHER_PIPELINE, name
        return (STABLE_UNCLIP if "UnCLIP" in name else STABLE), name
    files = sorted(file for file in source.iterdir() if file.suffix in WEIGHTS)
    if files and any((source / f"{part}_config.json").is_file() for part in ("prior", "decoder")):
        return LAION, ""
    return next((found for file in files if (found := _kind_of_file(file)) is not None), None), ""


def _kind_of_file(path: Path) -> str | None:
    if "malevich" in path.name.lower() or path.name.startswith("vqgan.gumbelf8-sber"):
        return RUDALLE
    names = _names_in(path)
    for kind, beginnings in KINDS:
        if all(any(name.startswith(beginning) for name in names) for beginning in beginnings):
            return kind
    return None


def _names_in(path: Path) -> set[str]:
    """The names of tensors in a safetensors file, the texts in a torch file's pickle; empty for any other file."""
    with path.open("rb") as file:
        start = file.read(9)
        if start[8:] == b"{":
            header = file.read(min(struct.unpack("<Q", start[:8])[0], JSON_LIMIT) - 1)
            return set(json.loads(b"{" + header))
        content = start + file.read(NAMES_LIMIT) if start[:1] == b"\x80" else b""
    if start[:2] == b"PK":
        with zipfile.ZipFile(path) as archive:
            pickled = [name for name in archive.namelist() if name.endswith("data.pkl")]
            if pickled:
                with archive.open(pickled[0]) as inside:
                    content = inside.read(NAMES_LIMIT)
    return set(_texts(content))


def _texts(pickle: bytes) -> Iterator[str]:
    """The texts of up to 300 letters that a pickle brings, found by their opcodes without following its program."""
    place = 0
    while place < len(pickle):
        start = length = 0
        if pickle[place] == 0x58:  # BINUNICODE: four bytes of length
            start, length = place + 5, int.from_bytes(pickle[place + 1 : place + 5], "little")
        elif pickle[place] == 0x8C:  # SHORT_BINUNICODE: one
            start, length = place + 2, int.from_bytes(pickle[place + 1 : place + 2], "little")
        text = pickle[start : start + length].decode("latin-1") if 0 < length <= 300 else ""
        if text.isascii() and text.isprintable() and text:
            yield text
            place = start + length
        else:
            place += 1
