"""embeddings.py and training from stored embeddings: the join by key, what is refused, the same loss, exact resume."""

import hashlib
import io
import itertools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_embed import write_noise
from test_image_text import SIZE, damage, write_broken, write_shards
from tiny_recipes import state_of

from genpipe.clip.model import CLIP
from genpipe.data.embeddings import EmbeddingsHeader, StoredEmbeddings
from genpipe.data.samples import Example
from genpipe.data.shards import Shards, expand_shards
from genpipe.data.tar_index import index_shard, picture_crc
from genpipe.errors import InputError
from genpipe.identity import weights_identity
from genpipe.parts import load_part
from genpipe.training.batches import BatchStream
from genpipe.training.config import DataConfig, OptimizerConfig, Recipe, RunConfig, check
from genpipe.training.data import check_embeddings, check_source, first_embeddings
from genpipe.training.decoder_stage import DecoderStage
from genpipe.training.embed import embed
from genpipe.training.loop import Trainer
from genpipe.training.stage import Stage
from genpipe.training.stages import STAGES

IDENTITY = "5f" * 32


def store(shard: Path, stored: StoredEmbeddings, left_out: set[int] | None = None, identity: str = IDENTITY) -> None:
    """Embeddings that tell the number of the sample that they belong to, (number, -number, 1)."""
    left_out = left_out or set()
    with open(shard, "rb") as file:
        found = [(entry.key, picture_crc(file, entry)) for entry in index_shard(shard).entries]
    found = [(key, crc) for key, crc in found if int(key) not in left_out]
    numbers = np.array([int(key) for key, _ in found], dtype=np.float16)
    header = EmbeddingsHeader(
        clip_identity=identity,
        embedding_dim=3,
        shard_bytes=shard.stat().st_size,
        shard_modified_ns=shard.stat().st_mtime_ns,
        shard_sha256="",
        keys=[key for key, _ in found],
        picture_crcs=[crc for _, crc in found],
    )
    stored.save(shard, header, np.stack([numbers, -numbers, np.ones_like(numbers)], axis=1))


def joined(examples: Any, count: int) -> list[int]:
    """The numbers of examples, each with the pixels, the caption and the embedding of one sample."""
    found = []
    for example in itertools.islice(examples, count):
        assert isinstance(example, Example) and example.embedding is not None
        number = int(example.caption.split()[1])
        assert (example.pixels[0] == number % 256).all()
        assert example.embedding.dtype == np.float32 and example.embedding.tolist() == [number, -number, 1]
        found.append(number)
    return found


# Reading --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beside", [True, False])
def test_a_shuffled_stream_gives_each_picture_its_own_embedding(tmp_path: Path, beside: bool) -> None:
    urls = write_shards(tmp_path, [9, 4, 6, 5])
    stored = StoredEmbeddings(None if beside else tmp_path / "elsewhere", IDENTITY)
    for shard in expand_shards(urls):
        store(shard, stored)
    shards = Shards(urls, SIZE, seed=2, mix=2, embeddings=stored)
    order = joined(shards.examples(), 48)
    assert sorted(order[:24]) == sorted(order[24:]) == list(range(24)) and order[:24] != sorted(order[:24])
    plain = Shards(urls, SIZE, seed=2, mix=2)
    assert [caption for _, caption in itertools.islice(plain, 48)] == [f"picture {number}" for number in order]
    assert next(plain.examples()).embedding is None
    pairs = itertools.islice(Shards(urls, SIZE, seed=2, mix=2, embeddings=stored), 48)
    assert [caption for _, caption in pairs] == [f"picture {number}" for number in order]


def test_samples_without_an_embedding_are_skipped_counted_and_replaced_and_a_resumed_stream_is_exact(
    tmp_path: Path,
) -> None:
    urls = write_shards(tmp_path, [9, 4, 6, 5])
    assert damage(tmp_path / "00000.tar", 0.4, seed=1) > 0
    stored = StoredEmbeddings()
    missing = {2, 10, 11, 13, 14, 15, 16, 17, 18}  # of one shard all
    for shard in expand_shards(urls):
        store(shard, stored, missing)
    shards = Shards(urls, SIZE, seed=5, mix=1, embeddings=stored)
    whole = joined(shards.examples(), 60)
    assert not missing & set(whole) and shards.report().skipped["no embedding"] >= len(missing)
    assert "no embedding (first: 0000" in str(shards.report())
    for start in (1, 17, 30, 59):
        resumed = Shards(urls, SIZE, seed=5, mix=1, embeddings=stored, start=start)
        assert joined(resumed.examples(), 60 - start) == whole[start:]


