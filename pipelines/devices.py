"""Which devices there are, and the one to compute on."""

import os
import warnings
from typing import TYPE_CHECKING

from genpipe.errors import InputError

if TYPE_CHECKING:
    import torch


def available_devices() -> list[str]:
    """Names for --device, the accelerators first."""
    import torch

    names = ["cpu"]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        assert kind is not None
        names = [f"{kind.type}:{index}" for index in range(torch.accelerator.device_count())] + names
    return names


def choose_device(name: str) -> "torch.device":
    """A device by name, or "auto": the first accelerator, else the processor. Raises InputError if it is not there."""
    import torch

    present = available_devices()
    chosen = present[0] if name == "auto" else name
    if chosen not in present and f"{chosen}:0" not in present:
        raise InputError(f"There is no device {name[:40]!r} here; choose from auto, {', '.join(present)}.")
    return torch.device(chosen)


def same_machine(kind: str, threads: int) -> "torch.device":
    """Set this process up as the one that drew a picture: the kind of its device and its number of threads.

    Both decide in which order sums are added up. Warns where this machine does not have them.
    """
    import torch

    if threads <= (os.cpu_count() or 1):
        torch.set_num_threads(threads)
    if any(name.partition(":")[0] == kind for name in available_devices()):
        return torch.device(kind)
    warnings.warn(f"The picture was drawn on a device of the kind {kind!r}, which is not here.", stacklevel=2)
    return choose_device("auto")
