"""GLIDE's networks written out from its published tensors by name, plainly and slowly; tiny files of them for tests.

Nothing here uses genpipe: the formulas are those of 2112.10741 and of the UNet of 2105.05233 (appendix A).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

GROUPS, HEAD = 4, 4  # of the tiny networks: groups of a group norm, width of an attention head
LAYERS = 2  # residual blocks of each level
TEXT = {"vocab_size": 256 + 40 + 1, "context_length": 10, "width": 16, "layers": 2, "heads": 2}
TABLES = {"base.pt": 3, "base_inpaint.pt": 7, "upsample.pt": 6, "upsample_inpaint.pt": 10}  # file -> input channels
GUIDE_CONFIG: dict[str, Any] = {
    "image_size": 8, "patch_size": 4, "image_width": 12, "image_layers": 2, "text_width": 8, "text_layers": 2,
    "head_width": 4, "embed_dim": 6, "vocab_size": 49408, "context_length": 12, "num_train_timesteps": 1000,
}  # fmt: skip


def unet_config(plain: int, attending: int) -> dict[str, Any]:
    """Of a tiny UNet: levels that do not attend, then levels that do, twice as wide."""
    return {
        "block_out_channels": [8] * plain + [16] * attending,
        "layers_per_block": LAYERS,
        "attention_head_dim": HEAD,
        "norm_num_groups": GROUPS,
        "resnet_time_scale_shift": "scale_shift",
        "down_block_types": ["ResnetDownsampleBlock2D"] * plain + ["SimpleCrossAttnDownBlock2D"] * attending,
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ["SimpleCrossAttnUpBlock2D"] * attending + ["ResnetUpsampleBlock2D"] * plain,
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "decoder": {"resolution": 8, "unet_config": unet_config(1, 1), "text_config": TEXT},
    "upsampler": {"resolution": 16, "unet_config": unet_config(2, 1), "text_config": TEXT, "factor": 2},
    "guide": GUIDE_CONFIG,
}


def published_unet(channels: int, plain: int, attending: int) -> dict[str, list[int]]:
    """Name -> shape of a tiny file: the blocks counted through, as its trainer built them."""
    widths, width, time = [8] * plain + [16] * attending, 8, 32
    table: dict[str, list[int]] = {}

    def weights(name: str, *shape: int) -> None:
        table[f"{name}.weight"], table[f"{name}.bias"] = list(shape), [shape[0]]

    def residual(name: str, before: int, after: int) -> None:
        weights(f"{name}.in_layers.0", before)
        weights(f"{name}.in_layers.2", after, before, 3, 3)
        weights(f"{name}.emb_layers.1", 2 * after, time)
        weights(f"{name}.out_layers.0", after)
        weights(f"{name}.out_layers.3", after, after, 3, 3)
        if before != after:
            weights(f"{name}.skip_connection", after, before, 1, 1)

    def attention(name: str, wide: int) -> None:
        weights(f"{name}.norm", wide)
        weights(f"{name}.qkv", 3 * wide, wide, 1)
        weights(f"{name}.encoder_kv", 2 * wide, TEXT["width"], 1)
        weights(f"{name}.proj_out", wide, wide, 1)

    weights("time_embed.0", time, width)
    weights("time_embed.2", time, time)
    weights("input_blocks.0.0", width, channels, 3, 3)
    stack, block = [width], 1
    for level, wide in enumerate(widths):
        for _ in range(LAYERS):
            residual(f"input_blocks.{block}.0", width, wide)
            width, block = wide, block + 1
            if level >= plain:
                attention(f"input_blocks.{block - 1}.1", wide)
            stack.append(width)
        if level < len(widths) - 1:
            residual(f"input_blocks.{block}.0", width, width)
            stack.append(width)
            block += 1
    residual("middle_block.0", width, width)
    attention("middle_block.1", width)
    residual("middle_block.2", width, width)
    block = 0
    for level, wide in reversed(list(enumerate(widths))):
        for i in range(LAYERS + 1):
            residual(f"output_blocks.{block}.0", width + stack.pop(), wide)
            width = wide
            if level >= plain:
                attention(f"output_blocks.{block}.1", wide)
            if level and i == LAYERS:
                residual(f"output_blocks.{block}.{2 if level >= plain else 1}", wide, wide)
            block += 1
    weights("out.0", width)
    weights("out.2", 6, width, 3, 3)
    return table | _published_text(time)


def _published_text(time: int) -> dict[str, list[int]]:
    w, length = TEXT["width"], TEXT["context_length"]
    table = {"positional_embedding": [length, w], "padding_embedding": [length, w]}
    table["token_embedding.weight"] = [TEXT["vocab_size"], w]
    layers = {"ln_1": [w], "attn.c_qkv": [3 * w, w], "attn.c_proj": [w, w], "ln_2": [w], "mlp.c_fc": [4 * w, w]}
    layers["mlp.c_proj"] = [w, 4 * w]
    named = {f"transformer.resblocks.{i}.{name}": s for i in range(TEXT["layers"]) for name, s in layers.items()}
    for name, shape in {**named, "final_ln": [w], "transformer_proj": [time, w]}.items():
        table[f"{name}.weight"], table[f"{name}.bias"] = shape, shape[:1]
    return table


def published_tower(image: bool) -> dict[str, list[int]]:
    """Name -> shape of a tiny tower of the noise-aware CLIP."""
    c = GUIDE_CONFIG
    w, layers = (c["image_width"], c["image_layers"]) if image else (c["text_width"], c["text_layers"])
    if image:
        patches = (c["image_size"] // c["patch_size"]) ** 2
        table = {"w_t": [1000, w], "patch_proj": [w, 3, 4, 4], "w_pos": [1 + patches, w], "ln.g": [w], "ln.b": [w]}
    else:
        table = {"w_voc": [c["vocab_size"], w], "w_pos": [c["context_length"], w]}
    table = {f"blocks.input.{name}": shape for name, shape in table.items()}
    for i in range(layers):
        attention, mlp = f"blocks.block_{i}.f_attn", f"blocks.block_{i}.f_mlp"
        for name in (attention, mlp):
            table |= {f"{name}.ln.g": [w], f"{name}.ln.b": [w]}
        table |= {f"{attention}.f_{letter}.w": [w, w] for letter in "qkvc"}
        table |= {f"{attention}.f_{letter}.b": [w] for letter in "qvc"}
        table |= {f"{mlp}.f_1.w": [4 * w, w], f"{mlp}.f_1.b": [4 * w]}
        table |= {f"{mlp}.f_2.w": [w, 4 * w], f"{mlp}.f_2.b": [w]}
    return table | {"blocks.output.ln.g": [w], "blocks.output.ln.b": [w], "blocks.output.f.w": [c["embed_dim"], w]}


def drawn(table: dict[str, list[int]], seed: int) -> dict[str, Tensor]:
    """Random tensors of these shapes, of a size that keeps activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) / max(math.prod(shape[1:]), 4) ** 0.5
        for name, shape in table.items()
    }


