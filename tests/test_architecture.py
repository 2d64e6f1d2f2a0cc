"""The shape of the project: who may import whom, frozen names and flags, no device literals, light imports."""

import ast
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from pipelines.cli import app
from pipelines.family import PART_CLASSES

ROOT = Path(__file__).parent.parent
BLOCKS = ("clip", "dalle1", "dalle2")
USERS_OF_BLOCKS = ("training", "published", "evaluation")  # everything else in genpipe/ is the bottom row
DEVICE = re.compile(r"(cpu|cuda|mps|xpu|hpu|npu|xla)(:\d+)?")

FLAGS = {
    "generate": {
        "--family", "--pipeline", "--candidates", "--keep", "--seed", "--guidance", "--temperature", "--top-k",
        "--top-p", "--decoder-weight", "--steps", "--scheduler", "--negative", "--mode", "--image", "--fill",
        "--prior-guidance", "--clip-guidance", "--upsample", "--no-upsample", "--out", "--device", "--json",
    },
    "reproduce": {"--family", "--image", "--fill", "--out"},
    "rerank": {"--top", "--clip", "--device", "--json"},
    "train": {"--set", "--data", "--minutes", "--steps", "--out", "--resume", "--no-resume"},
    "assemble": {
        "--runs", "--clip", "--dvae", "--transformer", "--decoder", "--prior", "--upsampler", "--name", "--license",
        "--description", "--guidance", "--temperature", "--top-p", "--default", "--card", "--replace",
    },
    "average": {"--share", "--out", "--replace"},
    "info": {"--json"},
    "import": {"--clip", "--dtype", "--replace", "--json"},
    "demo": {"--family", "--host", "--port", "--open", "--no-open", "--device"},
    "classify": {
        "--classes", "--classes-file", "--classifier", "--save-classifier", "--templates", "--head", "--text", "--top",
        "--clip", "--device", "--json",
    },
    "search": {"--top", "--clip", "--cache", "--device", "--json"},
    "embed": {"--clip", "--out", "--batch-size", "--device", "--json"},
    "data draw": {"--out", "--pipeline", "--count", "--objects", "--seed", "--device"},
    "data check": {"--headers-only", "--list", "--json"},
    "data pack": {"--samples", "--bytes", "--seed", "--keep-order", "--json"},
    "evaluate zero-shot": {
        "--classes", "--classes-file", "--classifier", "--templates", "--confusion", "--count", "--clip", "--device",
        "--json",
    },
    "evaluate family": {
        "--pipeline", "--candidates", "--per-task", "--prompts", "--objects", "--curve", "--summary", "--seed",
        "--out", "--device", "--json",
    },
    "evaluate distance": {"--features", "--objects", "--k", "--one-each", "--inception", "--device", "--json"},
    "evaluate retrieval": {"--clip", "--count", "--device", "--json"},
    "evaluate clip": {"--clip", "--family", "--count", "--seed", "--device", "--json"},
}  # fmt: skip


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Modules that a file imports, and whether only inside a function."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    late = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the arrows"
            yield from ((f"{node.module}.{alias.name}", id(node) in late) for alias in node.names)


def room(module: str) -> str:
    """genpipe.clip.model -> clip, genpipe.images -> images, pipelines.cli -> pipelines."""
    top, *rest = module.split(".")
    return rest[0] if top == "genpipe" and rest else top


def allowed(here: str, there: str) -> bool:
    if there in ("pipelines", "app"):
        return False
    if there in USERS_OF_BLOCKS:
        return here in USERS_OF_BLOCKS
    if there in BLOCKS:
        return here == there or here in USERS_OF_BLOCKS
    return True


@pytest.mark.parametrize("path", sources("genpipe"), ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_inside_genpipe(path: Path) -> None:
    here = path.relative_to(ROOT / "genpipe").parts[0].removesuffix(".py")
    for module, _ in imports(path):
        if module.split(".")[0] in ("genpipe", "pipelines", "app", "tests"):
            assert allowed(here, room(module)), f"{here} may not import {module}"


def test_arrows_of_the_pipelines() -> None:
    for path in sources("pipelines"):
        for module, late in imports(path):
            assert module.split(".")[0] != "app"
            if module.startswith("genpipe.training"):
                assert path.name in ("cli.py", "data_commands.py") and late, f"{path.name} may not import {module}"


def test_no_relative_order_is_forbidden_by_mistake() -> None:
    assert allowed("training", "clip") and allowed("clip", "images") and allowed("data", "errors")
    assert not any([allowed("clip", "dalle1"), allowed("images", "clip"), allowed("dalle1", "training")])
    assert not allowed("clip", room("pipelines.family"))


def device_literals(tree: ast.AST) -> list[str]:
    """Device names that choose a device. Asking `device.type == "..."` is no choice."""
    asked = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare)
        for child in [node.left, *node.comparators]
    }
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and DEVICE.fullmatch(node.value)
        and id(node) not in asked
    ]


