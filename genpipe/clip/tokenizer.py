"""The tokenizer of a published open_clip model, with the call that CaptionTokenizer has (CLIP, section 2.4)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import open_clip
import torch

from genpipe.errors import InputError
from genpipe.tokenizer import TokenBatch, checked_texts, encodable, say_truncation, token_batch


class OpenClipTokenizer:
    """The tokenizer of a published open_clip model, with the call of CaptionTokenizer (which see).

    `name` is open_clip's model name; some names fetch a vocabulary from the Hub. Raises InputError if that fails.
    """

    def __init__(self, name: str) -> None:
        try:
            self._library = open_clip.get_tokenizer(name)
        except Exception as error:  # import errors, network errors and bare exceptions, depending on the tokenizer
            reason = " ".join(str(error).split())
            raise InputError(f"the tokenizer of open_clip's {name!r} could not be had ({reason}).") from error
        self.name = name
        self._simple = isinstance(self._library, open_clip.SimpleTokenizer)
        inner = self._library if self._simple else self._library.tokenizer
        self.vocab_size = int(inner.vocab_size)
        self.pad_id = 0 if self._simple else int(inner.pad_token_id)
        end = inner.eot_token_id if self._simple else inner.eos_token_id
        self.end_id = self.pad_id if end is None else int(end)
        self._truncation_said = False

    def __call__(
        self,
        texts: str | Sequence[str],
        context_length: int,
        dropout: float = 0.0,
        generator: np.random.Generator | None = None,
    ) -> TokenBatch:
        """As CaptionTokenizer.__call__, without BPE dropout. Tokenizers from the Hub truncate by their own rule."""
        if dropout != 0.0:
            raise InputError(f"BPE dropout is not available for open_clip's tokenizer {self.name!r}, use dropout=0.")
        texts = [encodable(text) for text in checked_texts(texts, context_length)]
        if not self._simple:
            ids = self._library(texts, context_length=context_length)
            is_end = (ids == self.end_id) | (ids == self.pad_id)
            mask = is_end.cumsum(dim=1) - is_end.long() == 0  # up to the first end or pad, inclusive
            return TokenBatch(ids, mask if self.end_id != self.pad_id else mask | ~is_end)
        rows = [self._library.encode(text) for text in texts]
        if not self._truncation_said and any(len(row) > context_length - 2 for row in rows):
            self._truncation_said = True
            say_truncation(context_length)
        return token_batch(rows, context_length, self.pad_id, self._library.sot_token_id, self.end_id)

    def decode(self, ids: torch.Tensor | Sequence[int]) -> str:
        """The text of one row of ids, without special tokens."""
        kept = [int(id_) for id_ in ids]
        if not self._simple:
            return str(self._library.tokenizer.decode(kept, skip_special_tokens=True))
        if self.end_id in kept:
            kept = kept[: kept.index(self.end_id)]  # id 0 pads behind the end, and is "!" before it
        return str(self._library.decode([id_ for id_ in kept if id_ != self._library.sot_token_id])).strip()
