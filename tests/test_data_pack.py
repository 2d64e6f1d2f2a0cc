"""pack.py: folders and lists -> shards, there and back; limits of a shard, refusals, nothing half written."""

import hashlib
import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from genpipe.data import pack as pack_module
from genpipe.data.check import check_shards
from genpipe.data.image_text import ImageTextFolder, Shards
from genpipe.data.pack import pack
from genpipe.data.tar_index import CAPTION_LIMIT
from genpipe.errors import InputError

SIZE = 8


def fill(folder: Path, count: int) -> Path:
    """Noise of several formats, each with its caption."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(count):
        picture = Image.fromarray(generator.integers(0, 256, size=(9 + number % 3, 12, 3), dtype=np.uint8))
        picture.save(folder / f"{number:02d}.{('png', 'jpg', 'webp')[number % 3]}")
        (folder / f"{number:02d}.txt").write_text(f"picture {number}, grün\n", encoding="utf-8")
    return folder


def pairs(source) -> Counter:
    return Counter((pixels.tobytes(), caption) for pixels, caption in source)


def files_of(tar_path: Path) -> dict[str, bytes]:
    with tarfile.open(tar_path) as tar:
        return {header.name: tar.extractfile(header).read() for header in tar.getmembers()}


@pytest.mark.parametrize("seed", [0, 1, None])
def test_there_and_back(tmp_path, seed):
    folder = ImageTextFolder(fill(tmp_path / "pictures", 7), SIZE)
    packed = pack(tmp_path / "pictures", tmp_path / "out" / "set", max_samples=3, seed=seed)
    assert [path.name for path in packed.shards] == ["set-00000.tar", "set-00001.tar", "set-00002.tar"]
    assert packed.pattern == f"{tmp_path}/out/set-{{00000..00002}}.tar" and packed.report.read == 7
    assert packed.bytes == sum(path.stat().st_size for path in packed.shards)
    shards = Shards(packed.pattern, SIZE)
    assert pairs(shards.once()) == pairs(folder[i] for i in range(7))
    captions = [caption for _, caption in Shards(packed.pattern, SIZE).once()]
    assert (captions == folder.captions) == (seed is None)
    assert check_shards(packed.pattern).is_sound
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [path.name for path in packed.shards]


def test_the_layout_is_that_of_img2dataset(tmp_path):
    folder = fill(tmp_path / "pictures", 5)
    packed = pack(folder, tmp_path / "set", max_samples=2, seed=None)
    members = files_of(packed.shards[1])
    assert list(members) == [
        f"00001000{i}.{kind}" for i, p in enumerate(("webp", "png")) for kind in (p, "txt", "json")
    ]
    data = (folder / "02.webp").read_bytes()
    assert members["000010000.webp"] == data  # not encoded again
    assert members["000010000.txt"] == "picture 2, grün".encode()
    assert json.loads(members["000010000.json"]) == {
        "caption": "picture 2, grün",
        "key": "000010000",
        "status": "success",
        "width": 12,
        "height": 11,
        "sha256": hashlib.sha256(data).hexdigest(),
        "file": "02.webp",
    }
    plain = list(webdataset.WebDataset(packed.pattern, shardshuffle=False, empty_check=False))
    assert [sample["txt"].decode() for sample in plain] == [f"picture {i}, grün" for i in range(5)]


def test_the_same_source_gives_the_same_bytes(tmp_path):
    folder = fill(tmp_path / "pictures", 6)
    first, again = (pack(folder, tmp_path / name / "set", max_samples=4, seed=3) for name in ("a", "b"))
    assert [path.read_bytes() for path in first.shards] == [path.read_bytes() for path in again.shards]
    other = pack(folder, tmp_path / "c" / "set", max_samples=4, seed=4)
    assert [path.read_bytes() for path in first.shards] != [path.read_bytes() for path in other.shards]


def test_a_shard_holds_at_most_so_many_bytes(tmp_path):
    folder = fill(tmp_path / "pictures", 9)
    packed = pack(folder, tmp_path / "set", max_bytes=10_240, seed=None)
    assert 3 <= len(packed.shards) < 9 and {path.stat().st_size for path in packed.shards} == {10_240}
    assert [caption for _, caption in Shards(packed.pattern, SIZE).once()] == ImageTextFolder(folder, SIZE).captions
    single = pack(folder, tmp_path / "each", max_bytes=1)  # one sample is in a shard whatever its size
    assert len(single.shards) == 9


def test_lists_and_a_target_folder(tmp_path):
    folder = fill(tmp_path / "pictures", 4)
    (folder / "list.jsonl").write_text('{"image": "03.png", "text": "one"}\n{"image": "00.png", "text": "two"}\n')
    packed = pack(folder / "list.jsonl", f"{tmp_path}/out/", seed=None)
    assert packed.shards == [tmp_path / "out" / "00000.tar"] and packed.pattern == f"{tmp_path}/out/00000.tar"
    assert [caption for _, caption in Shards(packed.pattern, SIZE).once()] == ["one", "two"]
    (tmp_path / "there").mkdir()
    assert pack(folder / "list.jsonl", tmp_path / "there").shards == [tmp_path / "there" / "00000.tar"]


def test_what_a_reader_could_not_use_is_left_out_and_counted(tmp_path):
    folder = fill(tmp_path / "pictures", 6)
    (folder / "00.png").write_bytes(b"junk")
    (folder / "01.jpg").write_bytes((folder / "01.jpg").read_bytes()[:200])
    (folder / "02.txt").unlink()
    Image.new("RGB", (4, 4)).save(folder / "07.gif")
    (folder / "07.txt").write_text("a picture that shards have no name for")
    (folder / "03.txt").write_text("x" * (CAPTION_LIMIT + 1))
    packed = pack(folder, tmp_path / "set")
    assert packed.report.read == 2 and packed.report.skipped == {
        "picture cannot be read": 2,
        "no caption": 1,
        "neither JPEG, PNG nor WebP": 1,
        "member too large": 1,
    }
    assert packed.report.first["neither JPEG, PNG nor WebP"] == "07.gif"
    checked = check_shards(packed.pattern)
    assert checked.is_sound and checked.report.read == 2


def test_a_wrong_file_name_ending_does_not_matter(tmp_path):
    folder = fill(tmp_path / "pictures", 1)
    data = (folder / "00.png").read_bytes()
    (folder / "00.png").rename(folder / "00.jpg")
    assert files_of(pack(folder, tmp_path / "set").shards[0])["000000000.png"] == data


@pytest.mark.parametrize("target", ["out/set-{00000..00009}.tar", "out/set.tar", "", "a::b", "s3://bucket/set"])
def test_targets_that_are_no_name_are_refused(tmp_path, monkeypatch, target):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "pictures", 1)
    with pytest.raises(InputError, match="no name for new shards"):
        pack("pictures", target)
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]


def test_nothing_is_overwritten_and_nothing_is_left_half(tmp_path, monkeypatch):
    folder = fill(tmp_path / "pictures", 5)
    old = tmp_path / "out" / "set-00004.tar"
    old.parent.mkdir()
    old.write_bytes(b"older")
    with pytest.raises(InputError, match="shards already, such as .*set-00004.tar"):
        pack(folder, tmp_path / "out" / "set")
    pack(folder, tmp_path / "out" / "set2")  # other names beside them are no obstacle
    before = sorted(path.name for path in old.parent.iterdir())

    def appears_meanwhile(done: int, total: int) -> None:
        (old.parent / "new-00001.tar").write_bytes(b"another process")

    with pytest.raises(InputError, match="new-00001.tar' was written meanwhile"):
        pack(folder, tmp_path / "out" / "new", max_samples=2, report=appears_meanwhile)
    assert (old.parent / "new-00001.tar").read_bytes() == b"another process"
    assert sorted(path.name for path in old.parent.iterdir()) == sorted([*before, "new-00001.tar"])

    def interrupted(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(folder, tmp_path / "fresh" / "set", max_samples=2, report=interrupted)
    assert not (tmp_path / "fresh" / "set-00000.tar").exists() and not (tmp_path / "fresh").exists()
    with pytest.raises(InputError, match="cannot be written"):
        pack(folder, folder / "00.png" / "set")


def test_shards_can_be_written_where_there_are_no_links(tmp_path, monkeypatch):
    def no_links(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    folder = fill(tmp_path / "pictures", 2)
    monkeypatch.setattr(pack_module.os, "link", no_links)
    packed = pack(folder, tmp_path / "set")
    assert check_shards(packed.pattern).report.read == 2
    with pytest.raises(InputError, match="shards already"):
        pack(folder, tmp_path / "set")


def test_sources_and_limits_that_cannot_be_used_are_refused(tmp_path):
    folder = fill(tmp_path / "pictures", 1)
    for arguments in ({"max_samples": 0}, {"max_bytes": 0}):
        with pytest.raises(InputError, match="at least 1 sample"):
            pack(folder, tmp_path / "set", **arguments)
    (folder / "00.png").write_bytes(b"junk")
    with pytest.raises(InputError, match="None of the 1 pictures .* can go into a shard .*1 picture cannot be read"):
        pack(folder, tmp_path / "new" / "set")
    with pytest.raises(InputError, match="no file or folder"):
        pack(tmp_path / "missing", tmp_path / "set")
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]


def test_a_picture_is_read_before_it_is_taken(tmp_path):
    folder = fill(tmp_path / "pictures", 3)
    buffer = io.BytesIO()
    Image.new("RGB", (300, 300)).save(buffer, "PNG")
    (folder / "00.png").write_bytes(buffer.getvalue())
    packed = pack(folder, tmp_path / "set", max_pixels=10_000)
    assert packed.report.read == 2 and packed.report.skipped == {"picture cannot be read": 1}
