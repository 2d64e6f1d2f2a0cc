"""What both pipelines have in common: ranking where there is a whole CLIP, warnings, the device they compute on."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline

from genpipe.clip.model import CLIP
from pipelines import request
from pipelines.encoding import has_tower


class FamilyPipeline(DiffusionPipeline):
    """Parts of one family. `clip` may be None or lack its image tower: then pictures come back in order, unranked.

    Parts can be kept off the accelerator while they are idle, see diffusers: all of them by `enable_model_cpu_offload`,
    decoder and upsampler layer by layer, while the others stay on it, by `enable_sequential_cpu_offload`.
    """

    clip: CLIP | None

    # Layer by layer only what draws is streamed, and stays off: the others use weights of layers that they do not call.
    _exclude_from_cpu_offload = ["clip", "prior", "dvae", "transformer", "guide"]

    def register_family(self, defaults: Mapping[str, Any] | None, family: str, words: Sequence[str] | None) -> None:
        """Keep in the config what the family says: settings by name, its name, the words that it was trained on."""
        self.register_to_config(
            defaults=dict(defaults or {}), family=family, known_words=None if words is None else list(words)
        )

    @property
    def ranks(self) -> bool:
        """Whether candidates are ranked."""
        return has_tower(self.clip, "text") and has_tower(self.clip, "image")

    @property
    def computes_on(self) -> torch.device:
        """The device of the computation, which is not where the weights of idle parts lie.

        diffusers' own answer leaves out the parts that layer by layer offload excludes.
        """
        parts = [part for part in self.components.values() if isinstance(part, torch.nn.Module)]
        for module in (module for part in parts for module in part.modules()):
            device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
            if device is not None:
                return torch.device(device)
        return self.device

    def warn(self, prompts: Sequence[str]) -> None:
        """Say what will keep the pictures from showing what was asked for: untrained parts, words never seen."""
        request.warn_of_untrained(self.components)
        if not self.ranks:
            lacking = (
                "CLIP" if self.clip is None else f"CLIP {'image' if has_tower(self.clip, 'text') else 'text'} tower"
            )
            request.warn_of_no_ranking(lacking)
        if self.config.known_words is not None:
            request.warn_of_unknown_words(prompts, frozenset(self.config.known_words), self.config.family)
