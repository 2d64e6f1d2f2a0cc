"""GLIDE: its networks against formulas written out, its byte BPE, its samplers by hand, holes that are filled."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from glide_reference import CONFIGS, TEXT, tensors_of, text_reference, unet_reference
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

from genpipe.dalle2.glide import GLIDE, GLIDEUpsampler
from genpipe.dalle2.glide_text import ByteBPE
from genpipe.dalle2.losses import cumulative_alphas
from genpipe.dalle2.sampling import DECODER, UPSAMPLER, denoise, noise_of, scheduler_for, step_generators
from genpipe.dalle2.schedulers import fast27_timesteps
from genpipe.errors import InputError
from genpipe.parts import load_part, save_part
from genpipe.published.glide_parts import decoder, upsampler

CAPTIONS = ["a corgi's hat", "two corgis in a field of flowers, and a hat on each of them"]


@pytest.fixture(scope="module")
def merges() -> str:
    """vocab.bpe with 40 merges that the library learned."""
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=256 + 40, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator([*CAPTIONS, "the corgi wore the hat that the other corgi's hat was"] * 3, trainer)
    learned = [" ".join(pair) for pair in _learned(library)]
    assert len(learned) == 40
    return "\n".join(["#version: 0.2", *learned, ""])


def _learned(library: Tokenizer) -> list[list[str]]:
    merges = json.loads(library.to_str())["model"]["merges"]
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, merges: str) -> Path:
    root = tmp_path_factory.mktemp("glide")
    for name in ("base.pt", "base_inpaint.pt", "upsample.pt", "upsample_inpaint.pt"):
        torch.save(tensors_of(name), root / name)
    (root / "vocab.bpe").write_text(merges, encoding="utf-8")
    return root


def base_of(folder: Path, name: str = "base.pt") -> GLIDE:
    return decoder(folder / name, folder / "vocab.bpe", CONFIGS["decoder"], None)


def upsampler_of(folder: Path, name: str = "upsample.pt") -> GLIDEUpsampler:
    return upsampler(folder / name, folder / "vocab.bpe", CONFIGS["upsampler"], None)


@pytest.fixture(scope="module")
def base(folder: Path) -> GLIDE:
    return base_of(folder)


def random(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows_of(text: Any) -> tuple[Tensor, Tensor, Tensor]:
    return text.embedding, text.states, text.mask


# The byte BPE ---------------------------------------------------------------------------------------------------------


def bpe_by_hand(text: str, merges: list[tuple[str, str]]) -> list[str]:
    """The tokens of one piece of text, white space and punctuation already apart."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in text.encode()]
    for left, right in merges:  # in order: the first learned goes first, wherever it is
        i = 0
        while i < len(symbols) - 1:
            if (symbols[i], symbols[i + 1]) == (left, right):
                symbols[i : i + 2] = [left + right]
            i += 1
    return symbols


def test_byte_bpe_is_that_of_the_library_in_lower_case(merges: str) -> None:
    pairs = [(line.split(" ")[0], line.split(" ")[1]) for line in merges.split("\n")[1:-1]]
    ours = ByteBPE.from_merges(merges)
    vocabulary = {token: i for i, token in enumerate(sorted(ours._library.get_vocab()))}
    library = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    names = {id_: token for token, id_ in ours._library.get_vocab().items()}
    texts = [
        "A Corgi's HAT, on  the  hat.",
        " ü ß ΟΔΟΣ 漢字 🐶\n\ttabs",
        "they'll <|endoftext|> 3.14",
        "",
        "   ",
        "\x00",
    ]
    for text in texts:
        batch = ours([text], 60)
        tokens = [names[int(id_)] for id_ in batch.ids[0, batch.mask[0]]]
        assert tokens == library.encode(text.lower()).tokens
        assert ours.decode(batch.ids[0]) == text.lower()
        assert bool((batch.ids[0, ~batch.mask[0]] == 256 + 40).all())
    for word in ("corgi", " corgis", "😀", "'s"):
        (ids, mask) = (ours([word], 20).ids[0], ours([word], 20).mask[0])
        assert [names[int(id_)] for id_ in ids[mask]] == bpe_by_hand(word, pairs)
    # Bytes have GPT-2's ids: the printable ones first; then merges in their order; then the end.
    assert ours(["!", " "], 3).ids[:, 0].tolist() == [0, 188 + 32]
    assert [ours._library.get_vocab()["".join(pair)] for pair in pairs] == list(range(256, 296))


