"""Weights in memory once: files of gigabytes, sparse on the disk, are loaded in a process of its own and measured."""

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from genpipe.dalle2.prior import Prior
from genpipe.parts import on_meta
from genpipe.weight_files import WEIGHTS_NAME

MEASURE = """
import json, sys
from pathlib import Path
import torch
from genpipe.dalle2.prior import Prior
from genpipe.parts import load_part
def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
figures = []
for folder, dtype in ((sys.argv[1], torch.float32), (sys.argv[2], torch.bfloat16)):
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    prior = load_part(Prior, folder, dtype)
    loaded = memory("VmRSS")
    parameters = list(prior.parameters())
    first = parameters[: len(parameters) // 8]
    total = sum(float(each.sum()) for each in first)
    figures.append({
        "loaded": loaded - before, "used": memory("VmRSS") - before, "peak": memory("VmHWM") - before,
        "touched": sum(each.nbytes for each in first), "types": sorted({str(each.dtype) for each in parameters}),
        "meta": any(each.is_meta for each in [*parameters, *prior.buffers()]), "sum": total,
    })
    del prior, parameters, first
print(json.dumps(figures))
"""


def sparse_part(folder: Path, **config: Any) -> int:
    """The folder of a Prior whose weights are all zero and take next to no room on the disk; their size in bytes."""
    model = on_meta(lambda: Prior(**config))
    model.save_config(folder)
    header, end = {}, 0
    for name, tensor in model.state_dict().items():
        size = tensor.numel() * 4
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / WEIGHTS_NAME).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return end


@pytest.mark.slow  # touches gigabytes; the readers' tests do the same with one part each
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_gigabytes_load_in_the_memory_of_what_is_used(tmp_path: Path) -> None:
    shape = {"embedding_dim": 768, "text_width": 768, "text_length": 77}
    whole, third = tmp_path / "whole", tmp_path / "third"
    size, cast_size = sparse_part(whole, **shape), sparse_part(third, **shape, num_layers=6)  # whole: Karlo's
    assert size > 4e9 and cast_size > 1.2e9 and (whole / WEIGHTS_NAME).stat().st_blocks * 512 < 1e6
    command = [sys.executable, "-c", MEASURE, whole, third]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-500:]
    mapped, cast = json.loads(done.stdout.splitlines()[-1])
    assert not mapped["meta"] and not cast["meta"] and mapped["sum"] == cast["sum"] == 0
    assert (mapped["types"], cast["types"]) == (["torch.float32"], ["torch.bfloat16"])
    # Mapped: what was touched, and nothing else. Cast: the new copy, and nothing else.
    assert mapped["touched"] > 0.25e9 and mapped["loaded"] < 0.15e9
    assert max(mapped["used"], mapped["peak"]) < mapped["touched"] + 0.2e9
    assert 0.49 * cast_size < cast["loaded"] < cast_size / 2 + 0.15e9
    assert cast["peak"] < cast_size / 2 + 0.25e9  # 0.25: one large matrix and its copy
