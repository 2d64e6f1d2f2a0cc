"""The captions' tokenizer: special tokens, truncation, BPE dropout, saving, hostile text."""

import copy
import json
import os
import pickle
import subprocess
import sys
import threading
import warnings

import numpy as np
import open_clip
import pytest
import torch

from genpipe.clip.tokenizer import OpenClipTokenizer
from genpipe.errors import InputError
from genpipe.tokenizer import CaptionTokenizer

CAPTIONS = [
    f"{count} {thing}s on a {background} background"
    for count in ("two", "three", "four")
    for thing in ("tiger", "penguin", "strawberry", "guitar")
    for background in ("red", "white", "light green")
]
HOSTILE = [
    "",
    " ",
    "x" * 10_000,
    "naïve café 😀 👩‍👩‍👧",
    "\x00a\x07\tb\n",
    "日本語 العربية",
    "\ud800 lone",
    "<|end|> <|start|> <|pad|>",
]


@pytest.fixture(scope="module")
def tokenizer() -> CaptionTokenizer:
    return CaptionTokenizer.train(CAPTIONS, vocab_size=330)


def test_ids_of_the_specials(tokenizer):
    assert tokenizer.vocab_size <= 330
    assert (tokenizer.pad_id, tokenizer.start_id, tokenizer.end_id) == (
        0,
        tokenizer.vocab_size - 2,
        tokenizer.vocab_size - 1,
    )


def test_known_words_become_few_tokens(tokenizer):
    batch = tokenizer(["Two TIGERS on a\tred   background"], 16)
    assert batch.ids.shape == batch.mask.shape == (1, 16)
    assert batch.ids.dtype == torch.int64 and batch.mask.dtype == torch.bool
    assert int(batch.mask.sum()) <= 2 + 7
    assert tokenizer.decode(batch.ids[0]) == "two tigers on a red background"
    assert torch.equal(batch.mask[0], torch.arange(16) < batch.mask.sum())


@pytest.mark.filterwarnings("ignore:a text is longer")
@pytest.mark.parametrize(("name", "dropout"), [("captions", 0.0), ("captions", 0.3), ("ViT-B-32", 0.0)])
def test_start_and_end_are_always_there(tokenizer, name, dropout):
    if name != "captions":
        tokenizer = OpenClipTokenizer(name)
        start, end = 49406, 49407
    else:
        start, end = tokenizer.start_id, tokenizer.end_id
    batch = tokenizer(HOSTILE, 20, dropout, np.random.default_rng(0))
    for ids, mask in zip(batch.ids, batch.mask, strict=True):
        length = int(mask.sum())
        assert ids[0] == start and ids[length - 1] == end and int(ids.argmax()) == length - 1
        assert (ids[:length] == start).sum() == 1 and (ids[:length] == end).sum() == 1
        assert (ids[length:] == tokenizer.pad_id).all() and mask[:length].all()


def test_unicode_survives_and_control_characters_go(tokenizer):
    for text, expected in [("naïve café 😀", "naïve café 😀"), ("\x00a\x07\tb\n", "a b"), ("<|END|>", "<|end|>")]:
        assert tokenizer.decode(tokenizer([text], 64).ids[0]) == expected


def test_truncation_is_said_once():
    tokenizer = CaptionTokenizer.train(CAPTIONS, vocab_size=300)
    with pytest.warns(UserWarning, match="longer than the 6 tokens"):
        batch = tokenizer(["a tiger " * 50], 8)
    assert batch.mask.all() and batch.ids[0, -1] == tokenizer.end_id
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer(["a tiger " * 50], 8)


def test_dropout_off_equals_the_library(tokenizer):
    class Never:
        """A generator whose dropped merges are infinitely far away."""

        def geometric(self, probability: float) -> int:
            return 10**9

    library = tokenizer(CAPTIONS, 40)
    by_hand = tokenizer(CAPTIONS, 40, 0.5, Never())
    assert torch.equal(library.ids, by_hand.ids)
    # The merge loop itself, not only the table of whole words: one drop far behind the first word's merges.
    always_first = tokenizer(["penguin"], 40, 1 - 1e-9, np.random.default_rng(0))
    assert int(always_first.mask.sum()) == 2 + len(" penguin")  # every merge dropped: bytes


def test_the_merge_loop_equals_the_library(tokenizer):
    class NoDrops:
        def none_in(self, count: int) -> bool:
            return False

        def draw(self) -> bool:
            return False

    for word in ("Ġpenguin", "Ġbackground", "Ġstrawberrys", "Ġaaaa", "Ġzzgreengreen"):
        assert tokenizer._merge(word, NoDrops()) == [token.value for token in tokenizer._library.model.tokenize(word)]


