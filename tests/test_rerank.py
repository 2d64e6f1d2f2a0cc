"""Reranking: cosine similarity in chunks, streaming top-k, memory running out, broken numbers."""

import weakref

import pytest
import torch

from genpipe.clip.architecture import nano_architecture
from genpipe.clip.chunks import is_out_of_memory
from genpipe.clip.model import CLIP
from genpipe.clip.rerank import TopK, rerank, score
from genpipe.errors import InputError
from genpipe.tokenizer import CaptionTokenizer

CAPTION = "two tigers on a red background"


class SmallMemoryCLIP(CLIP):
    """A CLIP on a machine where more than `limit` pictures at once do not fit."""

    limit = 10**9
    error: BaseException = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    def embed_image(self, pixels: torch.Tensor) -> torch.Tensor:
        if len(pixels) > self.limit:
            raise self.error
        self.sizes.append(len(pixels))
        return super().embed_image(pixels)


@pytest.fixture
def clip() -> SmallMemoryCLIP:
    torch.manual_seed(0)
    tokenizer = CaptionTokenizer.train([CAPTION] * 5, vocab_size=300)
    architecture = nano_architecture(
        tokenizer.vocab_size, image_size=16, width=48, vision_layers=1, text_layers=1, embed_dim=24
    )
    clip = SmallMemoryCLIP(architecture).eval()
    clip.tokenizer = tokenizer
    clip.sizes = []
    return clip


def pictures(count: int, size: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(count))


def test_score_is_the_cosine(clip):
    pixels = pictures(5)
    before = pixels.clone()
    with torch.no_grad():
        expected = clip.encode_image(pixels).normalized @ clip.encode_text([CAPTION]).normalized[0]
    scores = score(clip, pixels, CAPTION)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)
    assert scores.dtype == torch.float32 and not scores.requires_grad and torch.equal(pixels, before)


def test_caption_or_embedding_scaled_at_will(clip):
    pixels = pictures(4)
    embedding = clip.encode_text([CAPTION]).embedding.detach()
    for text in (embedding, embedding[0], 100 * embedding[0]):
        torch.testing.assert_close(score(clip, pixels, text), score(clip, pixels, CAPTION))


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 64])
def test_chunks_do_not_matter(clip, chunk_size):
    pixels = pictures(10)
    whole = score(clip, pixels, CAPTION, chunk_size=100)
    torch.testing.assert_close(score(clip, pixels, CAPTION, chunk_size), whole, rtol=0, atol=1e-6)
    pieces = [pixels[:1], pixels[1:6], pixels[6:6], pixels[6:]]
    clip.sizes.clear()
    torch.testing.assert_close(score(clip, iter(pieces), CAPTION, chunk_size), whole, rtol=0, atol=1e-6)
    assert max(clip.sizes) <= chunk_size and len(clip.sizes) == -(-10 // chunk_size)  # small pieces are put together


def test_pictures_of_several_sizes(clip):
    pieces = [pictures(2, 16), pictures(1, 40), torch.rand(1, 3, 20, 33)]
    scores = score(clip, pieces, CAPTION)
    singly = torch.cat([score(clip, piece, CAPTION) for piece in pieces])
    torch.testing.assert_close(scores, singly, rtol=0, atol=1e-6)
    assert clip.sizes[0] == 4


def test_rerank_keeps_the_best_with_their_pictures(clip):
    pixels = pictures(20)
    scores = score(clip, pixels, CAPTION)
    ranking = rerank(clip, CAPTION, pixels.split(6), k=4, chunk_size=5)
    best = scores.argsort(descending=True)[:4].tolist()
    assert ranking.indices == best and [index for index, _ in ranking.pairs] == best
    assert ranking.scores == sorted(ranking.scores, reverse=True)
    assert all(torch.equal(picture, pixels[index]) for picture, index in zip(ranking.pixels, best, strict=True))
    assert rerank(clip, CAPTION, pixels, k=4, keep_pixels=False).pixels == []


def test_fewer_candidates_than_asked_for(clip):
    assert len(rerank(clip, CAPTION, pictures(3), k=10).indices) == 3
    assert rerank(clip, CAPTION, [], k=2).pairs == []
    assert score(clip, [], CAPTION).shape == (0,)


def test_thousands_of_candidates_are_never_held(clip):
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def stream():
        nonlocal most
        for index in range(2000):
            most = max(most, sum(reference() is not None for reference in alive))
            picture = torch.full((1, 3, 16, 16), (index % 97) / 97)
            alive.append(weakref.ref(picture))
            yield picture

    ranking = rerank(clip, CAPTION, stream(), k=2, chunk_size=50)
    assert len(alive) == 2000 and len(ranking.pixels) == 2 and most <= 2 * 50 + 2
    # A kept picture is a copy of its own, so its chunk can go.
    assert all(picture.untyped_storage().nbytes() == 3 * 16 * 16 * 4 for picture in ranking.pixels)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
        torch.OutOfMemoryError("HIP out of memory"),
        MemoryError(),
    ],
)
def test_chunk_halves_when_memory_runs_out(clip, error):
    pixels = pictures(20)
    whole = score(clip, pixels, CAPTION)
    clip.limit, clip.error = 3, error
    clip.sizes.clear()
    torch.testing.assert_close(score(clip, pixels, CAPTION, chunk_size=16), whole, rtol=0, atol=1e-6)
    assert sum(clip.sizes) == 20 and max(clip.sizes) == 2
    assert is_out_of_memory(error)


def test_other_errors_and_the_last_picture_are_not_swallowed(clip):
    clip.limit = 0
    with pytest.raises(RuntimeError, match="allocate"):
        score(clip, pictures(4), CAPTION)
    clip.error = RuntimeError("shapes differ")
    with pytest.raises(RuntimeError, match="shapes differ"):
        score(clip, pictures(4), CAPTION)


def test_broken_numbers_name_their_stage(clip):
    bad = pictures(3)
    bad[1, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match="candidates' pixels"):
        score(clip, bad, CAPTION)
    with pytest.raises(InputError, match="text embedding"):
        score(clip, pictures(3), torch.full((24,), float("inf")))
    with torch.no_grad():
        clip.towers.visual.proj[0, 0] = float("nan")
    with pytest.raises(InputError, match="image embedding"):
        score(clip, pictures(3), CAPTION)
    with pytest.raises(InputError, match="from number 7 on is NaN"):
        TopK(2).update([0.1, float("nan")], None, 7)


def test_bad_arguments(clip):
    with pytest.raises(InputError, match="chunk_size"):
        score(clip, pictures(2), CAPTION, chunk_size=0)
    with pytest.raises(InputError, match="at least 1, not 0"):
        rerank(clip, CAPTION, pictures(2), k=0)
    with pytest.raises(InputError, match="24 numbers"):
        score(clip, pictures(2), torch.zeros(23))
    with pytest.raises(InputError, match=r"\[0, 1\]"):
        score(clip, pictures(2) * 255, CAPTION)


def test_top_k_over_a_stream():
    best = TopK(3)
    for start in range(0, 2000, 500):
        best.update(torch.arange(start, start + 500) % 97, None, start)
    assert best.result() == [(96.0, 96, None), (96.0, 193, None), (96.0, 290, None)]


def test_top_k_ties_go_to_the_lower_index():
    best = TopK(2)
    best.update([1.0, 2.0], ["a", "b"], 10)
    best.update(torch.tensor([2.0, 2.0]), ["c", "d"], 0)
    assert best.result() == [(2.0, 0, "c"), (2.0, 1, "d")]
    assert best.result() == best.result()
