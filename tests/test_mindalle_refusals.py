"""minDALL-E's files: the archive; what is damaged, does not fit or is of another kind is refused."""

import hashlib
import io
import tarfile
from pathlib import Path

import pytest
import torch
from mindalle_files import Change, pack, stages, write
from torch import Tensor

from genpipe.dalle1.mindalle import MinDALLETransformer
from genpipe.dalle1.vqgan import VQGAN
from genpipe.errors import InputError
from genpipe.published import mindalle, registry
from genpipe.published.fitting import on_meta

Parts = tuple[VQGAN, MinDALLETransformer]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("published") / "1.3B")


def test_the_archive_is_unpacked_and_removed_again(tmp_path: Path, folder: Path) -> None:
    archive = tmp_path / "1.3B.tar.gz"
    md5 = pack(folder, archive)
    assert registry.find(archive) is registry.find(folder) is mindalle
    published = mindalle.read(archive, torch.bfloat16, archive_md5=md5)
    assert [path.name for path in tmp_path.iterdir()] == ["1.3B.tar.gz"] and published.resolution == 256
    transformer = published.parts["transformer"]()
    assert {parameter.dtype for parameter in transformer.parameters()} == {torch.bfloat16}
    assert published.files == [archive] and published.defaults["dalle1"]["top_k"] == 256
    assert published.parts["dvae"]().num_codes == 40
    del published, transformer
    assert [path.name for path in tmp_path.iterdir()] == ["1.3B.tar.gz"]


def test_archives_that_are_refused(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("empty")  # of files with the right names
    (folder / "tokenizer").mkdir()
    for name in mindalle.FILES:
        (folder / name).write_text(name * 100)
    archive = tmp_path / "1.3B.tar.gz"
    md5 = pack(folder, archive)
    with pytest.raises(InputError, match=f"md5 {md5} instead of 57b008f0"):
        mindalle.read(archive).parts["dvae"]()
    archive.write_bytes(archive.read_bytes()[:150])
    with pytest.raises(InputError, match="md5"):
        mindalle.read(archive, archive_md5=md5).parts["dvae"]()
    with pytest.raises(InputError, match="truncated"):
        mindalle.read(archive, archive_md5=hashlib.md5(archive.read_bytes()).hexdigest()).parts["dvae"]()

    def packed(name: str, kind: bytes = tarfile.REGTYPE) -> str:
        with tarfile.open(archive, "w:gz") as opened:
            opened.add(folder, "1.3B")
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            opened.addfile(member, io.BytesIO())
        return hashlib.md5(archive.read_bytes()).hexdigest()

    for name, kind, words in [
        ("1.3B/../../out.txt", tarfile.REGTYPE, "outside the folder"),
        ("1.3B/extra.py", tarfile.REGTYPE, "was not expected"),
        ("1.3B/stage3.ckpt", tarfile.SYMTYPE, "a link or a device"),
    ]:
        with pytest.raises(InputError, match=words):
            mindalle.read(archive, archive_md5=packed(name, kind)).parts["dvae"]()
        assert [path.name for path in tmp_path.iterdir()] == ["1.3B.tar.gz"]  # nothing was written


def transposed(tensors: dict[str, Tensor]) -> None:
    tensors["blocks.1.mlp.0.weight"] = tensors["blocks.1.mlp.0.weight"].T.contiguous()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop("blocks.0.attn.key.bias"), r"missing blocks\.0\.attention\.qkv\.key\.bias"),
        (lambda tensors: tensors.pop("head_txt.weight"), r"missing text_head\.weight"),
        (
            lambda tensors: tensors.update({"blocks.2.ln1.weight": torch.ones(48)}),
            r"unexpected blocks\.2\.norm_1\.weight",
        ),
        (lambda tensors: tensors.update({"norm.weight": torch.ones(48)}), r"unexpected norm\.weight \(twice\)"),
        (transposed, r"mis-shaped blocks\.1\.mlp\.0\.weight \[48, 192\] instead of \[192, 48\]"),
    ],
    ids=["missing in a block", "missing", "extra", "extra under our own name", "transposed"],
)
def test_tensors_that_do_not_fit_are_listed(tmp_path: Path, change: Change, words: str) -> None:
    published = mindalle.read(write(tmp_path / "1.3B", change))
    with pytest.raises(InputError, match=words):
        published.parts["transformer"]()


def test_a_vqgan_that_does_not_fit(tmp_path: Path, folder: Path) -> None:
    settings = mindalle.settings_in(folder / "config.yaml").vqgan
    for extra, words in [("loss.discriminator.weight", "unexpected"), ("encoder.conv_norm_out.bias", "twice")]:
        torch.save({"state_dict": {**stages()[0].state_dict(), extra: torch.ones(64)}}, tmp_path / "stage1.ckpt")
        with pytest.raises(InputError, match=words):
            mindalle.load_vqgan(tmp_path / "stage1.ckpt", settings)
    (tmp_path / "stage1.ckpt").write_bytes((folder / mindalle.STAGE_1).read_bytes()[:-4000])
    with pytest.raises(InputError, match=r"stage1\.ckpt"):
        mindalle.load_vqgan(tmp_path / "stage1.ckpt", settings)


def test_folders_that_are_not_complete(tmp_path: Path, folder: Path) -> None:
    assert not mindalle.recognises(tmp_path)
    (tmp_path / mindalle.STAGE_2).symlink_to(folder / mindalle.STAGE_2)
    assert mindalle.recognises(tmp_path) and len(mindalle.missing(tmp_path)) == 4
    with pytest.raises(InputError, match=r"config\.yaml, stage1_last\.ckpt, tokenizer/"):
        mindalle.read(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stage2: {hparams: {gelu_use_approx: true}}", "gelu_use_approx is True, not False"),
        ("stage1: {type: vqvae}", "stage1.type is 'vqvae'"),
        ("stage2: {hparams: {n_layers: many}}", "n_layers is 'many', not a int"),
        ("stage1: {hparams: {ch_mult: [1, -1]}}", "not a list of whole numbers"),
        ("stage1: [1, 2]", "stage1 is no mapping"),
        ("a: !!python/object/apply:os.system ['touch ran']", "could not determine a constructor"),
        ("a: [", "cannot be used"),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, text: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(InputError, match=words):
        mindalle.settings_in(tmp_path / "config.yaml")
    assert not (tmp_path / "ran").exists()


def test_an_empty_config_is_the_published_shape(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    settings = mindalle.settings_in(tmp_path / "config.yaml")
    vqgan, transformer = on_meta(VQGAN), on_meta(MinDALLETransformer)
    assert {key: vqgan.config[key] for key in settings.vqgan} == settings.vqgan
    assert {key: transformer.config[key] for key in settings.transformer} == settings.transformer
