"""A network that is asked how likely it finds texts.

T tokens, D hidden, V vocabulary, C continuations, S sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from zenray.model.distillation import IGNORED
from zenray.model.network import MoDE
from zenray.spec.errors import InvalidValue
from zenray.training.data.stream import Batch
from zenray.training.loss import hidden_states
from zenray.training.networks import Checkpoint

_PADDING = 0  # any token: nothing is computed from it


@dataclass(frozen=True)
class Subject:
    """What is measured: a network in evaluation mode, wherever its weights are, and its tokenizer.

    `first_token`: what stands before a text; the end of another one, where the network has no token to begin with.
    """

    model: MoDE
    tokenizer: Tokenizer
    first_token: int
    most_tokens: int

    @classmethod
    def open(cls, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Subject:
        """The whole network of a checkpoint. Blocks; errors are those of `Checkpoint.network`."""
        model = checkpoint.network(dtype).to(device).eval().requires_grad_(False)
        tokenizer = Tokenizer.from_file(str(checkpoint.tokenizer_file))
        first = checkpoint.hf.bos_token_id
        first = first if isinstance(first, int) else checkpoint.end_token
        return cls(model, tokenizer, first, model.config.max_position_embeddings)

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    @torch.no_grad()
    def log_likelihoods(
        self, context: Sequence[int], continuations: Sequence[Sequence[int]]
    ) -> list[tuple[float, bool]]:
        """Of each continuation's tokens after the context, summed, and whether each was the likeliest token.

        InvalidValue for what is longer than the network's context.
        """
        longest = len(context) + max(len(one) for one in continuations)
        if longest - 1 > self.most_tokens:
            raise InvalidValue(f"{longest:,} tokens do not fit into a context of {self.most_tokens:,}.")
        batch = _rows([[*context, *one] for one in continuations], len(context)).to(self.device)
        h_TD, _ = hidden_states(self.model, batch)
        h_CSD = h_TD.unflatten(0, batch.ids_BS.shape)
        found = []
        for row, labels_S in zip(h_CSD, batch.labels_BS, strict=True):
            counted = labels_S != IGNORED
            log_p_TV = F.linear(row[counted], self.model.lm_head.weight).float().log_softmax(dim=-1)
            targets_T = labels_S[counted]
            of_tokens = log_p_TV.gather(1, targets_T[:, None])
            found.append((float(of_tokens.double().sum()), bool((log_p_TV.argmax(dim=-1) == targets_T).all())))
        return found

    def log_likelihood(self, context: Sequence[int], tokens: Sequence[int]) -> tuple[float, bool]:
        """As `log_likelihoods` of a single continuation of any length: each token is predicted once, in windows of
        which the first is filled with the end of the context, and the last with the tokens before it. `context` has at
        least one token."""
        total, is_likeliest = 0.0, True
        for before, part in _windows(context, tokens, self.most_tokens):
            ((found, was_likeliest),) = self.log_likelihoods(before, [part])
            total, is_likeliest = total + found, is_likeliest and was_likeliest
        return total, is_likeliest

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)


def _windows(context: Sequence[int], tokens: Sequence[int], most: int) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """(what stands before, tokens to predict), of which `most` tokens at a time are read."""
    everything = [*context, *tokens]
    for start in range(len(context), len(everything), most):
        end = min(start + most, len(everything))
        yield everything[max(0, end - most - 1) : start], everything[start:end]


def _rows(rows: Sequence[Sequence[int]], given: int) -> Batch:
    """Sequences side by side, padded on the right; their targets are the tokens after the first `given`."""
    S = max(len(row) for row in rows) - 1
    ids_BS = torch.full((len(rows), S), _PADDING)
    labels_BS = torch.full((len(rows), S), IGNORED)
    for place, row in enumerate(rows):
        ids_BS[place, : len(row) - 1] = torch.tensor(row[:-1])
        labels_BS[place, given - 1 : len(row) - 1] = torch.tensor(row[given:])
    # Padding comes last, and nothing looks ahead: it need not be told apart.
    zeros_BS = torch.zeros_like(ids_BS)
    return Batch(ids_BS, labels_BS, torch.arange(S).expand(len(rows), S), document_BS=zeros_BS, domain_BS=zeros_BS)
