"""The captions' tokenizer: byte-level BPE learned from captions, with BPE dropout (DALL-E 1, section 2.2).

Legend: B texts, L context length, V vocabulary size.
"""

from __future__ import annotations

import json
import os
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from genpipe.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import Self

PAD, START, END = "<|pad|>", "<|start|>", "<|end|>"
MAX_VOCAB_SIZE = 4096
MIN_VOCAB_SIZE = 256 + 3  # every byte, and pad, start, end
FILE_NAME = "tokenizer.json"
MAX_CACHED_WORDS = 65536
MAX_DROPOUT_WORD = 64  # merging by hand is quadratic, so longer words are merged as usual


@dataclass(frozen=True)
class TokenBatch:
    """Token ids (B, L) int64 and mask (B, L) bool, which is True from the start token to the end token inclusive."""

    ids: torch.Tensor
    mask: torch.Tensor

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch on `device`."""
        return TokenBatch(self.ids.to(device), self.mask.to(device))


class SavedAsJson:
    """A tokenizer that is saved as tokenizer.json beside the weights of the part that eats its ids.

    Classes give `to_json` and its inverse `from_json`, which raises InputError for a text that is none of theirs.
    """

    def to_json(self) -> str:
        """Everything needed to build the tokenizer again."""
        raise NotImplementedError

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of to_json."""
        raise NotImplementedError

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write tokenizer.json into an existing folder."""
        (Path(folder) / FILE_NAME).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """Read tokenizer.json from a folder. Raises InputError naming the file if it is missing or damaged."""
        path = Path(folder) / FILE_NAME
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}), the part's folder is incomplete.") from error
        except ValueError as error:  # InputError, or bytes that are not UTF-8
            raise InputError(f"{path} is damaged: {error}") from error

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self).from_json(self.to_json())


class CaptionTokenizer(SavedAsJson):
    """Byte-level BPE for captions: lower-cased, any unicode encodes, control characters are dropped.

    Ids: 0 pads, then the bytes and the merged tokens, then start (V - 2) and end (V - 1). The end token has the largest
    id because open_clip's text tower finds it by arg-max. Text that merely spells a special token is ordinary text.

    One instance may be used from several threads and survives fork and pickle.
    """

    def __init__(self, library: Tokenizer) -> None:
        vocabulary = library.get_vocab()
        self.vocab_size = len(vocabulary)
        self.pad_id, self.start_id, self.end_id = 0, self.vocab_size - 2, self.vocab_size - 1
        expected = {PAD: self.pad_id, START: self.start_id, END: self.end_id}
        if any(vocabulary.get(token) != id_ for token, id_ in expected.items()):
            raise InputError(f"a caption tokenizer needs the entries {expected}, this vocabulary has others.")
        if not MIN_VOCAB_SIZE <= self.vocab_size <= MAX_VOCAB_SIZE:
            limits = f"{MIN_VOCAB_SIZE} to {MAX_VOCAB_SIZE}"
            raise InputError(f"a caption tokenizer has {limits} entries, not {self.vocab_size}.")
        self._library = library
        self._vocabulary = vocabulary
        pairs = _pairs(json.loads(library.to_str())["model"]["merges"])
        self._ranks = {pair: rank for rank, pair in enumerate(pairs)}
        self._whole_words: dict[str, list[str]] = {}
        self._truncation_said = False

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int = 2048) -> CaptionTokenizer:
        """Learn the merges from `captions`; the result has at most `vocab_size` entries (fewer if the text is small).

        Raises InputError when vocab_size is outside 259 (bytes and specials) to 4096.
        """
        if not MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
            raise InputError(f"vocab_size must be {MIN_VOCAB_SIZE} to {MAX_VOCAB_SIZE}, not {vocab_size}.")
        library = _empty_library(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 2,  # start and end are added behind the learned tokens
            special_tokens=[PAD],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        with _one_thread():
            library.train_from_iterator((encodable(caption) for caption in captions), trainer)
        learned = json.loads(library.to_str())["model"]
        vocabulary = dict(learned["vocab"])
        for token in (START, END):
            vocabulary[token] = len(vocabulary)
        merges = _pairs(learned["merges"])
        # Built anew so that the specials are plain vocabulary entries: as "added tokens" a prompt could spell them.
        return cls(_empty_library(models.BPE(vocab=vocabulary, merges=merges)))

    def __call__(
        self,
        texts: str | Sequence[str],
        context_length: int,
        dropout: float = 0.0,
        generator: np.random.Generator | None = None,
    ) -> TokenBatch:
        """Encode B texts as start, tokens, end, padding to exactly `context_length` (at least 3).

        A longer text loses its tail, never the end token; the first time this happens a warning says so.
        `dropout` in [0, 1) leaves out merges at random (BPE dropout, Provilkov et al., arXiv 1910.13267, algorithm 1)
        and then needs a `generator`. Raises InputError for texts that are not strings and for lengths below 3.
        """
        texts = checked_texts(texts, context_length)
        if dropout == 0.0:
            rows = [self._library.encode(encodable(text)).ids for text in texts]
        elif generator is None or not 0.0 < dropout < 1.0:
            raise InputError(f"BPE dropout must lie in [0, 1) and needs a generator, got {dropout} and {generator}.")
        else:
            drops = _Drops(dropout, generator)
            rows = [self._encode_with_dropout(encodable(text), drops) for text in texts]
        if not self._truncation_said and any(len(row) > context_length - 2 for row in rows):
            self._truncation_said = True
            say_truncation(context_length)
        return token_batch(rows, context_length, self.pad_id, self.start_id, self.end_id)

    def decode(self, ids: torch.Tensor | Sequence[int]) -> str:
        """The text of one row of ids, without special tokens; bytes that are not UTF-8 become U+FFFD."""
        kept = [int(id_) for id_ in ids if int(id_) not in (self.pad_id, self.start_id, self.end_id)]
        return self._library.decode(kept, skip_special_tokens=False).removeprefix(" ")

    def to_json(self) -> str:
        """Everything needed to build the tokenizer again, in the format of the `tokenizers` library."""
        return self._library.to_str(pretty=True)

    @classmethod
    def from_json(cls, text: str) -> CaptionTokenizer:
        """The inverse of to_json. Raises InputError if `text` is not a caption tokenizer."""
        try:
            library = Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"not a tokenizer in the format of the tokenizers library ({error}).") from error
        return cls(library)

    def _encode_with_dropout(self, text: str, drops: _Drops) -> list[int]:
        """Ids of one text, some of the merges left out."""
        normalized = self._library.normalizer.normalize_str(text)
        words = (word for word, _ in self._library.pre_tokenizer.pre_tokenize_str(normalized))
        return [self._vocabulary[token] for word in words for token in self._merge(word, drops)]

    def _merge(self, word: str, drops: _Drops) -> list[str]:
        """Algorithm 1 of BPE dropout on one word: of the merges that apply and are not dropped, do the first learned.

        A merge of two neighbours may be dropped at one step and done at a later one.
        """
        whole = self._whole_words.get(word)
        if whole is None:
            whole = [token.value for token in self._library.model.tokenize(word)]
            if len(self._whole_words) < MAX_CACHED_WORDS:
                self._whole_words[word] = whole
        # Only drops of the merge that would be done matter, so a word of n merges that sees no drop is merged as usual.
        if len(word) > MAX_DROPOUT_WORD or drops.none_in(len(word) - len(whole)):
            return whole
        symbols = list(word)
        while True:
            pairs = zip(symbols, symbols[1:], strict=False)
            found = sorted((self._ranks[pair], at) for at, pair in enumerate(pairs) if pair in self._ranks)
            kept = next((at for _, at in found if not drops.draw()), None)
            if kept is None:
                return symbols
            symbols[kept : kept + 2] = [symbols[kept] + symbols[kept + 1]]


class _Drops:
    """Independent draws, each True with probability p, made as the gaps between Trues: few calls of the generator."""

    def __init__(self, probability: float, generator: np.random.Generator) -> None:
        self._probability, self._generator = probability, generator
        self._gap = int(generator.geometric(probability)) - 1

    def draw(self) -> bool:
        if self._gap > 0:
            self._gap -= 1
            return False
        self._gap = int(self._generator.geometric(self._probability)) - 1
        return True

    def none_in(self, count: int) -> bool:
        """Whether the next `count` draws are all False; only then are they taken."""
        if self._gap < count:
            return False
        self._gap -= count
        return True


def _empty_library(model: models.BPE) -> Tokenizer:
    """The pipeline around the merges: white space collapsed, control characters dropped, lower case, bytes."""
    library = Tokenizer(model)
    library.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Replace(Regex(r"\p{Cc}"), ""),
            normalizers.NFC(),
            normalizers.Lowercase(),
            normalizers.Strip(),
        ]
    )
    # The prefix space makes a word the same token at the start of a caption as inside it.
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)
    library.decoder = decoders.ByteLevel()
    return library


def _pairs(merges: Sequence[str | Sequence[str]]) -> list[tuple[str, str]]:
    """Merges as the library's JSON has them ("a b" in older versions, ["a", "b"] in newer ones) -> pairs."""
    split = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    return [(left, right) for left, right in split]


