"""A CLIP's identity: what it depends on, and what it survives."""

import torch
from conftest import tiny_parts
from torch import nn

from genpipe.clip.model import CLIP
from genpipe.identity import weights_identity
from genpipe.parts import load_part, save_part


def layer(seed: int = 0) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(3, 4)


def test_equal_weights_have_one_identity_and_others_another() -> None:
    identity = weights_identity(layer())
    assert len(identity) == 64 and int(identity, 16) > 0
    assert weights_identity(layer()) == identity and weights_identity(layer(1)) != identity
    changed = layer()
    with torch.no_grad():
        changed.bias[3] += 0.01
    assert weights_identity(changed) != identity


def test_names_and_shapes_count() -> None:
    flat, square = nn.Module(), nn.Module()
    flat.weight, square.weight = nn.Parameter(torch.arange(4.0)), nn.Parameter(torch.arange(4.0).reshape(2, 2))
    named = nn.Module()
    named.other = nn.Parameter(torch.arange(4.0))
    assert len({weights_identity(module) for module in (flat, square, named)}) == 3


def test_it_does_not_change_the_model_and_ignores_mode_and_precision() -> None:
    model = layer()
    before, identity = {name: p.clone() for name, p in model.named_parameters()}, weights_identity(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert weights_identity(model.eval().requires_grad_(False)) == identity
    assert weights_identity(model.half()) == identity and weights_identity(model.half().float()) == identity


def test_a_clip_keeps_its_identity_when_it_is_saved_in_either_precision(tmp_path) -> None:
    clip = tiny_parts()["clip"]
    identity = weights_identity(clip)
    for dtype in (None, torch.float16):
        save_part(clip, tmp_path / str(dtype), dtype)
        assert weights_identity(load_part(CLIP, tmp_path / str(dtype))) == identity
    assert weights_identity(tiny_parts(seed=1)["clip"]) != identity
