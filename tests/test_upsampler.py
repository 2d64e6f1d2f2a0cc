"""The upsampler: what the network sees, any size, kept colour, seeds, its parts stored; published weights' shape."""

from pathlib import Path
from typing import Any

import pytest
import torch

from genpipe.dalle2.corruption import filtered, gaussian_kernel
from genpipe.dalle2.sampling import SCHEDULERS, Step
from genpipe.dalle2.sharpening import sharpened
from genpipe.dalle2.upsampler import Upsampler, keep_mean_colour, upsample
from genpipe.errors import InputError
from genpipe.evaluation.upsampling import colour_difference, gradient_energy, sharpness, shrink, upsampling_figures
from genpipe.images import resize, unit_to_signed
from genpipe.parts import load_part, save_part
from genpipe.training.recipes import recipe

UNET: dict[str, Any] = {
    "block_out_channels": [16, 16],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D"] * 2,
    "up_block_types": ["UpBlock2D"] * 2,
    "norm_num_groups": 8,
}
# As published: super-resolution of Karlo v1 alpha, from 64 to 256 pixels
KARLO: dict[str, Any] = {
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 960, 1280],
    "center_input_sample": False,
    "down_block_types": ["ResnetDownsampleBlock2D"] * 4,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "layers_per_block": 3,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "resnet_time_scale_shift": "default",
    "sample_size": 256,
    "time_embedding_type": "positional",
    "up_block_types": ["ResnetUpsampleBlock2D"] * 4,
}


def make(trained: bool = True, **settings: Any) -> Upsampler:
    """A tiny upsampler; `trained`: its last convolution is not zero, so that it answers something of its own."""
    given = {"patch_size": 2, "prediction_type": "sample", "residual": True, "num_inference_steps": 3, **settings}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Upsampler(UNET, **given)
        if trained:
            torch.nn.init.normal_(model.unet.conv_out.weight, std=0.02)
    return model.eval()


def small(rows: int = 2, height: int = 8, width: int = 8, seed: int = 0) -> torch.Tensor:
    """Smooth pictures between 0.2 and 0.8."""
    generator = torch.Generator().manual_seed(seed)
    return resize(0.2 + 0.6 * torch.rand(rows, 3, 3, 3, generator=generator), (height, width), mode="bilinear")


# the network ----------------------------------------------------------------------------------------------------------


def test_published_super_resolution_weights_fit() -> None:
    with torch.device("meta"):
        model = Upsampler(KARLO)
    assert sum(p.numel() for p in model.parameters()) == 691_579_523
    assert len(model.unet.state_dict()) == 408
    assert (model.unet.conv_in.in_channels, model.unet.conv_out.out_channels) == (6, 3)
    assert model.unet.down_blocks[0].resnets[0].time_embedding_norm == "default"  # additive
    assert not [name for name in model.state_dict() if "attention" in name or "attn" in name]


def test_shipped_recipes_have_the_papers_sizes() -> None:
    counts = {}
    for name in ("upsampler", "upsampler-paper-1", "upsampler-paper-2"):
        with torch.device("meta"):
            counts[name] = sum(p.numel() for p in Upsampler(**recipe(name).model).parameters())
    assert counts["upsampler"] <= 1_200_000
    assert counts["upsampler-paper-1"] == pytest.approx(700e6, rel=0.05)
    assert counts["upsampler-paper-2"] == pytest.approx(300e6, rel=0.15)


@torch.no_grad()
def test_the_unet_sees_the_noised_picture_first_and_the_enlarged_one_behind() -> None:
    model, seen = make(patch_size=1), []
    model.unet.conv_in.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x_t, low = torch.randn(2, 3, 16, 32, generator=torch.Generator().manual_seed(1)), unit_to_signed(small(2, 4, 8))
    model.denoise(x_t, torch.tensor(5), low)
    assert torch.equal(seen[0][:, :3], x_t)
    assert torch.equal(seen[0][:, 3:], resize(low, (16, 32), mode="bicubic"))


@torch.no_grad()
def test_patches_are_folded_and_unfolded_in_the_same_order() -> None:
    model = make(patch_size=2, residual=False)
    seen: list[torch.Tensor] = []
    model.unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model.unet.register_forward_hook(lambda module, inputs, output: (inputs[0][:, :12],))  # answers what it was given
    x_t = torch.arange(3 * 16 * 16.0).reshape(1, 3, 16, 16)
    assert torch.equal(model.denoise(x_t, torch.tensor(5), unit_to_signed(small(1, 4, 4))), x_t)
    assert seen[0].shape == (1, 24, 8, 8)
    assert seen[0][0, :4, 0, 0].tolist() == [0, 1, 16, 17]  # one channel's block of 2 x 2