def encodable(text: str) -> str:
    """`text` without lone surrogates, which have no UTF-8 form."""
    return text if text.isascii() else "".join(c for c in text if unicodedata.category(c) != "Cs")


def checked_texts(texts: str | Sequence[str], context_length: int) -> list[str]:
    """The texts as a list (a bare string is one text); InputError for anything else and for too short a context."""
    if context_length < 3:
        raise InputError(f"context_length must be at least 3 (start, one token, end), not {context_length}.")
    listed = [texts] if isinstance(texts, str) else list(texts)
    for text in listed:
        if not isinstance(text, str):
            raise InputError(f"a text to encode must be a string, not {type(text).__name__}.")
    return listed


def say_truncation(context_length: int) -> None:
    """Warn that a text lost its tail; the tokenizers call this once per instance."""
    limit = context_length - 2
    warnings.warn(f"a text is longer than the {limit} tokens that fit; its tail is ignored (said once).", stacklevel=3)


def token_batch(rows: list[list[int]], context_length: int, pad_id: int, start_id: int, end_id: int) -> TokenBatch:
    """Rows of bare ids -> ids and mask (B, L): start, at most L - 2 ids, end, padding."""
    ids = torch.full((len(rows), context_length), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(rows), context_length), dtype=torch.bool)
    for index, row in enumerate(rows):
        full = [start_id, *row[: context_length - 2], end_id]
        ids[index, : len(full)] = torch.tensor(full)
        mask[index, : len(full)] = True
    return TokenBatch(ids, mask)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keeps the library from starting threads, after which it would warn at every later fork (data loader workers)."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
