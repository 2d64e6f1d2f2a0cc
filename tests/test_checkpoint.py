"""Checkpoints: whole or not there, the newest wins, what cannot be read or written is one sentence."""

import json
import os
from pathlib import Path

import pytest
import torch

from genpipe.errors import InputError
from genpipe.training.checkpoint import (
    FORMAT_VERSION,
    Checkpoint,
    load_checkpoint,
    newest,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from genpipe.training.config import OptimizerConfig
from genpipe.training.optimizer import make_optimizer
from genpipe.training.recipes import recipe
from genpipe.training.run_folder import check_same_run, claim, fingerprint
from genpipe.training.state import State


def tiny(step: int = 3) -> Checkpoint:
    tensors = {"model.w": torch.arange(6.0).view(2, 3).T, "ema.0": torch.tensor(float("nan")), "n": torch.tensor([7])}
    return Checkpoint(step, tensors, {"words": ["ä", 1.5]})


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    checkpoint = tiny()
    path = save_checkpoint(tmp_path / "runs" / "checkpoints", checkpoint)
    assert path.name == "step-00000003" and sorted(p.name for p in path.iterdir()) == [
        "state.json",
        "state.safetensors",
    ]
    loaded = load_checkpoint(path)
    assert loaded.step == 3 and loaded.record["words"] == ["ä", 1.5] and checkpoint.record == {"words": ["ä", 1.5]}
    for name, tensor in checkpoint.tensors.items():
        torch.testing.assert_close(loaded.tensors[name], tensor, rtol=0, atol=0, equal_nan=True)


def test_the_newest_two_stay(tmp_path: Path) -> None:
    assert newest(tmp_path / "none") is None
    for step in (1, 9, 10, 100):
        save_checkpoint(tmp_path, tiny(step))
    assert newest(tmp_path) == tmp_path / "step-00000100"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000100"]
    save_checkpoint(tmp_path, tiny(100))  # again, in its own place
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000100"]


def test_what_a_killed_writer_left_is_no_checkpoint_and_goes(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, tiny(1))
    (tmp_path / ".writing-00000005-99").mkdir()
    (tmp_path / ".writing-00000005-99" / "state.safetensors").write_bytes(b"half")
    (tmp_path / "step-00000007").mkdir()  # without its record
    assert newest(tmp_path) == tmp_path / "step-00000001"
    save_checkpoint(tmp_path, tiny(8))
    assert newest(tmp_path) == tmp_path / "step-00000008" and not list(tmp_path.glob(".writing*"))


@pytest.mark.parametrize(
    ("file", "content", "complaint"),
    [
        ("state.json", b"{", "cannot be read.*delete that folder"),
        ("state.json", b"[]", "cannot be read"),
        ("state.json", b'{"format_version": 1}', "cannot be read"),
        ("state.safetensors", b"", "cannot be read"),
        ("state.safetensors", b"\x80\x04pickle", "cannot be read"),
        (
            "state.json",
            json.dumps({"format_version": FORMAT_VERSION + 1, "step": 3}).encode(),
            "install a newer genpipe",
        ),
    ],
)
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, file: str, content: bytes, complaint: str) -> None:
    path = save_checkpoint(tmp_path, tiny())
    (path / file).write_bytes(content)
    with pytest.raises(InputError, match=complaint) as refusal:
        load_checkpoint(path)
    assert str(path) in str(refusal.value)


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="no earlier checkpoint exists"):
        save_checkpoint(tmp_path / "file" / "checkpoints", tiny())
    save_checkpoint(tmp_path, tiny(1))
    shared = torch.ones(2, device="meta")  # stands for anything that fails half-way
    with pytest.raises(Exception):  # noqa: B017
        save_checkpoint(tmp_path, Checkpoint(2, {"w": shared}, {}))
    assert newest(tmp_path) == tmp_path / "step-00000001"


def stepped(seed: int, steps: int, method: str = "adamw") -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Embedding(6, 40), torch.nn.Linear(40, 32))
    model.register_parameter("frozen", torch.nn.Parameter(torch.ones(2), requires_grad=False))
    optimizer = make_optimizer(model, OptimizerConfig(method=method))
    for step in range(steps):
        more(model, optimizer, step)
    return model, optimizer


