"""The order of training: sequence i of a run, as a pure function of i, so that a resumed run reads what it would have.

Each domain's training tokens are cut into sequences, shuffled anew for every pass over them. Domains alternate in a
pattern of 1,000 places shared out by weight. S: sequence_tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Self

import numpy as np
import torch
from torch import Tensor

from zenray.model.distillation import IGNORED
from zenray.spec.errors import InvalidValue
from zenray.training.data.tokens import DomainTokens

_PLACES = 1000


@dataclass(frozen=True)
class Batch:
    """Packed sequences. `document_BS` numbers the documents within each sequence, from 0."""

    ids_BS: Tensor  # int64
    labels_BS: Tensor  # int64: the next token of the same document, or IGNORED
    positions_BS: Tensor  # int64: from 0 in each document
    document_BS: Tensor  # int64
    domain_BS: Tensor  # int64: the number of the domain, among the run's; on the CPU, where it decides who teaches

    @property
    def num_targets(self) -> int:
        return int((self.labels_BS != IGNORED).sum())

    def mask(self, window: int | None = None, of: Tensor | None = None) -> Tensor:
        """(B, 1, S, S) of bool: the same document, not later, and within `window` positions where one is given.

        `of`: the rows of these places only."""
        S = self.ids_BS.shape[1]
        place = torch.arange(S, device=self.ids_BS.device)
        of = place if of is None else of
        seen = of[:, None] >= place[None, :]
        if window is not None:
            seen = seen & (of[:, None] - place[None, :] < window)
        return (seen & (self.document_BS[:, of, None] == self.document_BS[:, None, :]))[:, None]

    def to(self, device: torch.device) -> Self:
        """All but `domain_BS`."""
        moved = {name: held.to(device) for name, held in vars(self).items() if name != "domain_BS"}
        return replace(self, **moved)

    def sequences(self, which_B: Tensor) -> Batch:
        """Those at which `which_B` is true."""
        return Batch(*(tensor[which_B] for tensor in vars(self).values()))


class PackedDomain:
    """One domain's tokens cut into sequences of S inputs, each overlapping the next by the one token it predicts."""

    def __init__(self, tokens: DomainTokens, sequence_tokens: int, seed: int) -> None:
        self.tokens, self.length, self.seed = tokens, sequence_tokens, seed
        self.num_sequences = (len(tokens) - 1) // sequence_tokens
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def require_one(self) -> PackedDomain:
        """InvalidValue, with the numbers, where there is not a single whole sequence."""
        if self.num_sequences < 1:
            raise InvalidValue(
                f"Domain {self.tokens.domain!r} has {len(self.tokens):,} tokens: too few for one sequence of "
                f"{self.length:,}.",
                hint="Add text, or lower sequence_tokens.",
            )
        return self

    def shuffled(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """As `at`, in the order of training: every sequence once, then all again in another order."""
        epoch, place = divmod(index, self.num_sequences)
        return self.at(int(self._order(epoch)[place]))

    def at(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(S + 1 tokens, the document of each) of the sequence at this place in the text."""
        start = index * self.length
        tokens = np.asarray(self.tokens.tokens[start : start + self.length + 1]).astype(np.int64)
        places = np.arange(start, start + self.length + 1)
        return tokens, np.searchsorted(self.tokens.starts, places, side="right") - 1

    def _shuffled(self, epoch: int) -> np.ndarray:
        return _generator(self.seed, self.tokens.domain, epoch).permutation(self.num_sequences)


class SequenceStream:
    """All domains of a run, mixed."""

    def __init__(self, domains: Sequence[PackedDomain], weights: Sequence[float], seed: int) -> None:
        self.domains = [domain.require_one() for domain in domains]
        places = _share_out(weights)
        pattern = np.repeat(np.arange(len(domains)), places)
        self._pattern = _generator(seed, "mix").permutation(pattern)
        self._places = places
        self._rank = np.zeros(_PLACES, dtype=np.int64)  # of each place among those of its domain
        for domain in range(len(domains)):
            mine = self._pattern == domain
            self._rank[mine] = np.arange(mine.sum())

    def domain_of(self, index: int) -> int:
        return int(self._pattern[index % _PLACES])

    def batch(self, first: int, count: int) -> Batch:
        """Sequences `first` to `first + count - 1` of the run."""
        found, domains = [], []
        for index in range(first, first + count):
            cycle, place = divmod(index, _PLACES)
            domain = self.domain_of(index)
            found.append(self.domains[domain].shuffled(cycle * int(self._places[domain]) + int(self._rank[place])))
            domains.append(domain)
        return pack(found, domains)


def pack(sequences: Sequence[tuple[np.ndarray, np.ndarray]], domains: Sequence[int] | None = None) -> Batch:
    """A batch out of (S + 1 tokens, the document of each), of these domains; None: all of the first. The first token of
    a document is never a target."""
    tokens = torch.from_numpy(np.stack([tokens for tokens, _ in sequences]))
    documents = torch.from_numpy(np.stack([documents for _, documents in sequences]))
    same = documents[:, 1:] == documents[:, :-1]
    labels = torch.where(same, tokens[:, 1:], IGNORED)
    S = labels.shape[1]
    place = torch.arange(S).expand(len(sequences), S)
    begins = torch.cat([torch.ones(len(sequences), 1, dtype=torch.bool), ~same[:, :-1]], dim=1)
    positions = place - torch.where(begins, place, 0).cummax(dim=1).values
    within = documents[:, :-1] - documents[:, :1]
    domain = torch.tensor(domains or [0] * len(sequences))[:, None].expand(-1, S).contiguous()
    return Batch(tokens[:, :-1].contiguous(), labels, positions, within, domain)


def _share_out(weights: Sequence[float]) -> np.ndarray:
    """1,000 places by weight, at least one each: largest remainders."""
    exact = np.array(weights, dtype=np.float64) / sum(weights) * _PLACES
    places = np.maximum(np.floor(exact), 1).astype(np.int64)
    while places.sum() < _PLACES:
        places[np.argmax(exact - places)] += 1
    while places.sum() > _PLACES:
        places[np.argmax(np.where(places > 1, places - exact, -np.inf))] -= 1
    return places


def _generator(seed: int, *path: str | int) -> np.random.Generator:
    digest = hashlib.sha256("/".join(map(str, (seed, *path))).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))