def tensors_of(file: str, seed: int = 0) -> dict[str, Tensor]:
    """The tensors of a tiny file by its published name."""
    if file.startswith("clip"):
        return drawn(published_tower(image="image" in file), seed)
    return drawn(published_unet(TABLES[file], *((1, 1) if file.startswith("base") else (2, 1))), seed)


def text_reference(p: dict[str, Tensor], ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """One text (L,) -> what is added to the time embedding (E,), states (L, W)."""
    x = p["token_embedding.weight"][ids] + p["positional_embedding"]
    for i in range(len(x)):
        if not mask[i]:
            x[i] = p["padding_embedding"][i]
    heads, wide = TEXT["heads"], TEXT["width"] // TEXT["heads"]
    for layer in range(TEXT["layers"]):
        name = f"transformer.resblocks.{layer}"
        qkv = _linear(p, f"{name}.attn.c_qkv", _norm(p, f"{name}.ln_1", x))
        mixed = []
        for head in range(heads):
            q, k, v = qkv[:, 3 * wide * head : 3 * wide * (head + 1)].split(wide, dim=1)
            mixed.append((q @ k.T / math.sqrt(wide)).softmax(dim=1) @ v)
        x = x + _linear(p, f"{name}.attn.c_proj", torch.cat(mixed, dim=1))
        x = x + _linear(p, f"{name}.mlp.c_proj", _gelu(_linear(p, f"{name}.mlp.c_fc", _norm(p, f"{name}.ln_2", x))))
    x = _norm(p, "final_ln", x)
    return _linear(p, "transformer_proj", x[-1]), x


def unet_reference(p: dict[str, Tensor], x: Tensor, t: int, added: Tensor, states: Tensor) -> Tensor:
    """All input channels (C, H, W) of one picture, t, and what `text_reference` says -> (6, H, W)."""
    angles = t * torch.exp(-math.log(10000) * torch.arange(4) / 4)
    time = _linear(p, "time_embed.0", torch.cat([angles.cos(), angles.sin()]))
    time = _linear(p, "time_embed.2", F.silu(time)) + added
    h, stack = x[None], []
    blocks = sorted({int(name.split(".")[1]) for name in p if name.startswith("input_blocks.")})
    for i in blocks:
        if i == 0:
            h = F.conv2d(h, p["input_blocks.0.0.weight"], p["input_blocks.0.0.bias"], padding=1)
        else:
            h = _residual(p, f"input_blocks.{i}.0", h, time, "down" if i % (LAYERS + 1) == 0 else "")
            h = _attention(p, f"input_blocks.{i}.1", h, states)
        stack.append(h)
    h = _residual(p, "middle_block.0", h, time)
    h = _residual(p, "middle_block.2", _attention(p, "middle_block.1", h, states), time)
    for i in blocks:
        h = _residual(p, f"output_blocks.{i}.0", torch.cat([h, stack.pop()], dim=1), time)
        h = _attention(p, f"output_blocks.{i}.1", h, states)
        for last in (1, 2):
            if f"output_blocks.{i}.{last}.in_layers.0.weight" in p:
                h = _residual(p, f"output_blocks.{i}.{last}", h, time, "up")
    h = F.silu(_group_norm(p, "out.0", h))
    return F.conv2d(h, p["out.2.weight"], p["out.2.bias"], padding=1)[0]


def _residual(p: dict[str, Tensor], name: str, x: Tensor, time: Tensor, way: str = "") -> Tensor:
    h = F.silu(_group_norm(p, f"{name}.in_layers.0", x))
    if way == "down":
        h, x = (F.avg_pool2d(each, 2) for each in (h, x))
    if way == "up":
        h, x = (each.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3) for each in (h, x))
    h = F.conv2d(h, p[f"{name}.in_layers.2.weight"], p[f"{name}.in_layers.2.bias"], padding=1)
    scale, shift = _linear(p, f"{name}.emb_layers.1", F.silu(time)).chunk(2)
    h = _group_norm(p, f"{name}.out_layers.0", h) * (1 + scale[:, None, None]) + shift[:, None, None]
    h = F.conv2d(F.silu(h), p[f"{name}.out_layers.3.weight"], p[f"{name}.out_layers.3.bias"], padding=1)
    if f"{name}.skip_connection.weight" in p:
        x = F.conv2d(x, p[f"{name}.skip_connection.weight"], p[f"{name}.skip_connection.bias"])
    return x + h


