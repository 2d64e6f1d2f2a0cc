"""minDALL-E read into VQGAN, transformer and tokenizer: names, values, formulas, refusals, the full size."""

import copy
import gzip
import hashlib
import io
import json
import re
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from mindalle_reference import Stage1, Stage2, randomised
from torch import Tensor

from genpipe.dalle1.character_tokenizer import CharacterTokenizer
from genpipe.dalle1.mindalle import MinDALLETransformer
from genpipe.dalle1.sampling import generate_tokens
from genpipe.dalle1.vqgan import VQGAN
from genpipe.errors import InputError
from genpipe.parts import load_one_of, load_part, save_part
from genpipe.published import mindalle, registry, taming
from genpipe.published.fitting import assign, on_meta

MANIFEST = json.loads(gzip.decompress((Path(__file__).parent / "manifests/mindalle.json.gz").read_bytes()))
WORDS = ["red", "car", "cat", "on", "a", "the", "hat", "'", ",", "!"]
MERGES = [("c", "a"), ("ca", "t</w>"), ("ca", "r</w>"), ("h", "a"), ("ha", "t</w>"), ("o", "n</w>"), ("r", "e")]
LETTERS = sorted(set("redcatonheh',!"))
VOCABULARY = ["[UNK]", *LETTERS, *(f"{letter}</w>" for letter in LETTERS), *(a + b for a, b in MERGES), "[PAD]"]
CONFIG = copy.deepcopy(mindalle.DEFAULTS)
CONFIG["dataset"] |= {"context_length": 10, "image_resolution": 16}
CONFIG["stage1"] |= {"embed_dim": 6, "n_embed": 40}
CONFIG["stage1"]["hparams"] |= {"resolution": 16, "z_channels": 5, "ch": 32, "ch_mult": [1, 1, 2]}
CONFIG["stage1"]["hparams"] |= {"num_res_blocks": 1, "attn_resolutions": [4]}
CONFIG["stage2"] |= {"vocab_size_txt": len(VOCABULARY), "vocab_size_img": 40}
CONFIG["stage2"]["hparams"] |= {"embed_dim": 48, "n_layers": 2, "n_heads": 4, "n_dense_layers": 2}
CONFIG["stage2"]["hparams"] |= {"ctx_len_img": 16, "ctx_len_txt": 10}
del CONFIG["stage2"]["use_cls_cond"], CONFIG["dataset"]["tokenizer_type"]  # merged over the published ones
PROMPTS = [
    "a red car",
    "The CAT, on the hat!",
    "",
    "a zebra on a car on a hat on a cat",
    "[PAD] cat [UNK]",
    "  hé\tcat ",
]
SHORT = ["a red car", "the CAT!", ""]  # no more than 10 tokens
Change = Callable[[dict[str, Tensor]], None]


@pytest.fixture(scope="module")
def stages() -> tuple[Stage1, Stage2]:
    with torch.random.fork_rng(devices=[]):
        return randomised(Stage1(CONFIG["stage1"]), 0), randomised(Stage2(CONFIG["stage2"]), 1)


def write_tokenizer(folder: Path, vocabulary: list[str] = VOCABULARY, merges: Any = MERGES) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bpe-16k-vocab.json").write_text(json.dumps({token: id_ for id_, token in enumerate(vocabulary)}))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "bpe-16k-merges.txt").write_text("\n".join(lines) + "\n")


