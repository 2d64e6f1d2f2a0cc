"""minDALL-E's files with few and random weights, for the tests of their readers."""

import copy
import functools
import hashlib
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from mindalle_reference import Stage1, Stage2, randomised
from torch import Tensor

from genpipe.published import mindalle

MERGES = [("c", "a"), ("ca", "t</w>"), ("ca", "r</w>"), ("h", "a"), ("ha", "t</w>"), ("o", "n</w>"), ("r", "e")]
LETTERS = sorted(set("redcatonheh',!"))
VOCABULARY = ["[UNK]", *LETTERS, *(f"{letter}</w>" for letter in LETTERS), *(a + b for a, b in MERGES), "[PAD]"]
CONFIG = copy.deepcopy(mindalle.DEFAULTS)
CONFIG["dataset"] |= {"context_length": 10, "image_resolution": 16}
CONFIG["stage1"] |= {"embed_dim": 6, "n_embed": 40}
CONFIG["stage1"]["hparams"] |= {"resolution": 16, "z_channels": 5, "ch": 32, "ch_mult": [1, 1, 2]}
CONFIG["stage1"]["hparams"] |= {"num_res_blocks": 1, "attn_resolutions": [4]}
CONFIG["stage2"] |= {"vocab_size_txt": len(VOCABULARY), "vocab_size_img": 40}
CONFIG["stage2"]["hparams"] |= {"embed_dim": 48, "n_layers": 2, "n_heads": 4, "n_dense_layers": 2}
CONFIG["stage2"]["hparams"] |= {"ctx_len_img": 16, "ctx_len_txt": 10}
del CONFIG["stage2"]["use_cls_cond"], CONFIG["dataset"]["tokenizer_type"]  # merged over the published ones
PROMPTS = [
    "a red car",
    "The CAT, on the hat!",
    "",
    "a zebra on a car on a hat on a cat",
    "[PAD] cat [UNK]",
    "  hé\tcat ",
]
SHORT = ["a red car", "the CAT!", ""]  # no more than 10 tokens
Change = Callable[[dict[str, Tensor]], None]


@functools.cache
def stages() -> tuple[Stage1, Stage2]:
    """The plain modules whose weights the files hold."""
    with torch.random.fork_rng(devices=[]):
        return randomised(Stage1(CONFIG["stage1"]), 0), randomised(Stage2(CONFIG["stage2"]), 1)


def write_tokenizer(folder: Path, vocabulary: list[str] = VOCABULARY, merges: Any = MERGES) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bpe-16k-vocab.json").write_text(json.dumps({token: id_ for id_, token in enumerate(vocabulary)}))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "bpe-16k-merges.txt").write_text("\n".join(lines) + "\n")


def write(folder: Path, change: Change | None = None) -> Path:
    """The unpacked folder, with a section of no use in its config; `change`: what is done to stage 2 before."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "optimizer": {"base_lr": 1e-4}}))
    for name, stage in zip((mindalle.STAGE_1, mindalle.STAGE_2), stages(), strict=True):
        tensors = dict(stage.state_dict())
        if change is not None and name == mindalle.STAGE_2:
            change(tensors)
        torch.save({"state_dict": tensors}, folder / name)
    write_tokenizer(folder / "tokenizer")
    return folder


def pack(folder: Path, archive: Path) -> str:
    """1.3B.tar.gz of a folder; its MD5."""
    with tarfile.open(archive, "w:gz", compresslevel=1) as packed:
        packed.add(folder, "1.3B")
    return hashlib.md5(archive.read_bytes()).hexdigest()
