"""The contrastive loss: a value worked out by hand, a naive loop, precision, and two processes against one."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from genpipe.clip.loss import contrastive_loss


def naive_loss(image: torch.Tensor, text: torch.Tensor, scale: float) -> float:
    """Figure 3 of the paper, one number at a time."""
    total, count = 0.0, len(image)
    for rows, columns in ((image, text), (text, image)):
        for i in range(count):
            logits = []
            for j in range(count):
                dot = sum(float(a) * float(b) for a, b in zip(rows[i], columns[j], strict=True))
                norms = math.sqrt(sum(float(a) ** 2 for a in rows[i]) * sum(float(b) ** 2 for b in columns[j]))
                logits.append(scale * dot / norms)
            total -= logits[i] - math.log(sum(math.exp(logit) for logit in logits))
    return total / (2 * count)


def random_pairs(count: int = 6, width: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator), torch.randn(count, width, generator=generator)


def test_by_hand():
    # Two orthogonal pairs, scale 2: each row's logits are (2, 0), so the loss is log(1 + e^-2).
    eye = torch.eye(2)
    assert contrastive_loss(eye, 3 * eye, torch.tensor(2.0)).item() == pytest.approx(
        math.log(1 + math.exp(-2)), rel=1e-6
    )


@pytest.mark.parametrize("local_loss", [False, True])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_equals_the_naive_loop(scale, local_loss):
    image, text = random_pairs()
    loss = contrastive_loss(image, text, torch.tensor(scale), local_loss=local_loss)
    assert loss.shape == () and loss.item() == pytest.approx(naive_loss(image, text, scale), rel=1e-5)


def test_one_pair_has_nothing_to_tell_apart():
    image, text = random_pairs(count=1)
    assert contrastive_loss(image, text, torch.tensor(10.0)).item() == 0.0


def test_inputs_unchanged_and_length_does_not_matter():
    image, text = random_pairs()
    before = image.clone(), text.clone()
    loss = contrastive_loss(image, text, torch.tensor(5.0))
    assert torch.equal(image, before[0]) and torch.equal(text, before[1])
    torch.testing.assert_close(contrastive_loss(7 * image, 0.1 * text, torch.tensor(5.0)), loss)


def test_float32_inside_autocast():
    image, text = random_pairs(64, 32)
    exact = contrastive_loss(image, text, torch.tensor(100.0))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = contrastive_loss(image, text, torch.tensor(100.0))
    assert mixed.dtype == torch.float32 and mixed.item() == exact.item()


def test_gradients_reach_all_three_inputs():
    image, text = (x.requires_grad_() for x in random_pairs())
    scale = torch.tensor(10.0, requires_grad=True)
    contrastive_loss(image, text, scale).backward()
    assert all(x.grad.abs().max() > 0 for x in (image, text, scale))


WORKER = """
import sys
import torch
import torch.distributed as dist
from genpipe.clip.loss import contrastive_loss

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
for local_loss in (False, True):
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(6, 5, generator=generator), torch.randn(6, 5, generator=generator)
    weight = torch.randn(5, 4, generator=generator).requires_grad_()
    scale = torch.tensor(7.0, requires_grad=True)
    mine = slice(3 * rank, 3 * rank + 3)
    loss = contrastive_loss(image[mine] @ weight, text[mine] @ weight, scale, local_loss=local_loss)
    loss.backward()
    results = [loss.detach(), weight.grad, scale.grad]
    for result in results:  # what DistributedDataParallel does with gradients
        dist.all_reduce(result)
        result /= 2
    if rank == 0:
        torch.save(results, f"{folder}/{local_loss}.pt")
dist.destroy_process_group()
"""


def test_two_processes_equal_one(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    arguments = [sys.executable, str(tmp_path / "worker.py")]
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    workers = [subprocess.Popen([*arguments, str(rank), str(tmp_path)], env=environment) for rank in (0, 1)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]

    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(6, 5, generator=generator), torch.randn(6, 5, generator=generator)
    weight = torch.randn(5, 4, generator=generator).requires_grad_()
    scale = torch.tensor(7.0, requires_grad=True)
    loss = contrastive_loss(image @ weight, text @ weight, scale)
    loss.backward()
    for local_loss in (False, True):
        results = torch.load(tmp_path / f"{local_loss}.pt", weights_only=True)
        for found, expected in zip(results, (loss.detach(), weight.grad, scale.grad), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
