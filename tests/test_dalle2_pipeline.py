"""DALL-E 2 put together: what reaches the picture, seeds, modes, negative prompts, upsampling, stopping, bad input."""

import copy
import dataclasses
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import all_tiny_parts, tiny_decoder
from PIL import Image

from genpipe.clip.rerank import score
from genpipe.dalle2.upsampler import upsample
from genpipe.errors import InputError
from genpipe.images import to_pil, to_unit
from pipelines.dalle2 import DALLE2Pipeline
from pipelines.family import Family
from pipelines.request import Progress
from pipelines.settings import DALLE2Sampling

PROMPTS = ["a cat on a red background", "two dogs"]


def arrays(images: list) -> list[np.ndarray]:
    return [np.asarray(image) for image in images]


@pytest.fixture(scope="module")
def pipeline(tiny_family: Family) -> DALLE2Pipeline:
    """The family's, without upsampling unless a test asks for it."""
    return DALLE2Pipeline(
        **tiny_family.dalle2.components, defaults={**tiny_family.defaults["dalle2"], "upsample": False}, family="tiny"
    )


@pytest.fixture(scope="module")
def given() -> Image.Image:
    """A picture to draw from."""
    return Image.effect_noise((40, 30), 90).convert("RGB")


def by_seed(output: Any, prompt: int = 0) -> dict[int, np.ndarray]:
    return dict(zip(output.seeds[prompt], arrays(output.images[prompt]), strict=True))


def test_pictures_come_best_first_with_their_scores_and_seeds(pipeline: DALLE2Pipeline) -> None:
    output = pipeline(PROMPTS[0], num_candidates=6, keep=6, seed=5)
    assert output.prompts == PROMPTS[:1] and output.complete
    assert sorted(output.seeds[0]) == [5, 6, 7, 8, 9, 10]
    assert output.scores[0] == sorted(output.scores[0], reverse=True)
    assert {image.size for image in output.images[0]} == {(16, 16)}
    again = score(pipeline.clip, to_unit(output.images[0]), PROMPTS[0])
    assert np.allclose(output.scores[0], again, atol=2e-2)  # the files hold 8 bits
    best_two = pipeline(PROMPTS[0], num_candidates=6, keep=2, seed=5)
    assert best_two.seeds[0] == output.seeds[0][:2] and best_two.scores[0] == output.scores[0][:2]


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_a_candidate_is_the_same_picture_whatever_ran_beside_it(
    pipeline: DALLE2Pipeline, chunk_size: int | None
) -> None:
    together = pipeline(PROMPTS, num_candidates=9, keep=9, seed=0, chunk_size=chunk_size)
    for number, prompt in enumerate(PROMPTS):
        expected = by_seed(together, number)
        three = by_seed(pipeline(prompt, num_candidates=3, keep=3, seed=2, chunk_size=chunk_size))
        assert three.keys() == {2, 3, 4}
        alone = by_seed(pipeline(prompt, num_candidates=1, keep=1, seed=8, chunk_size=chunk_size))
        for seed, picture in {**three, **alone}.items():
            assert np.array_equal(picture, expected[seed])


def test_smaller_chunks_draw_the_same_but_for_rounding(pipeline: DALLE2Pipeline) -> None:
    expected = by_seed(pipeline(PROMPTS[0], num_candidates=4, keep=4))
    for chunk_size in (1, 3):
        got = by_seed(pipeline(PROMPTS[0], num_candidates=4, keep=4, chunk_size=chunk_size))
        assert got.keys() == expected.keys()
        for seed, picture in got.items():
            assert np.abs(picture.astype(int) - expected[seed]).max() <= 1


def test_everything_that_is_asked_for_reaches_the_picture(pipeline: DALLE2Pipeline, given: Image.Image) -> None:
    def first(prompt: str | None = PROMPTS[0], rare: dict[str, Any] | None = None, **settings: Any) -> bytes:
        sampling = None if rare is None else pipeline.resolve_sampling(rare)
        output = pipeline(prompt, num_candidates=1, keep=1, sampling=sampling, **settings)
        return output.images[0][0].tobytes()

    assert first() == first() == first(mode="prior", guidance_scale=1.5)
    different = {
        "as it is": first(),
        "another prompt": first(PROMPTS[1]),
        "another seed": first(seed=1),
        "no guidance": first(guidance_scale=1.0),
        "null alone": first(guidance_scale=0.0),
        "more steps": first(num_inference_steps=3),
        "negative prompt": first(negative_prompt="white dogs"),
        "caption alone": first(mode="caption"),
        "text embedding": first(mode="text"),
        "given picture": first(image=given),
        "given picture, no text": first(None, image=given),
        "another given picture": first(None, image=given.rotate(90)),
        "prior's guidance": first(rare={"prior_guidance_scale": 4.0}),
        "prior's steps": first(rare={"prior_steps": 5}),
        "scheduler": first(rare={"scheduler": "ddpm"}),
        "scheduler's noise": first(rare={"scheduler": "ddim", "eta": 0.5}),
        "threshold": first(rare={"dynamic_threshold": 0.6}),
        "interval": first(rare={"guidance_interval": (0.5, 1.0)}),
    }
    same = [(a, b) for a in different for b in different if a < b and different[a] == different[b]]
    assert same == []


