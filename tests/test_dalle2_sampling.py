"""The denoising loop: against diffusers step by step, an oracle, guidance, limits, seeds, callback, bad input."""

import copy
import itertools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UnCLIPScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from genpipe.dalle2.guidance import dynamic_threshold
from genpipe.dalle2.losses import PREDICTION_TYPES, cumulative_alphas, diffuse, per_row, training_target
from genpipe.dalle2.sampling import (
    DECODER,
    PRIOR,
    SCHEDULERS,
    UPSAMPLER,
    Step,
    denoise,
    make_scheduler,
    noise_of,
    scheduler_for,
    step_generators,
)
from genpipe.dalle2.schedulers import started
from genpipe.errors import InputError

COSINE: dict[str, Any] = {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000}
ALPHAS = cumulative_alphas("squaredcos_cap_v2", 1000)
SHAPE = (2, 4, 4)
SEEDS = [3, 1, 2]
NAN = float("nan")


def cosine(name: Any, prediction_type: str = "v_prediction", learned_variance: bool = False) -> Any:
    return make_scheduler(name, **COSINE, prediction_type=prediction_type, learned_variance=learned_variance)


def toy(x_t: Tensor, t: Tensor) -> Tensor:
    """A stand-in for a network: not linear, different at every time step and place."""
    place = torch.linspace(-1, 1, x_t[0].numel()).reshape(x_t.shape[1:])
    return torch.sin(1.3 * x_t + place) * 0.8 + t / 4000


def toy_with_variance(x_t: Tensor, t: Tensor) -> Tensor:
    return torch.cat([toy(x_t, t), torch.tanh(3 * x_t)], dim=1)


def draw(predict: Callable[[Tensor, Tensor], Tensor], scheduler: Any, n: int, **options: Any) -> Tensor:
    """The loop from the noise of SEEDS, unless told otherwise."""
    options = {"seeds": SEEDS, "stream": DECODER, **options}
    return denoise(predict, scheduler, noise_of(options["seeds"], SHAPE, options["stream"]), n, **options)


@torch.no_grad()
def by_hand(
    predict: Callable[[Tensor, Tensor], Tensor], scheduler: Any, n: int, given: Any = None, **options: Any
) -> list[Tensor]:
    """diffusers' loop as its documentation has it, every x on the way."""
    scheduler.set_timesteps(n)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    x, walk = noise_of(SEEDS, SHAPE, DECODER) * scheduler.init_noise_sigma, []
    for i, t in enumerate(scheduler.timesteps):
        if given is not None:
            options["prev_timestep"] = given(scheduler.timesteps, i)
        walk.append(scheduler.scale_model_input(x, t))
        x = scheduler.step(predict(walk[-1], t), t, x, **options).prev_sample
    return [*walk, x]


def compare(walk: list[Tensor], predict: Any, scheduler: Any, n: int, tolerance: float = 2e-5, **options: Any) -> None:
    seen: list[Tensor] = []
    end = draw(predict, scheduler, n, callback=lambda step: seen.append(step.x_t), **options)
    assert len(seen) == len(walk) - 1
    for ours, theirs in zip([*seen, end], walk, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=tolerance)


TRAILING = {"timestep_spacing": "trailing"}


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("n", [2, 8, 20])
def test_the_loop_equals_diffusers_step_by_step(kind: str, n: int) -> None:
    trained = {**COSINE, "prediction_type": kind}
    compare(by_hand(toy, DDIMScheduler(**trained, **TRAILING, clip_sample=False), n), toy, cosine("ddim", kind), n)
    compare(by_hand(toy, DPMSolverMultistepScheduler(**trained, **TRAILING), n), toy, cosine("dpm-solver++", kind), n)
    compare(by_hand(toy, UniPCMultistepScheduler(**trained, **TRAILING), n), toy, cosine("unipc", kind), n)
    compare(by_hand(toy, EulerDiscreteScheduler(**trained, **TRAILING), n), toy, cosine("euler", kind), n)
    ddpm = DDPMScheduler(**trained, **TRAILING, clip_sample=False)
    generator = step_generators(SEEDS, DECODER)
    compare(by_hand(toy, ddpm, n, generator=generator), toy, cosine("ddpm", kind), n)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_the_loop_equals_diffusers_with_eta(eta: float) -> None:
    ddim = DDIMScheduler(**COSINE, **TRAILING, clip_sample=False, prediction_type="v_prediction")
    walk = by_hand(toy, ddim, 10, eta=eta, generator=step_generators(SEEDS, DECODER))
    compare(walk, toy, cosine("ddim"), 10, eta=eta)


