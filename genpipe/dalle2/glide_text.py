"""GLIDE's own view of a text: GPT-2's byte BPE and a small transformer beside the UNet (2112.10741, 2.3 and 3).

Legend: B texts, L text positions, V vocabulary size, W width of the transformer, E width of the time embedding.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn

from genpipe.errors import InputError
from genpipe.tokenizer import SavedAsJson, TokenBatch, checked_texts, encodable, say_truncation

END = "<|endoftext|>"


class ByteBPE(SavedAsJson):
    """GPT-2's byte-level BPE as GLIDE uses it: lower case, no start token, padded with the end token (3.1).

    Ids: the 256 bytes, then a token for each merge in its order, then the end token (V - 1). The empty text is all
    padding. Text that merely spells the end token is ordinary text.
    """

    def __init__(self, library: Tokenizer) -> None:
        vocabulary = library.get_vocab()
        self.vocab_size = len(vocabulary)
        self.pad_id = self.end_id = self.vocab_size - 1
        if vocabulary.get(END) != self.end_id or any(letter not in vocabulary for letter in _alphabet()):
            raise InputError(f"a byte BPE needs a token for every byte and {END} as the last; this vocabulary has not.")
        self._library = library
        self._truncation_said = False

    @classmethod
    def from_merges(cls, text: str) -> ByteBPE:
        """From GPT-2's vocab.bpe (merges.txt elsewhere): one merge a line, two tokens apart by a space, best first.

        Raises InputError, with the number of the line, for a line that is no merge of tokens that are there by then.
        """
        vocabulary, merges = {letter: id_ for id_, letter in enumerate(_alphabet())}, []
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip() or (number == 1 and line.startswith("#version")):
                continue
            pair = line.rstrip("\r").split(" ")
            if len(pair) != 2 or not set(pair) <= vocabulary.keys() or "".join(pair) in vocabulary:
                raise InputError(f"line {number} of the byte BPE's merges, {line[:60]!r}, is no merge of known tokens.")
            merges.append((pair[0], pair[1]))
            vocabulary["".join(pair)] = len(vocabulary)
        vocabulary[END] = len(vocabulary)
        library = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        library.decoder = decoders.ByteLevel()
        return cls(library)

    def __call__(
        self,
        texts: str | Sequence[str],
        context_length: int,
        dropout: float = 0.0,
        generator: np.random.Generator | None = None,
    ) -> TokenBatch:
        """Encode B texts as at most `context_length` tokens and padding; the mask is False on padding.

        A longer text loses its tail; the first time this happens a warning says so. Raises InputError for texts that
        are not strings, and for dropout, which this tokenizer has not.
        """
        if dropout != 0.0:
            raise InputError("the byte BPE has no dropout; use dropout=0.")
        # Python's own lower case, as the reference takes it: the library's differs at the end of Greek words.
        rows = [self._library.encode(encodable(text).lower()).ids for text in checked_texts(texts, context_length)]
        if not self._truncation_said and any(len(row) > context_length for row in rows):
            self._truncation_said = True
            say_truncation(context_length + 2)  # which counts a start and an end token in
        ids = torch.full((len(rows), context_length), self.pad_id, dtype=torch.int64)
        mask = torch.zeros((len(rows), context_length), dtype=torch.bool)
        for i, row in enumerate(rows):
            length = min(len(row), context_length)
            ids[i, :length], mask[i, :length] = torch.tensor(row[:length], dtype=torch.int64), True
        return TokenBatch(ids, mask)

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """The text of one row of ids, without padding; bytes that are not UTF-8 become U+FFFD."""
        kept = [int(id_) for id_ in ids if int(id_) != self.end_id]
        return self._library.decode(kept, skip_special_tokens=False)

    def to_json(self) -> str:
        """Everything needed to build the tokenizer again, in the format of the `tokenizers` library."""
        return self._library.to_str(pretty=True)

    @classmethod
    def from_json(cls, text: str) -> ByteBPE:
        """The inverse of to_json. Raises InputError if `text` is not such a tokenizer."""
        try:
            json.loads(text)  # says where a damaged file is damaged
            library = Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"not a tokenizer in the format of the tokenizers library ({error}).") from error
        return cls(library)


def _alphabet() -> list[str]:
    """GPT-2's letters for the 256 bytes, in the order of their ids: the printable ones first, as themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printable)
    return [chr(code) for code in printable] + [chr(256 + i) for i in range(others)]


@dataclass(frozen=True)
class GLIDEText:
    """What the UNet hears of B texts: embedding (B, E), states (B, L, W), mask (B, L), True where there is text.

    The embedding is the projected state of the last position, padding or not: it is added to the time embedding.
    """

    embedding: Tensor
    states: Tensor
    mask: Tensor


class TextTransformer(nn.Module):
    """Token ids -> states that see one another both ways, and a vector for the time embedding (2112.10741, 2.3).

    Names of parameters and the order of rows are those of the published files.
    """

    def __init__(
        self, vocab_size: int, context_length: int, width: int, layers: int, heads: int, time_width: int
    ) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(context_length, width))
        self.padding_embedding = nn.Parameter(0.01 * torch.randn(context_length, width))
        blocks = nn.Sequential(*(_Block(width, heads) for _ in range(layers)))
        self.transformer = nn.Sequential(OrderedDict(resblocks=blocks))
        self.final_ln = nn.LayerNorm(width)
        self.transformer_proj = nn.Linear(width, time_width)

    def forward(self, ids: Tensor, mask: Tensor) -> GLIDEText:
        """ids (B, L) int64, mask (B, L) bool. Padding is a learned vector of its own at each position."""
        x = self.token_embedding(ids) + self.positional_embedding  # B, L, W
        x = torch.where(mask[..., None], x, self.padding_embedding)
        x = self.transformer(x)
        states = self.final_ln(x)
        return GLIDEText(self.transformer_proj(states[:, -1]), states, mask)


class _Block(nn.Module):
    """Attention and MLP, each behind a layer norm and beside a path around it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attn = nn.ModuleDict({"c_qkv": nn.Linear(width, 3 * width), "c_proj": nn.Linear(width, width)})
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        # Head by head, each with its queries, keys and values: the order of the published rows.
        qkv = rearrange(self.attn["c_qkv"](self.ln_1(x)), "b l (h k d) -> k b h l d", h=self.heads, k=3)
        attended = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        x = x + self.attn["c_proj"](rearrange(attended, "b h l d -> b l (h d)"))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))
