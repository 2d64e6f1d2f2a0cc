"""image_text.py and shards.py: folders, lists, webdataset shards; order, resume, ranks, broken samples, refusals."""

import io
import itertools
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from genpipe.data.image_text import ImageTextFolder, Report, Shards
from genpipe.data.shards import expand_shards
from genpipe.data.tar_index import index_shard
from genpipe.data.transforms import CropConfig
from genpipe.errors import InputError

SIZE = 8


def picture_bytes(level: int, extension: str = "png") -> bytes:
    buffer = io.BytesIO()
    image = Image.new("RGB", (SIZE, SIZE), (level % 256, level // 256, 0))
    image.save(buffer, {"jpg": "JPEG"}.get(extension, extension.upper()))
    return buffer.getvalue()


def members(number: int, extension: str = "png") -> dict[str, bytes]:
    """A sample as img2dataset writes it; its caption tells its number, and so do its pixels."""
    key, caption = f"{number:09d}", f"picture {number}"
    record = {"caption": caption, "key": key, "status": "success"}
    return {
        f"{key}.{extension}": picture_bytes(number, extension),
        f"{key}.txt": caption.encode(),
        f"{key}.json": json.dumps(record).encode(),
    }


def write_tar(path: Path, files: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path


def write_shard(path: Path, numbers) -> Path:
    return write_tar(path, [item for number in numbers for item in members(number).items()])


def write_shards(folder: Path, sizes) -> str:
    first = 0
    for shard, size in enumerate(sizes):
        write_shard(folder / f"{shard:05d}.tar", range(first, first + size))
        first += size
    return f"{folder}/{{00000..{len(sizes) - 1:05d}}}.tar"


def numbers(pairs, count: int | None = None) -> list[int]:
    """The numbers of the pairs, each checked against its pixels."""
    found = []
    for pixels, caption in itertools.islice(pairs, count):
        number = int(caption.split()[1])
        assert pixels.dtype == np.uint8 and pixels.shape == (3, SIZE, SIZE)
        assert (pixels[0] == number % 256).all() and (pixels[1] == number // 256).all()
        found.append(number)
    return found


# Folders and lists


def fill_folder(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"{number:03d}.png").write_bytes(picture_bytes(number))
        (folder / f"{number:03d}.txt").write_text(f"picture {number}\n")


def test_folder_pairs_each_picture_with_its_text(tmp_path):
    fill_folder(tmp_path / "a", 3)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.JPG").write_bytes(picture_bytes(0, "jpg"))
    (tmp_path / "b" / "x.txt").write_bytes(b"\xef\xbb\xbf  a bear \n on a  hill\t")
    source = ImageTextFolder(tmp_path, SIZE)
    assert len(source) == 4
    assert numbers(source, 3) == [0, 1, 2]
    assert source.captions[3] == source[3][1] == source[-1][1] == "a bear on a hill"
    assert source.report() == Report(read=5)
    with pytest.raises(IndexError):
        source[4]


def test_folder_leaves_out_and_counts_what_has_no_caption(tmp_path):
    fill_folder(tmp_path, 5)
    (tmp_path / "001.txt").unlink()
    (tmp_path / "002.txt").write_text("  \n")
    (tmp_path / "003.txt").write_bytes(b"caf\xe9")
    source = ImageTextFolder(tmp_path, SIZE)
    assert numbers(source) == [0, 4]
    report = source.report()
    assert report.skipped == {"no caption": 2, "caption is not UTF-8": 1}
    assert "003.png" in report.first["caption is not UTF-8"]
    assert "2 pairs read, 3 skipped: 1 caption is not UTF-8 (first: " in str(report)


def test_a_broken_picture_is_replaced_by_the_next_and_counted_once(tmp_path):
    fill_folder(tmp_path, 4)
    (tmp_path / "001.png").write_bytes(b"junk")
    (tmp_path / "003.png").write_bytes(picture_bytes(3)[:40])
    source = ImageTextFolder(tmp_path, SIZE)
    for _ in range(2):
        assert numbers(source) == [0, 2, 2, 0]
    assert source.report().skipped == {"picture cannot be read": 2}
    assert source.report().read == 8


def test_folder_crops_follow_seed_epoch_and_index(tmp_path):
    Image.effect_noise((64, 32), 90).convert("RGB").save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("noise")
    crop = CropConfig(SIZE, spread=1.0, zoom_max=1.5)
    first, again = (ImageTextFolder(tmp_path, SIZE, crop=crop, seed=1) for _ in range(2))
    assert np.array_equal(first.example(0, epoch=2)[0], again.example(0, epoch=2)[0])
    assert not np.array_equal(first.example(0, epoch=2)[0], first.example(0, epoch=3)[0])
    other = ImageTextFolder(tmp_path, SIZE, crop=crop, seed=2)
    assert not np.array_equal(first[0][0], other[0][0])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.csv", '\ufeffid,Image,Caption\n1,000.png,"picture 0"\n2,001.png,"picture 1\n"\n'),
        ("list.tsv", "path\ttext\n000.png\tpicture 0\n001.png\tpicture 1\n"),
        (
            "list.jsonl",
            '{"file_name": "000.png", "text": "picture 0"}\n\n{"image": "001.png", "caption": "picture 1", "n": 2}\n',
        ),
    ],
)
def test_lists_name_pictures_and_captions(tmp_path, name, text):
    fill_folder(tmp_path, 2)
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert numbers(ImageTextFolder(tmp_path / name, SIZE)) == [0, 1]


def test_a_list_inside_the_folder_is_used(tmp_path):
    fill_folder(tmp_path, 3)
    (tmp_path / "metadata.csv").write_text("file_name,text\n002.png,picture 2\n001.png,\n")
    source = ImageTextFolder(tmp_path, SIZE)
    assert numbers(source) == [2]
    assert source.report().skipped == {"no caption": 1}


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.csv", b"file,words\n000.png,x\n", r"a\.csv' needs a column image, file_name, path .*it has file, words"),
        ("a.csv", b"", r"a\.csv' needs a column .*it has none"),
        ("a.csv", b"image,caption\n", r"a\.csv' has no rows"),
        (
            "a.csv",
            b"image,caption\n000.png,x\nb.png,y\nc.png,z\n",
            r"2 pictures named in .*a\.csv' are missing.*b\.png",
        ),
        ("a.csv", b"image,caption\n000.png," + b"x" * 200_000 + b"\n", r"row after line 1 of .*a\.csv' cannot be read"),
        ("a.csv", b"image,caption\n000.png,caf\xe9\n", r"a\.csv' cannot be read: it is not UTF-8"),
        ("a.csv", b"image,caption\n000.png,  \n", r"a\.csv' has no picture with a caption .*1 no caption"),
        ("a.jsonl", b'{"image": "000.png", "caption": "x"}\n{oops\n', r"Line 2 of .*a\.jsonl' is not valid JSON"),
        ("a.jsonl", b'{"image": "000.png", "label": 1}\n', r"a\.jsonl' in line 1 needs .*it has image, label"),
        ("a.jsonl", b"[1, 2]\n", r"a\.jsonl' in line 1 needs"),
        ("a.jsonl", b"[" * 100_000, r"Line 1 of .*a\.jsonl' is not valid JSON"),
        ("a.txt", b"000.png x\n", r"a\.txt' is neither a folder .* nor a list"),
    ],
)
def test_lists_that_cannot_be_used_are_refused(tmp_path, name, data, reason):
    fill_folder(tmp_path, 1)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=reason) as caught:
        ImageTextFolder(tmp_path / name, SIZE)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_folders_that_cannot_be_used_are_refused(tmp_path):
    with pytest.raises(InputError, match="no file or folder .*missing"):
        ImageTextFolder(tmp_path / "missing", SIZE)
    with pytest.raises(InputError, match="No pictures"):
        ImageTextFolder(tmp_path, SIZE)
    (tmp_path / "a.png").write_bytes(b"junk")
    with pytest.raises(InputError, match="no picture with a caption"):
        ImageTextFolder(tmp_path, SIZE)
    (tmp_path / "a.txt").write_text("a caption")
    source = ImageTextFolder(tmp_path, SIZE)
    with pytest.raises(InputError, match="None of the 1 pictures can be read"):
        source[0]