@torch.no_grad()
def test_an_enlarged_low_picture_is_as_good_as_a_small_one_and_both_reach_the_answer() -> None:
    model = make()
    x_t, low = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)), unit_to_signed(small())
    kept = x_t.clone(), low.clone()
    answer = model(x_t, torch.tensor([3, 900]), low)
    assert torch.equal(answer, model.denoise(x_t, torch.tensor([3, 900]), model.enlarge(low)))
    assert torch.equal(x_t, kept[0]) and torch.equal(low, kept[1])
    for changed in (
        model(-x_t, torch.tensor([3, 900]), low),
        model(x_t, torch.tensor([900, 3]), low),
        model(x_t, torch.tensor([3, 900]), -low),
    ):
        assert float((changed - answer).abs().max()) > 1e-3


@torch.no_grad()
def test_a_fresh_residual_upsampler_answers_the_enlarged_picture() -> None:
    model, low = make(trained=False), unit_to_signed(small())
    x_t = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(x_t, torch.tensor(500), low), resize(low, 32, mode="bicubic"))


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"prediction_type": "noise"}, "prediction_type"),
        ({"resize_mode": "area"}, "resize_mode"),
        ({"prediction_type": "epsilon"}, "residual"),
        ({"patch_size": 0}, "at least 1"),
        ({"corruption": {"kind": "fog"}}, "fog"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        make(**settings)


def test_attention_and_misfit_sizes_are_refused() -> None:
    with pytest.raises(InputError, match="no attention"):
        Upsampler({**UNET, "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]})
    model = make()
    assert model.multiple == 4
    with pytest.raises(InputError, match="multiples of 4"):
        model(torch.zeros(1, 3, 18, 16), torch.tensor(5), torch.zeros(1, 3, 18, 16))
    with pytest.raises(InputError, match="same sides"):
        model(torch.zeros(1, 3, 16, 16), torch.tensor(5), torch.zeros(1, 3, 8, 8))


# drawing --------------------------------------------------------------------------------------------------------------


def test_mean_colour_is_kept() -> None:
    low = small(3)
    drawn = upsample(make(), low, [1, 2, 3])
    assert drawn.shape == (3, 3, 32, 32) and 0 <= float(drawn.min()) and float(drawn.max()) <= 1
    assert float((drawn - resize(low, 32)).abs().mean()) > 0.01  # the network did change the picture
    assert colour_difference(drawn, low) < 0.1  # levels of 255


def test_mean_colour_by_hand() -> None:
    pixels, low = torch.full((1, 3, 4, 4), 0.5), torch.full((1, 3, 1, 1), 0.25)
    assert torch.equal(keep_mean_colour(pixels, low), torch.full((1, 3, 4, 4), 0.25))
    assert torch.equal(pixels, torch.full((1, 3, 4, 4), 0.5))
    half = torch.tensor([0.0, 0.6]).expand(1, 3, 2, 2)  # cutting at 0 is made up for
    torch.testing.assert_close(keep_mean_colour(half, low).mean(), torch.tensor(0.25), atol=0.5 / 255, rtol=0)
    assert keep_mean_colour(torch.full((1, 3, 4, 4), 0.9), torch.ones(1, 3, 1, 1)).min() == 1


@pytest.mark.parametrize("height, width", [(8, 8), (5, 7), (1, 3), (6, 11)])
def test_any_size(height: int, width: int) -> None:
    model = make(trained=False, patch_size=4)  # sides must be multiples of 8, small ones of 2
    low = small(2, height, width)
    drawn = upsample(model, low, [0, 1])
    assert drawn.shape == (2, 3, 4 * height, 4 * width)
    plain = keep_mean_colour(resize(low, (4 * height, 4 * width), mode="bicubic"), low)
    inner = (..., slice(0, max(4 * height - 8, 1)), slice(0, max(4 * width - 8, 1)))  # away from the padded border
    torch.testing.assert_close(drawn[inner], plain[inner], atol=0.02, rtol=0)
    assert bool(torch.isfinite(upsample(make(patch_size=4), low, [0, 1])).all())


def test_a_row_depends_on_its_own_seed_alone() -> None:
    model, low = make(), small(5)
    kept = low.clone()
    seeds = [3, 1, 4, 1, 5]
    drawn = upsample(model, low, seeds)
    assert torch.equal(low, kept)
    assert torch.equal(drawn, upsample(model, low, seeds))
    torch.testing.assert_close(drawn, upsample(model, low, seeds, rows_at_a_time=2))
    for i in (0, 4):
        torch.testing.assert_close(drawn[i : i + 1], upsample(model, low[i : i + 1], [seeds[i]]))
    assert float((drawn[:1] - upsample(model, low[:1], [9])).abs().max()) > 1e-3
    assert float((drawn[:1] - upsample(model, low[:1], [3], stage_number=1)).abs().max()) > 1e-3
    assert upsample(model, low[:0], []).shape == (0, 3, 32, 32)


def test_steps_come_from_the_model_unless_named_and_the_callback_sees_them() -> None:
    model, low, steps = make(), small(2), list[Step]()
    upsample(model, low, [0, 1], callback=steps.append)
    assert [(step.index, step.num_steps) for step in steps] == [(0, 3), (1, 3), (2, 3)]
    assert steps[-1].x_0.shape == (2, 3, 32, 32) and float(steps[-1].x_0.abs().max()) <= 1
    steps.clear()
    upsample(model, low, [0, 1], num_inference_steps=1, rows_at_a_time=1, callback=steps.append)
    assert [(step.index, len(step.x_0)) for step in steps] == [(0, 1), (0, 1)]


@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS))
@pytest.mark.parametrize("prediction_type", ["sample", "epsilon", "v_prediction"])
def test_every_scheduler_and_prediction(scheduler: str, prediction_type: str) -> None:
    model = make(prediction_type=prediction_type, residual=False)
    drawn = upsample(model, small(1), [0], scheduler=scheduler)
    assert bool(torch.isfinite(drawn).all()) and colour_difference(drawn, small(1)) < 1


@pytest.mark.parametrize("scheduler", ["unclip", "ddim"])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_second_network_takes_the_last_step_alone(scheduler: str, steps: int) -> None:
    model = make(last_step_network=True, scheduler=scheduler, num_inference_steps=steps)
    calls: list[str] = []
    for name, unet in (("first", model.unet), ("last", model.last_unet)):
        unet.register_forward_hook(lambda *unused, name=name: calls.append(name))
    plain = upsample(model, small(1), [0])
    assert calls == ["first"] * (steps - 1) + ["last"]
    with torch.no_grad():
        model.last_unet.conv_out.bias.add_(0.5)
    assert not torch.allclose(upsample(model, small(1), [0]), plain, atol=1e-3)
    names = {name.partition(".")[0] for name in model.state_dict()}
    assert {"unet", "last_unet"} <= names and make().last_unet is None


def test_the_scheduler_and_the_mean_colour_are_the_models() -> None:
    low = small(1)
    assert torch.equal(upsample(make(), low, [0]), upsample(make(), low, [0], scheduler="ddim"))
    stochastic = make(scheduler="unclip")
    assert torch.equal(upsample(stochastic, low, [0]), upsample(make(), low, [0], scheduler="unclip"))
    assert not torch.allclose(upsample(stochastic, low, [0]), upsample(make(), low, [0]), atol=1e-3)
    free = make(corrects_colour=False)
    with torch.no_grad():
        free.unet.conv_out.bias.add_(0.3)
    drawn = upsample(free, low, [0])
    assert colour_difference(drawn, low) > 5 and 0 <= float(drawn.min()) and float(drawn.max()) <= 1
    with pytest.raises(InputError, match="scheduler must be one of"):
        make(scheduler="unknown")


def test_the_lightest_blur_of_training_is_what_drawing_applies() -> None:
    blur, low = {"kind": "blur", "kernel": 3, "sigma": [0.6, 0.6]}, small(1)
    drawn = upsample(make(trained=False, corruption=blur), low, [0])
    softened = resize(filtered(low, gaussian_kernel(3, 0.6)), 32, mode="bicubic")
    torch.testing.assert_close(drawn, keep_mean_colour(softened, low), atol=1e-5, rtol=0)
    plain = upsample(make(trained=False, corruption={**blur, "sigma": [0.0, 0.6]}), low, [0])
    torch.testing.assert_close(plain, keep_mean_colour(resize(low, 32), low), atol=1e-5, rtol=0)


def test_sharpening_steepens_an_edge_and_overshoots_nowhere() -> None:
    """An edge over three pixels, by hand: its middle stays, its shoulders move outwards, its ends are held."""
    values = torch.tensor([0.0, 0.0, 0.0, 0.2, 0.5, 0.8, 1.0, 1.0, 1.0])
    edge = values.expand(1, 3, 9, 9)
    sharp = sharpened(edge, 1.0)
    near, far = torch.exp(-0.5 * (torch.tensor([1.0, 2.0]) / 0.7) ** 2).tolist()
    blurred = (0.2 + near * (0.0 + 0.5) + far * (0.0 + 0.8)) / (1 + 2 * near + 2 * far)
    torch.testing.assert_close(float(sharp[0, 0, 4, 3]), 0.2 + (0.2 - blurred))
    assert sharp[0, 0, 4, 2] == 0 and sharp[0, 0, 4, 6] == 1  # neither below nor above what was there
    torch.testing.assert_close(sharp[..., 4], edge[..., 4])
    assert float(gradient_energy(sharp)) > float(gradient_energy(edge))
    assert torch.equal(edge[0, 0, 0], values)
    plain = torch.full((1, 3, 8, 8), 0.3)
    torch.testing.assert_close(sharpened(plain, 4.0), plain)


def test_a_drawing_ends_with_the_models_sharpening() -> None:
    low = small(2)
    plain, sharp = upsample(make(corrects_colour=False), low, [0, 1]), make(corrects_colour=False, sharpening=1.5)
    torch.testing.assert_close(upsample(sharp, low, [0, 1]), sharpened(plain, 1.5), atol=1e-5, rtol=0)
    assert torch.equal(upsample(make(sharpening=0.0), low, [0, 1]), upsample(make(), low, [0, 1]))
    for amount in (-0.1, 4.5, float("nan")):
        with pytest.raises(InputError, match="sharpening is .*; it must be from 0, none, to 4"):
            make(sharpening=amount)


def test_a_damaged_network_is_named_with_its_step() -> None:
    model = make()
    torch.nn.init.constant_(model.unet.conv_out.bias, float("nan"))
    with pytest.raises(FloatingPointError, match="upsampler.*step 1 of 3"):
        upsample(model, small(), [0, 1])


def test_bad_input_is_refused() -> None:
    with pytest.raises(InputError, match="2 pictures need as many seeds, got 3"):
        upsample(make(), small(), [0, 1, 2])
    with pytest.raises(InputError, match="float pixels"):
        upsample(make(), small()[0], [0])
    with pytest.raises(InputError, match="steps"):
        upsample(make(), small(), [0, 1], num_inference_steps=0)


def test_saved_and_loaded_with_all_its_settings(tmp_path: Path) -> None:
    corruption = {"kind": "blur", "kernel": 5, "sigma": [0.1, 0.8], "noise": [0.0, 0.02]}
    model = make(corruption=corruption, resize_mode="bilinear")
    save_part(model, tmp_path / "upsampler")
    loaded = load_part(Upsampler, tmp_path / "upsampler").eval()
    assert dict(loaded.config.corruption) == corruption and loaded.degradation == model.degradation
    assert loaded.config.resize_mode == "bilinear" and loaded.config.num_inference_steps == 3
    assert torch.equal(upsample(model, small(), [0, 1]), upsample(loaded, small(), [0, 1]))


# figures --------------------------------------------------------------------------------------------------------------


def test_gradient_energy_and_sharpness_by_hand() -> None:
    pixels = torch.tensor([[0.0, 1.0], [0.0, 1.0]]).expand(1, 3, 2, 2)
    assert gradient_energy(pixels).tolist() == [1.0]  # 1 across, 0 down
    assert sharpness(pixels / 2, pixels) == pytest.approx(0.25)
    assert colour_difference(pixels, torch.full((1, 3, 1, 1), 0.5)) == 0
    assert colour_difference(pixels, torch.full((1, 3, 1, 1), 0.4)) == pytest.approx(25.5)


def test_figures_of_the_merely_enlarged_picture() -> None:
    model, pixels = make(trained=False), small(2, 32, 32)
    figures = upsampling_figures(model, pixels, [0, 1])
    assert figures["psnr"] == pytest.approx(figures["psnr_bicubic"], abs=0.1)
    assert figures["sharpness"] == pytest.approx(figures["sharpness_bicubic"], rel=0.01)
    assert figures["colour"] < 0.1
    torch.testing.assert_close(shrink(model, pixels), resize(pixels, 8, clamp=True))