def test_the_prior_decides_only_where_it_is_asked(pipeline: DALLE2Pipeline) -> None:
    """With another prior the mode "prior" draws something else, the others the same."""
    other = DALLE2Pipeline(**{**pipeline.components, "prior": None}, defaults=pipeline.config.defaults)
    assert other.resolve_sampling().mode == "text"
    for mode in ("text", "caption"):
        ours, theirs = (each(PROMPTS[0], 2, 2, mode=mode).images[0] for each in (pipeline, other))
        assert [image.tobytes() for image in ours] == [image.tobytes() for image in theirs]
    with pytest.raises(InputError, match="no prior"):
        other(PROMPTS[0], mode="prior")


def test_variations_are_ranked_by_the_given_picture(pipeline: DALLE2Pipeline, given: Image.Image) -> None:
    output = pipeline(image=given, num_candidates=3, keep=3)
    assert output.prompts == [""]
    expected = score(pipeline.clip, to_unit(output.images[0]), pipeline.clip.embed_image(to_unit([given]))[0])
    assert np.allclose(output.scores[0], expected, atol=2e-2)
    for bad, complaint in [({"mode": "prior"}, "takes the place"), ({"mode": "caption"}, "takes the place")]:
        with pytest.raises(InputError, match=complaint):
            pipeline(PROMPTS[0], image=given, **bad)
    with pytest.raises(InputError, match="needs a picture"):
        pipeline(PROMPTS[0], mode="image")
    with pytest.raises(InputError, match="needs a picture"):
        pipeline(PROMPTS[0], image=to_unit([given]))


def test_defaults_hold_until_a_call_says_otherwise(pipeline: DALLE2Pipeline) -> None:
    sampling = pipeline.resolve_sampling()
    assert (sampling.guidance_scale, sampling.num_inference_steps, sampling.mode) == (1.5, 2, "prior")
    assert sampling.scheduler == DALLE2Sampling().scheduler and sampling.upsampler_steps is None
    assert pipeline.resolve_sampling({"guidance_scale": 0.0}).guidance_scale == 0.0
    whole = DALLE2Sampling(num_inference_steps=3)
    assert pipeline.resolve_sampling({"mode": "text"}, whole) == dataclasses.replace(whole, mode="text", upsample=True,
        upsampler_steps=2)  # fmt: skip


def test_kept_pictures_are_upsampled_after_they_were_ranked(pipeline: DALLE2Pipeline) -> None:
    seen: list[Progress] = []
    sampling = pipeline.resolve_sampling({"upsample": True})
    small = pipeline(PROMPTS[0], num_candidates=5, keep=2)
    large = pipeline(PROMPTS[0], num_candidates=5, keep=2, sampling=sampling, callback=seen.append)
    assert (large.seeds, large.scores) == (small.seeds, small.scores)
    for little, big, seed in zip(small.images[0], large.images[0], small.seeds[0], strict=True):
        (expected,) = to_pil(upsample(pipeline.upsampler, to_unit([little]), [seed], 2))
        assert big.size == (32, 32) and big.tobytes() == expected.tobytes()
    stages = [each.stage for each in seen]
    assert stages == ["prior", "prior", "decoder", "decoder"] * 2 + ["upsampler"] * 4
    fractions = [each.fraction for each in seen]
    assert fractions == sorted(fractions) and 0 < fractions[0] and fractions[-1] == 1.0
    assert seen[-1].preview()[0].tobytes() != seen[-2].preview()[0].tobytes()


