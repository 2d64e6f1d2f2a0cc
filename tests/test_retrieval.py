"""Search over a folder (top-k, the cache in all its states, broken pictures) and recall over a data set, by hand."""

import json
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_parts
from PIL import Image
from safetensors.numpy import load_file, save_file

from genpipe.clip.embedding_cache import cache_path, embedding_identity
from genpipe.clip.model import CLIP
from genpipe.clip.retrieval import (
    has_faiss,
    index_folder,
    read_for_clip,
    search,
    top_k,
    top_k_by_faiss,
    top_k_by_product,
)
from genpipe.data.pack import pack
from genpipe.data.scenes import EmojiScenes
from genpipe.errors import InputError
from genpipe.evaluation.retrieval import open_source, ranks, retrieval_figures
from genpipe.images import shrink
from genpipe.parts import load_part, save_part

CAPTION = "a cat on a red background"


@pytest.fixture
def clip() -> CLIP:
    model = tiny_parts()["clip"]
    assert isinstance(model, CLIP)
    return model


def picture(path: Path, seed: int, side: int = 16) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, size=(side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five pictures, one of them in a sub-folder and of another size."""
    for number in range(4):
        picture(tmp_path / "pictures" / f"{number}.png", number)
    picture(tmp_path / "pictures" / "more" / "4.png", 4, side=33)
    return tmp_path / "pictures"


def counts(index) -> tuple[int, int, int]:
    return index.embedded, index.reused, index.dropped


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Top-k ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
@pytest.mark.parametrize("k", [1, 5, 100])
def test_top_k_is_what_sorting_everything_gives(rows, k):
    generator = np.random.default_rng(0)
    embeddings = generator.integers(-2, 3, size=(100, 4)).astype(np.float32)  # whole numbers: exact, with many ties
    queries = generator.integers(-2, 3, size=(3, 4)).astype(np.float32)
    scores, found = top_k_by_product(embeddings, queries, k, rows)
    for query, row_scores, row_found in zip(queries, scores, found, strict=True):
        products = embeddings @ query
        expected = sorted(range(100), key=lambda i: (-products[i], i))[:k]  # noqa: B023
        assert row_found.tolist() == expected and np.array_equal(row_scores, products[expected])


def test_top_k_returns_all_where_there_are_fewer_and_refuses_nonsense():
    embeddings = np.eye(3, dtype=np.float32)
    before = embeddings.copy()
    scores, found = top_k(embeddings, np.array([[0.0, 1.0, 0.5]], np.float32), 10)
    assert found.tolist() == [[1, 2, 0]] and scores.tolist() == [[1.0, 0.5, 0.0]] and np.array_equal(embeddings, before)
    with pytest.raises(InputError, match="at least 1, got 0"):
        top_k(embeddings, embeddings, 0)
    with pytest.raises(InputError, match=r"\(3, 3\) cannot be searched with queries of shape \(1, 2\)"):
        top_k(embeddings, np.ones((1, 2), np.float32), 1)


def test_faiss_finds_the_same_where_it_is_installed():
    generator = np.random.default_rng(0)
    embeddings, queries = (generator.standard_normal((n, 8), dtype=np.float32) for n in (500, 3))
    if not has_faiss():
        with pytest.raises(ImportError):
            top_k_by_faiss(embeddings, queries, 5)
        return
    scores, found = top_k_by_faiss(embeddings, queries, 5)
    expected_scores, expected = top_k_by_product(embeddings, queries, 5, 64)
    assert np.array_equal(found, expected) and np.allclose(scores, expected_scores, atol=1e-5)


# Searching a folder ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def similarity(clip: CLIP, path: Path) -> float:
    image, text = clip.embed_image(read_for_clip(clip, path)[None])[0], clip.encode_text(CAPTION).embedding[0]
    return float(image @ text / image.norm() / text.norm())


def test_search_orders_by_cosine_similarity(clip, folder):
    index = index_folder(clip, folder, chunk_size=2)
    expected = sorted(((similarity(clip, path), path) for path in index.paths), reverse=True)
    assert len(expected) == 5 and folder / "more" / "4.png" in index.paths
    found = search(clip, index, CAPTION, k=3)
    assert [path for _, path in found] == [path for _, path in expected[:3]]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected[:3]], abs=1e-5)
    assert len(search(clip, index, CAPTION, k=99)) == 5
    with pytest.raises(InputError, match="at least 1, got 0"):
        search(clip, index, CAPTION, k=0)


def test_only_new_and_changed_pictures_are_embedded(clip, folder):
    seen = []
    first = index_folder(clip, folder, report=lambda *state: seen.append(state))
    assert counts(first) == (5, 0, 0) and seen == [(5, 5)]
    assert first.cache == cache_path(folder, embedding_identity(clip)) and first.cache.parent == folder.parent
    assert names(folder) == ["0.png", "1.png", "2.png", "3.png", "more"]  # the folder itself is never written
    written = first.cache.stat().st_mtime_ns
    assert first.cache.stat().st_mode == (folder / "0.png").stat().st_mode  # readable to whom the person's files are

    second = index_folder(clip, folder, report=lambda *state: seen.append(state))
    assert counts(second) == (0, 5, 0) and len(seen) == 1
    assert second.paths == first.paths and np.array_equal(second.embeddings, first.embeddings)
    assert first.cache.stat().st_mtime_ns == written

    picture(folder / "new.png", 9)
    (folder / "1.png").unlink()
    picture(folder / "2.png", 7)
    os.utime(folder / "2.png", ns=(0, (folder / "2.png").stat().st_mtime_ns + 1))
    third = index_folder(clip, folder)
    assert counts(third) == (2, 3, 1)
    assert [path.name for path in third.paths] == ["0.png", "2.png", "3.png", "4.png", "new.png"]
    again = index_folder(clip, folder)
    assert counts(again) == (0, 5, 0) and np.array_equal(again.embeddings, third.embeddings)
    fresh = index_folder(clip, folder, cache=folder.parent / "elsewhere")
    assert counts(fresh) == (5, 0, 0) and fresh.paths == third.paths
    assert np.allclose(fresh.embeddings, third.embeddings, atol=1e-6)

    (folder / "0.png").unlink()
    assert counts(index_folder(clip, folder)) == (0, 4, 1)
    assert counts(index_folder(clip, folder)) == (0, 4, 0)


def test_the_cache_survives_another_way_to_the_folder(clip, folder, monkeypatch):
    index_folder(clip, folder)
    monkeypatch.chdir(folder)
    index = index_folder(clip, ".")
    assert counts(index) == (0, 5, 0) and Path("0.png") in index.paths
    moved = folder.parent / "other"
    cache = index.cache
    folder.rename(moved)
    assert cache is not None
    cache.rename(cache.with_name(cache.name.replace("pictures", "other")))
    assert counts(index_folder(clip, moved)) == (0, 5, 0)


def test_another_clip_or_another_preprocessing_has_a_cache_of_its_own(clip, folder, tmp_path):
    index_folder(clip, folder)
    other = tiny_parts(seed=1)["clip"]
    squashed = CLIP(**{**clip.config, "resize_mode": "squash"}).eval()
    squashed.load_state_dict(clip.state_dict())
    for model in (other, squashed):
        assert counts(index_folder(model, folder)) == (5, 0, 0)
        assert counts(index_folder(model, folder)) == (0, 5, 0)
    assert counts(index_folder(clip, folder)) == (0, 5, 0)
    save_part(clip, tmp_path / "clip")
    loaded = load_part(CLIP, tmp_path / "clip")
    assert counts(index_folder(loaded, folder)) == (0, 5, 0)  # a saved CLIP is the same CLIP


def test_broken_pictures_are_skipped_and_found_once_repaired(clip, folder):
    (folder / "a.png").write_bytes(b"junk")
    (folder / "z.png").symlink_to("nowhere")
    index = index_folder(clip, folder, chunk_size=2)
    assert counts(index) == (5, 0, 0) and [path.name for path, _ in index.skipped] == ["a.png", "z.png"]
    assert "a.png' is not a picture" in index.skipped[0][1] and "no file" in index.skipped[1][1]
    assert len(index_folder(clip, folder).skipped) == 2
    picture(folder / "a.png", 11)
    assert counts(index_folder(clip, folder)) == (1, 5, 0)


@pytest.mark.parametrize("damage", ["cut", "junk", "other", "shapes", "nan", "names"])
def test_a_damaged_cache_is_made_anew(clip, folder, damage):
    cache = index_folder(clip, folder).cache
    assert cache is not None
    data, tables = cache.read_bytes(), load_file(cache)
    about = {"format": "genpipe picture embeddings 1", "clip": embedding_identity(clip)}
    if damage in ("cut", "junk"):
        cache.write_bytes(data[:-9] if damage == "cut" else b"\x80\x04 a pickle, say")
    elif damage == "other":
        save_file(tables, cache, metadata={**about, "clip": "0" * 64})
    elif damage == "shapes":
        save_file({**tables, "embeddings": tables["embeddings"][:, :-1].copy()}, cache, metadata=about)
    elif damage == "names":
        save_file({**tables, "names": tables["names"][:-6].copy()}, cache, metadata=about)
    else:
        tables["embeddings"][3] = np.nan
        save_file(tables, cache, metadata=about)
    if damage == "nan":  # one bad row is not worth a word
        assert counts(index_folder(clip, folder)) == (1, 4, 0)
    else:
        with pytest.warns(UserWarning, match="are not used .* made anew"):
            assert counts(index_folder(clip, folder)) == (5, 0, 0)
    assert counts(index_folder(clip, folder)) == (0, 5, 0)


def test_a_place_that_cannot_be_written(clip, folder, tmp_path, monkeypatch):
    expected = index_folder(clip, folder, cache=tmp_path / "a" / "b")
    assert expected.cache is not None and expected.cache.parent == tmp_path / "a" / "b"
    with pytest.raises(InputError, match="0.png' cannot be written .*choose another"):
        index_folder(clip, folder, cache=folder / "0.png")

    monkeypatch.chdir(folder)
    here = Path("/proc/self/cwd")  # a way to the folder beside which nobody can write, not even root
    if not here.is_dir():
        here = folder
        folder.parent.chmod(0o500)
    with pytest.warns(UserWarning, match=r"cannot be written \(.*--cache"):
        index = index_folder(clip, here)
    folder.parent.chmod(0o700)
    assert index.cache is None and counts(index) == (5, 0, 0)
    assert np.allclose(index.embeddings, expected.embeddings, atol=1e-6)
    with warnings.catch_warnings():  # where nothing is to be written, nothing is said
        warnings.simplefilter("error")
        assert counts(index_folder(clip, folder, cache=tmp_path / "a" / "b")) == (0, 5, 0)


def test_an_interrupted_index_goes_on_where_it_was(clip, folder):
    def stop(done: int, total: int) -> None:
        if done >= 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index_folder(clip, folder, chunk_size=1, report=stop)
    assert counts(index_folder(clip, folder)) == (2, 3, 0)
    assert [name for name in names(folder.parent) if name.endswith(".tmp")] == []


def test_two_at_once_are_harmless(clip, folder):
    results = []

    def work() -> None:
        for _ in range(3):
            results.append(index_folder(clip, folder, chunk_size=1))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6
    assert all(np.allclose(index.embeddings, results[0].embeddings, atol=1e-6) for index in results)
    assert counts(index_folder(clip, folder)) == (0, 5, 0)


def test_folders_that_cannot_be_searched_are_refused(clip, folder, tmp_path):
    with pytest.raises(InputError, match="no file or folder .*missing"):
        index_folder(clip, tmp_path / "missing")
    with pytest.raises(InputError, match="is a file; give a folder"):
        index_folder(clip, folder / "0.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="No pictures"):
        index_folder(clip, tmp_path / "empty")
    (tmp_path / "empty" / "a.png").write_bytes(b"")
    with pytest.raises(InputError, match="None of the 1 pictures .* can be read; the first: .*a.png' is empty"):
        index_folder(clip, tmp_path / "empty")
    with pytest.raises(InputError, match="chunk_size"):
        index_folder(clip, folder, chunk_size=0)


def test_broken_weights_are_told_and_nothing_is_kept(clip, folder):
    with torch.no_grad():
        clip.towers.visual.proj[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="embedding of a picture is not finite"):
        index_folder(clip, folder)
    assert names(folder.parent) == ["pictures"]


class SmallMemoryCLIP(CLIP):
    """A CLIP on a machine where more than two pictures at once do not fit."""

    def embed_image(self, pixels: torch.Tensor) -> torch.Tensor:
        if len(pixels) > 2:
            raise MemoryError
        return super().embed_image(pixels)


def test_chunk_halves_when_memory_runs_out(clip, folder):
    expected = index_folder(clip, folder, cache=folder.parent / "other")
    small = SmallMemoryCLIP(**clip.config).eval()
    small.load_state_dict(clip.state_dict())
    small.tokenizer = clip.tokenizer
    index = index_folder(small, folder, chunk_size=8)
    assert counts(index) == (5, 0, 0) and np.allclose(index.embeddings, expected.embeddings, atol=1e-6)


def test_names_that_are_not_utf_8_are_kept_apart(clip, folder):
    if sys.platform != "linux":
        return
    strange = Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png"))
    strange.write_bytes((folder / "0.png").read_bytes())
    assert counts(index_folder(clip, folder)) == (6, 0, 0)
    index = index_folder(clip, folder)
    assert counts(index) == (0, 6, 0) and strange in index.paths


def test_very_large_pictures_shrink_by_a_whole_factor():
    large = Image.new("L", (5000, 4000))
    assert shrink(large, 224).size == (1250, 1000) and shrink(large, 4000) is large
    few = Image.new("L", (4000, 4000))
    assert shrink(few, 16) is few


# Recall over a data set -----------------------------------------------------------------------------------------------


def by_hand(image: np.ndarray, text: np.ndarray, captions: list[int], pictures: list[int]) -> tuple[list, list]:
    """Ranks by a plain loop."""
    products = image @ text.T
    count = len(products)

    def rank(own: float, others: list[float]) -> float:
        return 1 + sum(o > own + 1e-6 for o in others) + sum(abs(o - own) <= 1e-6 for o in others) / 2

    def wrong(i: int) -> list[int]:
        return [j for j in range(count) if captions[i] != captions[j] and pictures[i] != pictures[j]]

    return (
        [rank(products[i, i], [products[i, j] for j in wrong(i)]) for i in range(count)],
        [rank(products[i, i], [products[j, i] for j in wrong(i)]) for i in range(count)],
    )


@pytest.mark.parametrize("block", [1, 3, 64])
def test_ranks_are_what_a_plain_loop_counts(block):
    generator = np.random.default_rng(0)
    image, text = (generator.integers(-1, 2, size=(17, 5)).astype(np.float32) for _ in range(2))  # many ties
    captions, pictures = (generator.integers(0, 12, size=17).tolist() for _ in range(2))
    groups = (torch.tensor(captions), torch.tensor(pictures))
    found = ranks(image, text, groups, block, torch.device("cpu"))
    expected = by_hand(image, text, captions, pictures)
    assert found[0].tolist() == expected[0] and found[1].tolist() == expected[1]


def test_a_clip_that_sees_no_difference_ends_in_the_middle():
    same = np.ones((9, 4), dtype=np.float32) / 2
    groups = (torch.arange(9), torch.arange(9))
    for found in ranks(same, same, groups, 4, torch.device("cpu")):
        assert found.tolist() == [5.0] * 9


def scene_pairs(count: int) -> list[tuple[np.ndarray, str]]:
    scenes = EmojiScenes(size=16, split="heldout", seed=2)
    pixels, captions = scenes.batch(0, count)
    return list(zip(pixels, captions, strict=True))


def test_figures_by_hand_and_in_any_chunks(clip):
    pairs = scene_pairs(12)
    pairs[5] = (pairs[5][0], pairs[2][1])  # two pictures of one caption
    pairs[7] = (pairs[0][0], pairs[7][1])  # two captions of one picture
    with torch.no_grad():
        pixels = torch.from_numpy(np.stack([p for p, _ in pairs])).float() / 255
        image = clip.encode_image(pixels).normalized.numpy()
        text = clip.encode_text([caption for _, caption in pairs]).normalized.numpy()
    captions = [[c for _, c in pairs].index(caption) for _, caption in pairs]
    pictures = [[p.tobytes() for p, _ in pairs].index(p.tobytes()) for p, _ in pairs]
    expected = by_hand(image, text, captions, pictures)
    for chunk, block in ((128, 2048), (5, 3)):
        figures = retrieval_figures(clip, iter(pairs), recalls=(1, 5), chunk_size=chunk, block_size=block)
        assert (figures["pairs"], figures["distinct_captions"], figures["distinct_pictures"]) == (12, 11, 11)
        for way, hand in zip(("picture_to_caption", "caption_to_picture"), expected, strict=True):
            assert figures[way] == {
                "recall@1": pytest.approx(np.mean(np.array(hand) <= 1)),
                "recall@5": pytest.approx(np.mean(np.array(hand) <= 5)),
                "median_rank": np.median(hand),
            }
    json.dumps(figures)


def test_pairs_pass_by_and_are_not_held(clip):
    alive: list[int] = []

    class Pixels(np.ndarray):
        def __del__(self) -> None:
            alive.append(-1)

    most = 0

    def stream():
        nonlocal most
        for number in range(120):
            pixels = np.full((3, 16, 16), number % 251, dtype=np.uint8).view(Pixels)
            alive.append(1)
            most = max(most, sum(alive))
            yield pixels, f"picture {number}"

    assert retrieval_figures(clip, stream(), chunk_size=8, block_size=64)["pairs"] == 120
    assert most <= 3 * 8 + 2


def test_figures_refuse_what_cannot_be(clip):
    with pytest.raises(InputError, match="at least one picture"):
        retrieval_figures(clip, [])
    for wrong in ({"recalls": (0, 1)}, {"recalls": ()}, {"chunk_size": 0}, {"block_size": 0}):
        with pytest.raises(InputError, match="start at 1"):
            retrieval_figures(clip, scene_pairs(1), **wrong)
    with torch.no_grad():
        clip.towers.visual.proj[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        retrieval_figures(clip, scene_pairs(2))


def test_sources_of_every_kind_give_the_same_pairs(clip, tmp_path):
    for number, (pixels, caption) in enumerate(scene_pairs(6)):
        Image.fromarray(pixels.transpose(1, 2, 0)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(caption)
    (tmp_path / "6.png").write_bytes(b"junk")
    (tmp_path / "6.txt").write_text("junk")
    packed = pack(tmp_path, tmp_path / "set", seed=None)
    for source, skipped in ((str(tmp_path / "set-00000.tar"), 0), (str(tmp_path), 1)):
        if skipped:
            packed.shards[0].unlink()
        opened = open_source(clip, source)
        found = list(opened.pairs)
        assert [caption for _, caption in found] == [caption for _, caption in scene_pairs(6)]
        assert all(np.array_equal(one[0], other[0]) for one, other in zip(found, scene_pairs(6), strict=True))
        assert opened.report.read == 6 and sum(opened.report.skipped.values()) == skipped
    assert len(list(open_source(clip, str(tmp_path), 2).pairs)) == 2
    assert len(list(open_source(clip, "scenes", 3).pairs)) == 3
    with pytest.raises(InputError, match="never end"):
        open_source(clip, "scenes")
    with pytest.raises(InputError, match="no file or folder"):
        open_source(clip, str(tmp_path / "missing"))


@pytest.mark.slow
def test_the_benchmark_of_shards_runs() -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "shards.py"
    command = [sys.executable, str(script), "--samples", "60", "--shards", "2", "--repeats", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["genpipe_over_webdataset"] > 0