def test_dropout_is_reproducible_and_keeps_the_text(tokenizer):
    first, again, other = (tokenizer(CAPTIONS, 60, 0.2, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.ids, again.ids) and not torch.equal(first.ids, other.ids)
    assert [tokenizer.decode(ids) for ids in first.ids] == CAPTIONS
    assert first.mask.sum() > tokenizer(CAPTIONS, 60).mask.sum()


def test_dropout_rate(tokenizer):
    # A word of one merge is split exactly as often as that merge is dropped.
    word = next(text for text in tokenizer._ranks if "".join(text).startswith("Ġ"))
    text = tokenizer._library.decoder.decode(["".join(word)]).strip()
    batch = tokenizer([text] * 4000, 8, 0.25, np.random.default_rng(3))
    split = (batch.mask.sum(dim=1) == 4).float().mean()
    assert abs(float(split) - 0.25) < 0.03


def test_saved_and_loaded_and_copied(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    expected = tokenizer(CAPTIONS, 32).ids
    copies = [
        CaptionTokenizer.load(tmp_path),
        CaptionTokenizer.from_json(tokenizer.to_json()),
        pickle.loads(pickle.dumps(tokenizer)),
        copy.deepcopy(tokenizer),
    ]
    for loaded in copies:
        assert loaded.to_json() == tokenizer.to_json()
        assert torch.equal(loaded(CAPTIONS, 32).ids, expected)


def test_training_is_deterministic(tokenizer):
    assert CaptionTokenizer.train(CAPTIONS, vocab_size=330).to_json() == tokenizer.to_json()


def test_many_threads_one_instance(tokenizer):
    expected, results = tokenizer(CAPTIONS, 32).ids, []
    threads = [threading.Thread(target=lambda: results.append(tokenizer(CAPTIONS, 32).ids)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8 and all(torch.equal(result, expected) for result in results)


def test_no_warning_when_forked_after_training():
    code = (
        "import os\nfrom genpipe.tokenizer import CaptionTokenizer\n"
        "t = CaptionTokenizer.train(['a tiger'] * 50, 270); t(['a'], 8)\n"
        "pid = os.fork()\nif pid == 0: t(['b'] * 9, 8); os._exit(0)\nos.waitpid(pid, 0)"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TOKENIZERS_PARALLELISM"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0 and "huggingface/tokenizers" not in done.stderr


def test_inputs_unchanged(tokenizer):
    texts = ["Two  Tigers", "b"]
    tokenizer(texts, 8)
    assert texts == ["Two  Tigers", "b"]


def test_a_bare_string_is_one_text(tokenizer):
    assert torch.equal(tokenizer("two tigers", 8).ids, tokenizer(["two tigers"], 8).ids)


@pytest.mark.parametrize("size", [0, 258, 4097])
def test_vocabulary_limits(size):
    with pytest.raises(InputError, match="259 to 4096"):
        CaptionTokenizer.train(CAPTIONS, vocab_size=size)


def test_bad_calls(tokenizer):
    with pytest.raises(InputError, match="at least 3"):
        tokenizer(["a"], 2)
    with pytest.raises(InputError, match="must be a string"):
        tokenizer([3], 8)
    with pytest.raises(InputError, match="generator"):
        tokenizer(["a"], 8, 0.1)
    with pytest.raises(InputError, match="dropout"):
        tokenizer(["a"], 8, 1.0, np.random.default_rng(0))


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff\xfe", b'{"version": "1.0"}'])
def test_damaged_file_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(InputError, match="tokenizer.json"):
        CaptionTokenizer.load(tmp_path)


def test_foreign_vocabulary_is_refused(tokenizer, tmp_path):
    data = json.loads(tokenizer.to_json())
    data["model"]["vocab"] = {
        token + ("?" if token == "<|end|>" else ""): id_ for token, id_ in data["model"]["vocab"].items()
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match="tokenizer.json is damaged"):
        CaptionTokenizer.load(tmp_path)


@pytest.mark.filterwarnings("ignore:a text is longer")
def test_open_clip_parity():
    tokenizer, theirs = OpenClipTokenizer("ViT-B-32"), open_clip.get_tokenizer("ViT-B-32")
    texts = [*CAPTIONS, "A photo of a cat!", "tiger " * 200, ""]
    assert torch.equal(tokenizer(texts, 77).ids, theirs(texts))
    assert tokenizer.decode(tokenizer(["A photo, of a cat"], 77).ids[0]) == "a photo , of a cat"
    assert tokenizer.vocab_size == 49408
    with pytest.raises(InputError, match="dropout"):
        tokenizer(["a"], 77, 0.1, np.random.default_rng(0))


def test_open_clip_truncation_is_said_once():
    tokenizer = OpenClipTokenizer("ViT-B-32")
    with pytest.warns(UserWarning, match="75 tokens"):
        tokenizer(["tiger " * 200], 77)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer(["tiger " * 200], 77)
