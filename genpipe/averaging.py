"""The mean of the weights of several trainings of one part: a model soup (2203.05482, section 2).

It helps where each training went on from another, or from the same start: they lie in one basin of the loss, around a
point that is lower than any of them, as the late iterates of a single training do (1803.05407, section 3).
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genpipe.errors import InputError
from genpipe.parts import Part, load_part

_OF_TRAINING = {"dropout"}  # settings that say nothing of what the weights mean


def average_parts(
    cls: type[Part], folders: Sequence[str | os.PathLike[str]], shares: Sequence[float] | None = None
) -> Part:
    """The part of class `cls` whose weights are the weighted mean of those in `folders`, in float32 and eval mode.

    shares: weight of each folder, above 0, of any sum; None: all the same. Whole numbers and the tokenizer are the
    first's. One folder after another is read, so that memory does not grow with their number.
    Raises InputError for fewer than two folders, shares that do not fit, parts of another class, size or tokenizer, and
    as `load_part` does. Parts whose dropout differs are alike; the average has the first's settings.
    """
    weights = _normalised(shares, len(folders))
    first = load_part(cls, folders[0])
    total = {name: each * weights[0] if each.is_floating_point() else each for name, each in first.state_dict().items()}
    for folder, weight in zip(folders[1:], weights[1:], strict=True):
        other = load_part(cls, folder)
        _check_alike(first, other, folders[0], folder)
        _add(total, other.state_dict(), weight)
    first.load_state_dict(total, assign=True)
    return first.eval()


def _add(total: dict[str, Tensor], weights: Mapping[str, Tensor], share: float) -> None:
    for name, sum_so_far in total.items():
        if sum_so_far.is_floating_point():
            total[name] = torch.add(sum_so_far, weights[name], alpha=share)


def _normalised(shares: Sequence[float] | None, count: int) -> list[float]:
    if count < 2:
        raise InputError(f"an average needs at least two parts, {count} was given.")
    if shares is None:
        return [1 / count] * count
    if len(shares) != count:
        raise InputError(f"{count} parts need {count} shares, {len(shares)} were given.")
    bad = [share for share in shares if not 0 < share < float("inf")]
    if bad:
        raise InputError(f"a share is {bad[0]}; every one must be a number above 0.")
    return [share / sum(shares) for share in shares]


def _check_alike(first: Any, other: Any, first_folder: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
    """Raises InputError, naming both folders, for parts whose sum means nothing."""
    mine, its = _settings(first), _settings(other)
    different = sorted(key for key in mine.keys() | its.keys() if mine.get(key) != its.get(key))
    if different:
        raise InputError(
            f"{Path(folder)} cannot be averaged with {Path(first_folder)}: {different[0]} is "
            f"{str(its.get(different[0]))[:60]} there and {str(mine.get(different[0]))[:60]} here."
        )
    if _words(first) != _words(other):
        raise InputError(f"{Path(folder)} has another tokenizer than {Path(first_folder)}, so their ids differ.")


def _settings(part: Any) -> dict[str, Any]:
    return {key: value for key, value in part.config.items() if not key.startswith("_") and key not in _OF_TRAINING}


def _words(part: Any) -> str | None:
    tokenizer = getattr(part, "_tokenizer", None)
    return None if tokenizer is None else tokenizer.to_json()
