"""The CLIP that knows noise against its formula written out, and guidance by its gradient."""

import math

import pytest
import torch
from glide_reference import GUIDE_CONFIG, tensors_of
from open_clip import SimpleTokenizer
from torch import Tensor

from genpipe.clip.noise_aware import GLIDE_MEAN, GLIDE_STD, NoiseAwareCLIP
from genpipe.dalle2.guidance import clip_gradient, toward
from genpipe.dalle2.sampling import DECODER, SCHEDULERS, denoise, make_scheduler, noise_of, step_generators
from genpipe.errors import InputError
from genpipe.images import signed_to_unit
from genpipe.parts import load_part, save_part
from genpipe.published.glide_parts import guide

IMAGE, TEXT = "clip_image_enc.pt", "clip_text_enc.pt"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> NoiseAwareCLIP:
    folder = tmp_path_factory.mktemp("guide")
    for name in (IMAGE, TEXT):
        torch.save(tensors_of(name), folder / name)
    return guide(folder / IMAGE, folder / TEXT, GUIDE_CONFIG, None)


def tower_reference(p: dict[str, Tensor], h: Tensor, causal: bool) -> Tensor:
    """Positions (L, W) through all blocks: heads of 4, no bias of the keys, norms before."""
    for i in range(2):
        attention, mlp = f"blocks.block_{i}.f_attn", f"blocks.block_{i}.f_mlp"
        x = norm(p, f"{attention}.ln", h)
        q = x @ p[f"{attention}.f_q.w"].T + p[f"{attention}.f_q.b"]
        k = x @ p[f"{attention}.f_k.w"].T
        v = x @ p[f"{attention}.f_v.w"].T + p[f"{attention}.f_v.b"]
        heads = []
        for start in range(0, h.shape[1], 4):
            part = slice(start, start + 4)
            weight = q[:, part] @ k[:, part].T / 2
            if causal:
                weight = weight + torch.full_like(weight, -torch.inf).triu(1)
            heads.append(weight.softmax(dim=1) @ v[:, part])
        h = h + torch.cat(heads, dim=1) @ p[f"{attention}.f_c.w"].T + p[f"{attention}.f_c.b"]
        x = norm(p, f"{mlp}.ln", h) @ p[f"{mlp}.f_1.w"].T + p[f"{mlp}.f_1.b"]
        h = h + (x / 2 * (1 + torch.erf(x / math.sqrt(2)))) @ p[f"{mlp}.f_2.w"].T + p[f"{mlp}.f_2.b"]
    return h