def test_byte_bpe_pads_cuts_and_refuses(merges: str, tmp_path: Path) -> None:
    ours = ByteBPE.from_merges(merges)
    with pytest.warns(UserWarning, match="longer than the 3 tokens"):
        batch = ours(["the quick brown fox", ""], 3)
    assert batch.mask.tolist() == [[True] * 3, [False] * 3] and batch.ids[1].tolist() == [296] * 3
    ours.save(tmp_path)
    again = copy.deepcopy(ByteBPE.load(tmp_path))
    assert torch.equal(again(CAPTIONS, 30).ids, ours(CAPTIONS, 30).ids)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="tokenizer.json is damaged"):
        ByteBPE.load(tmp_path)
    with pytest.raises(InputError, match="line 2 of the byte BPE's merges, 'zz q'"):
        ByteBPE.from_merges("#version: 0.2\nzz q\n")
    with pytest.raises(InputError, match="no dropout"):
        ours(["a"], 3, dropout=0.1)


# The networks ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_text_transformer_is_the_formula(base: GLIDE) -> None:
    p, batch = tensors_of("base.pt"), base.tokenize(["a hat", ""])
    assert batch.mask.any() and not batch.mask[1].any()
    said = base.encode_text(batch)
    for row in range(2):
        added, states = text_reference(p, batch.ids[row], batch.mask[row])
        torch.testing.assert_close(said.embedding[row], added, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(said.states[row], states, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["base.pt", "base_inpaint.pt", "upsample.pt", "upsample_inpaint.pt"])
def test_network_is_the_formula(folder: Path, name: str) -> None:
    p, small, fills = tensors_of(name), name.startswith("base"), "inpaint" in name
    model: Any = base_of(folder, name) if small else upsampler_of(folder, name)
    side = 8 if small else 16
    said = model.encode_text(["a hat", "a corgi"])
    x, kept_pixels, low = random(2, 3, side, side), random(2, 3, side, side).sigmoid(), random(2, 3, 8, 8).tanh()
    kept = random(2, 1, side, side, seed=9) > 0
    condition = model.condition(None, *rows_of(said), **({"kept_pixels": kept_pixels, "kept": kept} if fills else {}))
    answer = model.denoise(x, torch.tensor([7, 991]), *([] if small else [low]), condition)
    channels = [x]
    if fills:
        channels += [(2 * kept_pixels - 1) * kept, kept.float()]
    if not small:
        channels.append(F.interpolate(low, (16, 16), mode="bilinear", align_corners=False))
    for row, t in enumerate((7, 991)):
        batch = model.tokenize([["a hat", "a corgi"][row]])
        text = text_reference(p, batch.ids[0], batch.mask[0])
        expected = unet_reference(p, torch.cat(channels, dim=1)[row], t, *text)
        assert float(expected.std()) > 0.05
        torch.testing.assert_close(answer[row], expected, rtol=1e-3, atol=2e-4)
    if fills:  # nothing known is black with a mask of zeros
        plain = model.denoise(x, torch.tensor(7), *([] if small else [low]), model.condition(None, *rows_of(said)))
        blank = {"kept_pixels": torch.zeros(1, 3, side, side), "kept": torch.zeros(1, 1, side, side)}
        empty = model.condition(None, *rows_of(said), **blank)
        torch.testing.assert_close(plain, model.denoise(x, torch.tensor(7), *([] if small else [low]), empty))


def test_what_a_pipeline_asks_of_it(base: GLIDE) -> None:
    assert base.context_length == TEXT["context_length"] and base.latent_shape == (3, 8, 8)
    assert base.clamp == 1.0 and base.resolution_of_pixels == 8 and not base.reads_image and not base.fills
    assert base.to_pixels(torch.tensor([-1.0, 0.0, 3.0])).tolist() == [0.0, 0.5, 1.0]


def test_what_does_not_fit_is_refused(base: GLIDE, folder: Path) -> None:
    said = rows_of(base.encode_text([""]))
    with pytest.raises(InputError, match="from captions alone"):
        base.condition(random(1, 6), *said)
    with pytest.raises(InputError, match="cannot fill holes"):
        base.condition(None, *said, kept_pixels=torch.zeros(1, 3, 8, 8), kept=torch.ones(1, 1, 8, 8))
    with pytest.raises(InputError, match="ByteBPE of 297 tokens"):
        base.tokenizer = ByteBPE.from_merges("")
    with pytest.raises(InputError, match="text_config needs"):
        GLIDE(8, CONFIGS["decoder"]["unet_config"], {"width": 16})
    large = upsampler_of(folder)
    with pytest.raises(InputError, match="as many seeds"):
        large.upsample(torch.zeros(2, 3, 8, 8), [1])
    with pytest.raises(InputError, match="multiples of 4"):
        large.upsample(torch.zeros(1, 3, 7, 7), [1])


def test_saved_with_its_tokenizer(base: GLIDE, folder: Path, tmp_path: Path) -> None:
    for model, cls in ((base, GLIDE), (upsampler_of(folder, "upsample_inpaint.pt"), GLIDEUpsampler)):
        save_part(model, tmp_path / cls.__name__)
        again: Any = load_part(cls, tmp_path / cls.__name__)
        assert (tmp_path / cls.__name__ / "tokenizer.json").is_file() and again.fills == model.fills
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
        assert torch.equal(again.tokenize(CAPTIONS).ids, model.tokenize(CAPTIONS).ids)


# The samplers ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_base_draws_as_the_reference_does(base: GLIDE) -> None:
    """DDPM over re-spaced steps (2102.09672, 4): x_0 clamped, learned range, guidance of the noise alone."""
    steps, scale, seed = 6, 3.0, 11
    condition = base.condition(None, *rows_of(base.encode_text(["a hat"])))
    null = base.condition(None, *rows_of(base.encode_text([""])))
    noise = noise_of([seed], base.latent_shape, DECODER)
    drawn = denoise(
        lambda x, t: base.denoise(x, t, condition), scheduler_for("unclip", base), noise, steps,
        null_predict=lambda x, t: base.denoise(x, t, null), guidance_scale=scale, clamp=base.clamp, seeds=[seed],
        stream=DECODER,
    )  # fmt: skip
    alpha_bars = cumulative_alphas("squaredcos_cap_v2", 1000).double()
    times = [round(999 * i / (steps - 1)) for i in range(steps)][::-1]
    (generator,) = step_generators([seed], DECODER)
    x = noise.double()
    for i, t in enumerate(times):
        out = base.denoise(x.float(), torch.tensor(t), condition).double()
        empty = base.denoise(x.float(), torch.tensor(t), null).double()
        eps, place = empty[:, :3] + scale * (out[:, :3] - empty[:, :3]), out[:, 3:]
        a, before = alpha_bars[t], alpha_bars[times[i + 1]] if i + 1 < steps else torch.tensor(1.0).double()
        x_0 = ((x - (1 - a).sqrt() * eps) / a.sqrt()).clamp(-1, 1)
        beta = 1 - a / before
        mean = before.sqrt() * beta / (1 - a) * x_0 + (a / before).sqrt() * (1 - before) / (1 - a) * x
        if i + 1 < steps:
            least, most = (beta * (1 - before) / (1 - a)).log(), beta.log()
            share = (place + 1) / 2
            fresh = torch.randn(1, 3, 8, 8, generator=generator)
            mean = mean + (0.5 * (share * most + (1 - share) * least)).exp() * fresh
        x = mean
    torch.testing.assert_close(base.to_pixels(drawn).double(), (x + 1) / 2, rtol=0, atol=2e-3)


@torch.no_grad()
def test_upsampler_draws_as_the_reference_does(folder: Path) -> None:
    """DDIM through the 27 steps from noise of 0.997, the small picture in 8 bits and enlarged bilinearly."""
    model, seeds, pixels = upsampler_of(folder), [3, 4], random(2, 3, 8, 8).sigmoid()
    text = model.encode_text(["a hat"])
    before = pixels.clone()
    drawn = model.upsample(pixels, seeds, text=text)
    assert drawn.shape == (2, 3, 16, 16) and torch.equal(pixels, before)
    low = (pixels * 255).round() / 127.5 - 1
    condition = model.condition(None, *(each.expand(2, *each.shape[1:]) for each in rows_of(text)))
    x, times = 0.997 * noise_of(seeds, (3, 16, 16), UPSAMPLER).double(), fast27_timesteps(1000)
    alpha_bars = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), dim=0)
    for i, t in enumerate(times):
        eps = model.denoise(x.float(), torch.tensor(t), low, condition)[:, :3].double()
        a = alpha_bars[t]
        x_0 = ((x - (1 - a).sqrt() * eps) / a.sqrt()).clamp(-1, 1)
        eps = (x - a.sqrt() * x_0) / (1 - a).sqrt()
        later = alpha_bars[times[i + 1]] if i + 1 < len(times) else torch.tensor(1.0).double()
        x = later.sqrt() * x_0 + (1 - later).sqrt() * eps
    torch.testing.assert_close(drawn.double(), (x + 1) / 2, rtol=0, atol=2e-3)
    alone = model.upsample(pixels[1:], seeds[1:], text=text)
    torch.testing.assert_close(alone, drawn[1:], rtol=0, atol=1e-3)
    assert not torch.allclose(model.upsample(pixels, seeds), drawn, atol=1e-2), "the caption must reach it"


