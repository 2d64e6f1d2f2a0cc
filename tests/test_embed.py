"""embed.py: values, bounded batches, going on after any end, what is redone, broken samples, refusals."""

import io
import itertools
import json
import os
import resource
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_parts
from PIL import Image
from test_image_text import members, write_broken, write_shard, write_tar

from genpipe.clip.model import CLIP
from genpipe.data.embeddings import StoredEmbeddings
from genpipe.data.shards import Shards
from genpipe.errors import InputError
from genpipe.identity import weights_identity
from genpipe.images import to_unit
from genpipe.training.embed import EmbedReport, embed


@pytest.fixture(scope="module")
def clip() -> CLIP:
    model = tiny_parts()["clip"]
    assert isinstance(model, CLIP)
    return model


class Watch:
    """The numbers of rows that CLIP's image tower sees while this is open; it may fail above some number of them."""

    def __init__(self, clip: CLIP, limit: int = 1000) -> None:
        self.rows: list[int] = []
        self.limit = limit
        self.handle = clip.towers.visual.register_forward_pre_hook(self.see)

    def see(self, module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        if len(arguments[0]) > self.limit:
            raise torch.OutOfMemoryError("out of memory")
        self.rows.append(len(arguments[0]))

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


def noise(number: int, size: tuple[int, int]) -> bytes:
    """A picture with something in every pixel, in a PNG file."""
    levels = np.random.default_rng(number).integers(0, 256, size=(*size[::-1], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "PNG")
    return buffer.getvalue()


def write_noise(path: Path, numbers: range, size: tuple[int, int] = (16, 16)) -> Path:
    files = [((f"{n:04d}.png", noise(n, size)), (f"{n:04d}.txt", f"picture {n}".encode())) for n in numbers]
    return write_tar(path, list(itertools.chain.from_iterable(files)))


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    """Three shards of 5, 2 and 4 samples."""
    (tmp_path / "shards").mkdir()
    ranges = [range(5), range(5, 7), range(7, 11)]
    return [write_noise(tmp_path / "shards" / f"{n:05d}.tar", numbers) for n, numbers in enumerate(ranges)]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.suffix != ".tar"}


def redone(folder: Path, before: dict[str, int]) -> set[str]:
    """Shards whose files have been written since."""
    return {name.split(".")[0] for name, time in times(folder).items() if before.get(name) != time}


def test_values_are_those_of_the_picture_in_the_shard(clip: CLIP, tmp_path: Path) -> None:
    sizes = [(16, 16), (40, 24), (9, 70), (300, 200), (16, 16)]
    files = []
    for number, size in enumerate(sizes):
        files += [(f"a.b/{number}.png", noise(number, size)), (f"a.b/{number}.txt", b"x")]
    path = write_tar(tmp_path / "some.shard.tar", files)
    report = embed(path, clip, batch_size=2)
    assert names(tmp_path) == ["some.shard.embeddings.json", "some.shard.embeddings.npy", "some.shard.tar"]
    values = np.load(tmp_path / "some.shard.embeddings.npy", allow_pickle=False)
    assert values.shape == (5, clip.embedding_dim) and values.dtype == np.float16
    for number, size in enumerate(sizes):
        picture = Image.open(io.BytesIO(noise(number, size))).convert("RGB")
        with torch.no_grad():
            expected = clip.embed_image(to_unit([picture]))[0].numpy()
        np.testing.assert_allclose(values[number], expected, rtol=2e-3, atol=1e-4)
    record = json.loads((tmp_path / "some.shard.embeddings.json").read_bytes())
    assert record["keys"] == [f"a.b/{number}" for number in range(5)] and record["format_version"] == 1
    assert record["clip_identity"] == weights_identity(clip) == report.clip_identity
    assert (report.shards, report.written, report.kept, report.pairs.read) == (1, 1, 0, 5)
    assert json.loads(json.dumps(report.to_dict()))["embeddings"] == 5
    assert report.embedding_dim == record["embedding_dim"] == clip.embedding_dim


def test_a_huge_picture_keeps_its_embedding_though_it_is_shrunk_first(clip: CLIP, tmp_path: Path) -> None:
    small = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    small.resize((4096, 4096), Image.Resampling.NEAREST).save(buffer, "PNG", compress_level=1)
    embed(write_tar(tmp_path / "0.tar", [("a.png", buffer.getvalue()), ("a.txt", b"x")]), clip)
    with torch.no_grad():
        expected = clip.embed_image(to_unit([small.resize((64, 64), Image.Resampling.NEAREST)]))[0].numpy()
    np.testing.assert_allclose(np.load(tmp_path / "0.embeddings.npy")[0], expected, rtol=2e-3, atol=1e-4)


def test_clip_never_sees_more_pictures_than_the_batch_and_fewer_when_memory_runs_out(
    clip: CLIP, shards: list[Path], tmp_path: Path
) -> None:
    with Watch(clip) as watch:
        embed(shards, clip, tmp_path / "three", batch_size=3)
    assert watch.rows == [3, 2, 2, 3, 1]
    with Watch(clip, limit=2) as watch:
        embed(shards, clip, tmp_path / "five", batch_size=5)
    assert watch.rows == [2, 2, 1, 2, 2, 2]
    for name in ("00000", "00001", "00002"):
        three, five = (np.load(tmp_path / run / f"{name}.embeddings.npy") for run in ("three", "five"))
        np.testing.assert_allclose(three, five, rtol=2e-3, atol=1e-4)
    with Watch(clip, limit=0), pytest.raises(torch.OutOfMemoryError):
        embed(shards, clip, tmp_path / "none", batch_size=4)
    assert not (tmp_path / "none").exists()


def test_progress_counts_shards(clip: CLIP, shards: list[Path]) -> None:
    calls: list[tuple[float, int]] = []
    embed(shards, clip, batch_size=2, progress=lambda done, total: calls.append((done, total)))
    done = [call[0] for call in calls]
    assert done == sorted(done) and done[0] == pytest.approx(0.4) and calls[-1] == (3, 3)
    calls.clear()
    embed(shards, clip, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_a_second_run_does_nothing_and_a_missing_or_damaged_file_is_made_again(clip: CLIP, shards: list[Path]) -> None:
    folder = shards[0].parent
    first = embed(folder, clip)
    assert first.written == 3 and first.pairs.read == 11
    before = times(folder)
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}
    with Watch(clip) as watch:
        again = embed(folder, clip, batch_size=7)
    assert watch.rows == [] and redone(folder, before) == set()
    assert (again.written, again.kept, again.pairs) == (0, 3, first.pairs)
    array, record = StoredEmbeddings().files(shards[1])
    for path, data in ((array, None), (record, None), (array, contents[array.name][:-3]), (record, b"{oops")):
        path.unlink()
        if data is not None:
            path.write_bytes(data)
        assert embed(folder, clip).written == 1
        assert redone(folder, before) == {"00001"}
        assert array.read_bytes() == contents[array.name] and record.read_bytes() == contents[record.name]


def test_a_changed_shard_and_another_clip_are_noticed(clip: CLIP, shards: list[Path]) -> None:
    folder = shards[0].parent
    embed(folder, clip)
    before = times(folder)
    os.utime(shards[0])  # copied, or moved: the contents decide
    assert embed(folder, clip).written == 0
    data = bytearray(shards[1].read_bytes())
    place = data.index(b"picture 6")
    data[place : place + 9] = b"picture 9"  # as long as before
    shards[1].write_bytes(data)
    write_noise(shards[2], range(7, 12))
    assert embed(folder, clip).written == 2 and redone(folder, before) == {"00001", "00002"}
    other = tiny_parts(seed=1)["clip"]
    assert isinstance(other, CLIP)
    assert embed(folder, other).written == 3 and embed(folder, other).written == 0
    assert StoredEmbeddings(identity=weights_identity(other)).load(shards[2]).values.shape[0] == 5


def test_an_interrupt_keeps_finished_shards_and_leaves_no_halves(
    clip: CLIP, shards: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def press(done: float, total: int) -> None:
        if 1 < done < 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed(shards, clip, out, batch_size=1, progress=press)
    assert names(out) == ["00000.embeddings.json", "00000.embeddings.npy"]
    with Watch(clip) as watch:
        report = embed(shards, clip, out, batch_size=1)
    assert (report.written, report.kept, sum(watch.rows)) == (2, 1, 6)
    assert names(shards[0].parent) == ["00000.tar", "00001.tar", "00002.tar"] and len(names(out)) == 6


def test_broken_samples_are_counted_as_the_stream_counts_them_and_have_no_embedding(clip: CLIP, tmp_path: Path) -> None:
    expected = write_broken(tmp_path / "0.tar")
    write_shard(tmp_path / "1.tar", range(3))
    report = embed(tmp_path, clip, batch_size=2)
    assert report.pairs.skipped == expected and report.pairs.read == 7
    assert report.pairs.first["duplicate key"] == "0.tar 000000000"
    stream = Shards(tmp_path, 8)
    list(stream.once())
    assert stream.report().skipped == report.pairs.skipped
    record = json.loads((tmp_path / "0.embeddings.json").read_bytes())
    assert record["keys"] == [f"{number:09d}" for number in (0, 3, 10, 11)] and record["skipped"] == expected
    again = embed(tmp_path, clip)
    assert again.written == 0 and again.pairs.skipped == expected and again.pairs.read == 7


def test_shards_without_a_sound_sample_are_finished_too(clip: CLIP, tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [])
    (tmp_path / "1.tar").write_bytes(b"junk")
    (tmp_path / "2.tar").write_bytes(b"")
    write_tar(tmp_path / "3.tar", [("0.png", b"junk"), ("0.txt", b"x")])
    report = embed(tmp_path, clip)
    assert report.written == 4 and report.pairs.read == 0
    assert report.pairs.skipped == {"shard damaged or cut short": 2, "picture cannot be read": 1}
    for number in range(4):
        assert np.load(tmp_path / f"{number}.embeddings.npy").shape == (0, clip.embedding_dim)
    assert embed(tmp_path, clip).written == 0


def test_a_full_disk_keeps_what_is_finished(clip: CLIP, tmp_path: Path) -> None:
    for number, size in enumerate((2, 60)):
        write_noise(tmp_path / f"{number}.tar", range(size))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # no file can grow beyond
    try:
        with pytest.raises(InputError, match=r"1\.embeddings\.npy' cannot be written .*finished shards are kept"):
            embed(tmp_path, clip)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["0.embeddings.json", "0.embeddings.npy", "0.tar", "1.tar"]
    assert embed(tmp_path, clip).written == 1


def test_two_at_once_leave_whole_pairs_of_files(clip: CLIP, shards: list[Path]) -> None:
    """The same work by two: in the end every array lies beside its own JSON file, whoever wrote them."""
    reports: list[EmbedReport] = []
    threads = [threading.Thread(target=lambda n=n: reports.append(embed(shards, clip, batch_size=n))) for n in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reports) == 2 and embed(shards, clip).written == 0
    stored = StoredEmbeddings(identity=weights_identity(clip))
    loaded = stored.load(shards[0])

    def write(shift: float) -> None:
        for turn in range(15):
            stored.save(shards[0], loaded.header, loaded.values + np.float16(shift + turn))

    threads = [threading.Thread(target=write, args=(shift,)) for shift in (0.0, 100.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stored.load(shards[0]).header.keys == loaded.header.keys
    assert len(names(shards[0].parent)) == 9


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"shards": ["missing.tar"]}, "shards are missing"),
    ({"clip": "no-such-folder"}, "no-such-folder is not a folder"),
    ({"batch_size": 0}, "batch size is 0"),
    ({"out": "00000.tar"}, r"00000\.tar' cannot be written; choose another"),
]


@pytest.mark.parametrize(("changes", "reason"), REFUSED)
def test_what_cannot_be_used_is_refused_in_one_sentence(
    clip: CLIP, shards: list[Path], changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shards[0].parent)
    with pytest.raises(InputError, match=reason) as caught:
        embed(**{"shards": shards, "clip": clip, **changes})
    assert "\n" not in str(caught.value)
    assert names(shards[0].parent) == ["00000.tar", "00001.tar", "00002.tar"]


def test_shards_of_one_name_need_folders_of_their_own(clip: CLIP, tmp_path: Path) -> None:
    paths = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        paths.append(write_shard(tmp_path / name / "0.tar", range(2)))
    with pytest.raises(InputError, match="have one name"):
        embed(paths, clip, tmp_path / "out")
    assert embed(paths, clip).written == 2
    assert names(tmp_path / "b") == ["0.embeddings.json", "0.embeddings.npy", "0.tar"]


def test_damaged_weights_and_training_mode_are_told(clip: CLIP, tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", list(members(1).items()))
    broken = tiny_parts()["clip"]
    assert isinstance(broken, CLIP)
    with pytest.raises(InputError, match="training mode"):
        embed(tmp_path, broken.train())
    with torch.no_grad():
        broken.towers.visual.proj.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"embed: .*'000000001' in .*0\.tar' is not finite"):
        embed(tmp_path, broken.eval())
    assert names(tmp_path) == ["0.tar"]
    embed(tmp_path / "0.tar", clip)
    assert len(names(tmp_path)) == 3
