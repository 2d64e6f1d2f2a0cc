"""CLIP: parity with open_clip, states, preprocessing, published names, saving, and loading inside a pipeline."""

import copy
import json

import huggingface_hub.constants
import open_clip
import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from open_clip.transform import image_transform
from safetensors.torch import save_file

from genpipe.clip.architecture import explicit_architecture, nano_architecture
from genpipe.clip.model import CLIP, _AtMost, _cover
from genpipe.errors import InputError
from genpipe.images import to_pil
from genpipe.tokenizer import CaptionTokenizer, TokenBatch

CAPTIONS = ["two tigers on a red background", "a penguin above a guitar", "three strawberries"]
VIT = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}


def nano_clip(seed: int = 0, **config) -> CLIP:
    torch.manual_seed(seed)
    tokenizer = CaptionTokenizer.train(CAPTIONS * 5, vocab_size=300)
    architecture = nano_architecture(tokenizer.vocab_size, width=96, vision_layers=2, text_layers=2, embed_dim=96)
    clip = CLIP(architecture, **config).eval()
    clip.tokenizer = tokenizer
    return clip


def open_clip_twin(clip: CLIP) -> torch.nn.Module:
    """open_clip's own model with the same architecture and weights."""
    config = dict(clip.config["architecture"])
    model = (open_clip.CustomTextCLIP if config.pop("custom_text") else open_clip.CLIP)(**config)
    model.load_state_dict(clip.towers.state_dict())
    return model.eval()


def pictures(count: int = 3, size: int = 32, seed: int = 1) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"quick_gelu": True},
        {"custom_text": True},
        {"text_cfg": {**TEXT, "no_causal_mask": True, "pool_type": "last", "proj_bias": True}, "custom_text": True},
        {"text_cfg": {**TEXT, "pool_type": "eos", "eos_id": 49407}, "custom_text": True},
        {"vision_cfg": {**VIT, "pool_type": "avg", "final_ln_after_pool": True}},
        {"vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32}},
        {"vision_cfg": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "token"}},
        {"vision_cfg": {"image_size": 160, "timm_model_name": "test_convnext"}},
    ],
    ids=["vit", "quick", "custom", "siglip-like", "eos", "avg", "resnet", "timm-vit", "timm-convnext"],
)
@torch.no_grad()
def test_parity_with_open_clip(changes):
    torch.manual_seed(0)
    clip = CLIP({"embed_dim": 64, "vision_cfg": VIT, "text_cfg": TEXT, **changes}, tokenizer_name="ViT-B-32").eval()
    for parameter in clip.parameters():  # norms and biases too
        parameter.add_(0.02 * torch.randn_like(parameter))
    theirs, pixels = open_clip_twin(clip), pictures(2, clip.image_size[0])
    normalized = (pixels - torch.tensor(clip.config["image_mean"])[:, None, None]) / torch.tensor(
        clip.config["image_std"]
    )[:, None, None]
    text, image = clip.encode_text(CAPTIONS), clip.encode_image(pixels)
    ids = open_clip.get_tokenizer("ViT-B-32")(CAPTIONS, context_length=16)
    torch.testing.assert_close(text.embedding, theirs.encode_text(ids), rtol=0, atol=1e-6)
    torch.testing.assert_close(image.embedding, theirs.encode_image(normalized), rtol=0, atol=1e-6)
    torch.testing.assert_close(clip.embed_image(pixels), image.embedding, rtol=0, atol=1e-6)
    assert text.states.shape == (3, 16, 64) and image.states.shape[0] == 2 and image.states.ndim == 3
    assert image.embedding.std(dim=0).max() > 0


@torch.no_grad()
def test_published_vit_b_32_with_its_own_tokenizer():
    torch.manual_seed(0)
    clip = CLIP.from_open_clip("ViT-B-32")
    ids = open_clip.get_tokenizer("ViT-B-32")(CAPTIONS[:2])
    encoding = clip.encode_text(CAPTIONS[:2])
    torch.testing.assert_close(encoding.embedding, clip.towers.encode_text(ids), rtol=0, atol=1e-6)
    assert encoding.states.shape == (2, 77, 512) and encoding.embedding.shape == (2, 512)
    assert clip.encode_image(pictures(1, 64)).states.shape == (1, 49, 768)


