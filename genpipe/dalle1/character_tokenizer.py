"""minDALL-E's tokenizer: BPE over characters with word-end marks (Sennrich et al., arXiv 1508.07909), as published.

The `tokenizers` library's CharBPETokenizer, set up as minDALL-E does: lower case, [UNK] for characters that the
vocabulary lacks, no start and no end, cut and filled up with [PAD] to a fixed length. The transformer sees the padding
as ordinary words, so it has to be exactly this.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from genpipe.errors import InputError
from genpipe.tokenizer import SavedAsJson, TokenBatch, checked_texts, encodable

UNKNOWN, PAD, WORD_END = "[UNK]", "[PAD]", "</w>"
MAX_FILE_BYTES = 64 * 2**20  # the published files have less than one


class CharacterTokenizer(SavedAsJson):
    """Texts -> ids (B, L), without start and end; of the same use as a CaptionTokenizer.

    Args:
        vocabulary: token -> id, the ids 0 to V' - 1; has [UNK]. [PAD] gets the next id if it is not in there.
        merges: pairs of tokens in the order in which they are merged.
    Raises InputError where they do not fit one another.
    """

    def __init__(self, vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> None:
        if UNKNOWN not in vocabulary or sorted(vocabulary.values()) != list(range(len(vocabulary))):
            raise InputError(f"a character tokenizer's vocabulary needs {UNKNOWN} and the ids 0, 1, 2, ... once each.")
        try:
            model = models.BPE(dict(vocabulary), list(merges), unk_token=UNKNOWN, end_of_word_suffix=WORD_END)
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"the merges do not fit the vocabulary ({error}).") from error
        library = Tokenizer(model)
        library.normalizer = normalizers.Sequence(
            [normalizers.BertNormalizer(lowercase=False), normalizers.Lowercase()]
        )
        library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        library.decoder = decoders.BPEDecoder(suffix=WORD_END)
        library.add_special_tokens([UNKNOWN])  # a text that spells a special token means it, as in the published one
        library.add_special_tokens([PAD])
        self._library = library
        self.vocab_size: int = library.get_vocab_size()
        self.pad_id = int(library.token_to_id(PAD) or 0)  # was added, so it is there
        self._truncation_said = False

    def __call__(
        self, texts: str | Sequence[str], context_length: int, dropout: float = 0.0, generator: Any = None
    ) -> TokenBatch:
        """Encode B texts, cut or filled up with [PAD] to exactly `context_length`; the mask is True on words.

        Warns once that a text lost its tail. Raises InputError for texts that are not strings, lengths below 3, and a
        BPE `dropout`, which this tokenizer does not have.
        """
        if dropout:
            raise InputError(f"minDALL-E's tokenizer has no BPE dropout; set it to 0, not {dropout}.")
        texts = checked_texts(texts, context_length)
        rows = [self._library.encode(encodable(text)).ids for text in texts]
        if not self._truncation_said and any(len(row) > context_length for row in rows):
            self._truncation_said = True
            warnings.warn(
                f"a text is longer than the {context_length} tokens that fit; its tail is ignored (said once).",
                stacklevel=2,
            )
        ids = torch.full((len(rows), context_length), self.pad_id, dtype=torch.int64)
        mask = torch.zeros((len(rows), context_length), dtype=torch.bool)
        for index, row in enumerate(rows):
            kept = row[:context_length]
            ids[index, : len(kept)] = torch.tensor(kept, dtype=torch.int64)
            mask[index, : len(kept)] = True
        return TokenBatch(ids, mask)

    def decode(self, ids: torch.Tensor | Sequence[int]) -> str:
        """The text of one row of ids, lower case, without special tokens."""
        return self._library.decode([int(id_) for id_ in ids])

    def to_json(self) -> str:
        """Everything needed to build the tokenizer again, in the format of the `tokenizers` library."""
        return self._library.to_str(pretty=True)

    @classmethod
    def from_json(cls, text: str) -> CharacterTokenizer:
        """The inverse of to_json. Raises InputError if `text` is anything else."""
        try:
            state = json.loads(Tokenizer.from_str(text).to_str())
            merges = [(left, right) for left, right in state["model"]["merges"]]
            vocabulary = dict(state["model"]["vocab"])
        except Exception as error:  # the library raises bare Exception; a model of another kind has other entries
            raise InputError(f"not a character tokenizer in the format of the tokenizers library ({error}).") from error
        tokenizer = cls(vocabulary, merges)
        if json.loads(tokenizer.to_json()) != state:
            raise InputError("a tokenizer of another kind: not character BPE with </w>, lower case, [UNK] and [PAD].")
        return tokenizer

    @classmethod
    def from_files(cls, vocabulary: Path, merges: Path) -> CharacterTokenizer:
        """The published pair: a JSON object token -> id, and a line per merge. Raises InputError naming a file."""
        for path in (vocabulary, merges):
            if not path.is_file() or path.stat().st_size > MAX_FILE_BYTES:
                raise InputError(f"{path} is missing or larger than {MAX_FILE_BYTES >> 20} MiB.")
        try:
            read = models.BPE.read_file(str(vocabulary), str(merges))
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"{vocabulary} and {merges.name} are damaged ({error}).") from error
        try:
            return cls(*read)
        except InputError as error:
            raise InputError(f"{vocabulary} and {merges.name} are damaged: {error}") from error