def write(folder: Path, stages: tuple[Stage1, Stage2], change: Change | None = None, config: Any = CONFIG) -> Path:
    """The unpacked folder, small. The config is JSON, which YAML is, with a section that is of no use."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps({**config, "optimizer": {"base_lr": 1e-4}}, indent=1))
    for name, stage in zip((mindalle.STAGE_1, mindalle.STAGE_2), stages, strict=True):
        tensors = dict(stage.state_dict())
        if change is not None and name == mindalle.STAGE_2:
            change(tensors)
        torch.save({"state_dict": tensors}, folder / name)
    write_tokenizer(folder / "tokenizer")
    return folder


def pack(folder: Path, archive: Path) -> str:
    """1.3B.tar.gz of a folder; its MD5."""
    with tarfile.open(archive, "w:gz", compresslevel=1) as packed:
        packed.add(folder, "1.3B")
    return hashlib.md5(archive.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, stages: tuple[Stage1, Stage2]) -> Path:
    return write(tmp_path_factory.mktemp("published") / "1.3B", stages)


@pytest.fixture(scope="module")
def parts(folder: Path) -> tuple[VQGAN, MinDALLETransformer]:
    published = mindalle.read(folder)
    return published.parts["dvae"](), published.parts["transformer"]()


def meta(component: str) -> dict[str, Tensor]:
    entries = MANIFEST[component].items()
    return {name: torch.empty(shape, dtype=getattr(torch, kind), device="meta") for name, (shape, kind) in entries}


def test_names_and_shapes_of_the_published_files() -> None:
    first, second = meta("stage1"), meta("stage2")
    assert (len(first), len(second)) == (343, 680)
    vqgan, transformer = on_meta(VQGAN), on_meta(MinDALLETransformer)
    assign(vqgan, taming.vqgan_tensors(first, 5), "the manifest")  # lists what is missing, unexpected or mis-shaped
    assign(transformer, mindalle.transformer_tensors(second), "the manifest")
    assert sum(parameter.numel() for parameter in vqgan.parameters()) == 76_073_859
    assert sum(parameter.numel() for parameter in transformer.parameters()) == 1_291_081_728
    assert (vqgan.num_codes, vqgan.grid_size, transformer.prefix_length, transformer.image_length) == (
        16384,
        16,
        64,
        256,
    )


def test_the_plain_modules_of_these_tests_have_the_published_names() -> None:
    short = copy.deepcopy(mindalle.DEFAULTS["stage2"])
    short["hparams"]["n_layers"] = 2
    with torch.device("meta"):
        plain = Stage1(mindalle.DEFAULTS["stage1"]), Stage2(short)
    for stage, component in zip(plain, ("stage1", "stage2"), strict=True):
        shapes = {name: list(tensor.shape) for name, tensor in stage.state_dict().items()}
        published = {name: shape for name, (shape, _) in MANIFEST[component].items()}
        assert shapes == {
            name: shape for name, shape in published.items() if not re.match(r"blocks\.\d*[2-9]|blocks\.\d\d", name)
        }


def test_values_bit_for_bit_both_ways(stages: tuple[Stage1, Stage2], parts: tuple[VQGAN, MinDALLETransformer]) -> None:
    ours = parts[0].state_dict()
    for name, tensor in stages[0].state_dict().items():
        found = ours.pop(taming.vqgan_name(name, 3))
        assert torch.equal(found.view(tensor.shape), tensor), name
    assert not ours
    ours = parts[1].state_dict()
    for name, tensor in stages[1].state_dict().items():
        assert torch.equal(ours.pop(mindalle.transformer_name(name)), tensor), name
    assert not ours


@torch.no_grad()
def test_the_vqgan_computes_the_published_formulas(
    stages: tuple[Stage1, Stage2], parts: tuple[VQGAN, MinDALLETransformer]
) -> None:
    pixels = torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(2))
    codes = stages[0].encode(pixels)
    assert torch.equal(parts[0].encode(pixels), codes.flatten(1)) and len(codes.unique()) > 3
    square = torch.randint(0, 40, (3, 4, 4), generator=torch.Generator().manual_seed(3))
    expected = stages[0].decode(square)
    decoded = parts[0].decode(square.flatten(1))
    assert (decoded - expected).abs().max() < 1e-5 and expected.std() > 0.1
    assert parts[0].codebook.shape == (40, 6) and parts[0].factor == 4 and not parts[0].training


def test_sizes_that_the_vqgan_cannot_take(parts: tuple[VQGAN, MinDALLETransformer]) -> None:
    with pytest.raises(InputError, match="divisible by 4"):
        parts[0].encode(torch.zeros(1, 3, 18, 16))
    with pytest.raises(InputError, match="square"):
        parts[0].decode(torch.zeros(1, 12, dtype=torch.long))
    with pytest.raises(InputError, match="factor 4"):
        VQGAN(resolution=18, widths=(32, 32, 32))
    with pytest.raises(InputError, match="norm_groups 32"):
        VQGAN(resolution=16, widths=(32, 48))


@torch.no_grad()
def test_the_transformer_computes_the_published_formulas(
    stages: tuple[Stage1, Stage2], parts: tuple[VQGAN, MinDALLETransformer]
) -> None:
    text = parts[1].tokenizer(SHORT, 10)
    images = torch.randint(0, 40, (3, 16), generator=torch.Generator().manual_seed(4))
    expected = stages[1](text.ids, images)
    found = parts[1](text.ids, text.mask, images)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape and (ours - theirs).abs().max() < 1e-4 < theirs.std()
    again = parts[1](text.ids, torch.ones_like(text.mask), images)
    assert torch.equal(again[1], found[1])  # padding is read as words


@torch.no_grad()
@pytest.mark.parametrize("given", [0, 5])
def test_step_by_step_equals_the_full_pass(parts: tuple[VQGAN, MinDALLETransformer], given: int) -> None:
    model = parts[1]
    text = model.tokenizer(SHORT, 10)
    images = torch.randint(0, 40, (3, 16), generator=torch.Generator().manual_seed(5))
    _, expected = model(text.ids, text.mask, images)
    cache, logits = model.prefill(text.ids, text.mask, images[:, :given] if given else None)
    cache = cache.rows(torch.arange(3), model.sequence_length)
    steps = [logits, *(model.decode_next(images[:, t], cache) for t in range(given, 15))]
    assert (torch.stack(steps, dim=1) - expected[:, given:]).abs().max() < 1e-5 < expected.std()


def test_greedy_drawing_follows_the_published_formulas(
    stages: tuple[Stage1, Stage2], parts: tuple[VQGAN, MinDALLETransformer]
) -> None:
    text = parts[1].tokenizer(PROMPTS[:1], 10)
    drawn = generate_tokens(parts[1], text.ids, text.mask, [[0]], temperature=0)[0]
    tokens = torch.zeros(1, 16, dtype=torch.long)
    with torch.no_grad():
        for t in range(16):
            tokens[:, t] = stages[1](text.ids, tokens)[1][:, t].argmax(dim=-1)
    assert torch.equal(drawn, tokens)


def reference_tokenizer(folder: Path) -> Any:
    """Set up as minDALL-E does."""
    files = [str(folder / name) for name in ("bpe-16k-vocab.json", "bpe-16k-merges.txt")]
    library = tokenizers.CharBPETokenizer.from_file(*files, unk_token="[UNK]", lowercase=True)
    library.add_special_tokens(["[PAD]"])
    library.enable_padding(length=10, pad_id=library.token_to_id("[PAD]"))
    library.enable_truncation(max_length=10)
    return library


def test_the_tokenizer_equals_the_library_s(tmp_path: Path, folder: Path) -> None:
    theirs = reference_tokenizer(folder / "tokenizer")
    ours = CharacterTokenizer.from_files(folder / mindalle.VOCABULARY, folder / mindalle.MERGES)
    ours.save(tmp_path)
    for tokenizer in (ours, CharacterTokenizer.load(tmp_path), copy.deepcopy(ours)):
        with pytest.warns(UserWarning, match="longer than the 10 tokens"):
            batch = tokenizer(PROMPTS, 10)
        encodings = [theirs.encode(prompt) for prompt in PROMPTS]
        assert batch.ids.tolist() == [encoding.ids for encoding in encodings]
        assert batch.mask.tolist() == [[bool(here) for here in encoding.attention_mask] for encoding in encodings]
        assert (tokenizer.pad_id, tokenizer.vocab_size) == (len(VOCABULARY) - 1, len(VOCABULARY))
    assert ours.decode(ours("The CAT", 10).ids[0]) == "the cat"


def test_a_padding_token_that_is_not_in_the_vocabulary_is_added_as_the_library_does(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, VOCABULARY[:-1])
    files = [tmp_path / name for name in ("bpe-16k-vocab.json", "bpe-16k-merges.txt")]
    ours = CharacterTokenizer.from_files(*files)
    assert ours("cat", 10).ids.tolist() == [reference_tokenizer(tmp_path).encode("cat").ids]
    assert ours.pad_id == len(VOCABULARY) - 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state["model"].update(end_of_word_suffix="@"), "another kind"),
        (lambda state: state.update(normalizer=None), "another kind"),
        (lambda state: state["model"]["vocab"].pop("[UNK]"), r"\[UNK\]|character tokenizer"),
        (lambda state: state["model"]["vocab"].update(cat=500), "ids 0, 1, 2"),
        (lambda state: state.pop("model"), "not a character tokenizer"),
    ],
)
def test_tokenizer_files_that_are_refused(
    tmp_path: Path, folder: Path, change: Callable[[Any], None], words: str
) -> None:
    ours = CharacterTokenizer.from_files(folder / mindalle.VOCABULARY, folder / mindalle.MERGES)
    state = json.loads(ours.to_json())
    change(state)
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match=words):
        CharacterTokenizer.load(tmp_path)


def test_tokenizers_that_do_not_fit(tmp_path: Path, parts: tuple[VQGAN, MinDALLETransformer]) -> None:
    with pytest.raises(InputError, match="needs a CharacterTokenizer"):
        parts[1].tokenizer = object()
    with pytest.raises(InputError, match="text table has"):
        parts[1].tokenizer = CharacterTokenizer({"[UNK]": 0, "a": 1}, [])
    with pytest.raises(InputError, match="no BPE dropout"):
        parts[1].tokenizer("a", 10, dropout=0.1)
    with pytest.raises(InputError, match="merges do not fit"):
        CharacterTokenizer({"[UNK]": 0, "a": 1}, [("a", "b")])
    write_tokenizer(tmp_path)
    (tmp_path / "bpe-16k-vocab.json").write_text("{")
    with pytest.raises(InputError, match=r"bpe-16k-vocab\.json"):
        CharacterTokenizer.from_files(tmp_path / "bpe-16k-vocab.json", tmp_path / "bpe-16k-merges.txt")


def test_saved_parts_load_again(tmp_path: Path, parts: tuple[VQGAN, MinDALLETransformer]) -> None:
    for part, name in zip(parts, ("dvae", "transformer"), strict=True):
        save_part(part, tmp_path / name)
        again = load_one_of((MinDALLETransformer, VQGAN), tmp_path / name)
        assert type(again) is type(part)
        assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in part.state_dict().items())
    assert torch.equal(again.tokenizer(SHORT, 10).ids, parts[1].tokenizer(SHORT, 10).ids)
    (tmp_path / "transformer" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        load_part(MinDALLETransformer, tmp_path / "transformer")


def test_the_archive_is_unpacked_and_removed_again(tmp_path: Path, folder: Path) -> None:
    archive = tmp_path / "1.3B.tar.gz"
    md5 = pack(folder, archive)
    assert registry.find(archive) is registry.find(folder) is mindalle
    published = mindalle.read(archive, torch.bfloat16, archive_md5=md5)
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
        mindalle.read(archive)
    archive.write_bytes(archive.read_bytes()[:150])
    with pytest.raises(InputError, match="md5"):
        mindalle.read(archive, archive_md5=md5)
    with pytest.raises(InputError, match="truncated"):
        mindalle.read(archive, archive_md5=hashlib.md5(archive.read_bytes()).hexdigest())

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
            mindalle.read(archive, archive_md5=packed(name, kind))
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
def test_tensors_that_do_not_fit_are_listed(
    tmp_path: Path, stages: tuple[Stage1, Stage2], change: Change, words: str
) -> None:
    published = mindalle.read(write(tmp_path / "1.3B", stages, change))
    with pytest.raises(InputError, match=words):
        published.parts["transformer"]()


def test_a_vqgan_that_does_not_fit(tmp_path: Path, folder: Path, stages: tuple[Stage1, Stage2]) -> None:
    settings = mindalle.settings_in(folder / "config.yaml").vqgan
    for extra, words in [("loss.discriminator.weight", "unexpected"), ("encoder.conv_norm_out.bias", "twice")]:
        torch.save({"state_dict": {**stages[0].state_dict(), extra: torch.ones(64)}}, tmp_path / "stage1.ckpt")
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


def memory(name: str) -> int:
    """VmRSS, what this process has in memory now, or VmHWM, its peak, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_full_size_is_mapped_from_its_file(tmp_path: Path) -> None:
    (tmp_path / mindalle.CONFIG).touch()
    (tmp_path / mindalle.STAGE_1).touch()
    with torch.serialization.skip_data():  # the numbers are a hole in the file
        tensors = {name: torch.empty(shape) for name, (shape, _) in MANIFEST["stage2"].items()}
        torch.save({"state_dict": tensors}, tmp_path / mindalle.STAGE_2)
    del tensors
    size = (tmp_path / mindalle.STAGE_2).stat()
    assert 5_164_326_912 <= size.st_size < 5.2e9 and 512 * size.st_blocks < 20e6
    write_tokenizer(tmp_path / "tokenizer", ["[UNK]", *(f"t{number}" for number in range(16382)), "[PAD]"], [])
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    model = mindalle.read(tmp_path).parts["transformer"]()
    assert memory("VmHWM") - before < 0.3e9  # nothing is read before it is used
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_291_081_728
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert float(model.image_head.weight.detach().sum()) == 0 and memory("VmHWM") - before < 0.5e9  # a matrix of 100 MB
