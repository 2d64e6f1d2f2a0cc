"""check.py: counts and reasons over sound, broken, cut and repeated shards; threads and headers change no count."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
from test_image_text import SIZE, damage, numbers, picture_bytes, write_broken, write_shard, write_tar

from genpipe.data.check import NOTHING, check_shards
from genpipe.data.image_text import Shards
from genpipe.data.read_ahead import read_ahead
from genpipe.errors import InputError


def test_sound_shards_are_counted(tmp_path):
    write_shard(tmp_path / "00000.tar", range(5))
    write_shard(tmp_path / "00001.tar", range(5, 7))
    done = []
    result = check_shards(f"{tmp_path}/{{00000..00001}}.tar", report=lambda *state: done.append(state))
    assert result.is_sound and result.broken == 0 and done == [(1, 2), (2, 2)]
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert json.loads(json.dumps(result.to_json())) == {
        "sound": True,
        "shards": 2,
        "bytes": size,
        "headers_only": False,
        "samples": 7,
        "samples_per_shard": {"smallest": 2, "largest": 5},
        "broken": {},
        "repeated_keys": {"count": 0, "first": None},
    }
    assert result.to_text() == f"7 sound samples in 2 shards (2 to 5 each, {size / 1e6:,.1f} MB), 0 broken"


@pytest.mark.parametrize("workers", [1, 3])
def test_every_kind_of_damage_is_listed_as_training_counts_it(tmp_path, workers):
    expected = write_broken(tmp_path / "a.tar")
    write_shard(tmp_path / "b.tar", range(20, 23))
    whole = (tmp_path / "b.tar").read_bytes()
    (tmp_path / "c.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "d.tar").write_bytes(b"not a tar")
    write_tar(tmp_path / "e.tar", [])
    seen = []
    result = check_shards(tmp_path, workers=workers, on_broken=lambda *broken: seen.append(broken))
    expected["shard damaged or cut short"] += 2
    expected[NOTHING] += 1
    assert result.report.skipped == dict(expected) and result.broken == sum(expected.values()) and not result.is_sound
    stream = Shards(tmp_path, SIZE)
    assert len(numbers(stream.once())) == result.report.read
    assert {**stream.report().skipped, NOTHING: 1} == result.report.skipped
    assert (result.smallest, result.largest) == (0, 4)
    assert len(seen) == result.broken and seen[-1] == (NOTHING, "e.tar")
    assert result.report.first["shard damaged or cut short"].startswith("c.tar ")
    assert result.report.first["duplicate key"] == "a.tar 000000000"
    assert result.report.first["no caption"] == "a.tar 000000001"
    text = result.to_text()
    assert "3 no caption, the first: a.tar 000000001" in text and "1 caption is not UTF-8, the first: a.tar" in text


def test_one_in_twenty_broken_is_one_in_twenty_counted(tmp_path):
    broken = 0
    for shard in range(4):
        path = write_shard(tmp_path / f"{shard:05d}.tar", range(100 * shard, 100 * shard + 100))
        broken += damage(path, 0.05, seed=shard)
    assert 5 < broken < 40
    result = check_shards(tmp_path)
    assert (result.report.read, result.broken) == (400 - broken, broken)
    stream = Shards(tmp_path, SIZE)
    assert len(numbers(stream.once())) == 400 - broken and sum(stream.report().skipped.values()) == broken


def test_headers_alone_miss_what_only_contents_show(tmp_path):
    path = write_shard(tmp_path / "0.tar", range(10))
    assert damage(path, 0.5, seed=0) > 0
    write_tar(tmp_path / "1.tar", [("9.png", picture_bytes(9))])
    result = check_shards(tmp_path, headers_only=True)
    assert result.report.read == 10 and result.report.skipped == {"no caption": 1}
    assert "10 samples (headers alone) in 2 shards" in result.to_text()


def test_keys_that_several_shards_share_are_noted(tmp_path):
    write_shard(tmp_path / "a.tar", range(4))
    write_shard(tmp_path / "b.tar", range(2, 6))
    write_shard(tmp_path / "c.tar", range(5, 8))
    result = check_shards(tmp_path)
    assert result.repeated_keys == 3 and result.first_repeated == "b.tar 000000002"
    assert result.is_sound and "3 keys occur in another shard too, as b.tar 000000002" in result.to_text()


def test_shards_that_are_not_there_are_refused(tmp_path):
    write_shard(tmp_path / "00000.tar", range(1))
    with pytest.raises(InputError, match=r"1 of 2 shards are missing, the first is .*00001\.tar"):
        check_shards(f"{tmp_path}/{{00000..00001}}.tar")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no shards"):
        check_shards(tmp_path / "empty")


def test_work_ahead_keeps_the_order_the_errors_and_the_memory(tmp_path):
    running = most = 0

    def work(number: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.002 * (number % 3))
        if number == 5:
            raise InputError("five")
        return number * number

    results = []
    for number, future in read_ahead(range(20), work, workers=3):
        if number == 5:
            with pytest.raises(InputError, match="five"):
                future.result()
        else:
            results.append(future.result())
        running -= 1
    assert results == [n * n for n in range(20) if n != 5] and most <= 3 + 2
    started = []
    stopped = read_ahead(range(1000), lambda n: started.append(n) or n, workers=2)
    next(stopped)
    stopped.close()  # a reader that stops early waits for what is under way alone
    assert len(started) <= 4
    assert list(read_ahead([], work)) == []


def test_counts_do_not_depend_on_threads(tmp_path):
    for shard in range(6):
        path = write_shard(tmp_path / f"{shard}.tar", range(10 * shard, 10 * shard + 10))
        damage(path, 0.3, seed=shard)
    results = [check_shards(Path(tmp_path), workers=workers).to_json() for workers in (1, 2, 5)]
    assert results[0] == results[1] == results[2] and np.sum([b["count"] for b in results[0]["broken"].values()]) > 3
