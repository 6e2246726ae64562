"""Tokens per document: how long the same texts are in different vocabularies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

_BATCH = 64


@dataclass(frozen=True)
class Length:
    """How many tokens some documents are."""

    documents: int
    tokens: int
    bytes: int
    used_entries: int

    @property
    def tokens_per_document(self) -> float:
        return self.tokens / self.documents

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / self.tokens

    def change_from(self, other: Length) -> float:
        """The relative change of tokens per document over the same documents: −0.12 is 12 % fewer."""
        return self.tokens / other.tokens - 1


def measure(encoder: Tokenizer, texts: Sequence[str]) -> Length:
    """Encode every text alone, without control tokens around it. `texts` must not be empty."""
    tokens, used = 0, set()
    for first in range(0, len(texts), _BATCH):
        for encoding in encoder.encode_batch_fast(list(texts[first : first + _BATCH]), add_special_tokens=False):
            tokens += len(encoding.ids)
            used.update(encoding.ids)
    return Length(len(texts), tokens, sum(len(text.encode()) for text in texts), len(used))