@pytest.mark.parametrize("n", [2, 3, 5, 7, 20, 50])
def test_replacing_all_the_noise_stays_finite(n: int) -> None:
    # Five of diffusers' own steps give NaN: the share of noise that is kept rounds to -6e-8.
    assert bool(draw(toy, cosine("ddim"), n, eta=1.0).isfinite().all())


def test_the_learned_variance_is_that_of_diffusers() -> None:
    trained = {**COSINE, "prediction_type": "epsilon", "variance_type": "learned_range"}
    ddpm = DDPMScheduler(**trained, clip_sample=False, timestep_spacing="leading")
    walk = by_hand(toy_with_variance, ddpm, 10, generator=step_generators(SEEDS, DECODER))
    compare(walk, toy_with_variance, ddpm, 10)
    assert cosine("ddpm", "epsilon", learned_variance=True).config.variance_type == "learned_range"
    fixed = draw(toy, cosine("ddpm", "epsilon"), 10)
    assert not torch.allclose(draw(toy_with_variance, cosine("ddpm", "epsilon", True), 10), fixed, atol=1e-2)
    assert torch.equal(draw(toy_with_variance, cosine("ddpm", "epsilon"), 10), fixed)  # a scheduler that ignores it


@pytest.mark.parametrize("learned", [False, True])
def test_the_unclip_scheduler_by_name_and_as_object(learned: bool) -> None:
    variance, kind = ("learned_range", "epsilon") if learned else ("fixed_small_log", "sample")
    theirs = UnCLIPScheduler(variance_type=variance, clip_sample=True, prediction_type=kind)
    predict = toy_with_variance if learned else toy

    def before(timesteps: Tensor, i: int) -> int | None:
        return int(timesteps[i + 1]) if i + 1 < len(timesteps) else None

    walk = by_hand(predict, copy.deepcopy(theirs), 7, before, generator=step_generators(SEEDS, DECODER))
    compare(walk, predict, theirs, 7, clamp=1.0, tolerance=2e-3)
    compare(walk, predict, cosine("unclip", kind, learned), 7, clamp=1.0, tolerance=2e-3)


def test_the_ends_of_a_linear_schedule_are_the_models() -> None:
    trained = {"beta_schedule": "linear", "num_train_timesteps": 1000, "prediction_type": "epsilon"}
    ends = {"beta_start": 0.00085, "beta_end": 0.012}
    for name in SCHEDULERS:
        betas = make_scheduler(name, **trained, **ends).betas
        assert float(betas[0]) == pytest.approx(0.00085) and float(betas[-1]) == pytest.approx(0.012)
    with pytest.raises(InputError, match="beta_end=0.02, the model was trained with 0.012"):
        make_scheduler(make_scheduler("ddpm", **trained, beta_start=0.00085), **trained, **ends)
    every = draw(toy, make_scheduler("ddpm-leading", **trained, **ends), 1000, clamp=1.0)  # no room for an offset of 1
    assert bool(every.isfinite().all())


def test_a_schedulers_own_settings_are_used_and_its_object_stays_as_it_is() -> None:
    given = DPMSolverMultistepScheduler(**COSINE, prediction_type="sample", solver_order=3, use_karras_sigmas=True)
    before, timesteps = dict(given.config), given.timesteps.clone()
    compare(by_hand(toy, copy.deepcopy(given), 9), toy, cosine(given, "sample"), 9)
    draw(toy, given, 1)
    draw(toy, given, 4)
    assert dict(given.config) == before and torch.equal(given.timesteps, timesteps)
    assert cosine(given, "sample") is not given