def test_fast27_is_the_list() -> None:
    """Written out: 10 steps of 22.1 up to 199, 10 up to 399, then 3, 2, 2, and 997 for 999."""
    expected = [997, 800, 799, 600, 599, 500, 400, 399, 377, 355, 333, 311, 288, 266, 244, 222, 200]
    assert fast27_timesteps(1000) == [*expected, 199, 177, 155, 133, 111, 88, 66, 44, 22, 0]


@torch.no_grad()
def test_holes_are_filled_and_the_rest_kept(folder: Path) -> None:
    small, large = base_of(folder, "base_inpaint.pt"), upsampler_of(folder, "upsample_inpaint.pt")
    picture = random(1, 3, 16, 16).sigmoid()
    kept = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    kept[..., :8, :] = True
    fewer = kept[..., ::2, ::2]
    condition = small.condition(
        None, *rows_of(small.encode_text(["a hat"] * 2)), kept_pixels=picture[..., ::2, ::2], kept=fewer
    )
    x_0 = denoise(
        lambda x, t: small.denoise(x, t, condition), scheduler_for("unclip", small),
        noise_of([0, 1], small.latent_shape, DECODER), 4, clamp=1.0, known=condition.known, seeds=[0, 1],
        stream=DECODER,
    )  # fmt: skip
    pixels = small.to_pixels(x_0)
    given = picture[..., ::2, ::2].expand(2, -1, -1, -1)
    assert torch.equal(pixels[:, :, :4], given[:, :, :4].mul(2).sub(1).add(1).div(2))
    assert float((pixels[0] - pixels[1]).abs().mean()) > 0.01 and not torch.allclose(pixels[:, :, 4:], given[:, :, 4:])
    drawn = large.upsample(pixels, [0, 1], num_inference_steps=27, kept_pixels=picture, kept=kept)
    torch.testing.assert_close(drawn[:, :, :8], picture.expand(2, -1, -1, -1)[:, :, :8], rtol=0, atol=1e-6)
    assert large.scheduler().config.variance_type == "learned_range" and math.isfinite(float(drawn.sum()))
