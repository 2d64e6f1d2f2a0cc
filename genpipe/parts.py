"""Saving and loading one learned part, strictly and safely: safetensors and JSON, everything checked before use."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import ModelMixin
from safetensors import SafetensorError
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from genpipe.errors import InputError
from genpipe.json_files import peek_json
from genpipe.tokenizer import CaptionTokenizer
from genpipe.weight_files import Table, read_weights, rewrite_weights, weight_table

FORMAT_VERSION = 1
FORMAT_KEY = "_genpipe_format"  # diffusers leaves keys that begin with "_" alone when it reads a config
CONFIG_NAME = "config.json"
Part = TypeVar("Part", bound=ModelMixin)
Model = TypeVar("Model", bound=nn.Module)


def save_part(
    model: Any, folder: str | os.PathLike[str], dtype: torch.dtype | None = None, file_bytes: int | None = None
) -> None:
    """Write `model` (its weights as `dtype`, or as they are) to `folder`: all of it, or nothing and the old one stays.

    The folder gets config.json with the format version, one safetensors file, or several of at most `file_bytes` (a
    single tensor may be larger) and their index, and whatever else the part's own save_pretrained writes. `model` is
    not changed. An existing folder is replaced only if it is empty or holds a part.
    Raises InputError if it cannot be written (with the reason), or if a weight is too large for `dtype`.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not (target / CONFIG_NAME).is_file())):
        raise InputError(f"{target} exists and is not the folder of a saved part, choose another name or remove it.")
    fresh, old = (target.parent / f".{target.name}.{kind}-{uuid.uuid4().hex[:8]}" for kind in ("new", "old"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        at_once = dtype is None and file_bytes is not None
        model.save_pretrained(fresh, max_shard_size=file_bytes if at_once else "10000GB")
        if not at_once:
            rewrite_weights(fresh, dtype, file_bytes)
        config = json.loads((fresh / CONFIG_NAME).read_text(encoding="utf-8"))
        config[FORMAT_KEY] = FORMAT_VERSION
        config.pop("_name_or_path", None)  # where it was loaded from is no part of it
        (fresh / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for path in filter(Path.is_file, fresh.rglob("*")):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if target.exists():
            target.rename(old)
        try:
            fresh.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    except (OSError, SafetensorError) as error:
        raise InputError(f"{target} cannot be written ({error}); what was there before is untouched.") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


def load_part(cls: type[Part], folder: str | os.PathLike[str], dtype: torch.dtype | None = torch.float32) -> Part:
    """Load a part of class `cls` that save_part (or diffusers) wrote, in eval mode, floating-point weights as `dtype`.

    None leaves them as they are stored.

    Nothing is unpickled, and the file's table of contents must equal the model's before any weight is read. Weights
    that are stored as `dtype` are mapped from the file, which must stay there, and read when they are used. Raises
    InputError, one sentence that names the file, for: a missing folder or file, a config of another class, with unknown
    entries or from a newer genpipe, a pickled, truncated or damaged weights file, and tensors that are missing,
    unexpected or of another shape or kind (all of them are listed).
    """
    root = Path(folder)
    if not root.is_dir():
        aside = sorted(root.parent.glob(f".{root.name}.old-*"))  # a save was killed between its two renames
        hint = f" (its previous version is {aside[-1]}, rename that)" if aside else ""
        raise InputError(f"{root} is not a folder, a saved {cls.__name__} was expected there{hint}.")
    config = _read_config(cls, root / CONFIG_NAME)
    weights, table = weight_table(root)
    model: Any = _built(cls, config, root / CONFIG_NAME)
    expected = {name: (tuple(each.shape), each.is_floating_point()) for name, each in model.state_dict().items()}
    _check_tensors(table, expected, weights)
    try:
        model.load_state_dict(read_weights(weights, dtype), strict=True, assign=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{weights} cannot be loaded as {cls.__name__} ({reason}).") from error
    if isinstance(model, OwnsTokenizer):
        model.load_tokenizer(root)
    model.register_to_config(_name_or_path=str(root))  # as diffusers does: its weights come from somewhere
    if (
        dtype is not None
    ):  # what is not saved is left to cast; ModelMixin's own `to` advises against what is wanted here
        nn.Module.to(model, dtype=dtype)
    return model.eval()


def load_one_of(
    classes: Sequence[type[Part]], folder: str | os.PathLike[str], dtype: torch.dtype = torch.float32
) -> Any:
    """`load_part` of the class among `classes` that the folder's config.json names; an error is the first class's."""
    named = peek_json(Path(folder) / CONFIG_NAME).get("_class_name")
    return load_part(next((cls for cls in classes if cls.__name__ == named), classes[0]), folder, dtype)


def sha256_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 in hex: of a file its contents, of a folder the relative names and contents of its files, in name order.

    Hidden files and folders do not count. Raises InputError if there is nothing at `path`.
    """
    root = Path(path)
    if root.is_file():
        return _sha256_of_file(root)
    if not root.is_dir():
        raise InputError(f"{root} does not exist, so it has no checksum.")
    names = {found.relative_to(root).as_posix(): found for found in root.rglob("*") if found.is_file()}
    total = hashlib.sha256()
    for name in sorted(names):
        if not any(piece.startswith(".") for piece in name.split("/")):
            total.update(f"{name}\0{_sha256_of_file(names[name])}\n".encode())
    return total.hexdigest()


def _sha256_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_config(cls: type[ModelMixin], path: Path) -> dict[str, Any]:
    """config.json, checked for class, format version and unknown entries."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}), so the part cannot be loaded.") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(config, dict) or config.get("_class_name") != cls.__name__:
        found = config.get("_class_name") if isinstance(config, dict) else None
        raise InputError(f"{path} describes a {found!r}, expected was a {cls.__name__!r}.")
    version = config.get(FORMAT_KEY, FORMAT_VERSION)  # absent when diffusers itself wrote the folder
    if not isinstance(version, int) or version < 1:
        raise InputError(f"{path} has the format version {version!r}, which is not a number from 1 on.")
    if version > FORMAT_VERSION:
        raise InputError(
            f"{path} has format version {version}, this genpipe reads up to {FORMAT_VERSION}; install a newer genpipe."
        )
    unknown = {key for key in config if not key.startswith("_")} - set(cls._get_init_keys(cls))
    if unknown:
        raise InputError(f"{path} has entries that {cls.__name__} does not know: {', '.join(sorted(unknown))}.")
    return config


def on_meta(build: Callable[[], Model]) -> Model:
    """The model that `build` makes, its parameters without memory (on the meta device) and not initialised.

    Buffers are made for real: those that are not saved have no other source. Draws made while building leave torch's
    global random state as it was.
    """
    thread = threading.get_ident()

    def emptied(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta or threading.get_ident() != thread:
            return None  # as it is; a parameter that two modules share must stay one object
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    hook = register_module_parameter_registration_hook(emptied)
    try:
        with torch.random.fork_rng(devices=[]):
            return build()
    finally:
        hook.remove()


def _built(cls: type[ModelMixin], config: dict[str, Any], path: Path) -> ModelMixin:
    """The model that a config describes, without memory for its weights."""
    arguments = {key: value for key, value in config.items() if not key.startswith("_")}
    try:
        try:
            return on_meta(lambda: cls(**arguments))
        except Exception:  # an initialisation that looks at values, or a config that does not fit: build it for real
            return cls(**arguments)
    except Exception as error:  # whatever a constructor makes of a config that does not fit
        reason = " ".join(str(error).split())
        raise InputError(f"{path} does not describe a {cls.__name__} that can be built ({reason}).") from error


def _check_tensors(found: Table, expected: Table, path: Path) -> None:
    """Raise InputError listing every tensor of the file that is missing, unexpected, or of another shape or kind."""
    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in expected]
    for name in expected:
        if name in found and found[name] != expected[name]:
            (shape, floating), (right_shape, right_floating) = found[name], expected[name]
            kinds = "" if floating == right_floating else ", integer and floating point confused"
            problems.append(f"mis-shaped {name} {list(shape)} instead of {list(right_shape)}{kinds}")
    if problems:
        raise InputError(f"{path} does not fit its config.json: {'; '.join(problems)}.")


class OwnsTokenizer:
    """Mixin, placed before ModelMixin, for parts that eat token ids: the tokenizer travels in the part's own folder.

    `model.tokenizer` is a `tokenizer_class`, saved as tokenizer.json and read by from_pretrained, unless the part's
    config has a `tokenizer_name`: then `named_tokenizer` makes it at first use.
    """

    config: Any
    tokenizer_class: Any = CaptionTokenizer  # anything with its `save` and `load`
    _tokenizer: Any = None

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that makes this part's ids. Raises InputError while there is none."""
        if self._tokenizer is None:
            name = self.config.get("tokenizer_name")
            if name is None:
                raise InputError(f"this {type(self).__name__} has no tokenizer yet; set its .tokenizer first.")
            self._tokenizer = self.named_tokenizer(name)
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self.check_tokenizer(tokenizer)
        self._tokenizer = tokenizer

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raise InputError if this part cannot use `tokenizer`; parts that know their table's size override this."""

    def named_tokenizer(self, name: str) -> Any:
        """The published tokenizer `name`; parts that can have one override this."""
        raise InputError(f"{type(self).__name__} knows no published tokenizer, {name!r} neither.")

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        save_function: Any = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """diffusers' save_pretrained (same arguments), and tokenizer.json beside the weights."""
        named = self.config.get("tokenizer_name") is not None
        own = None if named else self.tokenizer  # complains before anything is written
        super().save_pretrained(  # type: ignore[misc]
            save_directory,
            is_main_process=is_main_process,
            save_function=save_function,
            safe_serialization=safe_serialization,
            variant=variant,
            max_shard_size=max_shard_size,
            push_to_hub=push_to_hub,
            **kwargs,
        )
        if is_main_process and own is not None:
            own.save(save_directory)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """diffusers' from_pretrained (same arguments) for a local folder; reads its tokenizer.json too."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple if output_loading_info was asked for
        model.load_tokenizer(Path(pretrained_model_name_or_path) / (kwargs.get("subfolder") or ""))
        return loaded

    def load_tokenizer(self, folder: Path) -> None:
        """Read the tokenizer from a folder where one was saved. Raises InputError where it is missing or unfit."""
        if self.config.get("tokenizer_name") is None:
            self.tokenizer = self.tokenizer_class.load(folder)