# Shards


def test_once_reads_what_webdataset_reads(tmp_path):
    urls = write_shards(tmp_path, [5, 3, 7])
    plain = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
    assert numbers(Shards(urls, SIZE).once()) == [int(sample["txt"].split()[1]) for sample in plain] == list(range(15))


def test_shards_written_by_webdataset_are_read(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "0.tar")) as writer:
        for number, extension in enumerate(["png", "webp", "jpg", "jpeg"]):
            level = 128  # JPEG keeps this one
            data = picture_bytes(level, "jpg" if extension == "jpeg" else extension)
            writer.write({"__key__": f"dir.v1/{number}", extension: data, "txt": "picture 128", "cls": b"\x80pickle"})
    shards = Shards(tmp_path, SIZE)
    assert [caption for _, caption in shards.once()] == ["picture 128"] * 4
    assert shards.report() == Report(read=4)


def test_an_epoch_shows_every_sample_once_in_another_order(tmp_path):
    urls = write_shards(tmp_path, [5, 3, 7, 4, 2])
    stream = iter(Shards(urls, SIZE, seed=3, mix=2))
    first, second = numbers(stream, 21), numbers(stream, 21)
    assert sorted(first) == sorted(second) == list(range(21))
    assert first != second and first != sorted(first)
    assert numbers(Shards(urls, SIZE, seed=3, mix=2), 42) == first + second
    assert numbers(Shards(urls, SIZE, seed=4, mix=2), 21) != first