def _attention(p: dict[str, Tensor], name: str, x: Tensor, states: Tensor) -> Tensor:
    """Every pixel looks at the text and at all pixels, in heads of their own; x as it is where there is none."""
    if f"{name}.qkv.weight" not in p:
        return x
    flat = _group_norm(p, f"{name}.norm", x)[0].flatten(1)  # C, N
    qkv = p[f"{name}.qkv.weight"][..., 0] @ flat + p[f"{name}.qkv.bias"][:, None]
    text = p[f"{name}.encoder_kv.weight"][..., 0] @ states.T + p[f"{name}.encoder_kv.bias"][:, None]
    mixed = []
    for head in range(len(flat) // HEAD):
        q, k, v = qkv[3 * HEAD * head : 3 * HEAD * (head + 1)].split(HEAD)
        text_k, text_v = text[2 * HEAD * head : 2 * HEAD * (head + 1)].split(HEAD)
        k, v = torch.cat([text_k, k], dim=1), torch.cat([text_v, v], dim=1)
        mixed.append(v @ (q.T @ k / math.sqrt(HEAD)).softmax(dim=1).T)
    out = p[f"{name}.proj_out.weight"][..., 0] @ torch.cat(mixed) + p[f"{name}.proj_out.bias"][:, None]
    return x + out.reshape(x.shape)


def _linear(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def _norm(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    x = (x - x.mean(dim=-1, keepdim=True)) / (x.var(dim=-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return x * p[f"{name}.weight"] + p[f"{name}.bias"]


def _group_norm(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    groups = x.reshape(GROUPS, -1)
    groups = (groups - groups.mean(dim=1, keepdim=True)) / (
        groups.var(dim=1, unbiased=False, keepdim=True) + 1e-5
    ).sqrt()
    return groups.reshape(x.shape) * p[f"{name}.weight"][:, None, None] + p[f"{name}.bias"][:, None, None]


def _gelu(x: Tensor) -> Tensor:
    return x / 2 * (1 + torch.erf(x / math.sqrt(2)))
