"""Drawing image tokens: against an uncached loop, guidance, filters, seeds, chunks, callback, bad input."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from test_transformer import CODES, NULL, VOCAB, N, example, tiny
from torch import Tensor

from genpipe.dalle1.losses import text_image_loss
from genpipe.dalle1.sampling import draw, filter_logits, generate_tokens, guide, rows_within
from genpipe.dalle1.transformer import DALLE1Transformer
from genpipe.errors import InputError

INFINITY = float("inf")


@torch.no_grad()
def uncached(
    model: DALLE1Transformer,
    ids: Tensor,
    mask: Tensor,
    seed: int,
    scale: float = 1.0,
    temperature: float = 1.0,
    given: Tensor | None = None,
) -> list[int]:
    """Tokens of one candidate of one prompt (1, L): a whole forward pass for every token, no cache, no batch."""
    uniform = np.random.default_rng(seed).random(N)
    tokens = torch.zeros(1, N, dtype=torch.long)
    first = 0 if given is None else given.shape[1]
    if given is not None:
        tokens[:, :first] = given
    for t in range(first, N):
        logits = model(ids, mask, tokens)[1][0, t].double()
        if scale != 1.0:
            null = model(*NULL, tokens)[1][0, t].double()
            logits = null + scale * (logits - null)
        if temperature == 0:
            tokens[0, t] = logits.argmax()
        else:
            probabilities = (logits / temperature).softmax(dim=0)
            tokens[0, t] = int((probabilities.cumsum(dim=0) <= uniform[t]).sum())
    return tokens[0].tolist()


@pytest.mark.parametrize("attention", ["causal", "sparse"])
@pytest.mark.parametrize(("scale", "temperature"), [(1.0, 1.0), (3.0, 1.0), (3.0, 0.0), (0.0, 0.7), (1.5, 2.0)])
def test_tokens_equal_those_of_an_uncached_loop(attention: str, scale: float, temperature: float) -> None:
    model = tiny(attention)
    ids, mask, _ = example(2)
    seeds = [[0, 5], [7, 0]]
    tokens = generate_tokens(model, ids, mask, seeds, guidance_scale=scale, temperature=temperature, null_text=NULL)
    assert tokens.shape == (2, 2, N) and tokens.dtype == torch.long
    for row in (0, 1):
        for candidate, seed in enumerate(seeds[row]):
            expected = uncached(model, ids[row : row + 1], mask[row : row + 1], seed, scale, temperature)
            assert tokens[row, candidate].tolist() == expected


# guidance -------------------------------------------------------------------------------------------------------------


def test_guidance_by_hand() -> None:
    conditional, unconditional = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.5])
    assert guide(conditional, unconditional, 0.0).tolist() == [3.0, 0.5]
    assert guide(conditional, unconditional, 1.0).tolist() == [1.0, -2.0]
    assert guide(conditional, unconditional, 3.0).tolist() == [-3.0, -7.0]


def test_guidance_0_is_the_unconditional_draw_and_1_the_conditional_one_alone() -> None:
    model = tiny()
    ids, mask, _ = example(3)
    seeds = [[0, 1], [2, 3], [4, 5]]
    null_ids, null_mask = (x.expand(3, -1) for x in NULL)
    nothing = generate_tokens(model, ids, mask, seeds, guidance_scale=0.0, null_text=NULL)
    assert torch.equal(nothing, generate_tokens(model, null_ids, null_mask, seeds))
    alone = generate_tokens(model, ids, mask, seeds)  # needs no null_text
    assert torch.equal(alone, generate_tokens(model, ids, mask, seeds, guidance_scale=1.0, null_text=NULL))
    strong = generate_tokens(model, ids, mask, seeds, guidance_scale=3.0, null_text=NULL)
    assert not torch.equal(alone, nothing) and not torch.equal(strong, alone)
    with pytest.raises(InputError, match="guidance_scale 3.0 needs null_text"):
        generate_tokens(model, ids, mask, seeds, guidance_scale=3.0)


# the draw of one token ------------------------------------------------------------------------------------------------


def kept(logits: Tensor) -> list[list[int]]:
    """Tokens of each row that can still be drawn."""
    return [row.isfinite().nonzero().flatten().tolist() for row in logits]


def test_top_k_counts_exactly() -> None:
    logits = torch.tensor([[0.1, 3.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0], [5.0, 0.0, 5.0, 5.0]])
    before = logits.clone()
    assert kept(filter_logits(logits, top_k=1)) == [[1], [0], [0]]
    assert kept(filter_logits(logits, top_k=2)) == [[1, 2], [0, 1], [0, 2]]  # among equals the lower token
    assert kept(filter_logits(logits, top_k=3)) == [[1, 2, 3], [0, 1, 2], [0, 2, 3]]
    for k in (None, 4, 99):
        assert torch.equal(filter_logits(logits, top_k=k), logits)
    two = filter_logits(logits, top_k=2)
    assert two[0, 1:3].tolist() == [3.0, 2.0] and torch.equal(logits, before)


def test_top_p_by_hand() -> None:
    logits = torch.tensor([[0.2, 0.5, 0.3]]).log()
    assert kept(filter_logits(logits, top_p=1e-9)) == [[1]]
    assert kept(filter_logits(logits, top_p=0.49)) == [[1]]
    assert kept(filter_logits(logits, top_p=0.51)) == [[1, 2]]
    assert kept(filter_logits(logits, top_p=0.79)) == [[1, 2]]
    assert kept(filter_logits(logits, top_p=0.81)) == [[0, 1, 2]]
    assert torch.equal(filter_logits(logits, top_p=1.0), logits)
    # After top_k = 2 the masses are 5/8 and 3/8.
    assert kept(filter_logits(logits, top_k=2, top_p=0.62)) == [[1]]
    assert kept(filter_logits(logits, top_k=2, top_p=0.63)) == [[1, 2]]


def drawn(probabilities: Sequence[float], uniform: Sequence[float], **settings: float | int | None) -> list[int]:
    logits = torch.tensor(probabilities).log().expand(len(uniform), -1)
    return draw(logits, torch.tensor(uniform, dtype=torch.float64), **settings).tolist()  # type: ignore[arg-type]


def test_draws_by_hand() -> None:
    below_one = 1 - 2.0**-53
    assert drawn([0.25, 0.25, 0.5], [0, 0.249, 0.251, 0.499, 0.501, below_one]) == [0, 0, 1, 1, 2, 2]
    assert drawn([0, 0.5, 0, 0.5, 0], [0, 0.49, 0.51, below_one]) == [1, 1, 3, 3]  # never what cannot be
    assert drawn([0.25, 0.25, 0.5], [0, 0.9], temperature=0) == [2, 2]
    # Temperature 1/2 squares the probabilities: 0.1 and 0.9 of 0.25, 0.75.
    assert drawn([0.25, 0.75], [0.099, 0.101], temperature=0.5) == [0, 1]
    assert drawn([0.2, 0.5, 0.3], [0, 0.62, 0.63, 0.99], top_k=2) == [1, 1, 2, 2]
    for temperature in (1e-6, 1e-300, 5e-324):
        assert drawn([0.25, 0.25, 0.5], [0, 0.9], temperature=temperature) == [2, 2]


def test_draws_follow_the_probabilities() -> None:
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens = draw(torch.tensor([0.1, 0.2, 0.7]).log().expand(20_000, -1), uniform)
    assert (torch.bincount(tokens) / 20_000).tolist() == pytest.approx([0.1, 0.2, 0.7], abs=0.01)


def test_sharp_settings_are_greedy() -> None:
    model = tiny()
    ids, mask, _ = example(2)

    def tokens(**settings: float | int) -> list:
        return generate_tokens(
            model, ids, mask, [[0, 1, 2]] * 2, guidance_scale=2.0, null_text=NULL, **settings
        ).tolist()  # type: ignore[arg-type]

    greedy = tokens(temperature=0.0)
    assert greedy[0][0] == greedy[0][1] == greedy[0][2] and greedy[0] != greedy[1]
    assert tokens(top_k=1) == tokens(top_p=1e-6) == tokens(temperature=1e-9) == greedy
    assert tokens() != greedy
    assert tokens(top_k=CODES) == tokens(top_p=1.0) == tokens()


# seeds and batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_a_candidate_is_the_same_whatever_ran_beside_it(scale: float) -> None:
    model = tiny()
    ids, mask, _ = example(16)

    def tokens(rows: Sequence[int], seeds: Sequence[int], **settings: int) -> list:
        index = list(rows)
        return generate_tokens(
            model, ids[index], mask[index], [seeds] * len(index), guidance_scale=scale, null_text=NULL, **settings
        ).tolist()  # type: ignore[arg-type]

    together = tokens(range(16), range(5))
    assert len({str(candidate) for row in together for candidate in row}) == 80
    for row in (0, 7, 15):
        assert tokens([row], [3])[0][0] == together[row][3]  # one prompt, one candidate
    assert tokens([4, 2, 9], [4, 0]) == [[together[row][4], together[row][0]] for row in (4, 2, 9)]
    for chunk_size in (1, 2, 3, 7, 64, 1000):
        assert tokens([3, 5, 6], range(5), chunk_size=chunk_size) == [together[row] for row in (3, 5, 6)]


def test_other_seeds_give_other_tokens() -> None:
    model = tiny()
    ids, mask, _ = example(1)
    seeds = [0, 1, 2, 2**32, 2**32 + 1, 2**63, 2**64 + 1, 10**30]  # a torch generator has the first three twice
    tokens = generate_tokens(model, ids, mask, [seeds])[0].tolist()
    assert len({str(row) for row in tokens}) == len(seeds)
    assert generate_tokens(model, ids, mask, [[np.int64(2)]])[0, 0].tolist() == tokens[2]


def test_nothing_given_is_changed() -> None:
    model = tiny("sparse")
    ids, mask, given = example(2)
    prefix, seeds = given[:, :3], [[1, 2], [3, 4]]
    before = [t.clone() for t in (ids, mask, given, *NULL)]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random, numpys = torch.get_rng_state(), np.random.get_state()[1].tolist()
    for scale in (1.0, 3.0):
        generate_tokens(
            model, ids, mask, seeds, guidance_scale=scale, null_text=NULL, image_prefix=prefix, top_k=5, top_p=0.9
        )
    assert all(torch.equal(a, b) for a, b in zip((ids, mask, given, *NULL), before, strict=True))
    assert seeds == [[1, 2], [3, 4]]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random) and np.random.get_state()[1].tolist() == numpys


def test_no_candidates_are_no_error() -> None:
    model = tiny()
    ids, mask, _ = example(2)
    assert generate_tokens(model, ids, mask, [[], []]).shape == (2, 0, N)
    nothing = generate_tokens(model, ids[:0], mask[:0], [])
    assert nothing.shape == (0, 0, N) and nothing.dtype == torch.long


# a given beginning, chunks, callback ----------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["causal", "sparse"])
@pytest.mark.parametrize("count", [1, 6, N - 1])
def test_a_given_beginning_is_continued(attention: str, count: int) -> None:
    model = tiny(attention)
    ids, mask, given = example(2)
    prefix = given[:, :count]
    tokens = generate_tokens(
        model, ids, mask, [[0, 1, 2]] * 2, guidance_scale=2.0, null_text=NULL, image_prefix=prefix, chunk_size=2
    )
    assert torch.equal(tokens[:, :, :count], prefix[:, None].expand(-1, 3, -1))
    for row in (0, 1):
        expected = uncached(model, ids[[row]], mask[[row]], 1, 2.0, given=prefix[[row]])
        assert tokens[row, 1].tolist() == expected
    # What would have been drawn anyway leads to the same end.
    free = generate_tokens(model, ids, mask, [[4]] * 2)
    again = generate_tokens(model, ids, mask, [[4]] * 2, image_prefix=free[:, 0, :count])
    assert torch.equal(free, again)
    assert torch.equal(free, generate_tokens(model, ids, mask, [[4]] * 2, image_prefix=free[:, 0, :0]))


@pytest.mark.parametrize(("chunk_size", "first"), [(None, 0), (2, 0), (4, 0), (5, 3)])
def test_the_callback_sees_the_tokens_grow(chunk_size: int | None, first: int) -> None:
    model = tiny()
    ids, mask, given = example(3)
    seen: list[tuple[list[int], Tensor]] = []
    tokens = generate_tokens(
        model,
        ids,
        mask,
        [[0, 1, 2]] * 3,
        image_prefix=given[:, :first] if first else None,
        chunk_size=chunk_size,
        callback=lambda rows, so_far: seen.append((list(rows), so_far.clone())),
    ).view(9, N)
    steps = N - first
    assert len(seen) % steps == 0
    chunks = [seen[start : start + steps] for start in range(0, len(seen), steps)]
    covered = []
    for chunk in chunks:
        rows = chunk[0][0]
        covered += rows
        assert len(rows) <= (chunk_size or 9)
        for t, (same_rows, so_far) in enumerate(chunk, start=first + 1):
            assert same_rows == rows and torch.equal(so_far, tokens[rows, :t])
    assert covered == list(range(9))


def test_a_callback_may_stop_by_raising() -> None:
    def stop(rows: Sequence[int], tokens: Tensor) -> None:
        if tokens.shape[1] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_tokens(tiny(), *example(1)[:2], [[0]], callback=stop)


class Counting(DALLE1Transformer):
    """Notes how many prompts each prefill reads."""

    def prefill(self, ids, mask, image_prefix=None):  # type: ignore[no-untyped-def]
        self.read = [*getattr(self, "read", []), len(ids)]
        return super().prefill(ids, mask, image_prefix)


@pytest.mark.parametrize("chunk_size", [None, 2, 3, 7])
def test_each_prompt_is_read_once_and_alone(chunk_size: int | None) -> None:
    model = Counting(VOCAB, 7, CODES, 4, width=8, num_layers=1, num_heads=1).eval()
    ids, mask, _ = example(4)
    generate_tokens(model, ids, mask, [[0, 1, 2]] * 4, chunk_size=chunk_size)
    assert model.read == [1, 1, 1, 1]


@pytest.mark.parametrize("chunk_size", [1, 3, 5])
def test_a_candidate_of_a_model_of_real_width_is_the_same_in_any_batch(chunk_size: int) -> None:
    # narrow models do not show it: matrix products of one row and of many round differently from some width on
    torch.manual_seed(0)
    model = DALLE1Transformer(VOCAB, 7, 1024, 4, width=256, num_layers=2, num_heads=4).eval()
    with torch.no_grad():
        model.image_head.weight.mul_(20)  # sharper than fresh weights, so that draws lie close to borders
    ids, mask, _ = example(2)
    seeds = [list(range(16))] * 2
    together = generate_tokens(model, ids, mask, seeds, guidance_scale=3.0, null_text=NULL)
    apart = generate_tokens(
        model, ids[:1], mask[:1], seeds[:1], guidance_scale=3.0, null_text=NULL, chunk_size=chunk_size
    )
    assert torch.equal(apart[0], together[0])


def test_the_caches_stay_within_the_budget() -> None:
    model = tiny()
    with torch.no_grad():
        cache, _ = model.prefill(*example(1)[:2])
        whole = cache.rows(torch.tensor([0]), model.sequence_length)
    row = sum(t.numel() * t.element_size() for t in (cache.keys, cache.values, whole.keys, whole.values))
    assert rows_within(model, guided=False, budget=10 * row) == 10
    assert rows_within(model, guided=False, budget=10 * row - 1) == 9
    assert rows_within(model, guided=True, budget=10 * row) == 5
    assert rows_within(model, guided=True, budget=1) == 1
    assert rows_within(model.half(), guided=False, budget=10 * row) == 20


# learning, and what goes wrong ----------------------------------------------------------------------------------------


def test_a_batch_learned_by_heart_is_drawn_again() -> None:
    torch.manual_seed(0)
    model = DALLE1Transformer(VOCAB, 7, CODES, 4, width=48, num_layers=2, num_heads=2, attention="sparse", kernel=3)
    ids, mask, tokens = example(4)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(100):
        loss, terms = text_image_loss(*model(ids, mask, tokens), ids, mask, tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert terms["image"].item() < 0.05
    model.eval()
    assert torch.equal(generate_tokens(model, ids, mask, [[0]] * 4, temperature=0.0)[:, 0], tokens)
    cool = generate_tokens(model, ids, mask, [[1, 2]] * 4, temperature=0.2)
    assert torch.equal(cool, tokens[:, None].expand(-1, 2, -1))


def test_weights_that_are_not_numbers_name_the_token() -> None:
    ids, mask, _ = example(1)
    model = tiny()
    with torch.no_grad():
        model.image_head.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="logits are not finite at image token 0"):
        generate_tokens(model, ids, mask, [[0]])
    model = tiny()
    with torch.no_grad():
        model.row_position.weight[1] = INFINITY  # the second row of the grid is first read after token 4
    with pytest.raises(FloatingPointError, match="logits are not finite at image token 5"):
        generate_tokens(model, ids, mask, [[0]])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; it must be a number from 0 on"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0; it must be at least 1"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"guidance_scale": math.inf}, "guidance_scale is inf"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"chunk_size": -3}, "chunk_size is -3"),
        ({"seeds": [[0, 1]]}, "2 prompts need as many lists of seeds, all of one length"),
        ({"seeds": [[0, 1], [2]]}, "2 prompts need as many lists of seeds, all of one length"),
        ({"seeds": [[0], [-1]]}, "a seed is -1; it must be a whole number from 0 on"),
        ({"seeds": [[0], [0.5]]}, "a seed is 0.5"),
        ({"image_prefix": torch.zeros(2, N, dtype=torch.long)}, "2 rows of less than 16 tokens are needed"),
        ({"image_prefix": torch.zeros(1, 4, dtype=torch.long)}, r"image_prefix has shape \(1, 4\); 2 rows"),
        ({"image_prefix": torch.full((2, 4), CODES)}, r"image_prefix has tokens outside \[0, 12\)"),
        ({"image_prefix": torch.full((2, 4), -1)}, r"image_prefix has tokens outside \[0, 12\)"),
    ],
)
def test_what_cannot_be_drawn_is_refused(settings: dict, message: str) -> None:
    ids, mask, _ = example(2)
    with pytest.raises(InputError, match=message):
        generate_tokens(tiny(), ids, mask, **{"seeds": [[0], [1]], "null_text": NULL, **settings})


def test_dropout_is_refused() -> None:
    model = tiny(dropout=0.1)
    ids, mask, _ = example(1)
    with pytest.raises(InputError, match="in training mode"):
        generate_tokens(model.train(), ids, mask, [[0]])
    generate_tokens(model.eval(), ids, mask, [[0]])


def test_half_precision_draws_too() -> None:
    """Caches take the weights' type; logits are guided and drawn from in full precision."""
    model = tiny().bfloat16()
    ids, mask, _ = example(2)
    settings = {"guidance_scale": 2.0, "null_text": NULL, "top_k": 3}
    tokens = generate_tokens(model, ids, mask, [[0, 1], [2, 3]], **settings)
    assert tokens.shape == (2, 2, N) and 0 <= tokens.min() and tokens.max() < CODES
    assert torch.equal(generate_tokens(model, ids, mask, [[0, 1], [2, 3]], **settings), tokens)