def test_pictures_smaller_than_clip_sees_are_upsampled_before_they_are_ranked(pipeline: DALLE2Pipeline) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = {**pipeline.components, "decoder": tiny_decoder(pipeline.clip, resolution=8)}
    coarse = DALLE2Pipeline(**parts, defaults={"num_inference_steps": 1, "mode": "text"})
    seen: list[Progress] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = coarse(PROMPTS[0], num_candidates=3, keep=2, callback=seen.append)
    again = score(pipeline.clip, to_unit(output.images[0]), PROMPTS[0])
    assert output.images[0][0].size == (16, 16) and np.allclose(output.scores[0], again, atol=2e-2)
    assert [each.stage for each in seen] == ["decoder", *["upsampler"] * 6]
    fractions = [each.fraction for each in seen]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0


def test_the_callback_sees_progress_and_previews_and_can_stop(pipeline: DALLE2Pipeline) -> None:
    seen: list[Progress] = []
    done = pipeline(PROMPTS[0], num_candidates=3, keep=3, callback=seen.append)
    assert [(each.step, each.num_steps, each.running) for each in seen] == [(1, 2, 3), (2, 2, 3)] * 2
    nothing_yet, last = arrays(seen[0].preview()), seen[-1].preview()
    assert len(nothing_yet) == 3 and (nothing_yet[0] == 128).all()
    assert {image.tobytes() for image in last} == {image.tobytes() for image in done.images[0]}

    stopped = pipeline(PROMPTS, num_candidates=4, keep=4, callback=lambda progress: progress.finished >= 4)
    assert not stopped.complete and [len(images) for images in stopped.images] == [4, 0]
    sampling = pipeline.resolve_sampling({"upsample": True})
    early = pipeline(PROMPTS, 4, 2, sampling=sampling, callback=lambda progress: progress.finished >= 4)
    assert not early.complete and [len(images) for images in early.images] == [2, 0]
    assert early.images[0][0].size == (32, 32)
    late = pipeline(PROMPTS[0], 4, 3, sampling=sampling, callback=lambda progress: progress.fraction > 0.94)
    assert not late.complete and len(late.images[0]) == len(late.scores[0]) == len(late.seeds[0]) == 1


def test_a_block_is_halved_when_memory_runs_out(pipeline: DALLE2Pipeline) -> None:
    class Small(DALLE2Pipeline):
        """A machine with room for two candidates."""

        sizes: list[int] = []

        def decode(self, encoded, embedding, block, *arguments):  # type: ignore[no-untyped-def]
            self.sizes.append(max(len(block), block.together))
            if self.sizes[-1] > 2:
                raise torch.OutOfMemoryError("no room")
            return super().decode(encoded, embedding, block, *arguments)

    small = Small(**pipeline.components, defaults=pipeline.config.defaults)
    got, expected = (by_seed(each(PROMPTS[0], num_candidates=5, keep=5)) for each in (small, pipeline))
    assert Small.sizes == [4, 2, 2, 4, 1]
    assert got.keys() == expected.keys()
    assert all(np.abs(got[seed].astype(int) - expected[seed]).max() <= 1 for seed in got)


def test_nothing_given_is_changed(pipeline: DALLE2Pipeline, given: Image.Image) -> None:
    prompts, picture = list(PROMPTS), given.tobytes()
    parts = {name: part for name, part in pipeline.components.items() if part is not None}
    before = copy.deepcopy({name: part.state_dict() for name, part in parts.items()})
    random = torch.get_rng_state()
    pipeline(prompts, num_candidates=1, keep=1, image=given, negative_prompt="dogs")
    assert prompts == PROMPTS and given.tobytes() == picture
    assert torch.equal(torch.get_rng_state(), random)
    for name, part in parts.items():
        assert all(torch.equal(value, before[name][key]) for key, value in part.state_dict().items())