def test_samples_of_mixed_shards_are_mixed(tmp_path):
    urls = write_shards(tmp_path, [10] * 4)
    mixed = numbers(Shards(urls, SIZE, mix=4), 20)
    assert len({number // 10 for number in mixed}) == 4
    alone = numbers(Shards(urls, SIZE, mix=1), 20)
    assert len({number // 10 for number in alone}) == 2


def damage(path: Path, share: float, seed: int) -> int:
    """Break a share of a shard's pictures, each in its own way; returns how many."""
    generator = np.random.default_rng(seed)
    files, broken = [], 0
    with tarfile.open(path) as tar:
        for header in tar.getmembers():
            data = tar.extractfile(header).read()
            if header.name.endswith(".png") and generator.random() < share:
                data = [b"", b"junk", data[:45]][broken % 3]
                broken += 1
            files.append((header.name, data))
    write_tar(path, files)
    return broken


@pytest.mark.parametrize("weighted", [False, True])
def test_a_resumed_stream_goes_on_exactly(tmp_path, weighted):
    (tmp_path / "other").mkdir()
    urls, other = write_shards(tmp_path, [5, 3, 7, 4]), write_shards(tmp_path / "other", [6, 2])
    for name in ("00000.tar", "00002.tar", "other/00000.tar"):
        assert damage(tmp_path / name, 0.4, seed=1) > 0
    sources = [(urls, 2), (other, 1.0)] if weighted else urls
    crop = CropConfig(SIZE, spread=1.0)
    whole = numbers(Shards(sources, SIZE, crop=crop, seed=5, rank=1, world=2, mix=2), 90)
    for start in (0, 1, 4, 19, 37, 60):
        resumed = Shards(sources, SIZE, crop=crop, seed=5, rank=1, world=2, mix=2, start=start)
        assert numbers(resumed, 90 - start) == whole[start:]


def test_random_crops_follow_the_position(tmp_path):
    buffer = io.BytesIO()
    Image.effect_noise((64, 32), 90).convert("RGB").save(buffer, "PNG")
    write_tar(tmp_path / "0.tar", [("0.png", buffer.getvalue()), ("0.txt", b"noise")])
    shards = Shards(tmp_path, SIZE, crop=CropConfig(SIZE, spread=1.0, zoom_max=2.0))
    pixels = [pair[0] for pair in itertools.islice(shards, 4)]
    assert not np.array_equal(pixels[0], pixels[1])
    resumed = Shards(tmp_path, SIZE, crop=CropConfig(SIZE, spread=1.0, zoom_max=2.0), start=2)
    assert np.array_equal(next(iter(resumed))[0], pixels[2])


def test_ranks_share_an_epoch_and_never_wait(tmp_path):
    urls = write_shards(tmp_path, [9, 1, 1, 4])
    streams = [iter(Shards(urls, SIZE, rank=rank, world=2, mix=1)) for rank in range(2)]
    reach = [numbers(stream, 50) for stream in streams]  # 15 samples in all: each rank goes on for ever
    assert [set(seen) for seen in reach] == [set(range(15))] * 2
    shards = [{number_to_shard(number) for number in seen[:2]} for seen in reach]
    assert not shards[0] & shards[1]
    together = itertools.chain(*(Shards(urls, SIZE, rank=rank, world=3).once() for rank in range(3)))
    assert sorted(numbers(together)) == list(range(15))


def number_to_shard(number: int) -> int:
    return sum(number >= border for border in (9, 10, 11))


def test_more_ranks_than_shards_read_in_other_orders(tmp_path):
    write_shard(tmp_path / "0.tar", range(12))
    seen = [numbers(Shards(tmp_path, SIZE, rank=rank, world=3), 12) for rank in range(3)]
    assert all(sorted(order) == list(range(12)) for order in seen)
    assert seen[0] != seen[1] != seen[2] != seen[0]


def test_weights_give_the_share_of_each_source(tmp_path):
    write_shard(tmp_path / "a.tar", range(3))
    write_shard(tmp_path / "b.tar", range(100, 140))
    shards = Shards([(tmp_path / "a.tar", 3.0), ([tmp_path / "b.tar"], 1.0)], SIZE)
    seen = numbers(shards, 400)
    assert 0.68 < sum(number < 100 for number in seen) / 400 < 0.82
    assert set(seen[:80]) >= {0, 1, 2}


def write_broken(path: Path) -> Counter:
    """A shard with four sound samples, 0 3 10 and 11, and one of every kind of broken ones."""
    sound = {number: list(members(number).items()) for number in (0, 1, 2, 3, 4, 5, 6, 10, 11)}
    files = sound[0]
    files += [item for item in sound[1] if not item[0].endswith((".txt", ".json"))]
    files += [("000000002.png", b"junk"), *sound[2][1:]]
    files += [sound[3][0], sound[3][2]]  # caption in the JSON alone
    files += [sound[4][0], ("000000004.txt", b"caf\xe9")]
    files += [sound[5][0], ("000000005.txt", b" \n")]
    files += sound[6][1:]
    files += [*members(0).items()]  # a key that was there before
    files += [("000000007.png", picture_bytes(7)), ("000000007.json", b"{oops")]
    files += [("000000008.png", picture_bytes(8)), ("000000008.txt", b"x" * (2**20 + 1))]
    files += [("000000009.png", picture_bytes(9)), ("000000009.json", b'{"caption": null}')]
    files += sound[10] + sound[11]
    write_tar(path, files)
    return Counter(
        {
            "no caption": 3,
            "picture cannot be read": 1,
            "caption is not UTF-8": 1,
            "no picture": 1,
            "duplicate key": 1,
            "JSON cannot be read": 1,
            "member too large": 1,
        }
    )


def test_broken_samples_are_skipped_and_counted(tmp_path):
    expected = write_broken(tmp_path / "0.tar")
    shards = Shards(tmp_path, SIZE)
    assert numbers(shards.once()) == [0, 3, 10, 11]
    assert shards.report().skipped == expected
    assert shards.report().first["duplicate key"] == "0.tar 000000000"
    assert str(shards.report()).startswith("4 pairs read, 9 skipped: ")
    # The stream replaces each of the broken ones that the headers do not show, and counts each once.
    stream = Shards(tmp_path, SIZE)
    seen = numbers(stream, 4 + 6)
    assert set(seen) == {0, 3, 10, 11}
    assert stream.report().read == 10
    assert stream.report().skipped == expected


def test_one_in_twenty_broken_gives_the_right_count(tmp_path):
    urls = write_shards(tmp_path, [40] * 5)
    broken = sum(damage(tmp_path / f"{shard:05d}.tar", 0.05, seed=shard) for shard in range(5))
    assert 3 <= broken <= 20
    shards = Shards(urls, SIZE)
    assert len(numbers(shards, 200)) == 200
    assert shards.report() == Report(200, {"picture cannot be read": broken}, shards.report().first)
    once = Shards(urls, SIZE)
    assert len(numbers(once.once())) == 200 - broken


def test_truncated_shards_give_what_is_whole(tmp_path):
    path = write_shard(tmp_path / "0.tar", range(4))
    with tarfile.open(path) as tar:
        headers = tar.getmembers()
    data = path.read_bytes()
    cuts = {
        "inside the last picture": (headers[9].offset_data + 10, [0, 1, 2]),
        "inside a header": (headers[9].offset + 100, [0, 1, 2]),
        "before its caption": (headers[10].offset, [0, 1, 2]),
        "after its caption": (headers[11].offset, [0, 1, 2, 3]),
        "without the end": (headers[11].offset_data + 512, [0, 1, 2, 3]),
        "inside the first header": (30, []),
        "at once": (0, []),
    }
    for what, (length, sound) in cuts.items():
        path.write_bytes(data[:length])
        shards = Shards(path, SIZE)
        assert numbers(shards.once()) == sound, what
        assert shards.report().skipped == {"shard damaged or cut short": 1}, what
    path.write_bytes(data[: headers[6].offset] + b"\xff" * 512 + data[headers[6].offset + 512 :])
    shards = Shards(path, SIZE)
    assert numbers(shards.once()) == [0, 1]
    assert shards.report().skipped == {"shard damaged or cut short": 1}


def test_hostile_headers_end_the_index(tmp_path):
    header = tarfile.TarInfo("0.png")
    header.size = 10
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"\xff" * 8 + (-1024).to_bytes(4, "big", signed=True)  # a negative size leads backwards
    block[148:156] = b"%06o\0 " % (256 + sum(block[:148]) + sum(block[156:]))
    path = tmp_path / "0.tar"
    path.write_bytes(bytes(block) * 3)
    index = index_shard(path)
    assert index.entries == () and [reason for reason, _ in index.broken] == ["shard damaged or cut short"]


def test_links_and_foreign_members_are_not_touched(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("picture 0")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, data in [("../0.png", picture_bytes(0)), ("../0.pickle", b"\x80\x04"), ("../0.txt", b"picture 0")]:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
        header = tarfile.TarInfo("1.txt")
        header.type, header.linkname = tarfile.SYMTYPE, str(secret)
        tar.addfile(header)
    shards = Shards(tmp_path / "0.tar", SIZE)
    assert numbers(shards.once()) == [0]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["0.tar", "secret.txt"]


def test_a_shard_without_a_sound_sample_borrows_from_others(tmp_path):
    write_shard(tmp_path / "a.tar", range(4))
    assert damage(tmp_path / "a.tar", 1.0, seed=0) == 4
    (tmp_path / "b.tar").write_bytes(b"not a tar")
    write_shard(tmp_path / "c.tar", range(4, 8))
    whole = numbers(Shards(tmp_path, SIZE, mix=1), 40)
    assert set(whole) == {4, 5, 6, 7}
    assert numbers(Shards(tmp_path, SIZE, mix=1, start=13), 27) == whole[13:]


@pytest.mark.parametrize("world", [1, 2, 5])
def test_shards_without_any_sound_sample_are_refused(tmp_path, world):
    write_shard(tmp_path / "a.tar", range(4))
    damage(tmp_path / "a.tar", 1.0, seed=0)
    (tmp_path / "b.tar").write_bytes(b"not a tar")
    write_tar(tmp_path / "c.tar", [])
    for start in (0, 7):
        with pytest.raises(InputError, match="No sample can be read"):
            next(iter(Shards(tmp_path, SIZE, rank=world - 1, world=world, mix=1, start=start)))


def test_shards_that_cannot_be_used_are_refused(tmp_path):
    write_shard(tmp_path / "00000.tar", range(1))
    refusals = [
        (f"{tmp_path}/{{00000..00002}}.tar", r"2 of 3 shards are missing, the first is .*00001\.tar"),
        (f"{tmp_path}/{{0", "braces"),
        ("https://example.org/0.tar", "not on this computer"),
        ("pipe:echo", "not on this computer"),
        (f"{tmp_path}/{{0..3}}.tar.gz", r"0\.tar\.gz' is compressed"),
        ([], "no shards"),
        ([(tmp_path / "00000.tar", 0.0)], "above 0"),
        ([(tmp_path / "00000.tar", float("nan"))], "above 0"),
        ([tmp_path / "00000.tar", (tmp_path / "00000.tar", 1.0)], "for every source"),
    ]
    for urls, reason in refusals:
        with pytest.raises(InputError, match=reason):
            Shards(urls, SIZE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no shards"):
        expand_shards(tmp_path / "empty")
    for arguments in ({"rank": 1}, {"start": -1}, {"seed": -1}, {"mix": 0}, {"crop": CropConfig(SIZE + 1)}):
        with pytest.raises(InputError):
            Shards(tmp_path, SIZE, **arguments)


def test_braces_folders_and_lists_name_the_same_shards(tmp_path):
    urls = write_shards(tmp_path, [1, 1, 1])
    files = [tmp_path / f"{shard:05d}.tar" for shard in range(3)]
    assert expand_shards(urls) == expand_shards(tmp_path) == expand_shards([str(file) for file in files]) == files
    assert expand_shards([urls, files[1]]) == files