def test_blocks_never_choose_a_device() -> None:
    assert device_literals(ast.parse("x.to('cuda:1'); y = f(device='cpu')")) == ["cuda:1", "cpu"]
    assert device_literals(ast.parse("if device.type == 'cuda': pass")) == []
    found = {str(path): device_literals(ast.parse(path.read_text(encoding="utf-8"))) for path in sources("genpipe")}
    assert {path: names for path, names in found.items() if names} == {}


def test_component_classes_stay_where_saved_weights_look_for_them() -> None:
    assert PART_CLASSES == {
        "clip": ("genpipe.clip.model.CLIP",),
        "dvae": ("genpipe.dalle1.dvae.DVAE", "genpipe.dalle1.vqgan.VQGAN"),
        "transformer": ("genpipe.dalle1.transformer.DALLE1Transformer", "genpipe.dalle1.mindalle.MinDALLETransformer"),
        "prior": ("genpipe.dalle2.prior.Prior",),
        "decoder": (
            "genpipe.dalle2.decoder.Decoder", "genpipe.dalle2.latent_decoder.LatentDecoder",
            "genpipe.dalle2.glide.GLIDE",
        ),
        "upsampler": ("genpipe.dalle2.upsampler.Upsampler", "genpipe.dalle2.glide.GLIDEUpsampler"),
        "guide": ("genpipe.clip.noise_aware.NoiseAwareCLIP",),
    }  # fmt: skip
    for path in (path for paths in PART_CLASSES.values() for path in paths):
        module, _, name = path.rpartition(".")
        component = getattr(importlib.import_module(module), name)
        assert (component.__module__, component.__qualname__) == (module, name)
        # diffusers' loader looks these names up in the module that defines the class
        assert {"ModelMixin", "ConfigMixin"} <= set(vars(sys.modules[module]))


def verbs(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every verb with its command; one inside a group as "group verb"."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from verbs(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def test_the_flags_of_the_command_line_are_frozen() -> None:
    flags = {
        name: {
            flag
            for parameter in command.params
            if parameter.param_type_name == "option"
            for flag in [*parameter.opts, *parameter.secondary_opts]
        }
        - {"--help", "-h"}
        for name, command in verbs(typer.main.get_command(app))
    }
    assert flags == FLAGS


def run_python(code: str, folder: Path) -> dict:
    """Run code in a fresh interpreter with an empty working folder; what it prints last is JSON."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_the_packages_and_asking_for_help_is_light(tmp_path: Path) -> None:
    code = """
import json, sys
import genpipe, pipelines, pipelines.cli
try:
    pipelines.cli.main(["generate", "--help"])
except SystemExit as end:
    assert end.code == 0
print()
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""
    loaded = set(run_python(code, tmp_path))
    assert loaded & {"torch", "gradio", "diffusers", "open_clip", "numpy", "transformers", "accelerate"} == set()


def test_importing_any_module_has_no_side_effect(tmp_path: Path) -> None:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for package in ("genpipe", "pipelines")
        for path in sources(package)
        if path.name != "__main__.py"
    ]
    code = f"""
import importlib, json, os, random, signal, sys, warnings
import numpy, torch, diffusers, open_clip, accelerate, tokenizers, tqdm, typer, PIL.Image
def state():
    return [torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist(),
            torch.get_num_threads(), torch.get_default_dtype().itemsize, torch.is_grad_enabled(),
            repr(signal.getsignal(signal.SIGINT)), repr(warnings.showwarning), PIL.Image.MAX_IMAGE_PIXELS,
            sorted(os.environ.items()), os.getcwd(), sys.argv]
before = state()
for module in {modules!r}:
    importlib.import_module(module)
print(json.dumps({{"same": state() == before, "gradio": "gradio" in sys.modules}}))
"""
    assert run_python(code, tmp_path) == {"same": True, "gradio": False}
    assert list(tmp_path.iterdir()) == []