def test_saved_and_loaded_by_diffusers_it_draws_the_same(tiny_family: Family, tmp_path: Path) -> None:
    tiny_family.dalle2.save_pretrained(tmp_path / "all")
    loaded = DALLE2Pipeline.from_pretrained(tmp_path / "all")
    assert dict(loaded.config.defaults) == tiny_family.defaults["dalle2"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        first, second = (each(PROMPTS[0], num_candidates=2, keep=2) for each in (tiny_family.dalle2, loaded))
    assert first.seeds == second.seeds and np.array_equal(arrays(first.images[0]), arrays(second.images[0]))

    DALLE2Pipeline(tiny_family.clip, tiny_family.dalle2.decoder).save_pretrained(tmp_path / "few")
    few = DALLE2Pipeline.from_pretrained(tmp_path / "few")
    assert few.prior is None and few.upsampler is None


def test_fresh_weights_are_warned_about_and_strange_words_named(tiny_family: Family) -> None:
    parts = {part: all_tiny_parts()[part] for part in ("clip", "decoder", "prior")}
    with pytest.warns(UserWarning, match="clip, decoder, prior were not loaded"):
        DALLE2Pipeline(**parts, defaults={"num_inference_steps": 1, "prior_steps": 1})(PROMPTS[0], 1, 1)
    with pytest.warns(UserWarning, match="'zeppelin', 'x-ray'"):
        tiny_family.dalle2("a Zeppelin", num_candidates=1, keep=1, negative_prompt="X-ray")


def test_a_long_prompt_is_cut_and_says_so_once(pipeline: DALLE2Pipeline) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipeline("a cat on a red background " * 400, num_candidates=1, keep=1)
    (warning,) = [each for each in caught if each.category is UserWarning]  # not the libraries' own
    assert "10,399 characters" in str(warning.message)


def test_parts_that_do_not_fit_are_refused() -> None:
    parts, others = all_tiny_parts(), all_tiny_parts(seed=1)
    for strange in ("decoder", "prior"):
        fitting = {part: parts[part] for part in ("clip", "decoder", "prior")}
        with pytest.raises(InputError, match=f"The {strange} was trained beside another CLIP"):
            DALLE2Pipeline(**{**fitting, strange: others[strange]})
    wide = tiny_decoder(parts["clip"])
    wide.register_to_config(text_width=99)
    with pytest.raises(InputError, match="text states of width 99, this CLIP gives .* 48"):
        DALLE2Pipeline(parts["clip"], wide)
    parts["prior"].register_to_config(text_length=20)
    with pytest.raises(InputError, match="reads 20 text positions, this CLIP gives 32"):
        DALLE2Pipeline(parts["clip"], parts["decoder"], parts["prior"])
    parts["decoder"].register_to_config(clip_identity=None)  # unknown: nothing to compare
    assert DALLE2Pipeline(others["clip"], parts["decoder"]).prior is None


@pytest.mark.parametrize("broken", ["clip", "prior", "decoder", "upsampler"])
def test_weights_that_are_not_numbers_are_an_error_that_names_stage_and_step(broken: str) -> None:
    parts = all_tiny_parts()
    with torch.no_grad():
        for parameter in parts[broken].parameters():
            parameter.fill_(float("nan"))
    for part in ("decoder", "prior"):
        parts[part].register_to_config(clip_identity=None)
    pipeline = DALLE2Pipeline(
        **{part: parts[part] for part in ("clip", "prior", "decoder", "upsampler")},
        defaults={"num_inference_steps": 2, "prior_steps": 2},
    )
    stage = "prior" if broken == "clip" else broken
    with warnings.catch_warnings(), pytest.raises(FloatingPointError, match=f"{stage}.* not finite at step 1 of 2"):
        warnings.simplefilter("ignore")
        pipeline(PROMPTS[0], num_candidates=1, keep=1)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_candidates": 0},
        {"num_candidates": 3, "keep": 4},
        {"seed": -1},
        {"guidance_scale": -1.0},
        {"guidance_scale": float("nan")},
        {"num_inference_steps": 0},
        {"num_inference_steps": 1001},
        {"num_inference_steps": 2.5},
        {"mode": "magic"},
        {"negative_prompt": 7},
        {"chunk_size": 0},
    ],
)
def test_numbers_out_of_range_are_refused(pipeline: DALLE2Pipeline, settings: dict) -> None:
    with pytest.raises(InputError):
        pipeline(PROMPTS[0], **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"scheduler": "magic"},
        {"prior_scheduler": "magic"},
        {"eta": 0.5},
        {"eta": 2.0, "scheduler": "ddim"},
        {"guidance_interval": (0.5, 0.2)},
        {"guidance_interval": 3},
        {"dynamic_threshold": 0},
        {"prior_draws": 0},
        {"prior_steps": -1},
        {"prior_guidance_scale": "much"},
        {"upsample": "yes"},
        {"upsampler_steps": 0},
        {"temperature": 1.0},
    ],
)
def test_rare_settings_out_of_range_are_refused(pipeline: DALLE2Pipeline, settings: dict) -> None:
    with pytest.raises(InputError):
        pipeline.resolve_sampling(settings)


@pytest.mark.parametrize("prompts", ["", None, [], "\x00", ["a cat", " "], [3]])
def test_prompts_that_say_nothing_are_refused(pipeline: DALLE2Pipeline, prompts: Any) -> None:
    with warnings.catch_warnings(), pytest.raises(InputError):
        warnings.simplefilter("ignore")
        pipeline(prompts)