def norm(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    x = x - x.mean(dim=1, keepdim=True)
    return x / (x.square().mean(dim=1, keepdim=True) + 1e-5).sqrt() * p[f"{name}.g"] + p[f"{name}.b"]


@torch.no_grad()
def test_image_tower_is_the_formula(model: NoiseAwareCLIP) -> None:
    p = tensors_of(IMAGE)
    x_t = noise_of([0, 1], (3, 8, 8), DECODER)
    answer = model.encode_image(signed_to_unit(x_t), torch.tensor([3, 998])).embedding
    for row, t in enumerate((3, 998)):
        pixels = (x_t[row] + 1) * 127.5
        pixels = (pixels - torch.tensor(GLIDE_MEAN)[:, None, None]) / torch.tensor(GLIDE_STD)[:, None, None]
        places = [p["blocks.input.w_t"][t]]
        for top in (0, 4):
            for left in (0, 4):
                patch = pixels[:, top : top + 4, left : left + 4]
                places.append((p["blocks.input.patch_proj"] * patch).sum(dim=(1, 2, 3)))
        h = norm(p, "blocks.input.ln", torch.stack(places) + p["blocks.input.w_pos"])
        h = tower_reference(p, h, causal=False)
        expected = norm(p, "blocks.output.ln", h)[0] @ p["blocks.output.f.w"].T
        torch.testing.assert_close(answer[row], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_text_tower_is_the_formula_over_open_clips_ids(model: NoiseAwareCLIP) -> None:
    p, texts = tensors_of(TEXT), ["A painting of a fox!", "", "one two three four five six seven eight nine ten eleven"]
    with pytest.warns(UserWarning, match="10 tokens"):
        ids = model.tokenize(texts).ids
    assert torch.equal(ids, SimpleTokenizer()(texts, context_length=12))
    answer = model.encode_text(texts)
    for row, text_ids in enumerate(ids):
        h = tower_reference(p, p["blocks.input.w_voc"][text_ids] + p["blocks.input.w_pos"], causal=True)
        end = int((text_ids == 49407).nonzero()[0])
        expected = norm(p, "blocks.output.ln", h)[end] @ p["blocks.output.f.w"].T
        torch.testing.assert_close(answer.embedding[row], expected, rtol=1e-4, atol=1e-5)


def test_refused_and_saved(model: NoiseAwareCLIP, tmp_path: object) -> None:
    pixels = torch.rand(2, 3, 8, 8)
    with pytest.raises(InputError, match=r"pixels \(B, 3, 8, 8\)"):
        model.encode_image(torch.rand(1, 3, 9, 8), 0)
    with pytest.raises(InputError, match="0 to 999, got"):
        model.encode_image(pixels, torch.tensor([0, 1000]))
    with pytest.raises(InputError, match="whole"):
        NoiseAwareCLIP(**{**GUIDE_CONFIG, "patch_size": 3})
    save_part(model, f"{tmp_path}/guide")
    again = load_part(NoiseAwareCLIP, f"{tmp_path}/guide")
    assert torch.equal(again.encode_image(pixels, 9).embedding, model.encode_image(pixels, 9).embedding)
    image, text, scale = again(pixels, torch.tensor(9), *vars(again.tokenize(["a", "b"])).values())
    torch.testing.assert_close(text, model.encode_text(["a", "b"]).normalized)
    assert float(scale) == 100.0 and torch.allclose(image.norm(dim=1), torch.ones(2))


# Guidance -------------------------------------------------------------------------------------------------------------


def test_gradient_agrees_with_finite_differences(model: NoiseAwareCLIP) -> None:
    exact = NoiseAwareCLIP(**GUIDE_CONFIG).double()
    exact.load_state_dict(model.state_dict())
    text = exact.encode_text(["a fox", "a hat"]).embedding.detach()
    t, x_t = torch.tensor(400), noise_of([0, 1], (3, 8, 8), DECODER).double()
    before = x_t.clone()
    with torch.no_grad():  # as inside the denoising loop
        slope = clip_gradient(lambda x, t: exact.encode_image(signed_to_unit(x), t).embedding, text, 7.0)(x_t, t)
    assert torch.equal(x_t, before) and not slope.requires_grad and slope.shape == x_t.shape

    @torch.no_grad()
    def likeness(x: Tensor) -> Tensor:
        image = exact.encode_image(signed_to_unit(x), t).embedding
        return 7.0 * torch.nn.functional.cosine_similarity(image, text)

    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        step = 1e-3 * torch.randn(x_t.shape, generator=generator, dtype=torch.float64)
        change = (likeness(x_t + step) - likeness(x_t - step)) / 2
        torch.testing.assert_close((slope * step).sum(dim=(1, 2, 3)), change, rtol=2e-3, atol=1e-7)


def test_shifted_noise_by_hand() -> None:
    """alpha_bar 0.64: noise 0.5 and gradient 2 give noise 0.5 - 0.6 * 2 = -0.7, and x_0 = (1 + 0.6 * 0.7) / 0.8."""
    x_t, alpha_bar = torch.tensor([[1.0]]), torch.tensor([0.64])
    x_0 = (x_t - 0.6 * 0.5) / 0.8
    torch.testing.assert_close(toward(x_0, torch.tensor([[2.0]]), alpha_bar), torch.tensor([[1.42 / 0.8]]))


def test_ddpm_shifts_the_mean_by_the_variance() -> None:
    """The first step of two, worked out: what is drawn moves by variance * gradient (2112.10741, 2.2)."""
    scheduler = make_scheduler(
        "ddpm", beta_schedule="linear", num_train_timesteps=10, prediction_type="epsilon", learned_variance=True
    )
    seen: list[Tensor] = []

    def predict(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x)
        return torch.cat([torch.zeros_like(x), torch.full_like(x, 0.5)], dim=1)  # no noise; 3/4 up its range

    def gradient(x: Tensor, t: Tensor) -> Tensor:
        return torch.full_like(x, 4.0)

    noise = noise_of([0], (2, 3, 3), DECODER)
    denoise(predict, scheduler, noise, 2, clamp=1.0, gradient=gradient, seeds=[0], stream=DECODER)
    alpha_bars = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 10, dtype=torch.float64), dim=0)
    a, before = alpha_bars[9], alpha_bars[4]  # trailing: t = 9, then 4
    beta = 1 - a / before
    variance = math.exp(0.75 * math.log(beta) + 0.25 * math.log(beta * (1 - before) / (1 - a)))
    x_0 = (noise / a.sqrt()).clamp(-1, 1)
    mean = before.sqrt() * beta / (1 - a) * x_0 + (a / before).sqrt() * (1 - before) / (1 - a) * noise
    fresh = torch.randn(1, 2, 3, 3, generator=step_generators([0], DECODER)[0])
    expected = mean + variance**0.5 * fresh + 4.0 * variance
    torch.testing.assert_close(seen[1], expected.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_is_led_towards_the_caption(model: NoiseAwareCLIP, name: str) -> None:
    scheduler = make_scheduler(name, beta_schedule="linear", num_train_timesteps=1000, prediction_type="epsilon")
    text = model.encode_text(["a fox"]).embedding.detach()
    alpha_bars = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), dim=0)

    def predict(x: Tensor, t: Tensor) -> Tensor:  # what a model of unit noise, and nothing else, would say
        return x * (1 - alpha_bars[t]).sqrt()

    def likeness(scale: float) -> float:
        gradient = clip_gradient(lambda x, t: model.encode_image(signed_to_unit(x), t).embedding, text, scale)
        x_0 = denoise(
            predict, scheduler, noise_of([3], (3, 8, 8), DECODER), 20, clamp=1.0, seeds=[3], stream=DECODER,
            gradient=gradient if scale else None,
        )  # fmt: skip
        with torch.no_grad():
            image = model.encode_image(signed_to_unit(x_0), 0).embedding
        return float(torch.nn.functional.cosine_similarity(image, text))

    assert likeness(30.0) > likeness(0.0) + 0.02
