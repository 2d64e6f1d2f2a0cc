"""The diffusion prior: what each position sees, embeddings in and out, drawing (2204.06125, 2.2)."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genpipe.dalle2.prior import PAPER_STD, Prior, PriorCondition, closest_draw, sample
from genpipe.dalle2.sampling import Step
from genpipe.errors import InputError
from genpipe.parts import load_part, save_part

D, L = 16, 6
Text = tuple[Tensor, Tensor, Tensor]


def tiny_prior(seed: int = 0, gain: float = 1.5, **settings: object) -> Prior:
    """Two layers; its weights multiplied by `gain`, so that everything it reads counts."""
    torch.manual_seed(seed)
    model = Prior(
        **{**dict(embedding_dim=D, text_width=D, text_length=L, num_layers=2, num_heads=2, head_dim=8), **settings}
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(gain)
    return model.eval()


def texts(rows: int = 3, width: int = D, seed: int = 0) -> Text:
    """Embeddings, states and masks of captions of 2, 3, ... tokens."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(L)[None] < torch.arange(2, 2 + rows)[:, None]
    return torch.randn(rows, D, generator=g), torch.randn(rows, L, width, generator=g), mask


def noised(*shape: int) -> Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_the_answer_is_that_of_diffusers_prior_transformer() -> None:
    """Token order, causal mask, padding mask and query are the published ones, also when positions are left out."""
    model, (embedding, states, mask) = tiny_prior().double(), texts()
    x_t, t = noised(3).double(), torch.tensor([0, 500, 999])
    ours = model(x_t, t, embedding.double(), states.double(), mask)
    theirs = model.transformer(x_t, t, model.scaled(embedding).double(), states.double(), mask.double())
    torch.testing.assert_close(ours, theirs.predicted_image_embedding, rtol=1e-9, atol=1e-9)
    assert ours.std() > 0.1


@torch.no_grad()
def test_positions_are_text_then_embedding_then_time_noise_and_query() -> None:
    """Moving one position's learned place changes the answer only if something reads it, and in this order."""
    model, text = tiny_prior(), texts(1)
    x_t, t = noised(1), torch.tensor([300])
    before, condition = model(x_t, t, *text), model.condition(*text)

    def after_moving(position: int) -> tuple[Tensor, PriorCondition]:
        place = model.transformer.positional_embedding
        kept = place.clone()
        place[:, position] += torch.linspace(-1, 1, place.shape[-1])
        answer = model(x_t, t, *text), model.condition(*text)
        place.copy_(kept)
        return answer

    for position in (0, 1, L, L + 1, L + 2, L + 3):
        answer, seen = after_moving(position)
        assert not torch.allclose(answer, before), position
        unchanged = [torch.equal(a, b) for a, b in zip(seen.keys, condition.keys, strict=True)]
        assert all(unchanged) == (position > L)  # time, noise and query are not seen by the text
    padding, _ = after_moving(3)
    assert torch.equal(padding, before)


@torch.no_grad()
def test_attention_is_causal() -> None:
    """A later word or the text embedding does not change what the words before it look like; an earlier one does."""
    model, (embedding, states, mask) = tiny_prior(), texts(1)
    mask = torch.ones_like(mask)
    keys = model.condition(embedding, states, mask).keys[-1]
    later = states.clone()
    later[:, 3] += 1
    changed = model.condition(embedding, later, mask).keys[-1]
    assert torch.equal(changed[:, :, :3], keys[:, :, :3])
    assert not torch.allclose(changed[:, :, 4], keys[:, :, 4])
    assert torch.equal(model.condition(-embedding, states, mask).keys[-1][:, :, :L], keys[:, :, :L])


@torch.no_grad()
def test_padding_does_not_matter() -> None:
    model, (embedding, states, mask) = tiny_prior(), texts(3)
    x_t, t = noised(3), torch.tensor([10, 500, 990])
    before = model(x_t, t, embedding, states, mask)
    garbage = torch.where(mask[..., None], states, 1e3)
    assert torch.equal(model(x_t, t, embedding, garbage, mask), before)
    torch.testing.assert_close(model(x_t, t, embedding, states[:, :4], mask[:, :4]), before)
    assert not torch.allclose(model(x_t, t, embedding, states, torch.ones_like(mask)), before)


