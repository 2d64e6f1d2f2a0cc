"""minDALL-E's tokenizer: equal to the library's, padding and special tokens included; strict files."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from mindalle_files import PROMPTS, VOCABULARY, write, write_tokenizer

from genpipe.dalle1.character_tokenizer import CharacterTokenizer
from genpipe.dalle1.mindalle import MinDALLETransformer
from genpipe.dalle1.vqgan import VQGAN
from genpipe.errors import InputError
from genpipe.published import mindalle

Parts = tuple[VQGAN, MinDALLETransformer]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("published") / "1.3B")


@pytest.fixture(scope="module")
def parts(folder: Path) -> Parts:
    published = mindalle.read(folder)
    return published.parts["dvae"](), published.parts["transformer"]()


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


def test_tokenizers_that_do_not_fit(tmp_path: Path, parts: Parts) -> None:
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
