"""Published CLIPs: names of all files, values through their containers and back, equal outputs, refusals, memory."""

import gzip
import json
import math
import warnings
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import pytest
import torch
from published_files import MemoryPeak, random_tensors, rewrite, write_image_encoder, write_json, write_sparse
from published_files import write_text_encoder as write_text_folder
from safetensors.torch import load_file, save_file

from genpipe.clip.architecture import published_config
from genpipe.clip.model import CLIP
from genpipe.errors import InputError
from genpipe.parts import load_part, save_part
from genpipe.published.clip import hugging_face_clip, read_clip
from genpipe.published.clip_names import open_clip_name, openai_architecture
from genpipe.published.containers import read_tensors
from genpipe.published.fitting import assign, on_meta, take
from pipelines.ranking import load_clip

MANIFEST = json.loads(gzip.decompress((Path(__file__).parent / "manifests" / "clip.json.gz").read_bytes()))
CAPTIONS = ["a red cat", "two dogs on a hill!", ""]
VIT = {"image_size": 16, "patch_size": 8, "width": 64, "layers": 2}
TEXT = {"width": 64, "heads": 1, "layers": 2, "context_length": 12}
TINY = {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": TEXT}


def pictures() -> torch.Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))


def original(seed: int = 0, **changes: Any) -> Any:
    """An open_clip model that no published one is like, far from how it is initialised."""
    torch.manual_seed(seed)
    model = open_clip.CLIP(**{**TINY, "quick_gelu": True, **changes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def assert_same_outputs(clip: CLIP, model: Any, tolerance: float = 1e-5) -> None:
    """genpipe's CLIP against open_clip's own calls on ids and on normalised pixels."""
    mean, std = (torch.tensor(clip.config[name])[:, None, None] for name in ("image_mean", "image_std"))
    ids = clip.tokenize(CAPTIONS).ids
    pixels = torch.rand(2, 3, *clip.image_size, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        for ours, theirs in (
            (clip.encode_text(CAPTIONS).embedding, model.encode_text(ids)),
            (clip.encode_image(pixels).embedding, model.encode_image((pixels - mean) / std)),
        ):
            torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def meta_tensors(component: str) -> dict[str, torch.Tensor]:
    """The published names and shapes, without memory; whether they are whole numbers is in the names."""
    return {
        name: torch.empty(shape, device="meta", dtype=torch.int64 if "num_batches" in name else torch.float32)
        for name, shape in MANIFEST[component].items()
    }


OPENAI = [name for name in MANIFEST if name.startswith("openai/")]
HF_CONFIGS = {
    "hf/openai/clip-vit-base-patch32": (512, (8, 12), (768, 3072, 12, 12, 32), {}),
    "hf/openai/clip-vit-large-patch14": (768, (12, 12), (1024, 4096, 16, 24, 14), {}),
    "hf/laion/CLIP-ViT-H-14-laion2B-s32B-b79K": (1024, (16, 24), (1280, 5120, 16, 32, 14), {"hidden_act": "gelu"}),
    "hf/laion/CLIP-ViT-bigG-14-laion2B-39B-b160k": (1280, (20, 32), (1664, 8192, 16, 48, 14), {"hidden_act": "gelu"}),
}


@pytest.mark.parametrize("component", OPENAI)
def test_names_of_openai(component):
    tensors = meta_tensors(component)
    architecture = openai_architecture(tensors, Path("a.pt"))
    clip = on_meta(lambda: CLIP(architecture))
    assign(clip.towers, tensors, component)
    known = open_clip.get_model_config(
        component.split("/", 1)[1].replace("/", "-").replace("@", "-").removesuffix("px")
    )
    assert clip.config["architecture"]["quick_gelu"] and clip.image_size == (known["vision_cfg"]["image_size"],) * 2
    assert clip.config["architecture"]["text_cfg"] == known["text_cfg"]


@pytest.mark.parametrize("component", [name for name in MANIFEST if name.startswith("open_clip/")])
def test_names_of_open_clip(component):
    clip = on_meta(lambda: CLIP(**published_config(component.removeprefix("open_clip/"))))
    assign(clip.towers, meta_tensors(component), component)
    assert clip.config["architecture"]["quick_gelu"] == component.endswith("quickgelu")


@pytest.mark.parametrize("component", HF_CONFIGS)
def test_names_of_hugging_face(component):
    width, (heads, layers), vision, activation = HF_CONFIGS[component]
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "patch_size")
    text = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": heads, **activation}
    config = {
        "model_type": "clip",
        "projection_dim": width,
        "text_config": {**text, "num_hidden_layers": layers},
        "vision_config": {**dict(zip(sizes, vision, strict=True)), **activation},
    }
    tensors = meta_tensors(component)
    tensors["text_model.embeddings.position_ids"] = torch.empty(1, 77, dtype=torch.int64, device="meta")
    described, renamed = hugging_face_clip([(Path("x"), config, tensors)])
    clip = on_meta(lambda: CLIP(**described))
    assign(clip.towers, renamed, component, ignorable=["*position_ids"])
    assert clip.config["architecture"]["quick_gelu"] == (not activation) and clip.has_text and clip.has_image
    back = {name: tuple(take(renamed[target], operation).shape) for name, (target, operation) in named(tensors).items()}
    assert back == {name: tuple(shape) for name, shape in MANIFEST[component].items()}


def named(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[str, str]]:
    return {name: open_clip_name(name) for name in tensors if not name.endswith("position_ids")}


def test_half_of_every_kind_has_the_names_of_its_half():
    full = dict(MANIFEST["open_clip/ViT-L-14-quickgelu"])
    config = published_config("ViT-L-14-quickgelu")
    for halves, wanted in (("text", False), ("image", True)):
        clip = on_meta(lambda halves=halves: CLIP(**{**config, "halves": halves}))
        names = {name.removeprefix("towers.") for name in clip.state_dict()}
        assert names == {name for name in full if name.startswith("visual.") == wanted or name == "logit_scale"}


def archive(path: Path, model: Any) -> dict[str, torch.Tensor]:
    """A TorchScript archive as OpenAI's are: traced, half precision but for norms and embeddings, three scalars."""
    mask = model.attn_mask
    del model.attn_mask
    model.attn_mask = mask  # no buffer with them, so a constant of the code
    for name in ("input_resolution", "context_length", "vocab_size"):
        vars(model).pop(name, None)  # a plain number in open_clip's
        model.register_buffer(name, torch.tensor(16))
    side = model.visual.image_size
    pixels = torch.rand(1, 3, side, side) if isinstance(side, int) else torch.rand(1, 3, *side)
    traced = torch.jit.trace(model, (pixels, torch.zeros(1, 12, dtype=torch.int64)), check_trace=False)
    for name, parameter in traced.named_parameters():
        if not any(kept in name for kept in ("ln_", "bn", "downsample.1", "embedding", "logit_scale")):
            parameter.data = parameter.data.half()
    torch.jit.save(traced, path)
    return dict(traced.state_dict())


@pytest.mark.filterwarnings("ignore")  # torch means to replace tracing; OpenAI's files stay
@pytest.mark.parametrize(
    "vision", [VIT, {"image_size": 32, "width": 16, "layers": [2, 1, 1, 1], "head_width": 64}], ids=["ViT", "ResNet"]
)
def test_archive_of_openai(tmp_path, vision):
    model = original(vision_cfg=vision)
    saved = archive(tmp_path / "model.pt", model)
    clip = load_clip(str(tmp_path / "model.pt"))
    assert clip.dtype == torch.float32 and not clip.training and clip.config["architecture"]["quick_gelu"]
    kept = clip.towers.state_dict()
    assert saved.keys() - kept.keys() == {"input_resolution", "context_length", "vocab_size"}
    assert len({tensor.dtype for tensor in saved.values() if tensor.is_floating_point()}) == 2
    for name, tensor in kept.items():  # back in the file's type, they are the file's
        assert torch.equal(tensor.to(saved[name].dtype), saved[name]), name
    fresh = original(vision_cfg=vision)
    fresh.load_state_dict({name: saved[name].float() for name in kept})
    assert_same_outputs(clip, fresh)
    assert read_clip(tmp_path / "model.pt").dtype == torch.float32  # its types are mixed
    assert read_clip(tmp_path / "model.pt", torch.float16).towers.text_projection.dtype == torch.float16


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("pickled", [False, True])
def test_open_clip_folder(tmp_path, quick, pickled):
    model = original(quick_gelu=quick)
    config: dict[str, Any] = {"model_cfg": {**TINY, "quick_gelu": quick}, "preprocess_cfg": {"mean": [0.4] * 3}}
    write_json(tmp_path / "open_clip_config.json", config)
    if pickled:
        wrapped = {"epoch": 1, "state_dict": {f"module.{name}": tensor for name, tensor in model.state_dict().items()}}
        torch.save(wrapped, tmp_path / "open_clip_pytorch_model.bin")
    else:
        save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    clip = load_clip(str(tmp_path))
    assert clip.config["image_mean"] == [0.4] * 3 and clip.config["resize_mode"] == "shortest"
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in clip.towers.state_dict().items())
    assert_same_outputs(clip, model)
    assert_same_outputs(read_clip(next(tmp_path.glob("open_clip_*model.*"))), model)
    with pytest.raises(AssertionError):  # the activation is no detail
        assert_same_outputs(clip, wrong_activation(model, quick))


def wrong_activation(model: Any, quick: bool) -> Any:
    other = original(quick_gelu=not quick)
    other.load_state_dict(model.state_dict())
    return other


def test_named_file(tmp_path, monkeypatch):
    model = original()
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-quickgelu", {**TINY, "quick_gelu": True})
    torch.save(model.state_dict(), tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert_same_outputs(load_clip(f"tiny-quickgelu:{tmp_path / 'a.pt'}"), model)
    with pytest.raises(InputError, match="does not say .* which activation.*ViT-B-32-quickgelu:FILE"):
        load_clip(str(tmp_path / "a.pt"))


def hugging_face_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The same weights under Hugging Face's names, by the published key map's rule backwards."""
    full = {}
    layer = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"]
    layer += ["mlp.fc1", "mlp.fc2", "layer_norm1", "layer_norm2"]
    names = ["logit_scale", "text_projection.weight", "visual_projection.weight"]
    names += [f"text_model.embeddings.{kind}_embedding.weight" for kind in ("token", "position")]
    names += [f"vision_model.embeddings.{kind}_embedding.weight" for kind in ("patch", "position")]
    names += ["vision_model.embeddings.class_embedding"]
    both = ["text_model.final_layer_norm", "vision_model.pre_layrnorm", "vision_model.post_layernorm"]
    both += [f"{kind}_model.encoder.layers.{i}.{part}" for kind in ("text", "vision") for i in (0, 1) for part in layer]
    state = model.state_dict()
    for name in names + [f"{part}.{kind}" for part in both for kind in ("weight", "bias")]:
        target, operation = open_clip_name(name)
        full[name] = take(state[target], operation).contiguous()
    return full


def write_hugging_face(folder: Path, model: Any, activation: str = "quick_gelu") -> dict[str, torch.Tensor]:
    text = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 1, "num_hidden_layers": 2}
    vision = {**text, "image_size": 16, "patch_size": 8, "hidden_act": activation}
    config = {"model_type": "clip", "projection_dim": 24, "vision_config": vision}
    write_json(
        folder / "config.json",
        {**config, "text_config": {**text, "max_position_embeddings": 12, "hidden_act": activation}},
    )
    tensors = hugging_face_tensors(model)
    save_file(tensors, folder / "model.safetensors")
    return tensors


def test_hugging_face_folder(tmp_path):
    model = original()
    saved = write_hugging_face(tmp_path, model)
    write_json(
        tmp_path / "preprocessor_config.json",
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5], "resample": 2, "size": 16},
    )
    clip = load_clip(str(tmp_path))
    state = clip.towers.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())
    for name, tensor in saved.items():  # and back, bit for bit
        target, operation = open_clip_name(name)
        assert torch.equal(take(state[target], operation), tensor)
    assert clip.config["image_mean"] == [0.1, 0.2, 0.3] and clip.config["interpolation"] == "bilinear"
    assert_same_outputs(clip, model)
    batch = clip.tokenize(["a red cat", ""])
    assert batch.ids[0, 5:].tolist() == [0] * 7 and batch.mask.sum(dim=1).tolist() == [5, 2]  # id 0 pads, masked
    save_part(clip, tmp_path / "own")
    again = load_part(CLIP, tmp_path / "own")
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.towers.state_dict().items())


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_the_folder_says_the_activation(tmp_path, activation):
    model = original(quick_gelu=activation == "quick_gelu")
    write_hugging_face(tmp_path, model, activation)
    clip = read_clip(tmp_path)
    assert_same_outputs(clip, model)
    other = wrong_activation(model, activation == "quick_gelu")
    with torch.no_grad():
        difference = (clip.encode_text(CAPTIONS).embedding - other.encode_text(clip.tokenize(CAPTIONS).ids)).abs().max()
    assert difference > 1e-3


def write_halves(folder: Path, **image: Any) -> tuple[Path, Path]:
    write_text_folder(folder / "text_encoder", 16, 8)
    write_image_encoder(folder / "image_encoder", 16, 8, side=16, patch=8, **image)
    return folder / "text_encoder", folder / "image_encoder"


def test_halves_and_the_pair(tmp_path):
    folders = write_halves(tmp_path)
    write_json(tmp_path / "feature_extractor" / "preprocessor_config.json", {"image_mean": [0.3, 0.4, 0.5]})
    text, image, both = read_clip(folders[0]), read_clip(folders[1]), read_clip(folders)
    assert (text.has_text, text.has_image, image.has_text, image.has_image) == (True, False, False, True)
    assert both.has_text and both.has_image and both.config["image_mean"] == [0.3, 0.4, 0.5]
    with torch.no_grad():
        assert torch.equal(text.encode_text(CAPTIONS).states, both.encode_text(CAPTIONS).states)
        assert torch.equal(image.embed_image(pictures()), both.embed_image(pictures()))
    assert float(both.clipped_logit_scale().detach()) == pytest.approx(100)
    assert math.exp(float(text.logit_scale.detach())) == pytest.approx(100)
    for use in (lambda: text.encode_image(pictures()), lambda: text.embed_image(pictures()), lambda: text.image_size):
        with pytest.raises(InputError, match="has no image tower"):
            use()
    for use in (lambda: image.encode_text("a"), lambda: image.tokenize("a"), lambda: image.context_length):
        with pytest.raises(InputError, match="has no text tower"):
            use()
    save_part(text, tmp_path / "own")
    again = load_part(CLIP, tmp_path / "own")
    assert not again.has_image and torch.equal(again.encode_text("a").embedding, text.encode_text("a").embedding)
    assert not any("visual" in name for name in load_file(tmp_path / "own" / "diffusion_pytorch_model.safetensors"))


def test_names_without_a_prefix(tmp_path):
    """transformers 5 writes a bare tower so."""
    folders = write_halves(tmp_path)
    expected = [read_clip(folder).state_dict() for folder in folders]
    for folder, before in zip(folders, expected, strict=True):
        rewrite(
            folder / "model.safetensors",
            lambda tensors: {name.removeprefix("text_model.").removeprefix("vision_model."): tensor.clone()
                             for name, tensor in tensors.items()},
        )  # fmt: skip
        after = read_clip(folder).state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def without(name: str):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


KEY = "text_model.encoder.layers.0.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without(KEY), "missing transformer.resblocks.0.attn.in_proj_weight; unexpected .*q_proj.weight"),
        (without("text_projection.weight"), "missing text_projection"),
        (lambda tensors: {**tensors, "text_model.extra": torch.ones(1)}, "unexpected text_model.extra"),
        (lambda t: {**t, "text_projection.weight": t["text_projection.weight"].T}, r"mis-shaped .* \[8, 16\] instead"),
        (lambda tensors: {**tensors, KEY: torch.ones(16, 15)}, "missing .*in_proj_weight"),
        (lambda tensors: {"a": torch.ones(1)}, "unexpected a"),
    ],
)
def test_what_does_not_fit_is_listed(tmp_path, change, said):
    text, _ = write_halves(tmp_path)
    rewrite(text / "model.safetensors", change)
    with pytest.raises(InputError, match=said):
        read_clip(text)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_act": "gelu"}, "do not belong together.*gelu and quick_gelu"),
        ({"hidden_act": "swish"}, "activation 'swish'"),
        ({"num_attention_heads": 3}, "3 heads"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"projection_dim": 9}, r"width \[8, 9\]"),
    ],
)
def test_pairs_that_do_not_belong_together(tmp_path, changes, said):
    text, image = write_halves(tmp_path)
    config = json.loads((image / "config.json").read_text())
    write_json(image / "config.json", {**config, **changes})
    with pytest.raises(InputError, match=said):
        read_clip((text, image))
    with pytest.raises(InputError, match="must hold a text tower and an image tower"):
        read_clip((text, text))


def test_other_sources_are_refused(tmp_path):
    with pytest.raises(InputError, match="holds no CLIP"):
        load_clip(str(tmp_path))
    with pytest.raises(InputError, match="does not exist"):
        read_clip(tmp_path / "a.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "a.pt")
    with pytest.raises(InputError, match="none of OpenAI's CLIP"):
        load_clip(str(tmp_path / "a.pt"))
    write_json(tmp_path / "open_clip_config.json", {"model_cfg": {**TINY, "text_cfg": {"hf_tokenizer_name": "x/y"}}})
    save_file(random_tensors({"a": [1]}, 0), tmp_path / "open_clip_model.safetensors")
    with pytest.raises(InputError, match="asks for a tokenizer that none"):
        load_clip(str(tmp_path))


def test_hub_ids(tmp_path, monkeypatch):
    """What the Hub's client has in its cache, as it lies there, without a network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("first", "second"):
        revision = tmp_path / f"models--some--{name}" / "snapshots" / ("0" * 40)
        (revision.parent.parent / "refs").mkdir(parents=True)
        (revision.parent.parent / "refs" / "main").write_text("0" * 40)
        revision.mkdir(parents=True)
    model = original()
    first, second = (tmp_path / f"models--some--{name}" / "snapshots" / ("0" * 40) for name in ("first", "second"))
    write_json(first / "open_clip_config.json", {"model_cfg": {**TINY, "quick_gelu": True}, "preprocess_cfg": {}})
    save_file(model.state_dict(), first / "open_clip_model.safetensors")
    write_hugging_face(second, model)
    for name in ("some/first", "hf-hub:some/first", "some/second"):
        assert_same_outputs(load_clip(name), model)
    with pytest.raises(InputError, match="'some/third'.*connect to the network once"):
        load_clip("some/third")


def test_full_size_takes_the_memory_that_it_uses(tmp_path):
    shapes = MANIFEST["open_clip/ViT-L-14-quickgelu"]
    write_sparse(tmp_path / "a.safetensors", shapes)  # 1.7 GB
    with MemoryPeak() as peak:
        clip = read_clip(tmp_path / "a.safetensors", model_name="ViT-L-14-quickgelu")
    assert peak.rise < 60 << 20 and sum(tensor.nbytes for tensor in clip.state_dict().values()) > 1.7e9
    layer = clip.towers.visual.transformer.resblocks[3].mlp.c_fc.weight  # 16 MiB
    with MemoryPeak() as peak:
        assert float(layer.detach().sum()) == 0
    assert peak.rise < 40 << 20
    assert not any(tensor.is_meta for tensor in [*clip.parameters(), *clip.buffers()])


def test_like_hugging_face(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is no dependency; a check against it")
    for activation in ("quick_gelu", "gelu"):
        text = {"hidden_size": 48, "intermediate_size": 100, "num_attention_heads": 3, "num_hidden_layers": 2}
        vision = {**text, "image_size": 16, "patch_size": 8, "hidden_act": activation}
        text |= {"vocab_size": 49408, "hidden_act": activation}
        torch.manual_seed(1)
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
        reference = transformers.CLIPModel(config).eval()
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        reference.save_pretrained(tmp_path / activation)
        clip = read_clip(tmp_path / activation)
        mean, std = (torch.tensor(clip.config[name])[:, None, None] for name in ("image_mean", "image_std"))
        batch = clip.tokenize(CAPTIONS)
        with torch.no_grad():
            states = reference.text_model(batch.ids)
            pooled = reference.vision_model((pictures() - mean) / std).pooler_output
            ours, ours_image = clip.encode_text(batch), clip.encode_image(pictures())
            for found, expected in (
                (ours.states, states.last_hidden_state),
                (ours.embedding, reference.text_projection(states.pooler_output)),
                (ours_image.embedding, reference.visual_projection(pooled)),
            ):
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_tensors_are_read_by_one_reader(tmp_path):
    """A CLIP that wants to run something is refused before it is looked at."""
    marker = tmp_path / "marker"

    class Runs:
        def __reduce__(self):
            import os

            return os.system, (f"touch {marker}",)

    torch.save({"state_dict": original().state_dict(), "x": Runs()}, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"names (posix|nt)\.system"):
        load_clip(f"ViT-B-32:{tmp_path / 'a.pt'}")
    with pytest.raises(InputError, match=r"names (posix|nt)\.system"):
        read_tensors(tmp_path / "a.pt", inside=["state_dict"])
    assert not marker.exists()
