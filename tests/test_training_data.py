"""Batches by number: the same on any process, none twice, none left out, from every kind of source."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_recipes import tiny_recipe, write_pictures, write_shards

from genpipe.data.samples import Report
from genpipe.data.scenes import EmojiScenes, Scene, is_held_out
from genpipe.errors import InputError
from genpipe.training.batches import BatchStream, SceneBatches
from genpipe.training.config import DataConfig, Recipe
from genpipe.training.data import Batch, captions_of, check_source, is_shards, pairs_of, twin_pairs
from genpipe.training.validation import Validation


def collate(pictures: np.ndarray, captions: list[str], generator: np.random.Generator) -> Batch:
    """Pictures, a number that stands for the captions, and one draw."""
    return {
        "pixels": torch.from_numpy(np.ascontiguousarray(pictures)),
        "words": torch.tensor([sum(caption.encode()) for caption in captions]),
        "draw": torch.tensor(generator.random()),
    }


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("sources")
    pictures = write_pictures(folder / "pictures", 7)
    shards = write_shards(folder / "shards", pictures, 3)
    return {"scenes": "scenes", "folder": str(pictures), "shards": str(shards / "{00000..00002}.tar")}


def recipe_of(source: str, **data: object) -> Recipe:
    recipe = tiny_recipe("dvae", batch_size=2)
    recipe.data = DataConfig(source=source, size=16, **data)  # type: ignore[arg-type]
    return recipe


def same(one: Batch, other: Batch) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_batch_is_a_pure_function_of_its_number() -> None:
    data = DataConfig(size=16)
    batches = SceneBatches(data, 4, collate)
    scenes = EmojiScenes(size=16, seed=0)
    for number in (5, 0):
        expected = torch.from_numpy(scenes.batch(number * 4, 4)[0])
        assert torch.equal(batches[number]["pixels"], expected)
    assert batches[5]["pixels"].shape == (4, 3, 16, 16) and batches[5]["pixels"].dtype == torch.uint8
    assert same(batches[5], SceneBatches(data, 4, collate)[5]) and not same(batches[5], batches[6])


def test_hard_negatives_fill_their_share_with_twins_and_draw_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[bool] = []
    draw = EmojiScenes.draw

    def noted(self: EmojiScenes, scene: Scene) -> np.ndarray:
        drawn.append(is_held_out(scene))
        return draw(self, scene)

    monkeypatch.setattr(EmojiScenes, "draw", noted)
    for share, batch_size, pairs in ((0.5, 8, 2), (1.0, 9, 4), (0.0, 4, 0), (0.99, 2, 0)):
        data = DataConfig(size=16, hard_negatives=share, twin_shares=[0.0, 0.0, 1.0, 0.0, 0.0])
        drawn.clear()
        batch = SceneBatches(data, batch_size, collate)[3]
        assert len(batch["pixels"]) == batch_size == len(drawn) and twin_pairs(data, batch_size) == pairs
        assert not any(drawn)  # nothing held out
        corners = batch["pixels"][:, :, 0, 0].float()
        same_words = [bool(batch["words"][2 * pair] == batch["words"][2 * pair + 1]) for pair in range(pairs)]
        assert all((corners[2 * pair] - corners[2 * pair + 1]).abs().max() > 16 for pair in range(pairs))
        assert not any(same_words)  # another background, in picture and caption
    assert twin_pairs(DataConfig(source="pictures", hard_negatives=1.0), 8) == 0


def test_the_first_twins_speak_plainly() -> None:
    captions: list[str] = []

    def listen(pictures: np.ndarray, words: list[str], generator: np.random.Generator) -> Batch:
        captions.extend(words)
        return {}

    data = DataConfig(size=16, hard_negatives=1.0, twin_shares=[1.0, 0.0, 0.0, 0.0, 0.0], plain_batches=2)
    batches = SceneBatches(data, 64, listen)
    counts = []
    for numbers in ((0, 1), (2, 3)):
        captions.clear()
        for number in numbers:
            batches[number]
        counts.append(sum(" right of " in caption or " below " in caption for caption in captions))
    assert counts[0] < counts[1]


@pytest.mark.parametrize("source", ["scenes", "folder", "shards"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_goes_on_where_another_stopped(sources: dict[str, str], source: str, workers: int) -> None:
    recipe = recipe_of(sources[source], workers=workers, crop="stage_1")
    whole = list(BatchStream(recipe, collate, seen=0, count=7))
    assert len(whole) == 7
    for seen in (3, 4):
        rest = list(BatchStream(recipe, collate, seen=seen, count=7 - seen))
        assert len(rest) == 7 - seen
        assert all(same(ours, theirs) for ours, theirs in zip(rest, whole[seen:], strict=True))
    assert list(BatchStream(recipe, collate, seen=7, count=0)) == []


def test_processes_share_out_the_batches_of_one(sources: dict[str, str]) -> None:
    for source in ("scenes", "folder"):
        recipe = recipe_of(sources[source])
        one = list(BatchStream(recipe, collate, seen=0, count=6))
        two = [list(BatchStream(recipe, collate, seen=0, count=3, rank=rank, world=2)) for rank in range(2)]
        assert all(same(one[2 * i + rank], two[rank][i]) for i in range(3) for rank in range(2))
        late = [list(BatchStream(recipe, collate, seen=2, count=2, rank=rank, world=2)) for rank in range(2)]
        assert all(same(one[2 + 2 * i + rank], late[rank][i]) for i in range(2) for rank in range(2))
    recipe = recipe_of(sources["shards"])  # a stream: the ranks read different shards
    shares = [
        {int(word) for batch in islice(BatchStream(recipe, collate, 0, 20, rank, 3), 1) for word in batch["words"]}
        for rank in range(3)
    ]
    assert sum(map(len, shares)) == len(set.union(*shares))


def test_an_epoch_shows_every_picture_once_and_the_next_in_another_order(sources: dict[str, str]) -> None:
    recipe = recipe_of(sources["folder"])
    recipe.run.batch_size = 7
    first, second = BatchStream(recipe, collate, seen=0, count=2)
    assert len(set(first["words"].tolist())) == 7 and sorted(first["words"]) == sorted(second["words"])
    assert first["words"].tolist() != second["words"].tolist()


def test_a_stream_leaves_torchs_own_generator_alone(sources: dict[str, str]) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for source in sources.values():
        next(BatchStream(recipe_of(source), collate, seen=0, count=2))
    assert torch.equal(torch.get_rng_state(), before)


def test_what_could_not_be_read_is_reported(tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "pictures", 4)
    (pictures / "02.png").write_bytes(b"")
    (pictures / "03.txt").unlink()
    stream = BatchStream(recipe_of(str(pictures)), collate, seen=0, count=3)
    assert len(list(stream)) == 3
    assert stream.report().skipped == {"no caption": 1, "picture cannot be read": 1}
    shards = write_shards(tmp_path / "shards", pictures)
    stream = BatchStream(recipe_of(str(shards)), collate, seen=0, count=3)
    assert len(list(stream)) == 3 and set(stream.report().skipped) == {"no caption", "picture cannot be read"}
    assert BatchStream(recipe_of("scenes"), collate, seen=0, count=1).report().skipped == {}


@pytest.mark.parametrize("workers", [0, 2])
def test_what_all_processes_and_their_workers_skip_is_counted_once(tmp_path: Path, workers: int) -> None:
    pictures = write_pictures(tmp_path / "pictures", 24)
    for number in range(0, 24, 5):
        (pictures / f"{number:02}.png").write_bytes(b"no picture")
    (pictures / "07.txt").unlink()
    expected = {"no caption": 1, "picture cannot be read": 5}
    for source in (pictures, write_shards(tmp_path / "shards", pictures, 4)):
        recipe = recipe_of(str(source), workers=workers)
        total = Report()
        for seen, count in ((0, 11), (22, 9)):  # of two processes, twice: 80 pairs, each process several epochs
            for rank in range(2):
                stream = BatchStream(recipe, collate, seen=seen, count=count, rank=rank, world=2)
                assert len(list(stream)) == count
                total.add(stream.report())
        assert (total.read, total.skipped) == (80, expected), source
        assert "no caption (first: " in str(total)


def test_an_error_in_a_worker_keeps_its_one_sentence(tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "pictures", 3)
    for path in pictures.glob("*.png"):
        path.write_bytes(b"no picture")
    sentence = r"^No sample can be read from the 2 shards like .*3 picture cannot be read.*\.$"
    for workers in (0, 1):
        recipe = recipe_of(str(write_shards(tmp_path / f"shards{workers}", pictures)), workers=workers)
        with pytest.raises(InputError, match=sentence):
            BatchStream(recipe, collate, seen=0, count=1)


def test_several_sources_give_their_shares(sources: dict[str, str], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for number in range(30):
        Image.new("RGB", (16, 16)).save(other / f"{number}.png")
        (other / f"{number}.txt").write_text("black")
    joined = f"{sources['shards']}=1::{write_shards(tmp_path / 'others', other, 1)}=3"
    check_source(DataConfig(source=joined, validation=joined))
    assert [caption for _, caption in pairs_of(joined, 16, 8)].count("black") == 6
    assert captions_of(DataConfig(source=joined, size=16), 8).count("black") == 6
    words = torch.cat([batch["words"] for batch in BatchStream(recipe_of(joined), collate, seen=0, count=100)])
    assert 0.65 < float((words == sum(b"black")).float().mean()) < 0.85
    for bad, complaint in ((f"{joined}::{sources['folder']}", "is no webdataset shards"), (f"{joined}0x", "a weight")):
        with pytest.raises(InputError, match=complaint):
            check_source(DataConfig(source=bad))


def test_emphasis_is_for_training_and_not_for_its_figures() -> None:
    plain, hard = (DataConfig(size=16, objects="common", emphasis=names) for names in ("", "sun, cat,"))
    captions = captions_of(hard, 200)
    assert captions != captions_of(plain, 200) and sum("cat" in c or "sun" in c for c in captions) > 25
    assert Validation(hard, 9).pairs()[1] == Validation(plain, 9).pairs()[1]
    for other in ({"faint_share": 1.0}, {"blended_share": 1.0}):
        data = DataConfig(size=16, objects="common", **other)  # type: ignore[arg-type]
        assert captions_of(data, 20) != captions_of(plain, 20)
        assert Validation(data, 9).pairs()[1] == Validation(plain, 9).pairs()[1]
    with pytest.raises(InputError, match="'yeti' is to be emphasised"):
        check_source(DataConfig(emphasis="cat, yeti"))


def test_sources_are_told_apart_and_checked(sources: dict[str, str], tmp_path: Path) -> None:
    assert is_shards("a/{00..10}.tar") and is_shards(str(Path(sources["shards"]).parent))
    assert not any(map(is_shards, ("scenes", sources["folder"], "pictures.csv", str(tmp_path))))
    for source in sources.values():
        check_source(DataConfig(source=source))
    for missing in ("/nowhere", "/nowhere/{0..1}.tar"):
        for data in (DataConfig(source=missing), DataConfig(validation=missing)):
            with pytest.raises(InputError, match="nowhere"):
                check_source(data)
    (tmp_path / "broken.tar").touch()
    with pytest.raises(InputError, match="No sample can be read from .*broken.tar"):
        pairs_of(str(tmp_path / "broken.tar"), 16, 5)
    (tmp_path / "broken.tar").unlink()
    with pytest.raises(InputError, match="No pictures were found"):
        BatchStream(recipe_of(str(tmp_path)), collate, seen=0, count=1)


def test_captions_for_a_tokenizer(sources: dict[str, str]) -> None:
    from_scenes = captions_of(DataConfig(size=16), 5)
    assert len(from_scenes) == 5 and from_scenes == captions_of(DataConfig(size=16), 5)
    assert from_scenes != captions_of(DataConfig(size=16, seed=1), 5)
    for source in ("folder", "shards"):
        captions = captions_of(DataConfig(source=sources[source], size=16), 100)
        assert sorted(captions) == [f"picture number {i} of one colour" for i in range(7)]
        assert len(captions_of(DataConfig(source=sources[source], size=16), 2)) == 2


def test_validation_pictures_are_held_out_or_called_seen(sources: dict[str, str]) -> None:
    held_out = Validation(DataConfig(size=16, split="train"), 5)
    pictures, captions = held_out.pairs()
    assert held_out.kind == "heldout" and pictures.shape == (5, 3, 16, 16) and len(captions) == 5
    assert held_out.scenes is not None and all(is_held_out(held_out.scenes.scene(i)) for i in range(5))
    assert held_out.pairs()[0] is pictures
    seen = Validation(DataConfig(source=sources["folder"], size=16, crop="stage_1"), 100)
    assert seen.kind == "seen" and seen.scenes is None and len(seen.pairs()[0]) == 7
    assert np.array_equal(seen.pairs()[0][2], pairs_of(sources["folder"], 16, 3)[2][0])
    own = Validation(DataConfig(source=sources["folder"], size=16, validation=sources["shards"]), 3)
    assert own.kind == "heldout" and len(own.pairs()[1]) == 3
    scenes = Validation(DataConfig(source=sources["folder"], size=16, validation="scenes"), 2)
    assert scenes.kind == "heldout" and scenes.scenes is not None
