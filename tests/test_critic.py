"""DALL-E 2's decoder as a critic: its error, alone and beside CLIP's score in DALL-E 1's ranking; what is refused."""

from typing import Any

import pytest
import torch
from conftest import all_tiny_parts, tiny_parts
from torch import Tensor

from genpipe.dalle2.critic import can_judge, denoising_errors
from genpipe.dalle2.losses import cumulative_alphas
from genpipe.errors import InputError
from genpipe.images import signed_to_unit, unit_to_signed
from pipelines.dalle1 import DALLE1Pipeline
from pipelines.family import Family, load_family
from pipelines.settings import DALLE1Sampling

PROMPT = "a cat left of a dog"


class Knows:
    """A decoder that answers, whatever the noise, x_0 = picture + wrong; v-prediction as `Decoder` has it."""

    config = type("Config", (dict,), {"__getattr__": dict.__getitem__})(
        beta_schedule="squaredcos_cap_v2", num_train_timesteps=1000, prediction_type="v_prediction"
    )
    latent_shape, null_picture = (3, 8, 8), False

    def __init__(self, picture: Tensor, wrong: float) -> None:
        self.picture, self.wrong, self.times, self.conditions = unit_to_signed(picture), wrong, [], []

    def condition(self, image: None, embedding: Tensor, states: Tensor, mask: Tensor) -> Any:
        self.conditions.append((image, embedding, states, mask))
        return len(embedding)

    def denoise(self, x_t: Tensor, t: Tensor, condition: int) -> Tensor:
        assert len(x_t) == condition
        self.times.append(int(t))
        alpha_bar = cumulative_alphas("squaredcos_cap_v2", 1000)[t]
        return (alpha_bar.sqrt() * x_t - (self.picture + self.wrong)) / (1 - alpha_bar).sqrt()