def test_a_set_without_any_embedding_ends_in_one_sentence(tmp_path: Path) -> None:
    urls = write_shards(tmp_path, [3])
    store(tmp_path / "00000.tar", StoredEmbeddings(), {0, 1, 2})
    with pytest.raises(InputError, match="No sample can be read .*3 no embedding"):
        next(Shards(urls, SIZE, embeddings=StoredEmbeddings()).examples())


def test_a_changed_picture_or_shard_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, [4])
    shard, stored = tmp_path / "00000.tar", StoredEmbeddings(identity=IDENTITY)
    store(shard, stored)
    data = shard.read_bytes()
    picture = index_shard(shard).entries[2].picture
    changed = bytearray(data)
    changed[picture.offset + picture.size - 20] ^= 1
    shard.write_bytes(changed)
    with pytest.raises(InputError, match=r"picture '000000002' of the shard .*has changed .*`genpipe embed`"):
        joined(Shards(shard, SIZE, embeddings=stored).examples(), 4)
    shard.write_bytes(data + bytes(512))
    with pytest.raises(InputError, match=r"00000\.tar' has changed since its embeddings were made .*bytes then"):
        stored.header(shard)
    shard.write_bytes(data)
    assert len(joined(Shards(shard, SIZE, embeddings=stored).examples(), 4)) == 4


def test_missing_files_and_another_clip_are_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, [2])
    shard, stored = tmp_path / "00000.tar", StoredEmbeddings(tmp_path, IDENTITY)
    for missing in ("npy", "json"):
        store(shard, stored)
        (tmp_path / f"00000.embeddings.{missing}").unlink()
        assert not stored.exist(shard)
        with pytest.raises(InputError, match=rf"embeddings\.{missing}' is missing; make them with `genpipe embed`"):
            next(Shards(shard, SIZE, embeddings=stored).examples())
    store(shard, stored, identity="ab" * 32)
    with pytest.raises(InputError, match=r"another CLIP \(abababababab\.\.\.\) than the one in use \(5f5f5f5f5f5f"):
        stored.header(shard)
    assert StoredEmbeddings(tmp_path).header(shard).clip_identity == "ab" * 32


def change(record: dict[str, Any], **entries: Any) -> bytes:
    return json.dumps({**record, **entries}).encode()


SPOILED: list[tuple[Callable[[dict[str, Any]], bytes], str]] = [
    (lambda record: b"", "cannot be read"),
    (lambda record: b"[1, 2]", "cannot be read"),
    (lambda record: b'"text"', "cannot be read"),
    (lambda record: b"[" * 100_000, "cannot be read"),
    (lambda record: b"\xff\xfe\xfa", "cannot be read"),
    (lambda record: json.dumps({k: v for k, v in record.items() if k != "keys"}).encode(), "cannot be read"),
    (lambda record: change(record, format_version=2), "format version 2, this genpipe reads up to 1; install a newer"),
    (lambda record: change(record, format_version="1"), "cannot be read"),
    (lambda record: change(record, keys=["0", "0", "1"]), "cannot be read .*not one for each"),
    (lambda record: change(record, keys=["0"]), "cannot be read .*not one for each"),
    (lambda record: change(record, keys="012"), "cannot be read"),
    (lambda record: change(record, keys=[0, 1, 2]), "cannot be read"),
    (lambda record: change(record, picture_crcs=[0.5, 1, 2]), "cannot be read"),
    (lambda record: change(record, skipped={"no caption": "3"}), "cannot be read"),
    (lambda record: change(record, embedding_dim=4), "cannot be read .*float16 of shape"),
    (lambda record: change(record, array_sha256="0"), "not the array that its .json file describes"),
]


@pytest.mark.parametrize("number", range(len(SPOILED)))
def test_a_damaged_json_file_is_refused_in_one_sentence(tmp_path: Path, number: int) -> None:
    spoil, reason = SPOILED[number]
    write_shards(tmp_path, [3])
    shard, stored = tmp_path / "00000.tar", StoredEmbeddings()
    store(shard, stored)
    path = stored.files(shard)[1]
    path.write_bytes(spoil(json.loads(path.read_bytes())))
    with pytest.raises(InputError, match=reason) as caught:
        stored.load(shard)
    assert "\n" not in str(caught.value) and path.name.removesuffix(".json") in str(caught.value)


class Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_a_damaged_array_is_refused_and_nothing_is_unpickled(tmp_path: Path) -> None:
    write_shards(tmp_path, [3])
    shard, stored = tmp_path / "00000.tar", StoredEmbeddings()
    store(shard, stored)
    array, path = stored.files(shard)
    sound, record = array.read_bytes(), json.loads(path.read_bytes())
    pickled, single = io.BytesIO(), io.BytesIO()
    np.save(pickled, np.array([Harmful(tmp_path / "harm")], dtype=object), allow_pickle=True)
    np.save(single, np.zeros((3, 3), dtype=np.float32))
    spoiled = (b"", sound[:-1], sound[:40], b"PK\x03\x04", pickled.getvalue(), single.getvalue())
    for data in spoiled:
        array.write_bytes(data)
        for checksum in (record["array_sha256"], hashlib.sha256(data).hexdigest()):
            path.write_bytes(change(record, array_sha256=checksum))
            with pytest.raises(InputError, match=r"embeddings\.npy' cannot be read .*run `genpipe embed`") as caught:
                stored.load(shard)
            assert "\n" not in str(caught.value)
    assert not (tmp_path / "harm").exists()


# Training -------------------------------------------------------------------------------------------------------------


UNET = {
    "block_out_channels": [32, 32],
    "layers_per_block": 1,
    "down_block_types": ["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
    "attention_head_dim": 16,
    "resnet_time_scale_shift": "scale_shift",
}


MODELS: dict[str, dict[str, Any]] = {
    "decoder": {"unet_config": UNET},
    "prior": {"num_layers": 1, "num_heads": 2, "head_dim": 16, "dropout": 0.0, "embedding_scale": "unit"},
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "decoder": {
        "image_dropout": 0.1,
        "text_dropout": 0.5,
        "new_clip": False,
        "min_snr_gamma": 5.0,
        "contrast_power": 0.0,
        "timestep_shift": 1.0,
        "bound_weight": 0.001,
    },
    "prior": {"new_clip": False, "text_dropout": 0.1, "repeats": 2, "statistics_pairs": 8},
}


def recipe_for(
    clip: Path, source: Path, embeddings: str, stage: str = "decoder", workers: int = 0, steps: int = 4
) -> Recipe:
    """16 x 16 pixels, as many as the tiny CLIP sees."""
    return Recipe(
        name=f"tiny {stage}",
        stage=stage,
        model=MODELS[stage],
        objective={"clip": str(clip), **OBJECTIVES[stage]},
        data=DataConfig(source=str(source), size=16, embeddings=embeddings, workers=workers),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2, decay="constant"),
        run=RunConfig(steps=steps, batch_size=4, precision="no", log_every=1, threads=1, validate_every=1000),
    )


@pytest.fixture(scope="module")
def clip_folder(tiny_folder: Path) -> Path:
    return tiny_folder / "clip"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, clip_folder: Path) -> Path:
    """Shards with their embeddings, one sample of which is broken."""
    folder = tmp_path_factory.mktemp("embedded")
    for number, numbers in enumerate((range(5), range(5, 12))):
        write_noise(folder / f"{number:05d}.tar", numbers)
    write_broken(folder / "00002.tar")
    embed(folder, clip_folder, batch_size=4)
    return folder


def batches(recipe: Recipe, stage: Stage, seen: int, count: int) -> list[dict[str, torch.Tensor]]:
    return list(BatchStream(recipe, stage.collate, seen, count))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_hold_the_embeddings_of_their_rows_and_go_on_exactly(
    clip_folder: Path, source: Path, workers: int
) -> None:
    recipe = recipe_for(clip_folder, source, "beside", workers=workers)
    stage = DecoderStage(recipe, None)
    whole = batches(recipe, stage, 0, 6)
    for batch in whole:
        with torch.no_grad():
            live = stage.clip.embed_image(batch["pixels"].float() / 255)
        stored = batch["image_embedding"]
        assert stored.dtype == torch.float32 and stored.shape == (4, stage.clip.embedding_dim)
        noise = batch["pixels"].float().std(dim=(1, 2, 3)) > 50  # the broken shard's pictures are of another size
        assert torch.allclose(stored[noise], live[noise], rtol=2e-3, atol=1e-4)
    rest = batches(recipe, stage, 4, 2)
    for ours, theirs in zip(rest, whole[4:], strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs) and ours.keys() == theirs.keys()
    recipe.data.embeddings = ""
    plain = batches(recipe, stage, 0, 6)
    assert all("image_embedding" not in batch for batch in plain)
    assert all(torch.equal(ours["pixels"], theirs["pixels"]) for ours, theirs in zip(plain, whole, strict=True))


def copied(source: Path, folder: Path) -> Path:
    """The two shards of `source` whose pictures have CLIP's size, without their embeddings."""
    folder.mkdir()
    for name in ("00000.tar", "00001.tar"):
        shutil.copy(source / name, folder)
    return folder