@torch.no_grad()
def test_states_are_what_is_pooled():
    clip = nano_clip()
    text, image = clip.encode_text(CAPTIONS), clip.encode_image(pictures())
    end = text.mask.sum(dim=1) - 1
    torch.testing.assert_close(text.states[torch.arange(3), end] @ clip.towers.text_projection, text.embedding)
    assert image.states.shape == (3, 64, 96)
    # Patch states come row by row: a change in the top right corner moves state 7 most (one layer mixes little).
    changed = pictures()
    changed[:, :, :4, -4:] = 1 - changed[:, :, :4, -4:]
    moved = (clip.encode_image(changed).states - image.states).norm(dim=-1)
    assert (moved.argmax(dim=1) == 7).all()


@torch.no_grad()
def test_only_normalized_is_normalized():
    clip = nano_clip()
    for encoding in (clip.encode_text(CAPTIONS), clip.encode_image(pictures())):
        torch.testing.assert_close(encoding.normalized.norm(dim=-1), torch.ones(3))
        assert (encoding.embedding.norm(dim=-1) - 1).abs().min() > 1e-3
        torch.testing.assert_close(encoding.normalized, F.normalize(encoding.embedding, dim=-1))


@torch.no_grad()
def test_padding_does_not_count():
    clip = nano_clip()
    batch = clip.tokenize(CAPTIONS)
    noisy = torch.where(batch.mask, batch.ids, torch.full_like(batch.ids, 5))
    a, b = clip.encode_text(batch), clip.encode_text(TokenBatch(noisy, batch.mask))
    torch.testing.assert_close(a.embedding, b.embedding, rtol=0, atol=1e-6)
    full, short = clip(pictures(), batch.ids), clip(pictures(), batch.ids, batch.mask)
    torch.testing.assert_close(full[1], short[1], rtol=0, atol=1e-6)


def test_shortened_texts_give_the_same_gradient():
    clip = nano_clip()
    batch, gradients = clip.tokenize(CAPTIONS), []
    for mask in (None, batch.mask):
        clip.zero_grad()
        clip(pictures(), batch.ids, mask)[1][:, :7].sum().backward()
        gradients.append(clip.towers.positional_embedding.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)
    assert gradients[0].abs().max() > 0


def test_inputs_unchanged_and_deterministic():
    clip, pixels = nano_clip(), pictures(2, 48)
    batch, before = clip.tokenize(CAPTIONS[:2]), pixels.clone()
    ids = batch.ids.clone()
    first = clip(pixels, batch.ids, batch.mask)
    second = clip(pixels, batch.ids, batch.mask)
    assert torch.equal(pixels, before) and torch.equal(batch.ids, ids)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    architecture = nano_architecture(300)
    kept = copy.deepcopy(architecture)
    CLIP(architecture)
    assert architecture == kept


def test_forward_under_bf16_autocast_returns_float32():
    clip, batch = nano_clip(), nano_clip().tokenize(CAPTIONS)
    with torch.autocast("cpu", torch.bfloat16):
        image, text, scale = clip(pictures(), batch.ids, batch.mask)
    assert image.dtype == text.dtype == scale.dtype == torch.float32
    torch.testing.assert_close(image.norm(dim=-1), torch.ones(3))
    (image * text).sum().backward()
    without = {name for name, p in clip.named_parameters() if p.grad is None}
    assert without == {"towers.logit_scale"}


@torch.no_grad()
def test_half_precision_weights():
    clip = nano_clip()
    reference = clip.encode_text(CAPTIONS).normalized, clip.encode_image(pictures()).normalized
    half = copy.deepcopy(clip).to(torch.bfloat16)
    text, image = half.encode_text(CAPTIONS), half.encode_image(pictures())
    assert text.embedding.dtype == image.states.dtype == torch.bfloat16 and image.normalized.dtype == torch.float32
    for a, b in zip(reference, (text.normalized, image.normalized), strict=True):
        assert (a * b).sum(dim=-1).min() > 0.99


