"""shards.py: several sources with weights in one string, and broken samples counted once whoever meets them."""

import itertools
from collections import Counter
from pathlib import Path

import pytest
from test_image_text import SIZE, damage, numbers, write_broken, write_shard

from genpipe.data.check import check_shards
from genpipe.data.samples import Report
from genpipe.data.shards import Shards, expand_shards, is_shards, weighted_sources
from genpipe.errors import InputError


def test_weights_are_read_from_one_string(tmp_path, monkeypatch):
    assert weighted_sources("a/{00..99}.tar=3::b.tar") == [("a/{00..99}.tar", 3.0), ("b.tar", 1.0)]
    assert weighted_sources("a.tar=1e-3::b=1.tar=.5") == [("a.tar", 0.001), ("b=1.tar", 0.5)]
    assert weighted_sources("a.tar") == weighted_sources("a.tar=1") == [("a.tar", 1.0)]
    assert weighted_sources("x=1/a.tar::x=1/b.tar") == [("x=1/a.tar", 1.0), ("x=1/b.tar", 1.0)]
    monkeypatch.chdir(tmp_path)
    for folder in ("x", "x=2", "y::z"):
        (tmp_path / folder).mkdir()
        write_shard(tmp_path / folder / "0.tar", range(1))
    assert weighted_sources("x=3::x=2::x=2=4") == [("x", 3.0), ("x=2", 1.0), ("x=2", 4.0)]  # what exists is meant
    assert weighted_sources("y::z") == [("y::z", 1.0)]
    assert all(map(is_shards, ("a.tar", "a.tar=2", "x", "x=2", "x=3", "y::z", "x::pictures")))
    assert not any(map(is_shards, ("scenes", "pictures", "pictures=2", "list.csv", "")))


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("a.tar=0", "needs a place and a weight above 0"),
        ("a.tar=-1::b.tar", "needs a place and a weight above 0"),
        ("a.tar=two::b.tar", "needs a place and a weight above 0"),
        ("a.tar=nan", "needs a place and a weight above 0"),
        ("a.tar=inf", "needs a place and a weight above 0"),
        ("a.tar=::b.tar", "needs a place and a weight above 0"),
        ("a.tar::", "needs a place and a weight above 0"),
        ("::", "needs a place and a weight above 0"),
        ("=3::a.tar", "needs a place and a weight above 0"),
        ("a.tar::scenes", '"scenes" is no webdataset shards'),
        ("a.tar=2::pictures=1", '"pictures" is no webdataset shards'),
    ],
)
def test_sources_that_cannot_be_meant_are_refused(source, complaint):
    assert is_shards(source)
    for read in (weighted_sources, expand_shards, lambda urls: Shards(urls, SIZE)):
        with pytest.raises(InputError, match=complaint):
            read(source)


def test_one_string_gives_what_a_list_of_weights_gives(tmp_path):
    (tmp_path / "b").mkdir()
    a, b = write_shard(tmp_path / "a.tar", range(3)), write_shard(tmp_path / "b" / "0.tar", range(100, 140))
    text = f"{tmp_path}/a.tar=3::{tmp_path}/b"
    seen = numbers(Shards(text, SIZE), 400)
    assert seen == numbers(Shards([(a, 3.0), (tmp_path / "b", 1.0)], SIZE), 400)
    assert 0.68 < sum(number < 100 for number in seen) / 400 < 0.82
    assert expand_shards(text) == [a, b] and expand_shards([text, a]) == [a, b]
    assert sorted(numbers(Shards(text, SIZE).once())) == [*range(3), *range(100, 140)]
    assert check_shards(text).report.read == 43


def broken_shards(folder: Path, count: int = 6, samples: int = 20) -> Counter[str]:
    """Shards of unequal length with broken samples of every kind; how many they are, by reason."""
    expected = write_broken(folder / "x.tar")
    for shard in range(count):
        path = write_shard(folder / f"{shard}.tar", range(samples * shard, samples * shard + samples - shard))
        expected["picture cannot be read"] += damage(path, 0.2, seed=shard)
    (folder / "y.tar").write_bytes(b"not a tar")
    expected["shard damaged or cut short"] += 1
    return expected


def test_all_ranks_together_count_each_broken_sample_once(tmp_path):
    expected = broken_shards(tmp_path)
    assert check_shards(tmp_path).report.skipped == expected
    for world, mix in ((1, 4), (2, 2), (3, 1), (11, 4)):  # with 11, ranks share shards
        total = Report()
        for rank in range(world):
            shards = Shards(tmp_path, SIZE, rank=rank, world=world, mix=mix)
            assert len(numbers(shards, 300)) == 300  # several epochs
            total.add(shards.report())
        assert (total.read, total.skipped) == (300 * world, expected), world


def test_a_stream_and_its_resumed_rest_count_each_broken_sample_once(tmp_path):
    expected = broken_shards(tmp_path)
    for cuts in ([1, 2, 3], [19, 20, 40], [7, 60, 61], [150]):
        total = Report()
        for start, end in itertools.pairwise([0, *cuts, 200]):
            shards = Shards(tmp_path, SIZE, mix=2, start=start)
            assert len(numbers(shards, end - start)) == end - start
            total.add(shards.report())
        assert (total.read, total.skipped) == (200, expected), cuts