def a_text(states: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(1, 4), torch.randn(1, states, 5), torch.ones(1, states, dtype=torch.bool)


def test_the_error_is_what_the_decoder_would_change() -> None:
    picture = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    pixels = torch.stack([picture, signed_to_unit(unit_to_signed(picture) + 0.2), *[picture] * 20])
    decoder, text = Knows(picture, 0.1), a_text()
    errors = denoising_errors(decoder, pixels, text)
    torch.testing.assert_close(errors, torch.tensor([0.01, 0.01, *[0.01] * 20]), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(denoising_errors(Knows(picture, 0.0), pixels, text)[:2], torch.tensor([0.0, 0.04]))
    assert set(decoder.times) == {350} and len(decoder.times) == 4  # sixteen at a time, with two noises
    image, *given = decoder.conditions[0]
    assert image is None
    for part, whole in zip(given, text, strict=True):
        assert torch.equal(part, whole.expand(16, *whole.shape[1:]))


def test_a_large_fault_in_one_place_outweighs_the_same_error_spread_thin() -> None:
    picture = torch.full((3, 16, 16), 0.5)
    thin = signed_to_unit(unit_to_signed(picture) + 0.1)
    local = picture.clone()
    local[:, 4:8, 8:12] = signed_to_unit(torch.tensor(0.4))  # a sixteenth of the picture: the same mean squared error
    decoder = Knows(picture, 0.0)
    decoder.latent_shape = (3, 16, 16)
    errors = denoising_errors(decoder, torch.stack([thin, local]), a_text())
    torch.testing.assert_close(errors, torch.tensor([0.01, 0.04]), rtol=1e-3, atol=0)


def test_pictures_of_another_size_are_resized_and_damaged_ones_named() -> None:
    grey = torch.full((3, 8, 8), 0.5)
    errors = denoising_errors(Knows(grey, 0.0), torch.full((2, 3, 32, 32), 0.5), a_text())
    torch.testing.assert_close(errors, torch.zeros(2), rtol=0, atol=1e-9)
    with pytest.raises(FloatingPointError, match="the decoder's judgement is not finite"):
        denoising_errors(Knows(grey * float("nan"), 0.0), torch.full((2, 3, 8, 8), 0.5), a_text())


def test_an_error_is_the_same_at_every_call_and_beside_others() -> None:
    parts = all_tiny_parts()
    decoder, text = parts["decoder"], parts["clip"].encode_text([PROMPT])
    given = (text.embedding, text.states, text.mask)
    pixels = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    errors = denoising_errors(decoder, pixels, given)
    assert can_judge(decoder) and errors.shape == (3,) and float(errors.min()) > 0
    assert torch.equal(errors, denoising_errors(decoder, pixels, given))
    torch.testing.assert_close(denoising_errors(decoder, pixels[1:2], given), errors[1:2], rtol=1e-4, atol=0)
    other = parts["clip"].encode_text(["three pandas"])
    assert not torch.allclose(denoising_errors(decoder, pixels, (other.embedding, other.states, other.mask)), errors)


def test_the_decoder_has_its_say_in_the_ranking_and_scores_stay_clips(tiny_family: Family) -> None:
    pipeline = tiny_family.pipeline("dalle1")
    settings = {"num_candidates": 6, "keep": 6, "seed": 3}
    alone = pipeline(PROMPT, **settings)
    led = pipeline(PROMPT, **settings, sampling=pipeline.resolve_sampling({"decoder_weight": 1000.0}))
    score = dict(zip(alone.seeds[0], alone.scores[0], strict=True))
    pictures = dict(zip(alone.seeds[0], alone.images[0], strict=True))
    assert alone.scores[0] == sorted(alone.scores[0], reverse=True)
    assert led.seeds != alone.seeds and set(led.seeds[0]) == set(alone.seeds[0])
    assert led.scores[0] == [score[seed] for seed in led.seeds[0]]
    assert [image.tobytes() for image in led.images[0]] == [pictures[seed].tobytes() for seed in led.seeds[0]]

    small = pipeline(PROMPT, **settings, sampling=pipeline.resolve_sampling({"upsample": False}))
    drawn = torch.stack([torch.tensor(list(image.tobytes())).view(16, 16, 3) for image in small.images[0]])
    text = pipeline.clip.encode_text([PROMPT])
    errors = denoising_errors(
        pipeline.decoder, drawn.permute(0, 3, 1, 2) / 255, (text.embedding, text.states, text.mask)
    )
    order = [seed for _, seed in sorted(zip(errors.tolist(), small.seeds[0], strict=True))]
    assert led.seeds[0] == order  # with such a weight, the decoder alone

    few = pipeline(PROMPT, 6, 2, 3, chunk_size=2, sampling=pipeline.resolve_sampling({"decoder_weight": 1000.0}))
    assert few.seeds[0] == led.seeds[0][:2]


def test_without_a_decoder_that_can_judge_a_weight_is_refused() -> None:
    parts = all_tiny_parts()
    needed = {part: parts[part] for part in ("clip", "dvae", "transformer")}
    without = DALLE1Pipeline(**needed)
    assert without.resolve_sampling() == DALLE1Sampling(upsample=False)
    with pytest.raises(InputError, match=r"no decoder of pixels that reads CLIP's text, .* set it to 0"):
        without(PROMPT, 2, 1, sampling=DALLE1Sampling(decoder_weight=0.1))
    for weight in (-1.0, float("nan"), "much"):
        with pytest.raises(InputError, match="weight in the ranking must be 0 or above"):
            DALLE1Pipeline(**needed, decoder=parts["decoder"]).resolve_sampling({"decoder_weight": weight})
    with pytest.raises(InputError, match="trained beside another CLIP"):
        DALLE1Pipeline(**tiny_parts(seed=1), decoder=parts["decoder"]).resolve_sampling({"decoder_weight": 0.1})


def test_what_only_ranks_does_not_change_the_hash_of_what_is_drawn(tiny_folder: Any) -> None:
    family = load_family(tiny_folder, pipelines=["dalle1"])
    assert "decoder" in family.parts_of("dalle1") and family.dalle1.decoder is not None
    other = dict(family.info["parts"], decoder={**family.info["parts"]["decoder"], "sha256": "0" * 64})
    changed = Family(family.folder, {**family.info, "parts": other})
    assert changed.hash_of("dalle1") == family.hash_of("dalle1")
    assert changed.hash_of("dalle1", ranked=True) != family.hash_of("dalle1", ranked=True)  # others may be kept
    assert changed.hash_of("dalle2") != family.hash_of("dalle2")