def test_logit_scale_starts_at_the_papers_value_and_is_clipped():
    clip = nano_clip()
    assert clip.clipped_logit_scale().item() == pytest.approx(1 / 0.07, rel=1e-5)
    with torch.no_grad():
        clip.logit_scale.fill_(5.0)  # exp(5) = 148
    assert clip.clipped_logit_scale().item() == 100.0
    assert CLIP({**nano_architecture(300), "init_logit_scale": 1.0}).logit_scale.item() == 1.0


@pytest.mark.parametrize(
    ("value", "direction", "expected"), [(50.0, 1, 1), (50.0, -1, -1), (150.0, 1, 1), (150.0, -1, 0)]
)
def test_clip_lets_only_lowering_gradients_pass(value, direction, expected):
    x = torch.tensor(value, requires_grad=True)
    (direction * _AtMost.apply(x, 100.0)).backward()
    assert x.grad.item() == expected


# Preprocessing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("shape", [(50, 80), (80, 50), (20, 20), (33, 97)])
def test_pixels_fit_as_in_open_clip(mode, shape):
    clip = nano_clip(resize_mode=mode)
    smooth = F.interpolate(torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(2)), shape, mode="bilinear")
    picture = to_pil(smooth)[0]
    theirs = image_transform(
        32, is_train=False, mean=(0, 0, 0), std=(1, 1, 1), resize_mode=mode, interpolation="bicubic"
    )(picture)
    fitted = clip.fit_pixels(smooth)
    assert fitted.shape == (1, 3, 32, 32)
    assert (fitted[0] - theirs).abs().max() < 2.5 / 255  # Pillow rounds to 8 bits twice


def test_right_size_is_left_alone():
    pixels = pictures()
    assert nano_clip().fit_pixels(pixels) is pixels


def test_cover():
    assert _cover(480, 640, 224, 224) == (224, 298)
    assert _cover(640, 480, 224, 224) == (298, 224)
    assert _cover(1, 1000, 224, 224) == (224, 224000)


@pytest.mark.parametrize(
    "pixels",
    [
        torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
        torch.zeros(3, 32, 32),
        torch.zeros(1, 1, 32, 32),
        torch.zeros(1, 3, 0, 32),
        -torch.ones(1, 3, 32, 32),
        torch.full((1, 3, 32, 32), 255.0),
    ],
    ids=["uint8", "no batch", "grey", "empty", "signed", "levels"],
)
def test_wrong_pixels_are_refused(pixels):
    with pytest.raises(InputError, match=r"\[0, 1\]"):
        nano_clip().encode_image(pixels)


def test_gradient_reaches_pixels():
    pixels = pictures(2, 40).requires_grad_()
    nano_clip().encode_image(pixels).embedding[:, 0].sum().backward()
    assert pixels.grad.abs().max() > 0


# Configuration --------------------------------------------------------------------------------------------------------


def test_config_says_everything():
    clip = CLIP(
        {"embed_dim": 64, "vision_cfg": {**VIT, "image_size": 16}, "text_cfg": {"width": 64, "heads": 2, "layers": 1}}
    )
    architecture = clip.config["architecture"]
    assert architecture["quick_gelu"] is False and architecture["custom_text"] is False
    assert architecture["text_cfg"]["context_length"] == 77 and architecture["text_cfg"]["vocab_size"] == 49408
    assert clip.image_size == (16, 16) and clip.context_length == 77 and clip.embedding_dim == 64
    assert clip.config["resize_mode"] == "shortest" and len(clip.config["image_mean"]) == 3


@pytest.mark.parametrize("model_name", ["ViT-L-14", "ViT-B/32", "ViT-B-16-quickgelu", "RN50"])
def test_activation_follows_the_weights(model_name):
    assert CLIP.default_config(model_name, "openai")["architecture"]["quick_gelu"] is True


