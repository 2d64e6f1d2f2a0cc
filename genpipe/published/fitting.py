"""Fitting published tensors into a model: the operations of key maps and their inverses, and the one strict load."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from genpipe.errors import InputError
from genpipe.parts import on_meta

__all__ = ["assign", "give_back", "on_meta", "take"]


def take(tensor: torch.Tensor, operation: str) -> torch.Tensor:
    """`tensor` of one naming as the other naming has it, by the operation's name in a key map. A view.

    copy; transpose (2-D); unsqueeze0 (a leading axis); squeeze_last (a 1x1 Conv1d kernel becomes a Linear weight);
    rows:i/n (the i-th of n equal blocks of rows); per_head_rows:i/n:d (rows lie head by head, each head holding n
    groups of d rows: group i of every head). Raises ValueError for another operation or a tensor that it does not fit.
    """
    name, _, rest = operation.partition(":")
    if name == "copy":
        return tensor
    if name == "transpose" and tensor.ndim == 2:
        return tensor.T
    if name == "unsqueeze0":
        return tensor[None]
    if name == "squeeze_last" and tensor.shape[-1:] == (1,):
        return tensor.squeeze(-1)
    if name == "rows":
        index, count = (int(number) for number in rest.split("/"))
        return tensor.unflatten(0, (count, -1))[index]
    if name == "per_head_rows":
        fraction, _, width = rest.partition(":")
        index, count = (int(number) for number in fraction.split("/"))
        return tensor.unflatten(0, (-1, count, int(width)))[:, index].flatten(0, 1)
    raise ValueError(f"the operation {operation!r} does not fit a tensor of shape {list(tensor.shape)}")


def give_back(parts: Sequence[tuple[str, torch.Tensor]]) -> torch.Tensor:
    """The inverse of `take`: (operation, result) of all that was taken from one tensor -> that tensor.

    Raises ValueError unless the parts make up the whole.
    """
    name, _, rest = parts[0][0].partition(":")
    if name in ("rows", "per_head_rows"):
        fraction, _, width = rest.partition(":")
        count = int(fraction.split("/")[1])
        blocks = {int(operation.partition(":")[2].split("/")[0]): part for operation, part in parts}
        if sorted(blocks) != list(range(count)) or len(parts) != count:
            raise ValueError(f"{count} blocks of rows are needed, not {[operation for operation, _ in parts]}")
        ordered = [blocks[index] for index in range(count)]
        if name == "rows":
            return torch.cat(ordered)
        return torch.stack([block.unflatten(0, (-1, int(width))) for block in ordered], dim=1).flatten(0, 2)
    if len(parts) != 1:
        raise ValueError(f"{[operation for operation, _ in parts]} are not parts of one tensor")
    tensor = parts[0][1]
    if name == "transpose":
        return tensor.T
    if name == "unsqueeze0":
        return tensor.squeeze(0)
    if name == "squeeze_last":
        return tensor[..., None]
    return take(tensor, parts[0][0])


def assign(
    model: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    source: str,
    dtype: torch.dtype | None = None,
    ignorable: Collection[str] = (),
) -> None:
    """Make `tensors` the weights of `model` (from on_meta): no second copy, and nothing left over on either side.

    Floating-point tensors become `dtype` one by one; None keeps the file's. `ignorable` names tensors (* and ? stand
    for any text) that may be there without being used. Raises InputError listing all that is missing, unexpected, of
    another shape, or integer where floating point belongs and the other way round.
    """
    expected = model.state_dict()
    used = {
        name: tensor
        for name, tensor in tensors.items()
        if name in expected or not any(fnmatchcase(name, pattern) for pattern in ignorable)
    }
    problems = [f"missing {name}" for name in expected if name not in used]
    problems += [f"unexpected {name}" for name in used if name not in expected]
    for name in expected:
        if name in used:
            problems += _misfit(name, used[name], expected[name])
    if problems:
        raise InputError(f"{source} does not fit {type(model).__name__}: {'; '.join(problems)}.")
    for name, tensor in used.items():
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        used[name] = tensor.to(kind).contiguous()  # a transposed view could not be saved as it is
    model.load_state_dict(used, strict=True, assign=True)
    wanting = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if wanting and not any(tensor.is_meta for tensor in used.values()):
        raise InputError(f"{source} leaves parts of {type(model).__name__} without values: {', '.join(wanting)}.")


def _misfit(name: str, found: torch.Tensor, wanted: torch.Tensor) -> list[str]:
    if found.shape != wanted.shape:
        return [f"mis-shaped {name} {list(found.shape)} instead of {list(wanted.shape)}"]
    if found.is_floating_point() != wanted.is_floating_point():
        return [f"{name} of type {found.dtype} instead of {wanted.dtype}"]
    return []
