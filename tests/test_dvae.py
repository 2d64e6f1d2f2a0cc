"""The discrete VAE: shapes, the published architecture, both heads, the code book's start, determinism, learning."""

import math
import multiprocessing as mp
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genpipe.dalle1.dvae import DVAE, BottleneckBlock, code_statistics, gumbel_noise
from genpipe.dalle1.losses import relaxed_elbo_loss, unsqueeze_pixels
from genpipe.errors import InputError
from genpipe.parts import load_part, save_part

SHAPES = [
    {"resolution": 16, "widths": (16,), "space_to_depth": 4},
    {"resolution": 16, "widths": (16, 24), "space_to_depth": 2},
    {"resolution": 16, "widths": (16, 16, 16), "space_to_depth": 1, "code_width": 16},  # equal widths everywhere
    {"resolution": 16, "widths": (16, 24), "space_to_depth": 1, "head": "linear", "branch_gain": None, "bottleneck": 4},
    {"resolution": 16, "widths": (16,), "space_to_depth": 4, "num_codes": 8, "code_width": 8, "head": "linear"},
]


def tiny(seed: int = 0, **config: object) -> DVAE:
    """16 px, 4 x 4 tokens of 24 codes unless `config` says otherwise, in eval mode."""
    settings = {
        "resolution": 16, "num_codes": 24, "widths": (16,), "blocks_per_group": 1, "code_width": 8, "space_to_depth": 4
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DVAE(**{**settings, **config}).eval()


def pictures(count: int = 3, size: int = 16, seed: int = 1) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("config", SHAPES)
def test_shapes_and_ranges(config: dict) -> None:
    model = tiny(**config)
    grid, codes = model.grid_size, model.num_codes
    assert grid == 16 // model.factor
    tokens = model.encode(pictures())
    assert tokens.shape == (3, grid * grid) and tokens.dtype == torch.long
    assert 0 <= int(tokens.min()) and int(tokens.max()) < codes
    decoded = model.decode(tokens)
    assert decoded.shape == (3, 3, 16, 16) and 0 <= decoded.min().item() and decoded.max().item() <= 1
    output = model(pictures(), 0.5, gumbel_noise((3, codes, grid, grid), torch.Generator().manual_seed(0), tokens))
    assert output.logits.shape == (3, codes, grid, grid)
    assert output.mu.shape == output.ln_b.shape == (3, 3, 16, 16)
    twice = model.encode(pictures(size=32))  # any multiple of the factor
    assert twice.shape == (3, 4 * grid * grid) and model.decode(twice).shape == (3, 3, 32, 32)


def convolution(out: int, into: int, kernel: int) -> list[tuple[int, ...]]:
    return [(out, into, kernel, kernel), (out,)]


def released_group(into: int, out: int, kernels: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Weights and biases of two bottleneck blocks, with a 1 x 1 convolution beside the first where widths differ."""
    hidden, shapes = out // 4, convolution(out, into, 1) if into != out else []
    for first in (into, out):
        widths = (first, hidden, hidden, hidden, out)
        for i, kernel in enumerate(kernels):
            shapes += convolution(widths[i + 1], widths[i], kernel)
    return shapes


def test_the_published_shape() -> None:
    """Tensor by tensor the released encoder (74) and decoder (76), and one scale that the linear head ignores."""
    with torch.device("meta"):
        model = DVAE(256, 8192, (256, 512, 1024, 2048), 2, 128, 1, 7, "linear", 4, None)
    encoder, decoder = convolution(256, 3, 7), convolution(128, 8192, 1)
    for into, out in ((256, 256), (256, 512), (512, 1024), (1024, 2048)):
        encoder += released_group(into, out, (3, 3, 3, 1))
    for into, out in ((128, 2048), (2048, 1024), (1024, 512), (512, 256)):
        decoder += released_group(into, out, (1, 3, 3, 3))
    encoder += convolution(8192, 2048, 1)
    decoder += convolution(6, 256, 1)

    tensors = model.state_dict()
    scale = tensors.pop("log_scale")
    assert scale.shape == () and not model.log_scale.requires_grad
    reads = {name: tuple(t.shape) for name, t in tensors.items() if name.startswith(("encoder", "to_codes"))}
    draws = {name: tuple(t.shape) for name, t in tensors.items() if name not in reads}
    assert draws.pop("codebook") == (8192, 128)  # the 1 x 1 convolution (128, 8192, 1, 1), as rows
    draws["input"] = (128, 8192, 1, 1)
    assert sorted(reads.values()) == sorted(encoder) and len(encoder) == 74
    assert sorted(draws.values()) == sorted(decoder) and len(decoder) == 76
    assert sum(map(math.prod, reads.values())) == 53_786_240
    assert sum(map(math.prod, draws.values())) == 43_829_766

    assert (model.factor, model.grid_size, model.num_codes) == (8, 32, 8192)
    assert {block.gain for block in model.modules() if isinstance(block, BottleneckBlock)} == {1 / 64}


def test_a_look_up_is_a_convolution_over_the_one_hot_map() -> None:
    model = tiny(head="linear", branch_gain=None)
    with torch.no_grad():
        model.code_bias.normal_(generator=torch.Generator().manual_seed(0))
    tokens = torch.randint(0, 24, (2, 16), generator=torch.Generator().manual_seed(0))
    one_hot = F.one_hot(tokens, 24).float().transpose(1, 2).reshape(2, 24, 4, 4)
    hidden = F.conv2d(one_hot, model.codebook.T[:, :, None, None], model.code_bias)
    maps = F.pixel_shuffle(model.decoder(hidden), 4)  # B, 6, 16, 16
    expected = unsqueeze_pixels(torch.sigmoid(maps[:, :3]))
    assert torch.allclose(model.decode(tokens), expected, atol=1e-6)


def test_the_distance_head_by_brute_force() -> None:
    model = tiny()
    with torch.no_grad():
        model.log_scale.fill_(0.7)
        z = model.encode_features(pictures(1))[0]  # D, h, w
        logits = model.encode_logits(pictures(1))[0]
        for y in range(4):
            for x in range(4):
                for v in range(24):
                    squared = sum(float(a - b) ** 2 for a, b in zip(z[:, y, x], model.codebook[v], strict=True))
                    assert float(logits[v, y, x]) == pytest.approx(-math.exp(0.7) * squared, rel=1e-4, abs=1e-4)
        nearest = torch.cdist(z.flatten(1).T, model.codebook).argmin(dim=1)
    assert torch.equal(model.encode(pictures(1))[0], nearest)


def test_a_sharp_relaxation_decodes_what_the_tokens_decode() -> None:
    for head in ("distance", "linear"):
        model = tiny(head=head)
        with torch.no_grad():
            hard = model.decode(model.encode(pictures()))
            soft = unsqueeze_pixels(torch.sigmoid(model(pictures(), temperature=1e-5).mu))
        assert torch.allclose(hard, soft, atol=1e-3)


def test_noise_and_temperature_act_on_the_relaxation_only() -> None:
    model = tiny()
    noise = gumbel_noise((3, 24, 4, 4), torch.Generator().manual_seed(0), pictures())
    with torch.no_grad():
        plain, noisy, warm = model(pictures()), model(pictures(), 1.0, noise), model(pictures(), 5.0)
        continuous = model(pictures(), quantise=False)
        mu, _ = model.decode_maps(model.encode_features(pictures()))
    assert torch.equal(plain.logits, noisy.logits) and torch.equal(plain.logits, warm.logits)
    assert not torch.equal(plain.mu, noisy.mu) and not torch.equal(plain.mu, warm.mu)
    assert torch.allclose(continuous.mu, mu, atol=1e-6)


def test_every_parameter_has_a_gradient_in_both_phases() -> None:
    """Or training in several processes would wait for one that never comes."""
    for config, quantise in ((SHAPES[1], True), (SHAPES[1], False), (SHAPES[3], True)):
        model = tiny(**config)
        output = model(pictures(), quantise=quantise)
        (output.mu.sum() + output.ln_b.sum() + output.logits.square().mean()).backward()
        missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing


def test_equal_pictures_give_equal_tokens_and_nothing_given_is_changed() -> None:
    model = tiny()
    with torch.no_grad():  # an untrained code book is too far from the features to tell them apart
        model.initialise_codebook(model.encode_features(pictures()), torch.Generator().manual_seed(0))
    pixels, random = pictures(), torch.get_rng_state()
    noise = gumbel_noise((3, 24, 4, 4), torch.Generator().manual_seed(0), pixels)
    given = [t.clone() for t in (pixels, noise)]
    tokens = model.encode(pixels)
    kept = tokens.clone()
    decoded = model.decode(tokens)
    model(pixels, 0.5, noise)
    assert torch.equal(tokens, model.encode(pixels)) and torch.equal(decoded, model.decode(tokens))
    assert torch.equal(torch.cat([model.encode(picture[None]) for picture in pixels]), tokens)
    assert torch.equal(pixels, given[0]) and torch.equal(noise, given[1]) and torch.equal(tokens, kept)
    assert torch.equal(torch.get_rng_state(), random)
    assert not torch.equal(tokens[0], tokens[1])


@pytest.mark.parametrize("config", SHAPES)
def test_saved_and_loaded_it_is_the_same(config: dict, tmp_path: Path) -> None:
    model = tiny(**config)
    save_part(model, tmp_path / "dvae")
    loaded = load_part(DVAE, tmp_path / "dvae")
    assert torch.equal(loaded.encode_logits(pictures()), model.encode_logits(pictures()))
    assert torch.equal(loaded.decode(model.encode(pictures())), model.decode(model.encode(pictures())))


def test_half_precision_keeps_the_code_books_arithmetic_in_full(tmp_path: Path) -> None:
    model = tiny()
    with torch.no_grad():
        model.log_scale.fill_(13.0)  # e^13 is more than float16 holds
    save_part(model, tmp_path / "dvae")
    half = load_part(DVAE, tmp_path / "dvae", dtype=torch.float16)
    logits = half.logits_from_features(torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(0)).half())
    assert logits.dtype == torch.float32 and torch.isfinite(logits).all()
    brain = load_part(DVAE, tmp_path / "dvae", dtype=torch.bfloat16)
    with torch.no_grad():
        pixels = brain.decode(brain.encode(pictures()))
        relaxed = brain(pictures(), 1.0, torch.zeros(3, 24, 4, 4))
    assert pixels.dtype == relaxed.mu.dtype == relaxed.logits.dtype == torch.float32
    assert torch.allclose(pixels, model.decode(brain.encode(pictures())), atol=0.05)


def test_autocast_leaves_the_convolutions_beside_the_vocabulary_alone() -> None:
    model = tiny(head="linear")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        features = model.encode_features(pictures())
        mu, _ = model.decode_maps(torch.zeros(1, 8, 4, 4))
    assert features.dtype == mu.dtype == torch.float32
    assert not torch.equal(features, features.bfloat16().float())  # not float32 in name only


def line(*values: float) -> Tensor:
    """One-dimensional features (1, 1, 1, count)."""
    return torch.tensor(values).view(1, 1, 1, -1)


def test_the_code_book_starts_with_distinct_features() -> None:
    model, features = tiny(), torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(3))
    before = features.clone()
    model.initialise_codebook(features, torch.Generator().manual_seed(0))
    rows = {tuple(vector) for vector in features.permute(0, 2, 3, 1).reshape(-1, 8).tolist()}
    chosen = [tuple(row) for row in model.codebook.tolist()]
    assert len(set(chosen)) == 24 and set(chosen) <= rows
    assert torch.equal(features, before)

    same, other = tiny(), tiny()
    same.initialise_codebook(features, torch.Generator().manual_seed(0))
    other.initialise_codebook(features, torch.Generator().manual_seed(1))
    assert torch.equal(same.codebook, model.codebook) and torch.equal(same.log_scale, model.log_scale)
    assert not torch.equal(other.codebook, model.codebook)


def test_the_code_book_finds_what_is_rare() -> None:
    model = tiny(num_codes=5, code_width=1)
    features = line(*[0.0] * 500, 2.0, 4.0, *[0.0] * 500, 6.0, 8.0)
    model.initialise_codebook(features, torch.Generator().manual_seed(0))
    assert sorted(model.codebook.flatten().tolist()) == [0, 2, 4, 6, 8]
    assert model.log_scale.item() == pytest.approx(0, abs=1e-5)  # 4 / squared spacing of 2


def test_too_few_distinct_features_leave_the_code_book_as_it_was() -> None:
    model = tiny(num_codes=5, code_width=1)
    before = model.codebook.clone()
    for features in (line(1.0, 2.0, 3.0), line(*[0.0] * 100, 1.0, 2.0, 3.0)):
        with pytest.raises(InputError, match="[34] distinct feature vectors cannot initialise 5 codes"):
            model.initialise_codebook(features, torch.Generator().manual_seed(0))
    assert torch.equal(model.codebook, before)


def _initialise(rank: int, rendezvous: str, answers: mp.SimpleQueue) -> None:
    """One of two processes, each with features and a generator of its own."""
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    model = tiny()
    features = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(rank))
    model.initialise_codebook(features, torch.Generator().manual_seed(rank))
    answers.put((rank, model.codebook.tolist(), model.log_scale.item()))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif("fork" not in mp.get_all_start_methods(), reason="the processes are forked, to import torch once")
def test_all_processes_start_with_one_code_book(tmp_path: Path) -> None:
    context = mp.get_context("fork")
    answers = context.SimpleQueue()
    rendezvous = (tmp_path / "rendezvous").as_uri()
    processes = [context.Process(target=_initialise, args=(rank, rendezvous, answers), daemon=True) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    found = {rank: answer for rank, *answer in (answers.get(), answers.get())}
    assert found[0] == found[1]
    model = tiny()
    features = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    model.initialise_codebook(features, torch.Generator().manual_seed(0))
    assert found[0] == [model.codebook.tolist(), model.log_scale.item()]  # the first process's


def test_gumbel_noise() -> None:
    noise = gumbel_noise((100, 1000), torch.Generator().manual_seed(0), torch.zeros(1))
    assert torch.isfinite(noise).all()
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.02)  # Euler's constant
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.05)
    assert torch.equal(noise, gumbel_noise((100, 1000), torch.Generator().manual_seed(0), torch.zeros(1)))
    # The arg-max of ln p + noise is a draw from p.
    p = torch.tensor([0.1, 0.2, 0.7])
    draws = (p.log()[:, None] + gumbel_noise((3, 50_000), torch.Generator().manual_seed(1), p)).argmax(dim=0)
    assert (torch.bincount(draws) / 50_000).tolist() == pytest.approx(p.tolist(), abs=0.01)


def test_code_statistics_by_hand() -> None:
    figures = code_statistics(torch.tensor([[0, 0, 3], [3, 0, 3]]), num_codes=6)
    assert figures == {"perplexity": pytest.approx(2.0), "dead_codes": 4.0}
    assert code_statistics(torch.arange(8), num_codes=8) == {"perplexity": pytest.approx(8.0), "dead_codes": 0.0}


@pytest.mark.parametrize("head", ["distance", "linear"])
def test_it_learns_a_batch_by_heart(head: str) -> None:
    generator = torch.Generator().manual_seed(0)
    colours = torch.rand(5, 3, generator=generator)
    cells = colours[torch.randint(0, 5, (8, 4, 4), generator=generator)].permute(0, 3, 1, 2)  # 8, 3, 4, 4
    pixels = cells.repeat_interleave(4, 2).repeat_interleave(4, 3)
    model = tiny(head=head, widths=(32,), num_codes=16).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for step in range(150):
        warm_up = step < 50 and head == "distance"
        if step == 50 and head == "distance":
            model.initialise_codebook(model.encode_features(pixels), generator)
        noise = gumbel_noise((8, 16, 4, 4), generator, pixels)
        output = model(pixels, temperature=max(1 - step / 135, 1 / 16), gumbel=noise, quantise=not warm_up)
        loss, _ = relaxed_elbo_loss(pixels, output.mu, output.ln_b, output.logits, beta=0.1, squared_error=1000.0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    spread = (pixels - pixels.mean(dim=(0, 2, 3), keepdim=True)).square().mean()
    error = (model.decode(model.encode(pixels)) - pixels).square().mean()
    assert losses[-1] < losses[0] / 5
    assert error < spread / 5  # what the tokens say beyond the mean colour


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"head": "cosine"}, 'head is "cosine"; it must be "distance" or "linear"'),
        ({"resolution": 18}, "resolution 18 is not a multiple of the factor 4"),
        ({"first_kernel": 4}, "first_kernel is 4; it must be odd"),
    ],
)
def test_configs_that_cannot_be_are_refused(config: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny(**config)


def test_inputs_that_do_not_fit_are_refused() -> None:
    model = tiny()
    for shape in ((1, 3, 16, 18), (1, 1, 16, 16), (3, 16, 16)):
        with pytest.raises(InputError, match="sides divisible by 4"):
            model.encode(torch.zeros(shape))
    for shape in ((1, 15), (16,)):
        with pytest.raises(InputError, match="do not form square grids"):
            model.decode(torch.zeros(shape, dtype=torch.long))
    for token in (-1, 24):
        with pytest.raises(IndexError):
            model.decode(torch.full((1, 16), token))
    with pytest.raises(InputError, match="warm-up needs the distance head"):
        tiny(head="linear")(pictures(), quantise=False)