@torch.no_grad()
def test_noised_embeddings_of_one_caption_do_not_see_one_another() -> None:
    model, text = tiny_prior(), texts(3)
    groups, t = noised(3, 4), torch.randint(0, 1000, (3, 4), generator=torch.Generator().manual_seed(2))
    together = model(groups, t, *text)
    assert together.shape == groups.shape
    for i in range(4):
        torch.testing.assert_close(together[:, i], model(groups[:, i], t[:, i], *text), rtol=1e-4, atol=1e-4)
    one_time = model(groups, torch.tensor(7), *text)
    torch.testing.assert_close(one_time[:, 0], model(groups[:, 0], torch.full((3,), 7), *text), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_condition_reaches_the_answer() -> None:
    model, (embedding, states, mask) = tiny_prior(), texts(1)
    x_t, t = noised(1), torch.tensor([500])
    before = model(x_t, t, embedding, states, mask)
    for other in (
        model(-x_t, t, embedding, states, mask),
        model(x_t, t + 400, embedding, states, mask),
        model(x_t, t, -embedding, states, mask),
        model(x_t, t, embedding, -states, mask),
    ):
        assert not torch.allclose(other, before, rtol=1e-2)
    torch.testing.assert_close(model(x_t, t, 5 * embedding, states, mask), before)  # "unit" reads directions


@torch.no_grad()
@pytest.mark.parametrize("width", [D, 24])
def test_widths_equal_or_not(width: int) -> None:
    """An own projection of the text is there when it is asked for, whether or not the widths coincide."""
    model = tiny_prior(text_width=width, text_projection=True)
    text = texts(2, width)
    x_t = noised(2)
    assert model.text_to_width is not None and model(x_t, torch.tensor(5), *text).shape == (2, D)
    before = model(x_t, torch.tensor(5), *text)
    model.text_to_width.weight.zero_()
    assert not torch.allclose(model(x_t, torch.tensor(5), *text), before)
    with pytest.raises(InputError, match="text_projection"):
        tiny_prior(text_width=24)
    assert tiny_prior().text_to_width is None


def test_statistics_there_and_back() -> None:
    model = tiny_prior()
    embeddings = 7 * torch.randn(500, D, generator=torch.Generator().manual_seed(3)) * torch.arange(1, D + 1) + 20
    kept = embeddings.clone()
    model.set_statistics(embeddings)
    assert torch.equal(embeddings, kept)
    x_0 = model.to_prior(embeddings)
    torch.testing.assert_close(x_0.mean(dim=0), torch.zeros(D), atol=1e-4, rtol=0)
    torch.testing.assert_close(x_0.std(dim=0), torch.ones(D), atol=1e-4, rtol=0)
    back = model.from_prior(x_0)
    torch.testing.assert_close(back, F.normalize(embeddings, dim=-1) * D**0.5, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.to_prior(0.1 * embeddings), x_0, atol=1e-3, rtol=1e-3)  # "unit": directions alone
    raw = tiny_prior(embedding_scale="raw")
    raw.set_statistics(embeddings)
    torch.testing.assert_close(raw.from_prior(raw.to_prior(embeddings)), embeddings, atol=1e-2, rtol=1e-4)
    model.set_statistics(torch.ones(3, D))  # coordinates that never change
    assert model.to_prior(embeddings).isfinite().all()
    for bad in (torch.ones(1, D), torch.ones(4, D + 1), torch.full((4, D), float("nan"))):
        with pytest.raises(InputError, match="statistics"):
            model.set_statistics(bad)


def test_without_statistics_it_is_the_papers_scale() -> None:
    """17.2 times a unit vector of width 1,024 (2.2); the deviation of a coordinate is 0.5375 at any width."""
    wide = Prior(1024, 1024, 2, num_layers=1, num_heads=1, head_dim=2)
    unit = F.normalize(torch.randn(3, 1024), dim=-1)
    torch.testing.assert_close(wide.to_prior(5 * unit), 17.2 * unit)
    vector = torch.full((1, D), 3.0)
    torch.testing.assert_close(tiny_prior().to_prior(vector), torch.full((1, D), PAPER_STD))
    assert torch.equal(tiny_prior(embedding_scale="raw").to_prior(vector), vector)


def test_save_and_load(tmp_path: Path) -> None:
    model = tiny_prior(clip_identity="abc")
    model.set_statistics(torch.randn(50, D) + 1)
    save_part(model, tmp_path / "prior")
    loaded = load_part(Prior, tmp_path / "prior")
    assert dict(loaded.config)["clip_identity"] == "abc" and loaded.prediction_type == "sample"
    assert loaded.state_dict().keys() == model.state_dict().keys() >= {"mean", "std"}
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    again, before = (sample(part, *texts(1), [[3]], num_inference_steps=2) for part in (loaded, model))
    torch.testing.assert_close(again, before)


def test_karlos_shape() -> None:
    """Its published prior has 338 tensors with 1,022,030,080 numbers, clip_mean and clip_std among them."""
    with torch.device("meta"):
        state = Prior(768, 768, 77, num_layers=20, num_heads=32, head_dim=64, embedding_scale="raw").state_dict()
    assert (len(state), sum(tensor.numel() for tensor in state.values())) == (338, 1_022_030_080)
    assert state["transformer.positional_embedding"].shape == (1, 81, 2048)


# drawing --------------------------------------------------------------------------------------------------------------


def test_row_equals_single_and_seeds_decide() -> None:
    model, text = tiny_prior(), texts(3)
    seeds, options = (
        [[1, 2], [3, 4], [5, 1]],
        {"num_inference_steps": 3, "guidance_scale": 2.0, "null_text": texts(1, seed=9)},
    )
    drawn = sample(model, *text, seeds, **options)
    assert drawn.shape == (3, 2, D) and torch.equal(drawn, sample(model, *text, seeds, **options))
    for row in range(3):
        for place in range(2):
            alone = sample(model, *(part[row : row + 1] for part in text), [[seeds[row][place]]], **options)
            torch.testing.assert_close(alone[0, 0], drawn[row, place], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(drawn[:, 0], drawn[:, 1], atol=1e-2)


def test_the_draw_nearest_to_the_text_is_kept() -> None:
    text = F.normalize(torch.randn(2, D, generator=torch.Generator().manual_seed(4)), dim=-1)
    drawn = torch.randn(2, 3, 4, D, generator=torch.Generator().manual_seed(5))
    drawn[1, 2, 3] = 0.1 * text[1]  # the direction counts, not the length
    kept = closest_draw(drawn, text)
    assert torch.equal(kept[1, 2], drawn[1, 2, 3])
    cosine = F.cosine_similarity(drawn, text[:, None, None], dim=-1).max(dim=-1).values
    torch.testing.assert_close(F.cosine_similarity(kept, text[:, None], dim=-1), cosine)


def test_more_draws_come_nearer_and_the_first_stays_the_same() -> None:
    model, text = tiny_prior(), texts(2)
    seeds, steps = [[1, 2, 3], [4, 5, 6]], 2
    seen: list[Step] = []
    one, many = (
        sample(model, *text, seeds, num_inference_steps=steps, draws=draws, callback=seen.append) for draws in (1, 5)
    )
    first, all_five = (model.from_prior(seen[i].x_0) for i in (steps - 1, 2 * steps - 1))
    assert all_five.shape == (6, 5, D) and seen[-1].num_steps == steps
    torch.testing.assert_close(all_five[:, :1], first, rtol=1e-4, atol=1e-4)
    nearness = [F.cosine_similarity(drawn, text[0][:, None], dim=-1) for drawn in (one, many)]
    assert (nearness[1] >= nearness[0] - 1e-5).all() and (nearness[1] > nearness[0] + 1e-3).any()


def test_guidance() -> None:
    """1 is the conditional prediction alone, 0 the null text's; a null text or negative prompt changes the others."""
    model, text, null, other = tiny_prior(), texts(2), texts(1, seed=9), texts(2, seed=10)
    seeds = [[1], [2]]

    def drawn(scale: float, null_text: Text | None, of: Text = text) -> Tensor:
        return sample(model, *of, seeds, null_text, 2, guidance_scale=scale, draws=1)

    assert torch.equal(drawn(1.0, null), drawn(1.0, None))
    expanded: Text = (null[0].expand(2, -1), null[1].expand(2, -1, -1), null[2].expand(2, -1))
    torch.testing.assert_close(drawn(0.0, null), drawn(1.0, None, of=expanded), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(drawn(3.0, null), drawn(3.0, expanded), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(drawn(3.0, null), drawn(1.0, None), atol=1e-2)
    assert not torch.allclose(drawn(3.0, null), drawn(3.0, other), atol=1e-2)


@pytest.mark.parametrize("name", ["ddpm", "dpm-solver++", "unipc", "euler", "unclip"])
def test_schedulers(name: str) -> None:
    """One step of each is the answer to pure noise; more steps give finite embeddings within the clamp."""
    model, text = tiny_prior(), texts(1)
    drawn, seen = [], []
    for steps in (1, 4):
        drawn.append(
            sample(model, *text, [[1, 2]], num_inference_steps=steps, scheduler=name, callback=seen.append, clamp=0.5)
        )
    assert all(x.shape == (1, 2, D) and x.isfinite().all() for x in drawn)
    assert all(step.x_0.abs().max() <= 0.5 + 1e-5 for step in seen)
    torch.testing.assert_close(
        drawn[0], sample(model, *text, [[1, 2]], num_inference_steps=1, clamp=0.5), rtol=1e-3, atol=1e-3
    )


def test_the_clamp_is_the_priors_unless_a_drawing_names_one() -> None:
    text, narrow = texts(1), tiny_prior(gain=3.0, clamp=0.25)
    seen: list[Step] = []
    drawn = sample(narrow, *text, [[1]], num_inference_steps=3, callback=seen.append)
    assert max(float(step.x_0.abs().max()) for step in seen) == 0.25
    wide = tiny_prior(gain=3.0, clamp=None)
    assert torch.equal(drawn, sample(wide, *text, [[1]], num_inference_steps=3, clamp=0.25))
    assert tiny_prior().config.clamp == 5.0
    with pytest.raises(InputError, match="clamp of a prior must be above 0"):
        tiny_prior(clamp=0.0)


def test_inputs_stay_as_they_are() -> None:
    model, text, null = tiny_prior(), texts(2), texts(1, seed=9)
    kept = [part.clone() for part in (*text, *null)]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seeds = [[1, 2], [3, 4]]
    sample(model, *text, seeds, null, 2, guidance_scale=2.0)
    assert all(torch.equal(a, b) for a, b in zip((*text, *null), kept, strict=True)) and seeds == [[1, 2], [3, 4]]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_bad_input() -> None:
    model, (embedding, states, mask) = tiny_prior(), texts(2)
    bad_texts = [
        (embedding[:, :8], states, mask),
        (embedding, states[:, :, :8], mask),
        (embedding, states, mask[:, :3]),
        (embedding[:1], states, mask),
        (embedding, torch.cat([states, states], dim=1), torch.cat([mask, mask], dim=1)),
        (embedding, states[:, :0], mask[:, :0]),
    ]
    for bad in bad_texts:
        with pytest.raises(InputError, match="shapes"):
            model.condition(*bad)
    for seeds in ([], [[1]], [[1], [2, 3]], [[], []]):
        with pytest.raises(InputError, match="seeds"):
            sample(model, embedding, states, mask, seeds)
    with pytest.raises(InputError, match="draws is 0"):
        sample(model, embedding, states, mask, [[1], [2]], draws=0)
    with pytest.raises(InputError, match="null_text"):
        sample(model, embedding, states, mask, [[1], [2]], guidance_scale=2.0)
    for settings in ({"embedding_scale": "rescaled"}, {"num_layers": 0}, {"num_heads": 1, "head_dim": 3}):
        with pytest.raises(InputError):
            tiny_prior(**settings)


def test_damaged_weights_are_named() -> None:
    model = tiny_prior()
    with torch.no_grad():
        model.transformer.proj_in.weight[0, 0] = np.nan
    with pytest.raises(FloatingPointError, match="prior's output is not finite at step 1 of 3"):
        sample(model, *texts(1), [[1]], num_inference_steps=3)