@pytest.mark.parametrize("n", [1, 2, 5, 7, 25, 61])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_an_oracle_gets_its_picture(name: str, n: int) -> None:
    # 7 does not divide 1,000; for 61, diffusers' trailing spacing has one step too many. Nothing depends on the
    # variance: the oracle's is the largest of the range.
    x_0 = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for kind in PREDICTION_TYPES:
        for clamp in (None, 1.0):
            predict = oracle(x_0, kind)
            if clamp is not None:
                predict = with_variance(predict)
            steps: list[Step] = []
            end = draw(predict, cosine(name, kind, clamp is not None), n, clamp=clamp, callback=steps.append)
            # At the noisiest step a picture counts 20,000 times less than its noise: float32 holds no more of it.
            tolerance = 6e-3 if (kind, n) == ("epsilon", 1) else 2e-5
            torch.testing.assert_close(end, x_0, rtol=0, atol=tolerance)
            assert torch.equal(steps[-1].x_0, end) and len(steps) == n
            first = 999 if n == 1 or name != "ddpm-leading" else (n - 1) * (1000 // n) + 1
            assert int(steps[0].t) == first and int(steps[-1].t) < 1000 / n


def oracle(x_0: Tensor, kind: str) -> Callable[[Tensor, Tensor], Tensor]:
    """A model that knows x_0, whatever it is given."""

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        alpha_bar = ALPHAS[t].expand(len(x_t))
        a = per_row(alpha_bar, x_t)
        return training_target(x_0, (x_t - a.sqrt() * x_0) / (1 - a).sqrt(), alpha_bar, kind)

    return predict


@pytest.mark.parametrize("n", [1, 2, 5, 61, 200, 999, 1000])
def test_shifted_time_steps_are_dense_where_there_is_little_noise(n: int) -> None:
    times = started(cosine("ddim-shifted"), n, torch.device("cpu")).timesteps.tolist()
    assert len(times) == n and times[0] == 999 and times[-1] >= 0
    assert all(before > after for before, after in itertools.pairwise(times))
    assert n != 5 or times == [999, 285, 129, 61, 23]


@pytest.mark.parametrize("name", ["ddim", "ddim-shifted", "dpm-solver++", "unipc", "euler"])
def test_an_oracles_noise_only_fades(name: str) -> None:
    # At each time step, x holds x_0 and the noise it began with in the shares of that very time step.
    x_0 = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    steps: list[Step] = []
    draw(oracle(x_0, "v_prediction"), cosine(name), 7, callback=steps.append)
    for step in steps:
        expected = diffuse(x_0, steps[0].x_t, ALPHAS[step.t].expand(3))
        torch.testing.assert_close(step.x_t, expected, rtol=0, atol=1e-3)


def with_variance(predict: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x_t, t: torch.cat([predict(x_t, t), torch.ones_like(x_t)], dim=1)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_embeddings_are_denoised_as_well(name: str) -> None:
    x_0 = torch.randn(2, 16, generator=torch.Generator().manual_seed(0)) * 3
    end = denoise(lambda x_t, t: x_0, cosine(name, "sample"), noise_of([0, 1], (16,), PRIOR), 5, seeds=[0, 1], stream=1)
    torch.testing.assert_close(end, x_0)


@pytest.mark.parametrize("scheduler", [HeunDiscreteScheduler, EulerAncestralDiscreteScheduler])
def test_other_schedulers_of_diffusers_work(scheduler: Any) -> None:
    x_0 = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    given = scheduler(**COSINE, prediction_type="epsilon", timestep_spacing="trailing")
    torch.testing.assert_close(draw(oracle(x_0, "epsilon"), given, 5), x_0, rtol=0, atol=1e-4)


def counted(predict: Callable[[Tensor, Tensor], Tensor], calls: list[int]) -> Callable[[Tensor, Tensor], Tensor]:
    def counting(x_t: Tensor, t: Tensor) -> Tensor:
        calls.append(int(t))
        return predict(x_t, t)

    return counting


def null(x_t: Tensor, t: Tensor) -> Tensor:
    return torch.cos(x_t) - t / 3000


def test_guidance_one_is_the_condition_alone_and_zero_is_the_null_alone() -> None:
    calls: tuple[list[int], list[int]] = ([], [])
    end = draw(counted(toy, calls[0]), cosine("ddim"), 4, null_predict=counted(null, calls[1]), guidance_scale=1.0)
    assert torch.equal(end, draw(toy, cosine("ddim"), 4)) and [len(c) for c in calls] == [4, 0]
    end = draw(counted(toy, calls[0]), cosine("ddim"), 4, null_predict=counted(null, calls[1]), guidance_scale=0.0)
    assert torch.equal(end, draw(null, cosine("ddim"), 4)) and [len(c) for c in calls] == [4, 4]


def test_guidance_three_by_its_formula() -> None:
    end = draw(toy, cosine("dpm-solver++"), 4, null_predict=null, guidance_scale=3.0)
    assert torch.allclose(end, draw(lambda x, t: 3 * toy(x, t) - 2 * null(x, t), cosine("dpm-solver++"), 4), atol=1e-5)
    assert not torch.allclose(end, draw(toy, cosine("dpm-solver++"), 4), atol=1e-2)


def test_guidance_leaves_the_variance_of_the_condition() -> None:
    def other_variance(x_t: Tensor, t: Tensor) -> Tensor:
        return torch.cat([null(x_t, t), torch.full_like(x_t, -0.7)], dim=1)

    def expected(x_t: Tensor, t: Tensor) -> Tensor:
        return torch.cat([2 * toy(x_t, t) - null(x_t, t), torch.tanh(3 * x_t)], dim=1)

    scheduler = cosine("ddpm", "sample", True)
    end = draw(toy_with_variance, scheduler, 5, null_predict=other_variance, guidance_scale=2.0)
    torch.testing.assert_close(end, draw(expected, scheduler, 5))


def test_the_guidance_interval_counts_steps_from_the_noisy_end() -> None:
    calls: tuple[list[int], list[int]] = ([], [])
    options = {"null_predict": counted(null, calls[1]), "guidance_scale": 4.0}
    end = draw(counted(toy, calls[0]), cosine("ddim"), 10, guidance_interval=(0.2, 0.6), **options)
    assert len(calls[0]) == 10 and calls[1] == calls[0][2:6] == [799, 699, 599, 499]

    def expected(x_t: Tensor, t: Tensor) -> Tensor:
        return 4 * toy(x_t, t) - 3 * null(x_t, t) if 499 <= t <= 799 else toy(x_t, t)

    torch.testing.assert_close(end, draw(expected, cosine("ddim"), 10), rtol=0, atol=1e-5)
    calls[1].clear()
    draw(toy, cosine("ddim"), 10, guidance_interval=(0.5, 0.5), **options)
    assert calls[1] == []


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_clamped_and_thresholded_like_diffusers_ddpm(kind: str) -> None:
    trained = {**COSINE, **TRAILING, "prediction_type": kind}
    clipped = DDPMScheduler(**trained, clip_sample=True, clip_sample_range=0.4)
    walk = by_hand(toy, clipped, 5, generator=step_generators(SEEDS, DECODER))
    # Back to a prediction of the noise, float32 holds some of x_0 at the noisiest step only.
    tolerance = 2e-3 if kind == "epsilon" else 2e-5
    compare(walk, toy, cosine("ddpm", kind), 5, tolerance, clamp=0.4)
    thresholded = DDPMScheduler(**trained, clip_sample=False, thresholding=True, sample_max_value=1e6)
    walk = by_hand(lambda x, t: 3 * toy(x, t), thresholded, 5, generator=step_generators(SEEDS, DECODER))
    compare(walk, lambda x, t: 3 * toy(x, t), cosine("ddpm", kind), 5, tolerance, dynamic_threshold=0.995)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_x_0_stays_within_its_limits_at_every_step(name: str) -> None:
    x_0 = 4 * torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0)) - 2
    limited = dynamic_threshold(x_0, 0.8)
    for kind in PREDICTION_TYPES:
        steps: list[Step] = []
        end = draw(oracle(x_0, kind), cosine(name, kind), 3, clamp=0.5, callback=steps.append)
        assert max(float(step.x_0.abs().max()) for step in steps) == 0.5
        torch.testing.assert_close(end, x_0.clamp(-0.5, 0.5), rtol=0, atol=1e-4)
        end = draw(oracle(x_0, kind), cosine(name, kind), 3, dynamic_threshold=0.8)
        torch.testing.assert_close(end, limited, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_noise_predictions_stay_finite_at_the_noisiest_step(name: str) -> None:
    # alpha_bar is 2e-9 there: a prediction that is off by 1 means an x_0 that is off by 20,000.
    for options in ({}, {"clamp": 1.0}, {"dynamic_threshold": 0.9}):
        for n in (1, 2, 5, 25):
            steps: list[Step] = []
            end = draw(lambda x, t: -x, cosine(name, "epsilon"), n, callback=steps.append, **options)
            assert bool(end.isfinite().all()) and bool(steps[0].x_0.isfinite().all())
            assert not options or float(end.abs().max()) <= 1


def test_noise_depends_on_the_rows_own_seed_and_on_the_stream() -> None:
    noise = noise_of([7, 2**70, 7, 0], (3, 5), DECODER)
    assert noise.shape == (4, 3, 5) and noise.dtype == torch.float32
    assert torch.equal(noise[0], noise[2]) and not torch.equal(noise[0], noise[1])
    for seed, row in zip([7, 2**70, 7, 0], noise, strict=True):
        assert torch.equal(row, noise_of([seed], (3, 5), DECODER)[0])
    streams = [noise_of([7], (3, 5), stream) for stream in (PRIOR, DECODER, UPSAMPLER, UPSAMPLER + 1)]
    assert len({tuple(s.flatten().tolist()) for s in streams}) == 4
    assert noise_of([], (3, 5), PRIOR).shape == (0, 3, 5)
    many = noise_of(range(200), (100,), PRIOR)
    assert abs(float(many.mean())) < 0.03 and float(many.std()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(("name", "eta"), [(name, 0.0) for name in SCHEDULERS] + [("ddim", 1.0)])
def test_a_row_is_the_same_alone_and_a_seed_makes_the_picture(name: str, eta: float) -> None:
    def together(seeds: list[int]) -> Tensor:
        return draw(toy, cosine(name, "sample"), 4, seeds=seeds, eta=eta)

    rows = together([3, 1, 2])
    assert torch.equal(rows, together([3, 1, 2]))
    torch.testing.assert_close(rows[1:2], together([1]))
    torch.testing.assert_close(rows[1:2], together([5, 5, 1, 0])[2:3])
    assert not torch.allclose(rows[1], together([4])[0], atol=1e-2)


def test_added_noise_is_another_one_for_another_part() -> None:
    noise = noise_of(SEEDS, SHAPE, DECODER)
    ends = [denoise(toy, cosine("ddpm"), noise, 4, seeds=SEEDS, stream=stream) for stream in (DECODER, UPSAMPLER)]
    assert not torch.allclose(ends[0], ends[1], atol=1e-2)


def test_the_callback_sees_every_step_in_order_and_can_end_the_loop() -> None:
    steps: list[Step] = []
    end = draw(lambda x, t: -toy(x, t), cosine("euler"), 4, callback=steps.append)
    assert [step.index for step in steps] == [0, 1, 2, 3] and {step.num_steps for step in steps} == {4}
    assert [int(step.t) for step in steps] == [999, 749, 499, 249]
    assert {(step.t.ndim, step.t.dtype) for step in steps} == {(0, torch.int64)}
    for step in steps:  # the one that x_t and v stand for
        a = ALPHAS[step.t]
        torch.testing.assert_close(step.x_0, a.sqrt() * step.x_t + (1 - a).sqrt() * toy(step.x_t, step.t))
    assert torch.equal(steps[-1].x_0, end)

    def stop(step: Step) -> None:
        if step.index == 1:
            raise KeyboardInterrupt

    calls: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        draw(counted(toy, calls), cosine("euler"), 4, callback=stop)
    assert calls == [999, 749]


def test_inputs_are_unchanged_and_no_gradient_is_kept() -> None:
    noise, weight = noise_of(SEEDS, SHAPE, DECODER), torch.ones((), requires_grad=True)
    before = noise.clone()
    for name in SCHEDULERS:
        scheduler = cosine(name)
        config, timesteps = dict(scheduler.config), scheduler.timesteps.clone()
        end = denoise(lambda x, t: weight * toy(x, t), scheduler, noise, 3, seeds=SEEDS, stream=DECODER, clamp=1.0)
        assert torch.equal(noise, before) and not end.requires_grad
        assert dict(scheduler.config) == config and torch.equal(scheduler.timesteps, timesteps)


def test_a_model_in_half_precision_is_denoised_in_float32() -> None:
    end = draw(lambda x, t: toy(x, t).half(), cosine("ddim"), 4)
    assert end.dtype == torch.float32
    torch.testing.assert_close(end, draw(toy, cosine("ddim"), 4), rtol=0, atol=1e-2)
    half = denoise(toy, cosine("ddim"), noise_of(SEEDS, SHAPE, DECODER).half(), 4, stream=DECODER)
    assert half.dtype == torch.float32


def test_what_is_not_finite_is_named_with_stage_and_step() -> None:
    def broken(x_t: Tensor, t: Tensor) -> Tensor:
        return toy(x_t, t).masked_fill(torch.ones_like(x_t).cumsum(1) > 1, NAN) if t < 600 else toy(x_t, t)

    with pytest.raises(FloatingPointError, match=r"the prior's output is not finite at step 3 of 5; "):
        draw(broken, cosine("ddim"), 5, stage="prior")
    with pytest.raises(FloatingPointError, match=r"the decoder's output is not finite at step 1 of 2; "):
        draw(toy, cosine("ddim"), 2, null_predict=lambda x, t: x / 0, guidance_scale=2.0)


def test_a_part_says_how_it_was_trained() -> None:
    config = {**COSINE, "prediction_type": "epsilon", "learned_variance": True}
    part = types.SimpleNamespace(config=type("Config", (dict,), {"__getattr__": dict.__getitem__})(config))
    scheduler = scheduler_for("ddpm", part)
    assert scheduler.config.variance_type == "learned_range" and scheduler.config.prediction_type == "epsilon"
    assert torch.equal(scheduler.alphas_cumprod, ALPHAS)
    del part.config["learned_variance"]
    part.config.update(beta_schedule="linear", num_train_timesteps=50)
    scheduler = scheduler_for("dpm-solver++", part)
    assert torch.equal(scheduler.alphas_cumprod, cumulative_alphas("linear", 50))
    assert scheduler_for("ddpm", part).config.variance_type == "fixed_small"


def test_bad_schedulers_are_refused() -> None:
    with pytest.raises(InputError, match=r"no scheduler 'dpm'; choose one of ddpm, ddim, ddim-shifted, dpm-solver"):
        cosine("dpm")
    with pytest.raises(InputError, match="'ddim' does not know the noise schedule 'laplace'"):
        make_scheduler("ddim", beta_schedule="laplace", num_train_timesteps=10, prediction_type="sample")
    with pytest.raises(InputError, match="or an object of diffusers, not 3"):
        cosine(3)
    with pytest.raises(InputError, match="prediction_type='epsilon', the model was trained with 'v_prediction'"):
        cosine(DDIMScheduler(**COSINE))
    with pytest.raises(InputError, match="beta_schedule='linear'"):
        cosine(DDIMScheduler(prediction_type="v_prediction"))
    with pytest.raises(InputError, match="num_train_timesteps=500"):
        cosine(DDIMScheduler(500, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"))
    own_betas = DDIMScheduler(trained_betas=[0.1] * 1000, prediction_type="v_prediction")
    assert torch.equal(cosine(own_betas).betas, own_betas.betas)
    with pytest.raises(InputError, match="FlowMatchEulerDiscreteScheduler, as configured"):
        draw(toy, FlowMatchEulerDiscreteScheduler(), 4)
    with pytest.raises(InputError, match="a scheduler object, not 'ddim'"):
        draw(toy, "ddim", 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "steps must be a whole number from 1 to 1000, not 0"),
        ({"n": 1001}, "steps must be a whole number from 1 to 1000, not 1001"),
        ({"n": 2.5}, "steps must be a whole number from 1 to 1000, not 2.5"),
        ({"guidance_scale": 2.0}, "guidance scale is a number, and 2.0 needs a null prediction"),
        ({"guidance_scale": NAN, "null_predict": toy}, "guidance scale is a number, and nan"),
        ({"guidance_interval": (0.5, 0.2)}, "guidance interval must be two shares"),
        ({"guidance_interval": (-0.1, 1)}, "guidance interval must be two shares"),
        ({"dynamic_threshold": 0.0}, "percentile of dynamic thresholding"),
        ({"dynamic_threshold": 99.5}, "percentile of dynamic thresholding"),
        ({"clamp": 0.0}, "clamp of x_0 must be above 0"),
        ({"eta": 1.5}, "eta is 1.5: DDIM takes a number from 0 to 1"),
        ({"eta": NAN}, "eta is nan: DDIM takes a number from 0 to 1"),
        ({"scheduler": "euler", "eta": 0.5}, "eta is 0.5: DDIM takes"),
        ({"eta": 0.5, "seeds": [-1]}, "a seed is a whole number from 0 on, not -1"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    options = dict(options)
    scheduler, n = cosine(options.pop("scheduler", "ddim")), options.pop("n", 4)
    with pytest.raises(InputError, match=message):
        draw(toy, scheduler, n, **options)


def test_what_does_not_fit_is_refused() -> None:
    noise = noise_of(SEEDS, SHAPE, DECODER)
    for seeds in (None, [1, 2]):
        with pytest.raises(InputError, match="DDPMScheduler adds noise at every step and needs a seed for each row"):
            denoise(toy, cosine("ddpm"), noise, 4, seeds=seeds, stream=DECODER)
    with pytest.raises(InputError, match="whole number from 0 on, not 0.5"):
        noise_of([0.5], SHAPE, DECODER)
    with pytest.raises(InputError, match=r"the decoder answers \[3, 1, 4, 4\] for \[3, 2, 4, 4\]"):
        draw(lambda x, t: x[:, :1], cosine("ddim"), 4)
    with pytest.raises(InputError, match="needs a learned variance"):
        draw(toy, cosine("ddpm", learned_variance=True), 4)
