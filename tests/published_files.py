"""Files in the layouts that others published, with random weights: for the tests of the readers."""

import json
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Shapes = Mapping[str, Sequence[int]]


class MemoryPeak:
    """While it is entered, watches how far this process's resident memory rises."""

    def __init__(self) -> None:
        self._process, self._done = psutil.Process(), threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "MemoryPeak":
        self._before = self._highest = self._process.memory_info().rss
        self._watch.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._done.set()
        self._watch.join()

    def _look(self) -> None:
        while not self._done.wait(0.002):
            self._highest = max(self._highest, self._process.memory_info().rss)

    @property
    def rise(self) -> int:
        """The highest so far above the beginning, in bytes."""
        return max(self._highest, self._process.memory_info().rss) - self._before


def randomised(model: nn.Module, seed: int) -> Any:
    """The model in eval mode, none of its weights as its class starts them: zeros would hide what is mixed up."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def random_tensors(shapes: Shapes, seed: int, scale: float = 0.1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(*shape, generator=generator) * scale for name, shape in shapes.items()}


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_sparse(path: Path, shapes: Shapes) -> None:
    """A safetensors file of zeros in full size that takes hardly any disk: its header, then a hole."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # as safetensors pads it: numbers that are not aligned cannot be mapped
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def _layers(prefix: str, layers: int, width: int) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for number in range(layers):
        layer = f"{prefix}.encoder.layers.{number}"
        sizes = {f"self_attn.{name}": [width, width] for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
        sizes |= {"mlp.fc1": [4 * width, width], "mlp.fc2": [width, 4 * width]}
        for name, size in sizes.items():
            shapes |= {f"{layer}.{name}.weight": size, f"{layer}.{name}.bias": size[:1]}
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{layer}.{name}.{kind}": [width] for kind in ("weight", "bias")}
    return shapes


def write_text_encoder(folder: Path, width: int, embed_dim: int, heads: int = 2, layers: int = 1, **own: Any) -> None:
    """CLIP's text tower as a CLIPTextModelWithProjection, with the full vocabulary."""
    shapes = _layers("text_model", layers, width)
    shapes |= {
        "text_model.embeddings.token_embedding.weight": [49408, width],
        "text_model.embeddings.position_embedding.weight": [77, width],
        "text_projection.weight": [embed_dim, width],
    }
    shapes |= {f"text_model.final_layer_norm.{kind}": [width] for kind in ("weight", "bias")}
    config = {
        "architectures": ["CLIPTextModelWithProjection"], "model_type": "clip_text_model", "hidden_size": width,
        "intermediate_size": 4 * width, "num_attention_heads": heads, "num_hidden_layers": layers,
        "max_position_embeddings": 77, "vocab_size": 49408, "projection_dim": embed_dim, "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5, "eos_token_id": 2, **own,
    }  # fmt: skip
    position_ids = {"text_model.embeddings.position_ids": torch.arange(77)[None]}  # as early versions saved it
    write_json(folder / "config.json", config)
    save_file({**random_tensors(shapes, 1, 0.3), **position_ids}, folder / "model.safetensors")


def write_image_encoder(
    folder: Path, width: int, embed_dim: int, side: int, patch: int, heads: int = 2, layers: int = 1, **own: Any
) -> None:
    """CLIP's image tower as a CLIPVisionModelWithProjection."""
    shapes = _layers("vision_model", layers, width)
    shapes |= {
        "vision_model.embeddings.class_embedding": [width],
        "vision_model.embeddings.patch_embedding.weight": [width, 3, patch, patch],
        "vision_model.embeddings.position_embedding.weight": [1 + (side // patch) ** 2, width],
        "visual_projection.weight": [embed_dim, width],
    }
    for name in ("pre_layrnorm", "post_layernorm"):
        shapes |= {f"vision_model.{name}.{kind}": [width] for kind in ("weight", "bias")}
    config = {
        "architectures": ["CLIPVisionModelWithProjection"], "model_type": "clip_vision_model", "hidden_size": width,
        "intermediate_size": 4 * width, "num_attention_heads": heads, "num_hidden_layers": layers, "image_size": side,
        "patch_size": patch, "projection_dim": embed_dim, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, **own,
    }  # fmt: skip
    write_json(folder / "config.json", config)
    save_file(random_tensors(shapes, 2, 0.3), folder / "model.safetensors")


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Change the tensors of a safetensors file."""
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}, path)
