"""Parts that are kept off the accelerator while they are idle: every one of them, whatever the pipeline asks of it.

Most of it needs no accelerator: an idle part's weights are taken away altogether (to the meta device), so that whatever
forgets the hook, or asks an idle part for its device, fails.
"""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import set_module_tensor_to_device
from karlo_files import write_folder, write_variations
from mindalle_files import write as write_mindalle
from PIL import Image
from test_kandinsky import write_folders
from test_published_glide import CONFIGS as GLIDE_CONFIGS
from test_published_glide import FILES as GLIDE_FILES
from test_published_glide import write as write_glide

from genpipe.published import glide
from pipelines.base import FamilyPipeline
from pipelines.dalle2 import DALLE2Pipeline
from pipelines.family import Family, load_family

PROMPT = "a cat"
GIVEN = Image.effect_noise((40, 40), 90).convert("RGB")
FEW = {"num_inference_steps": 2, "prior_steps": 2, "upsampler_steps": 2}


class Parked(ModelHook):
    """Takes a part's weights away until it is asked for something, and then those of all the others."""

    execution_device = torch.device("cpu")

    def __init__(self, part: torch.nn.Module, all_: "list[Parked]") -> None:
        self.part, self.all, self.calls = part, all_, 0
        self.away: dict[str, torch.Tensor] = {}
        all_.append(self)

    def init_hook(self, module: torch.nn.Module) -> torch.nn.Module:
        self.park()
        return module

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.calls += 1
        for other in self.all:
            if other is not self:
                other.park()
        self.fetch()
        return args, kwargs

    def park(self) -> None:
        if not self.away:
            tensors = [*self.part.named_parameters(), *self.part.named_buffers()]
            self.away = {name: tensor.detach() for name, tensor in tensors}
            for name in self.away:
                set_module_tensor_to_device(self.part, name, "meta")

    def fetch(self) -> None:
        for name, tensor in self.away.items():
            set_module_tensor_to_device(self.part, name, "cpu", value=tensor)
        self.away = {}


def parked(pipeline: FamilyPipeline) -> dict[str, Parked]:
    """Hooks on all parts of a pipeline, by name."""
    together: list[Parked] = []
    hooks = {name: Parked(part, together) for name, part in pipeline.components.items() if part is not None}
    for hook in hooks.values():
        add_hook_to_module(hook.part, hook)
    return hooks


def pictures(pipeline: FamilyPipeline, **options: Any) -> list[bytes]:
    sampling = pipeline.resolve_sampling(options.pop("rare", {}), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = pipeline(PROMPT, num_candidates=2, keep=2, sampling=sampling, **options)
    return [image.tobytes() for image in output.images[0]]


def check(pipeline: FamilyPipeline, calls: list[dict[str, Any]]) -> None:
    """With parked parts the same pictures are drawn, and every part was asked for something."""
    expected = [pictures(pipeline, **dict(options)) for options in calls]
    hooks = parked(pipeline)
    assert all(next(hook.part.parameters()).is_meta for hook in hooks.values())
    got = [pictures(pipeline, **dict(options)) for options in calls]
    assert got == expected and all(hook.calls > 0 for hook in hooks.values()), {n: h.calls for n, h in hooks.items()}
    assert sum(not next(hook.part.parameters()).is_meta for hook in hooks.values()) == 1


@pytest.fixture
def fresh(tiny_folder: Path) -> Family:
    """A family that a test may put hooks on."""
    return load_family(tiny_folder)


def test_both_pipelines_of_a_family_of_ours(fresh: Family) -> None:
    check(fresh.dalle1, [{"rare": {"upsample": True, "decoder_weight": 0.1}}])
    check(
        load_family(fresh.folder).dalle2, [{}, {"image": GIVEN}, {"rare": {"mode": "text", "negative_prompt": "dogs"}}]
    )


def test_karlo(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "karlo")
    images = write_variations(folder, tmp_path / "variations") / "image_encoder"
    check(load_family(folder, clip=images).dalle2, [{"rare": FEW}])


def test_kandinsky(tmp_path: Path) -> None:
    family = load_family(write_folders(tmp_path))
    rare = {**FEW, "upsampler_steps": None}
    check(
        family.dalle2, [{"rare": rare}, {"rare": {**rare, "negative_prompt": "dogs"}}, {"image": GIVEN, "rare": rare}]
    )


def test_glide(tmp_path: Path) -> None:
    def build(source: Path) -> DALLE2Pipeline:
        read = glide.read(source, configs=GLIDE_CONFIGS)
        parts = {name: built() for name, built in read.parts.items()}
        return DALLE2Pipeline(None, **parts, defaults={**read.defaults["dalle2"], **FEW, "prior_steps": None})

    folder = write_glide(tmp_path / "glide", *GLIDE_FILES)
    check(build(folder), [{"rare": {"clip_guidance_scale": 2.0}}])
    mask = Image.new("L", (40, 40))
    mask.paste(255, (0, 0, 20, 40))
    filling = build(folder / "base_inpaint.pt")
    check(filling, [{"image": GIVEN, "fill": mask, "rare": {"clip_guidance_scale": 1.0}}])


def test_mindalle(tmp_path: Path) -> None:
    check(load_family(write_mindalle(tmp_path / "1.3B")).dalle1, [{}])


def test_diffusers_own_offload_on_a_processor(fresh: Family) -> None:
    for pipeline in (fresh.dalle1, fresh.dalle2):
        expected = pictures(pipeline)
        pipeline.enable_model_cpu_offload(device="cpu")
        parts = {name: part for name, part in pipeline.components.items() if part is not None}
        assert set(parts) == set(pipeline.model_cpu_offload_seq.split("->"))
        assert all(hasattr(part, "_hf_hook") for part in parts.values())
        assert pictures(pipeline) == expected and pipeline.computes_on.type == "cpu"
        pipeline.remove_all_hooks()


def test_layer_by_layer_offload_streams_the_networks_that_draw(fresh: Family) -> None:
    pipeline = fresh.dalle2
    expected = pictures(pipeline)
    for name, part in pipeline.components.items():  # diffusers' own method wants the index of an accelerator
        if part is not None and name not in pipeline._exclude_from_cpu_offload:
            cpu_offload(part, torch.device("cpu"), offload_buffers=len(part._parameters) > 0)
    assert next(pipeline.decoder.unet.parameters()).is_meta and next(pipeline.upsampler.parameters()).is_meta
    assert pictures(pipeline) == expected
    assert next(pipeline.decoder.unet.parameters()).is_meta  # gone again
    assert not next(pipeline.clip.parameters()).is_meta


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("kind", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offload_on_an_accelerator(fresh: Family, kind: str) -> None:
    for pipeline in (fresh.dalle1, fresh.dalle2):
        getattr(pipeline, kind)()
        assert len(pictures(pipeline)) == 2 and pipeline.computes_on.type == "cuda"
        if kind == "enable_model_cpu_offload":  # after a call all have left it
            assert {part.device.type for part in pipeline.components.values()} == {"cpu"}