def test_published_configs():
    assert CLIP.default_config("ViT-L-14", "laion2b_s32b_b82k")["architecture"]["quick_gelu"] is False
    assert CLIP.default_config("ViT-L-14", "laion2b_s32b_b82k")["image_mean"] == [0.5, 0.5, 0.5]
    assert CLIP.default_config("roberta-ViT-B-32", "laion2b_s12b_b32k")["architecture"]["quick_gelu"] is True
    siglip = CLIP.default_config("ViT-B-16-SigLIP", "webli")
    assert siglip["resize_mode"] == "squash" and siglip["architecture"]["vision_cfg"]["timm_model_pretrained"] is False


def test_every_published_config_is_complete_or_refused():
    for name in open_clip.list_models():
        if "multimodal_cfg" in open_clip.get_model_config(name):
            with pytest.raises(InputError, match="captioning"):
                CLIP.default_config(name)
        else:
            config = CLIP.default_config(name)
            assert config["architecture"] == explicit_architecture(config["architecture"])
            assert isinstance(config["architecture"]["quick_gelu"], bool) and config["tokenizer_name"] == name


def test_quick_gelu_matters():
    torch.manual_seed(0)
    plain = CLIP({"embed_dim": 64, "vision_cfg": VIT, "text_cfg": TEXT}).eval()
    quick = CLIP({"embed_dim": 64, "vision_cfg": VIT, "text_cfg": TEXT, "quick_gelu": True}).eval()
    quick.load_state_dict(plain.state_dict())
    difference = (plain.encode_image(pictures()).normalized - quick.encode_image(pictures()).normalized).norm(dim=-1)
    assert difference.min() > 1e-4


@pytest.mark.parametrize(
    ("name", "tag", "said"),
    [
        ("ViT-B-33", None, "ViT-B-32"),
        ("ViT-B-32", "opnai", "laion2b"),
        ("coca_ViT-B-32", None, "captioning"),
        ("", None, "none"),
    ],
)
def test_unknown_names_get_near_matches(name, tag, said):
    with pytest.raises(InputError, match=said):
        CLIP.from_open_clip(name, tag)


def test_published_weights_are_loaded_with_their_activation(tmp_path, monkeypatch):
    architecture = {"embed_dim": 64, "vision_cfg": VIT, "text_cfg": TEXT}
    torch.manual_seed(3)
    original = open_clip.CLIP(**architecture, quick_gelu=True).eval()
    save_file(original.state_dict(), tmp_path / "weights.safetensors")
    entry = {"file": str(tmp_path / "weights.safetensors"), "quick_gelu": True, "mean": (0, 0, 0), "std": (1, 1, 1)}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-test", architecture)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-test", {"openai": entry})
    clip = CLIP.from_open_clip("tiny-test", "openai")
    assert not clip.training and clip.config["architecture"]["quick_gelu"] is True
    with torch.no_grad():
        torch.testing.assert_close(clip.encode_image(pictures()).embedding, original.encode_image(pictures()))
        torch.testing.assert_close(
            clip.encode_text(CAPTIONS).embedding, original.encode_text(clip.tokenize(CAPTIONS).ids)
        )


def test_no_network_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="could not be downloaded.*connect to the network"):
        CLIP.from_open_clip("ViT-B-32", "openai")


@pytest.mark.parametrize(
    "change",
    [
        {"text_cfg": None},
        {"speed": 3},
        {"vision_cfg": {**VIT, "colour": 1}},
        {"text_cfg": {**TEXT, "pool_type": "middle"}},
    ],
)
def test_wrong_architectures_are_refused(change):
    architecture = {"embed_dim": 64, "vision_cfg": VIT, "text_cfg": TEXT, **change}
    with pytest.raises(InputError, match="architecture"):
        CLIP({key: value for key, value in architecture.items() if value is not None})


@pytest.mark.parametrize("change", [{"resize_mode": "longest"}, {"interpolation": "nearest"}])
def test_unknown_resizing_is_refused(change):
    with pytest.raises(InputError, match="resize_mode"):
        CLIP(nano_architecture(300), **change)


def test_towers_without_states_say_so_when_asked():
    text = {**TEXT, "embed_cls": True}
    clip = CLIP(
        {"embed_dim": 64, "vision_cfg": VIT, "text_cfg": text, "custom_text": True}, tokenizer_name="ViT-B-32"
    ).eval()
    encoding = clip.encode_text(CAPTIONS)
    assert encoding.embedding.shape == (3, 64)
    with pytest.raises(InputError, match="no token states"):
        _ = encoding.states


