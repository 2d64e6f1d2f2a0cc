"""Atomic checkpoints of a run: safetensors for tensors, JSON for numbers, the newest complete one wins.

A checkpoint is a folder step-XXXXXXXX that appears by one rename, so that a killed process or a full disk leaves the
previous one as it was. Every random draw of a run is seeded by the number of its batch, so the random state and the
data position are two numbers, steps and batches; the format is the same for any number of processes.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from genpipe.errors import InputError

FORMAT_VERSION = 1
KEEP = 2


@dataclass
class Checkpoint:
    """One checkpoint in memory: named tensors and a JSON-able record."""

    step: int
    tensors: dict[str, Tensor]
    record: dict[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write folder/step-XXXXXXXX and remove all but the newest two. Raises InputError when it cannot be written."""
    final = folder / f"step-{checkpoint.step:08d}"
    temporary = folder / f".writing-{checkpoint.step:08d}-{os.getpid()}"
    record = {**checkpoint.record, "format_version": FORMAT_VERSION, "step": checkpoint.step}
    try:
        for killed in folder.glob(".writing-*"):  # a run has one writer
            shutil.rmtree(killed, ignore_errors=True)
        temporary.mkdir(parents=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
        save_file(tensors, temporary / "state.safetensors")
        (temporary / "state.json").write_text(json.dumps(record, indent=1))
        for file in temporary.iterdir():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        kept = newest(folder)
        kept_words = f"the checkpoint {kept} is untouched" if kept else "no earlier checkpoint exists"
        raise InputError(
            f"the checkpoint {final} could not be written ({error}); {kept_words}, make room and run again to resume."
        ) from error
    for old in _complete(folder)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _complete(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if (path / "state.json").is_file())


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint below `folder`, or None."""
    complete = _complete(folder) if folder.is_dir() else []
    return complete[-1] if complete else None


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint. Raises InputError when it is damaged or from a newer version."""
    try:
        record = json.loads((path / "state.json").read_text())
        if record["format_version"] > FORMAT_VERSION:
            raise InputError(
                f"{path} has checkpoint format {record['format_version']}, this genpipe reads up to {FORMAT_VERSION}; "
                "install a newer genpipe."
            )
        return Checkpoint(int(record["step"]), load_file(path / "state.safetensors"), record)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(
            f"the checkpoint {path} cannot be read ({error}); delete that folder to resume from the one before."
        ) from error


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state as named tensors: "optimizer.<parameter number>.<name>"."""
    state = optimizer.state_dict()["state"]
    return {
        f"optimizer.{number}.{name}": torch.as_tensor(value)
        for number, values in state.items()
        for name, value in values.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of :func:`optimizer_tensors`; learning rates are a function of the step and are set by the loop."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        group, _, rest = key.partition(".")
        if group == "optimizer":
            number, _, name = rest.partition(".")
            state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