def more(model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    model(torch.tensor([step % 6, 1])).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("method", ["adamw", "muon"])
def test_the_optimiser_goes_on_where_it_was(method: str) -> None:
    model, optimizer = stepped(0, 3, method)
    tensors = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer).items()}
    momentum = {"momentum"} if method == "muon" else set()
    assert {name.split(".")[2] for name in tensors} == {"step", "exp_avg", "exp_avg_sq"} | momentum
    other, fresh = stepped(0, 0, method)
    other.load_state_dict(model.state_dict())
    restore_optimizer(fresh, {**tensors, "model.w": torch.ones(1)})
    for step in range(3, 6):
        more(model, optimizer, step)
        more(other, fresh, step)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_checkpoint_of_another_shape_is_refused() -> None:
    state = State(*stepped(0, 1), ema_decay=0.9)
    state.advance(3)
    kept = state.checkpoint({"recipe": {"run": {"accumulate": 3}}})
    again = State(*stepped(1, 0), ema_decay=0.9)
    again.restore(kept)
    assert (again.step, again.seen, again.ema.optimization_step) == (1, 3, 1)
    del kept.tensors["ema.0"]
    with pytest.raises(InputError, match="step 1 does not fit"):
        again.restore(kept)
    narrow = State(torch.nn.Linear(1, 1), torch.optim.AdamW([torch.ones(1)]), ema_decay=0.9)
    with pytest.raises(InputError, match="does not fit"):
        narrow.restore(state.checkpoint({}))


# the folder of a run --------------------------------------------------------------------------------------------------


def test_settings_are_compared_with_those_of_the_checkpoint(tmp_path: Path) -> None:
    shipped = recipe("clip")
    record = {"recipe": json.loads(json.dumps(shipped.to_dict())), "fingerprint": "f"}
    assert check_same_run(shipped, record, tmp_path) == []
    shipped.run.log_every, shipped.data.workers, shipped.run.threads = 1, 3, 2
    shipped.objective["tokenizer"] = "elsewhere"
    assert check_same_run(shipped, record, tmp_path) == []
    shipped.optimizer.beta_1, shipped.run.accumulate = 0.8, 2
    assert check_same_run(shipped, record, tmp_path) == ["optimizer.beta_1 0.9 -> 0.8", "run.accumulate 1 -> 2"]
    shipped.data.hard_negatives = 0.5
    with pytest.raises(InputError, match=r"\(data.hard_negatives 0.8 -> 0.5\).*--no-resume"):
        check_same_run(shipped, record, tmp_path)
    shipped.data.hard_negatives, shipped.data.source = 0.8, "x.tar"
    with pytest.raises(InputError, match="data.source.*data.workers"):  # workers shift the order of shards
        check_same_run(shipped, record, tmp_path)
    shipped.data.source = "scenes"
    del record["recipe"]["data"]["plain_batches"]  # a setting that the checkpoint is older than: 0 then
    with pytest.raises(InputError, match="plain_batches 0 -> 3000"):
        check_same_run(shipped, record, tmp_path)
    record["recipe"]["data"]["plain_batches"] = 3000
    del record["recipe"]["objective"]["twin_weight"]
    assert check_same_run(shipped, record, tmp_path)[2:] == ["objective.twin_weight 1.0, which it had not yet"]
    del record["fingerprint"]
    with pytest.raises(InputError, match="objective.tokenizer"):
        check_same_run(shipped, record, tmp_path)


def test_the_fingerprint_sees_weights() -> None:
    one, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    assert fingerprint([one], None) == fingerprint([one], None) != fingerprint([other], None)
    with torch.no_grad():
        other.load_state_dict(one.state_dict())
    assert fingerprint([one], None) == fingerprint([other], None)
    assert fingerprint([one.to(torch.bfloat16)], None) != fingerprint([other], None)


def test_a_fresh_start_moves_only_a_run_with_a_checkpoint(tmp_path: Path) -> None:
    claim(tmp_path, recipe("dvae"), "dvae", None, fresh=True)
    (tmp_path / "mine.txt").touch()
    save_checkpoint(tmp_path / "checkpoints", tiny(4))
    claim(tmp_path, recipe("clip"), "clip", None, fresh=True)
    assert newest(tmp_path / "checkpoints") is None and newest(tmp_path / "previous" / "checkpoints") is not None
    claim(tmp_path, recipe("dvae"), "dvae", None, fresh=True)  # nothing new was saved: the earlier run stays aside
    assert newest(tmp_path / "previous" / "checkpoints") is not None
    assert json.loads((tmp_path / "recipe.json").read_text())["name"] == "dvae" and (tmp_path / "mine.txt").exists()
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