# The tokenizer, saving, pipelines -------------------------------------------------------------------------------------


def test_tokenizer_must_fit():
    clip = CLIP(nano_architecture(310))
    with pytest.raises(InputError, match="no tokenizer yet"):
        clip.encode_text(["a"])
    with pytest.raises(InputError, match="310"):
        clip.tokenizer = CaptionTokenizer.train(CAPTIONS, vocab_size=280)
    with pytest.raises(InputError, match="context has 32 positions"):
        clip.encode_text(TokenBatch(torch.ones(1, 40, dtype=torch.int64), torch.ones(1, 40, dtype=torch.bool)))


@pytest.mark.filterwarnings("ignore:a text is longer")
def test_long_and_strange_prompts():
    clip = nano_clip()
    encoding = clip.encode_text(["tiger " * 2000, "😀\x00", ""])
    assert encoding.mask.sum(dim=1)[0] == 32 and encoding.embedding.isfinite().all()


def test_saved_and_loaded(tmp_path):
    clip = nano_clip(image_mean=(0.1, 0.2, 0.3), resize_mode="squash", max_logit_scale=50.0)
    clip.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "tokenizer.json",
    }
    loaded = CLIP.from_pretrained(tmp_path)
    assert not loaded.training
    for name, tensor in clip.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert loaded.tokenizer.to_json() == clip.tokenizer.to_json()
    for key in ("architecture", "image_mean", "image_std", "resize_mode", "interpolation", "max_logit_scale"):
        assert loaded.config[key] == clip.config[key], key
    assert torch.equal(loaded.encode_text(CAPTIONS).states, clip.encode_text(CAPTIONS).states)
    assert torch.equal(loaded.encode_image(pictures(2, 50)).states, clip.encode_image(pictures(2, 50)).states)


def test_saved_in_half_loaded_in_full(tmp_path):
    clip = nano_clip()
    copy.deepcopy(clip).half().save_pretrained(tmp_path)
    loaded = CLIP.from_pretrained(tmp_path)
    assert loaded.dtype == torch.float32 and clip.dtype == torch.float32
    for name, tensor in clip.state_dict().items():
        assert torch.equal(tensor.half().float(), loaded.state_dict()[name]), name


def test_published_tokenizer_needs_no_file(tmp_path):
    clip = CLIP({"embed_dim": 64, "vision_cfg": VIT, "text_cfg": TEXT}, tokenizer_name="ViT-B-32").eval()
    clip.save_pretrained(tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()
    loaded = CLIP.from_pretrained(tmp_path)
    assert torch.equal(loaded.encode_text(CAPTIONS).embedding, clip.encode_text(CAPTIONS).embedding)


def test_saving_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(InputError, match="no tokenizer yet"):
        CLIP(nano_architecture(300)).save_pretrained(tmp_path / "clip")
    assert not (tmp_path / "clip").exists()


def test_missing_tokenizer_file_is_named(tmp_path):
    nano_clip().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="tokenizer.json"):
        CLIP.from_pretrained(tmp_path)


class OneClip(DiffusionPipeline):
    """The smallest pipeline: it only holds a CLIP."""

    def __init__(self, clip: CLIP) -> None:
        super().__init__()
        self.register_modules(clip=clip)


def test_component_path_is_frozen_and_loads_in_a_pipeline(tmp_path):
    clip = nano_clip()
    OneClip(clip).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["clip"] == ["genpipe.clip.model", "CLIP"]
    loaded = OneClip.from_pretrained(tmp_path).clip
    assert isinstance(loaded, CLIP)
    assert torch.equal(loaded.encode_text(CAPTIONS).embedding, clip.encode_text(CAPTIONS).embedding)


def test_deepcopy_is_independent():
    clip = nano_clip()
    other = copy.deepcopy(clip)
    with torch.no_grad():
        other.logit_scale.add_(1)
    assert clip.logit_scale.item() != other.logit_scale.item()
    assert other.tokenizer.to_json() == clip.tokenizer.to_json()