@pytest.mark.parametrize(("stage", "tolerance"), [("decoder", 1e-4), ("prior", 2e-3)])  # half precision, standardised
def test_a_stage_has_the_same_loss_with_stored_embeddings_and_reads_them(
    clip_folder: Path, source: Path, tmp_path: Path, stage: str, tolerance: float
) -> None:
    shards, stored = copied(source, tmp_path / "shards"), tmp_path / "stored"
    embed(shards, clip_folder, stored)

    def losses(embeddings: str) -> list[float]:
        recipe = recipe_for(clip_folder, shards, embeddings, stage)
        torch.manual_seed(0)
        built, generator = STAGES[stage](recipe, None), torch.Generator().manual_seed(1)
        found = []
        for number, batch in enumerate(batches(recipe, built, 0, 3)):
            built.before_step(batch, number, generator)
            with torch.no_grad():
                found.append(float(built.loss(built.model, batch, number, generator)[0]))
        return found

    expected = losses("")
    assert losses(str(stored)) == pytest.approx(expected, rel=tolerance)
    for shard in expand_shards(shards):
        there = StoredEmbeddings(stored).load(shard)
        StoredEmbeddings(stored).save(shard, there.header, there.values[:, ::-1] ** 2)
    turned = losses(str(stored))
    assert max(abs(ours / theirs - 1) for ours, theirs in zip(turned, expected, strict=True)) > 5 * tolerance


def test_a_priors_statistics_are_those_of_stored_embeddings(clip_folder: Path, source: Path) -> None:
    recipe = recipe_for(clip_folder, source, "beside", "prior")
    stage = STAGES["prior"](recipe, None)
    stage.before_step({}, 0, torch.Generator())
    first = [np.load(source / f"{number:05d}.embeddings.npy").astype(np.float32) for number in range(2)]
    expected = stage.model.scaled(torch.from_numpy(np.concatenate(first)[:8])).mean(dim=0)
    assert torch.allclose(stage.model.mean, expected, atol=1e-5)
    assert len(first_embeddings(recipe.data, 100)) == 5 + 7 + 4 and len(first_embeddings(recipe.data, 5)) == 5


def test_a_resumed_training_from_stored_embeddings_is_exact(clip_folder: Path, source: Path, tmp_path: Path) -> None:
    for folder, steps in (("whole", 4), ("halves", 3), ("halves", 4)):
        recipe = recipe_for(clip_folder, source, "beside", steps=steps)
        recipe.data.validation = str(source / "00002.tar")  # few pictures
        Trainer(recipe, tmp_path / folder).run()
    ours, theirs = (state_of(tmp_path / name, 4) for name in ("halves", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(InputError, match="other settings .*data.embeddings beside -> "):
        Trainer(recipe_for(clip_folder, source, ""), tmp_path / "whole")


def test_the_decoder_refuses_what_does_not_fit(clip_folder: Path, source: Path, tmp_path: Path) -> None:
    identity = weights_identity(load_part(CLIP, clip_folder))
    data = recipe_for(clip_folder, source, "beside").data
    check_embeddings(data, identity)
    with pytest.raises(InputError, match="another CLIP"):
        check_embeddings(data, IDENTITY)
    with pytest.raises(InputError, match=r"2 of 3 shards have no embeddings, the first is .*00001\.tar.* --out "):
        partial = tmp_path / "partial"
        partial.mkdir()
        for name in ("00000.embeddings.npy", "00000.embeddings.json"):
            shutil.copy(source / name, partial)
        DecoderStage(recipe_for(clip_folder, source, str(partial)), None)
    shards = copied(source, tmp_path / "shards")
    with pytest.raises(InputError, match=r"make them with: genpipe embed .*shards --clip FOLDER\.$"):
        DecoderStage(recipe_for(clip_folder, shards, "beside"), None)
    embed(shards, clip_folder)
    recipe = recipe_for(clip_folder, shards, "beside")
    stage = DecoderStage(recipe, None)
    store(shards / "00001.tar", StoredEmbeddings())  # of another CLIP, after the stage has looked
    with pytest.raises(InputError, match="another CLIP"):
        batches(recipe, stage, 0, 4)


def test_settings_that_do_not_go_together_are_refused(clip_folder: Path, source: Path) -> None:
    recipe = recipe_for(clip_folder, source, "beside")
    check(recipe)
    check_source(recipe.data)
    for crop in ("stage_1", "stage_2"):
        with pytest.raises(InputError, match="data.crop=centre"):
            check_source(replace(recipe.data, crop=crop))
    with pytest.raises(InputError, match='"scenes" is no webdataset shards'):
        check_source(replace(recipe.data, source="scenes"))
    recipe.stage = "dvae"
    with pytest.raises(InputError, match="the stage dvae reads none"):
        check(recipe)
