"""DALL-E 1's transformer: cached = uncached logits, causality, padding, sparse masks, saving."""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from genpipe.dalle1.cached import KeyValueCache
from genpipe.dalle1.losses import text_image_loss
from genpipe.dalle1.sampling import guide
from genpipe.dalle1.transformer import DALLE1Transformer
from genpipe.errors import InputError
from genpipe.parts import load_part, save_part
from genpipe.tokenizer import CaptionTokenizer

VOCAB, LENGTH, CODES, GRID = 40, 7, 12, 4
N = GRID**2
ATTENTION = ["causal", "sparse"]


def tiny(attention: str = "causal", seed: int = 0, **config: object) -> DALLE1Transformer:
    """7 text positions, 4 x 4 tokens of 12 codes, in eval mode, with weights so large that every input counts."""
    settings = {
        "vocab_size": VOCAB, "text_length": LENGTH, "num_image_tokens": CODES, "grid_size": GRID, "width": 24,
        "num_layers": 4, "num_heads": 2, "kernel": 3,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DALLE1Transformer(**{**settings, "attention": attention, **config})
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" not in name:
                    parameter.copy_(torch.randn(parameter.shape) * 0.4)
    return model.eval()


def example(rows: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """ids, mask (B, L) with 7, 5, 3, ... real tokens and image tokens (B, N)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (rows, LENGTH), generator=generator)
    real = torch.tensor([max(3, LENGTH - 2 * row) for row in range(rows)])
    mask = torch.arange(LENGTH) < real[:, None]
    return ids, mask, torch.randint(0, CODES, (rows, N), generator=generator)


NULL = torch.tensor([[38, 39, 0, 0, 0, 0, 0]]), torch.arange(LENGTH)[None] < 2  # start, end


@torch.no_grad()
def step_by_step(model: DALLE1Transformer, ids: Tensor, mask: Tensor, tokens: Tensor, given: int) -> Tensor:
    """Image logits (B, N - given, V) through the cache, the first `given` tokens as a prefix."""
    cache, logits = model.prefill(ids, mask, tokens[:, :given] if given else None)
    cache = cache.rows(torch.arange(len(ids)), model.sequence_length)
    found = [logits]
    for t in range(given, N - 1):
        found.append(model.decode_next(tokens[:, t], cache))
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("given", [0, 1, 6, N - 1])
def test_cached_logits_equal_uncached_ones(attention: str, given: int) -> None:
    model = tiny(attention).double()
    ids, mask, tokens = example()
    with torch.no_grad():
        _, expected = model(ids, mask, tokens)
    cached = step_by_step(model, ids, mask, tokens, given)
    assert cached.shape == (3, N - given, CODES)
    assert torch.allclose(cached, expected[:, given:], rtol=0, atol=1e-12)
    assert expected.std(dim=(0, 1)).min() > 0.1  # the logits do depend on what was read


@pytest.mark.parametrize("attention", ATTENTION)
def test_cached_guidance_equals_uncached_guidance(attention: str) -> None:
    """Two prompts and three candidates of each; both branches keep a cache of their own and read the same tokens."""
    model = tiny(attention).double()
    ids, mask, _ = example(2)
    _, _, tokens = example(6)
    null_ids, null_mask = (x.expand(2, -1) for x in NULL)
    owner = torch.tensor([0, 0, 0, 1, 1, 1])
    with torch.no_grad():
        _, conditional = model(ids[owner], mask[owner], tokens)
        _, unconditional = model(null_ids[owner], null_mask[owner], tokens)
        read, null = model.prefill(ids, mask), model.prefill(null_ids, null_mask)
        cache, null_cache = (cache.rows(owner, model.sequence_length) for cache, _ in (read, null))
        logits, null_logits = read[1][owner], null[1][owner]
        for t in range(N):
            expected = guide(conditional[:, t], unconditional[:, t], 3.0)
            assert torch.allclose(guide(logits, null_logits, 3.0), expected, rtol=0, atol=1e-11)
            if t + 1 < N:
                logits = model.decode_next(tokens[:, t], cache)
                null_logits = model.decode_next(tokens[:, t], null_cache)
    assert not torch.allclose(conditional, unconditional, atol=0.1)


def test_candidates_leave_the_prompts_cache_alone() -> None:
    model = tiny()
    ids, mask, tokens = example(2)
    with torch.no_grad():
        cache, logits = model.prefill(ids, mask)
        kept = KeyValueCache(cache.keys.clone(), cache.values.clone(), cache.length)
        mine = cache.rows(torch.tensor([1, 0, 1]), model.sequence_length)
        model.decode_next(tokens[:1, 0].expand(3), mine)
    assert (cache.room, mine.room) == (model.prefix_length, model.sequence_length)
    assert (cache.length, mine.length) == (kept.length, kept.length + 1)
    assert torch.equal(cache.keys, kept.keys) and torch.equal(cache.values, kept.values)
    assert torch.equal(mine.keys[:, [0, 1], :, : cache.length], cache.keys[:, [1, 0]])


def test_a_full_cache_says_so() -> None:
    model = tiny()
    ids, mask, tokens = example(1)
    with torch.no_grad():
        cache, _ = model.prefill(ids, mask)
        with pytest.raises(InputError, match=r"position 9 does not fit: the cache has room for 8"):
            model.decode_next(tokens[:, 0], cache)
        with pytest.raises(InputError, match="a whole sequence has 23"):
            model.prefill(ids, mask, tokens)


@pytest.mark.parametrize("attention", ATTENTION)
def test_later_tokens_leave_earlier_logits_alone(attention: str) -> None:
    model = tiny(attention).double()
    ids, mask, tokens = example(1)
    with torch.no_grad():
        text, image = model(ids, mask, tokens)
        for t in range(N - 1):
            other = tokens.clone()
            other[:, t] = (other[:, t] + 1) % CODES
            other_text, other_image = model(ids, mask, other)
            assert torch.equal(other_text, text)
            assert torch.allclose(other_image[:, : t + 1], image[:, : t + 1], rtol=0, atol=1e-12)
            assert not torch.allclose(other_image[:, t + 1], image[:, t + 1], atol=1e-3)
        for position in range(1, LENGTH):
            changed = ids.clone()
            changed[:, position] = (changed[:, position] + 1) % VOCAB
            other_text, other_image = model(changed, mask, tokens)
            assert torch.allclose(other_text[:, :position], text[:, :position], rtol=0, atol=1e-12)
            difference = (other_image - image).abs().amax(dim=-1)
            assert difference.min() > 1e-4  # every image token sees all of the text


def test_an_image_token_is_embedded_with_its_row_and_its_column() -> None:
    model = tiny()
    tokens = torch.tensor([[3, 8, 1]])  # at raster positions 6, 7 and 8 of the 4 x 4 grid
    with torch.no_grad():
        found = model.embed_image(tokens, first=6)[0]
        for vector, token, row, column in zip(found, [3, 8, 1], [1, 1, 2], [2, 3, 0], strict=True):
            parts = (
                model.image_embedding.weight[token],
                model.row_position.weight[row],
                model.column_position.weight[column],
            )
            assert torch.allclose(vector, sum(parts), atol=1e-6)  # type: ignore[arg-type]


def test_the_last_image_token_is_no_input() -> None:
    model = tiny()
    ids, mask, tokens = example(1)
    other = tokens.clone()
    other[:, -1] = (other[:, -1] + 1) % CODES
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(model(ids, mask, tokens), model(ids, mask, other), strict=True))


def test_sparse_attention_sees_its_window_only() -> None:
    """One convolutional layer, kernel 3: token 0 reaches the tokens at its right, below it and below right."""
    ids, mask, tokens = example(1)
    other = tokens.clone()
    other[:, 0] = (other[:, 0] + 1) % CODES

    def reached(attention: str) -> list[int]:
        model = tiny(attention, num_layers=1).double()
        with torch.no_grad():
            difference = (model(ids, mask, tokens)[1] - model(ids, mask, other)[1])[0].abs().amax(dim=-1)
        return difference.gt(1e-9).nonzero().flatten().tolist()

    assert reached("sparse") == [1, 2, 5, 6]  # logits of token n are read at token n - 1, so of 0, 1, 4 and 5
    assert reached("causal") == list(range(1, N))


def test_what_stands_in_the_padding_does_not_matter() -> None:
    model = tiny()
    ids, mask, tokens = example()
    other = torch.where(mask, ids, (ids + 11) % VOCAB)
    assert not torch.equal(other, ids)
    with torch.no_grad():
        text, image = model(ids, mask, tokens)
        other_text, other_image = model(other, mask, tokens)
        cache, logits = model.prefill(other, mask)
    assert torch.equal(text, other_text) and torch.equal(image, other_image)
    assert torch.allclose(logits, image[:, 0], atol=1e-4)
    # ... but each unused position has a learned embedding of its own
    with torch.no_grad():
        model.padding_embedding.weight[5].neg_()
        assert not torch.allclose(model(ids, mask, tokens)[1][1], image[1])
        assert torch.equal(model(ids, mask, tokens)[1][0], image[0])  # the first caption fills all positions


@pytest.mark.parametrize(
    "config", [{}, {"vocab_size": 24, "num_image_tokens": 24}, {"grid_size": 1}, {"num_layers": 1}]
)
def test_shapes(config: dict) -> None:
    model = tiny("sparse", **config)
    side, codes, vocab = model.config.grid_size, model.config.num_image_tokens, model.config.vocab_size
    ids, mask, tokens = example()
    text, image = model(ids % vocab, mask, tokens[:, : side**2])
    assert text.shape == (3, LENGTH - 1, vocab) and image.shape == (3, side**2, codes)
    assert (model.prefix_length, model.image_length, model.sequence_length) == (8, side**2, 7 + side**2)


def test_nothing_given_is_changed() -> None:
    model = tiny("sparse")
    given = example()
    kept, random = [t.clone() for t in given], torch.get_rng_state()
    with torch.no_grad():
        first = model(*given)
        step_by_step(model, *given, given=3)
        again = model(*given)
    assert all(torch.equal(a, b) for a, b in zip(given, kept, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("attention", ATTENTION)
def test_every_parameter_has_a_gradient(attention: str) -> None:
    """Or training in several processes would wait for one that never comes; also when no position is padded."""
    model = tiny(attention).train()
    ids, _, tokens = example()
    mask = torch.ones_like(ids, dtype=torch.bool)
    loss, _ = text_image_loss(*model(ids, mask, tokens), ids, mask, tokens)
    loss.backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


def test_a_new_model_knows_nothing() -> None:
    torch.manual_seed(0)
    model = DALLE1Transformer(VOCAB, LENGTH, CODES, GRID, width=32, num_layers=8, num_heads=2)
    ids, mask, tokens = example()
    with torch.no_grad():
        loss, _ = text_image_loss(*model(ids, mask, tokens), ids, mask, tokens)
    assert loss.item() == pytest.approx((math.log(VOCAB) + 7 * math.log(CODES)) / 8, rel=0.01)
    last = model.blocks[0].mlp[2].weight, model.blocks[7].attention.out.weight
    assert [weight.std().item() for weight in last] == pytest.approx([0.02 / 4] * 2, rel=0.1)
    assert model.blocks[0].attention.qkv.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_image_tokens_can_start_from_the_code_book() -> None:
    model = tiny()
    vectors = torch.randn(CODES, 5, generator=torch.Generator().manual_seed(0))
    vectors[1] = vectors[0]
    kept = vectors.clone()
    model.initialise_image_tokens(vectors, torch.Generator().manual_seed(0))
    for table in (model.image_embedding.weight, model.image_head.weight):
        assert torch.allclose(table[0], table[1]) and not torch.allclose(table[0], table[2], atol=1e-3)
        assert 0.01 < table.std().item() < 0.04
    assert torch.equal(vectors, kept)


# saving, copying, moving ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> CaptionTokenizer:
    return CaptionTokenizer.train(["a cat above two red dogs"] * 3, vocab_size=280)


@pytest.mark.parametrize("attention", ATTENTION)
def test_saved_and_loaded_it_is_the_same(attention: str, tokenizer: CaptionTokenizer, tmp_path: Path) -> None:
    model = tiny(attention, vocab_size=tokenizer.vocab_size)
    model.tokenizer = tokenizer
    given = example()
    with torch.no_grad():
        before = model(*given)  # the masks that this builds are not part of what is saved
        save_part(model, tmp_path / "transformer")
        loaded = load_part(DALLE1Transformer, tmp_path / "transformer")
        after = loaded(*given)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert loaded.tokenizer.to_json() == tokenizer.to_json()
    assert {file.name for file in (tmp_path / "transformer").iterdir()} == {
        "config.json", "diffusion_pytorch_model.safetensors", "tokenizer.json"
    }  # fmt: skip


def test_copies_and_moves_after_the_masks_were_built(tokenizer: CaptionTokenizer) -> None:
    model = tiny("sparse", vocab_size=tokenizer.vocab_size)
    model.tokenizer = tokenizer
    ids, mask, tokens = example()
    with torch.no_grad():
        before = model(ids, mask, tokens)
        twin = copy.deepcopy(model)
        assert all(torch.equal(a, b) for a, b in zip(before, twin(ids, mask, tokens), strict=True))
        twin.text_embedding.weight.zero_()
        assert all(torch.equal(a, b) for a, b in zip(before, model(ids, mask, tokens), strict=True))
        # There and back: the masks follow the tensors, not the place where they were first built.
        twin.to("meta")
        assert twin(*(t.to("meta") for t in (ids, mask, tokens)))[1].device.type == "meta"
        assert twin._layer_masks(torch.device("meta"))[0].is_meta
        assert not twin._layer_masks(ids.device)[0].is_meta
    assert len({id(mask) for mask in tiny("sparse", num_layers=12)._layer_masks(ids.device)}) == 3


def test_training_works_after_sampling_in_inference_mode() -> None:
    model = tiny("sparse")
    ids, mask, tokens = example()
    with torch.inference_mode():
        model(ids, mask, tokens)
    loss, _ = text_image_loss(*model(ids, mask, tokens), ids, mask, tokens)
    loss.backward()
    assert model.image_head.weight.grad is not None


# bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"attention": "axial"}, 'attention is "axial"; it must be "causal" or "sparse"'),
        ({"width": 25}, "width 25 is not a multiple of num_heads 2"),
        ({"kernel": 4}, "kernel is 4; it must be odd"),
    ],
)
def test_configs_that_cannot_be_are_refused(config: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny(**config)


def test_text_that_does_not_fit_is_refused(tokenizer: CaptionTokenizer) -> None:
    model = tiny()
    ids, mask, tokens = example()
    with pytest.raises(InputError, match="ids have 6 positions, this transformer reads 7"):
        model(ids[:, :6], mask[:, :6], tokens)
    with pytest.raises(InputError, match="the tokenizer has 2[0-9]{2} entries, this transformer's text table has 40"):
        model.tokenizer = tokenizer
    with pytest.raises(InputError, match="has no tokenizer yet"):
        _ = model.tokenizer
