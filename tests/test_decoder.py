"""The decoder of DALL-E 2: what reaches its output, shapes, widths, masks, saving, Karlo's sizes, a drawing with it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genpipe.dalle2.decoder import Decoder, DecoderCondition
from genpipe.dalle2.sampling import DECODER, Step, denoise, noise_of, scheduler_for
from genpipe.errors import InputError
from genpipe.parts import load_part, save_part

B, L, D, W = 3, 6, 10, 14  # pictures, text positions, CLIP width, width of the text states

UNET: dict[str, Any] = {
    "block_out_channels": [16, 24],
    "layers_per_block": 1,
    "down_block_types": ["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
    "attention_head_dim": 8,
    "norm_num_groups": 4,
    "resnet_time_scale_shift": "scale_shift",
}
# The decoder of Karlo v1 alpha, of which everything but the sizes is diffusers' default.
KARLO = {
    "block_out_channels": [320, 640, 960, 1280],
    "layers_per_block": 3,
    "down_block_types": ["ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3],
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": [*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"],
    "attention_head_dim": 64,
    "resnet_time_scale_shift": "scale_shift",
}


def tiny(seed: int = 0, resolution: int = 8, clip_width: int = D, text_width: int = W, **config: Any) -> Decoder:
    """A decoder whose parameters are all random: fresh ones are 0 in places, where a fault would not show."""
    model = Decoder(resolution, clip_width, text_width, {**UNET, **config.pop("unet", {})}, **config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / max(parameter[0].numel(), 4) ** 0.5)
    return model.eval()


def example(clip_width: int = D, text_width: int = W, length: int = L) -> dict[str, Tensor]:
    """Conditions of B pictures; the captions use all positions, all but one, all but two."""
    generator = torch.Generator().manual_seed(1)
    return {
        "image_embedding": torch.randn(B, clip_width, generator=generator),
        "text_embedding": torch.randn(B, clip_width, generator=generator),
        "text_states": torch.randn(B, length, text_width, generator=generator),
        "text_mask": torch.arange(length) < length - torch.arange(B)[:, None],
    }


def noised(resolution: int = 8) -> tuple[Tensor, Tensor]:
    return noise_of(range(B), (3, resolution, resolution), DECODER), torch.tensor([5, 500, 999])


@torch.no_grad()
def answer(model: Decoder, **condition: Any) -> Tensor:
    return model(*noised(model.config.resolution), **condition)


def rows_apart(a: Tensor, b: Tensor) -> list[float]:
    """The largest difference of each row."""
    return (a - b).abs().flatten(1).amax(dim=1).tolist()


def test_every_condition_reaches_the_output_of_its_own_row_alone() -> None:
    model, condition = tiny(), example()
    before = answer(model, **condition)
    assert before.shape == (B, 3, 8, 8) and bool(before.isfinite().all())
    for name in ("image_embedding", "text_embedding", "text_states"):
        changed = condition[name].clone()
        changed[1] = changed[1].flip(-1)
        apart = rows_apart(answer(model, **{**condition, name: changed}), before)
        assert apart[1] > 1e-3 and apart[0] == apart[2] == 0, name
    mask = condition["text_mask"].clone()
    mask[1, 2] = False
    apart = rows_apart(answer(model, **{**condition, "text_mask": mask}), before)
    assert apart[1] > 1e-3 and apart[0] == apart[2] == 0
    x_t, t = noised()
    with torch.no_grad():
        assert min(rows_apart(model(x_t.flip(-1), t, **condition), before)) > 1e-3
        assert min(rows_apart(model(x_t, t - 4, **condition), before)) > 1e-4


def test_the_image_embedding_enters_by_the_time_and_by_the_context() -> None:
    condition = example()
    other = {**condition, "image_embedding": condition["image_embedding"].flip(-1)}
    for shut in ("image_to_time", "image_to_context", None):
        model = tiny()
        for name in {"image_to_time", "image_to_context"} - {shut}:
            torch.nn.init.zeros_(getattr(model, name).weight)
        apart = rows_apart(answer(model, **condition), answer(model, **other))
        assert min(apart) > 1e-4 if shut else max(apart) == 0, shut


@torch.no_grad()
def test_the_condition_by_hand() -> None:
    model, condition = tiny(embedding_scale="raw", context_width=12), example()
    got = model.condition(**condition)
    image, text = condition["image_embedding"], condition["text_embedding"]
    time = F.linear(image, model.image_to_time.weight, model.image_to_time.bias)
    time = time + F.linear(text, model.text_to_time.weight, model.text_to_time.bias)
    torch.testing.assert_close(got.time, time)
    weight, bias = model.image_to_context.weight, model.image_to_context.bias
    assert weight.shape == (4 * 12, D) and got.context.shape == (B, 4 + L, 12)
    for k in range(4):  # every fourth row of the weight makes one token
        torch.testing.assert_close(got.context[:, k], F.linear(image, weight[k::4], bias[k::4]))
    states = F.linear(condition["text_states"], model.text_to_context.weight, model.text_to_context.bias)
    states = F.layer_norm(states, (12,), model.text_norm.weight, model.text_norm.bias)
    torch.testing.assert_close(got.context[:, 4:], states)
    assert bool(got.mask[:, :4].all()) and torch.equal(got.mask[:, 4:], condition["text_mask"])
    assert len(got) == B


@pytest.mark.parametrize("clip_width", [W, D])
@pytest.mark.parametrize("context_width", [None, W, 12])
def test_equal_widths_are_projected_like_others(clip_width: int, context_width: int | None) -> None:
    model, condition = tiny(clip_width=clip_width, context_width=context_width), example(clip_width)
    before = answer(model, **condition)
    assert model.text_to_context.weight.shape == (context_width or W, W)
    assert model.image_to_time.weight.shape == model.text_to_time.weight.shape == (64, clip_width)
    for name in ("image_to_time", "text_to_time", "image_to_context", "text_to_context", "text_norm"):
        with torch.no_grad():
            getattr(model, name).weight.mul_(-0.5)
        after = answer(model, **condition)
        assert min(rows_apart(after, before)) > 1e-4, name
        before = after


def test_what_is_masked_does_not_count_and_padding_may_be_cut() -> None:
    model, condition = tiny(), example()
    before = answer(model, **condition)
    other = condition["text_states"].masked_fill(~condition["text_mask"][..., None], 7.0)
    assert torch.equal(answer(model, **{**condition, "text_states": other}), before)
    kept = condition["text_states"].masked_fill(condition["text_mask"][..., None], 7.0)
    assert min(rows_apart(answer(model, **{**condition, "text_states": kept}), before)) > 1e-3
    short = {**condition, "text_mask": condition["text_mask"] & (torch.arange(L) < 3)}
    cut = {**short, "text_states": short["text_states"][:, :3], "text_mask": short["text_mask"][:, :3]}
    torch.testing.assert_close(answer(model, **cut), answer(model, **short), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pixels", [16, 64])
def test_a_context_as_long_as_a_level_has_pixels(pixels: int) -> None:
    # diffusers takes a mask of that length for one of the pixels: with one more, masked position it does not.
    model, condition = tiny(unet={"down_block_types": ["SimpleCrossAttnDownBlock2D"] * 2}), example(length=pixels - 4)
    longer = {
        **condition,
        "text_states": F.pad(condition["text_states"], (0, 0, 0, 3), value=2.0),
        "text_mask": F.pad(condition["text_mask"], (0, 3), value=False),
    }
    assert model.condition(**condition).mask.shape[1] == pixels
    torch.testing.assert_close(answer(model, **condition), answer(model, **longer), rtol=1e-4, atol=1e-5)


def test_a_dropped_image_embedding_is_the_null_embedding() -> None:
    model, condition = tiny(), example()
    given = answer(model, **condition)
    null = answer(model, **{**condition, "image_embedding": None})
    kept = torch.tensor([True, False, True])
    mixed = answer(model, **condition, image_kept=kept)
    assert torch.equal(mixed, torch.where(kept[:, None, None, None], given, null))
    assert min(rows_apart(given, null)) > 1e-3
    other = {**condition, "image_embedding": condition["image_embedding"].flip(-1)}
    assert torch.equal(answer(model, **other, image_kept=torch.zeros(B, dtype=torch.bool)), null)
    with torch.no_grad():
        model.null_image_embedding.mul_(2)
    assert min(rows_apart(answer(model, **{**condition, "image_embedding": None}), null)) > 1e-4
    assert float(Decoder(8, D, W, UNET).null_image_embedding.abs().sum()) == 0  # learned, from 0 on


def test_unit_embeddings_have_no_length_and_raw_ones_do() -> None:
    condition = example()
    longer = {**condition, **{name: 7 * condition[name] for name in ("image_embedding", "text_embedding")}}
    unit, raw = tiny(embedding_scale="unit"), tiny(embedding_scale="raw")
    torch.testing.assert_close(answer(unit, **condition), answer(unit, **longer), rtol=1e-4, atol=1e-5)
    assert unit.scaled(condition["image_embedding"]).norm(dim=1).tolist() == pytest.approx([D**0.5] * B)
    assert min(rows_apart(answer(raw, **condition), answer(raw, **longer))) > 1e-3
    assert torch.equal(raw.scaled(condition["image_embedding"]), condition["image_embedding"])


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("learned_variance", [False, True])
def test_patches_and_learned_variance(patch_size: int, learned_variance: bool) -> None:
    model = tiny(resolution=8, patch_size=patch_size, learned_variance=learned_variance)
    assert answer(model, **example()).shape == (B, 6 if learned_variance else 3, 8, 8)
    channels = 3 * patch_size**2
    assert model.unet.conv_in.weight.shape[1] == channels
    assert model.unet.conv_out.weight.shape[0] == channels * (2 if learned_variance else 1)
    x_t, t = noised()
    with torch.no_grad():
        condition = model.condition(**example())
        output = model.denoise(x_t, t, condition)
        folded = model.unet(
            F.pixel_unshuffle(x_t, patch_size),
            t,
            encoder_hidden_states=condition.context,
            class_labels=condition.time,
            attention_mask=condition.mask,
        ).sample
    assert torch.equal(output, F.pixel_shuffle(folded, patch_size))


def test_a_row_is_the_same_alone_and_twice_and_its_inputs_stay() -> None:
    model, condition = tiny(), example()
    before = {name: value.clone() for name, value in condition.items()}
    x_t, t = noised()
    first = answer(model, **condition)
    assert torch.equal(answer(model, **condition), first)
    assert torch.equal(noised()[0], x_t)
    assert all(torch.equal(condition[name], before[name]) for name in before)
    for row in range(B):
        one = {name: value[row : row + 1] for name, value in condition.items()}
        with torch.no_grad():
            alone = model(x_t[row : row + 1], t[row : row + 1], **one)
            torch.testing.assert_close(alone, first[row : row + 1], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(model(x_t[row : row + 1], t[row], **one), alone)  # a scalar time step


def test_every_parameter_learns() -> None:
    model = tiny(learned_variance=True).train()
    output = model(*noised(), **example(), image_kept=torch.tensor([True, False, True]))
    output.square().mean().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert idle == []


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_saved_and_loaded(dtype: torch.dtype | None, tmp_path: Any) -> None:
    model = tiny(patch_size=2, prediction_type="v_prediction", learned_variance=True, clip_identity="abc")
    save_part(model, tmp_path / "decoder", dtype)
    loaded = load_part(Decoder, tmp_path / "decoder")
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    assert {name: loaded.config[name] for name in config} == config and loaded.config.clip_identity == "abc"
    before, after = answer(model, **example()), answer(loaded, **example())
    if dtype is None:
        assert torch.equal(after, before)
    else:
        torch.testing.assert_close(after, before, rtol=0, atol=0.02 * float(before.abs().max()))


def test_it_runs_in_another_precision() -> None:
    model = tiny().to(torch.bfloat16)
    output = answer(model, **example())
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), answer(tiny(), **example()), rtol=0, atol=0.3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"prediction_type": "noise"}, "prediction_type must be one of"),
        ({"embedding_scale": "paper"}, "embedding_scale one of"),
        ({"resolution": 9}, "multiple of 2, not 9"),
        ({"resolution": 10, "patch_size": 2}, "multiple of 4, not 10"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny(**config)


def test_karlos_weights_would_fit() -> None:
    with torch.device("meta"):
        model = Decoder(
            64,
            768,
            768,
            KARLO,
            context_width=1536,
            learned_variance=True,
            prediction_type="epsilon",
            embedding_scale="raw",
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    of_unet = {name.removeprefix("unet."): shape for name, shape in shapes.items() if name.startswith("unet.")}
    assert len(of_unet) == 716
    assert sum(parameter.numel() for parameter in model.unet.parameters()) == 885_439_686
    for name, shape in {
        "conv_in.weight": (320, 3, 3, 3),
        "time_embedding.linear_1.weight": (1280, 320),
        "down_blocks.0.resnets.0.time_emb_proj.weight": (640, 1280),
        "down_blocks.1.attentions.0.add_k_proj.weight": (640, 1536),
        "mid_block.attentions.0.to_q.weight": (1280, 1280),
        "up_blocks.3.resnets.3.conv1.weight": (320, 640, 3, 3),
        "conv_out.weight": (6, 320, 3, 3),
    }.items():
        assert of_unet[name] == shape, name
    assert {name: shape for name, shape in shapes.items() if not name.startswith("unet.")} == {
        "null_image_embedding": (768,),
        "image_to_time.weight": (1280, 768),
        "image_to_time.bias": (1280,),
        "text_to_time.weight": (1280, 768),
        "text_to_time.bias": (1280,),
        "image_to_context.weight": (6144, 768),
        "image_to_context.bias": (6144,),
        "text_to_context.weight": (1536, 768),
        "text_to_context.bias": (1536,),
        "text_norm.weight": (1536,),
        "text_norm.bias": (1536,),
    }


def predictor(model: Decoder, condition: DecoderCondition) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x_t, t: model.denoise(x_t, t, condition)


@pytest.mark.parametrize(("kind", "scheduler"), [("epsilon", "ddpm"), ("v_prediction", "ddim"), ("sample", "unclip")])
def test_a_drawing_is_guided_seeded_and_the_same_alone(kind: str, scheduler: str) -> None:
    model, condition = tiny(prediction_type=kind, learned_variance=True), example()

    def drawn(rows: list[int], scale: float, seeds: list[int]) -> Tensor:
        steps: list[Step] = []
        with torch.no_grad():
            given = model.condition(**{name: value[rows] for name, value in condition.items()})
            text = {name: value[:1] * 0 + 0.5 for name, value in condition.items() if "text_" in name}
            text = {name: value.expand(len(rows), *value.shape[1:]) for name, value in text.items()}
            null = model.condition(None, **text)
        end = denoise(
            predictor(model, given),
            scheduler_for(scheduler, model),
            noise_of(seeds, (3, 8, 8), DECODER),
            3,
            null_predict=predictor(model, null),
            guidance_scale=scale,
            clamp=1.0,
            seeds=seeds,
            stream=DECODER,
            callback=steps.append,
        )
        assert torch.equal(steps[-1].x_0, end) and len(steps) == 3
        return end

    guided = drawn([0, 1, 2], 3.0, [5, 6, 7])
    assert guided.shape == (B, 3, 8, 8) and float(guided.abs().max()) <= 1
    torch.testing.assert_close(drawn([1], 3.0, [6]), guided[1:2], rtol=1e-3, atol=1e-3)
    for other in (
        drawn([0, 1, 2], 1.0, [5, 6, 7]),
        drawn([0, 1, 2], 3.0, [15, 16, 17]),
        drawn([1, 2, 0], 3.0, [5, 6, 7]),
    ):
        assert min(rows_apart(other, guided)) > 1e-2
