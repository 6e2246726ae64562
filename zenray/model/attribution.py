"""What an expert works on: the tokens that activate it most strongly (drop-upcycling blog: 10,000 for each expert).

T tokens, E experts, R rows, N tokens that are kept.

Streams: batch after batch passes through the model, and only the N strongest of each expert are kept, so the result is
exact whatever the size of the corpus. Strength is the weight with which the router lets the expert speak.
"""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from zenray.model.dispatch import Assignment
from zenray.model.router import Router

KEPT = 10_000


class StrongestTokens:
    """The N strongest (weight, token, position) of each expert of one layer. Equal weights: the earlier one stays."""

    def __init__(self, num_experts: int, keep: int = KEPT) -> None:
        self.keep = keep
        self.weights = [torch.empty(0) for _ in range(num_experts)]
        self.tokens = [torch.empty(0, dtype=torch.int64) for _ in range(num_experts)]
        self.positions = [torch.empty(0, dtype=torch.int64) for _ in range(num_experts)]
        self.seen = [0] * num_experts  # all rows, kept or not

    def add(self, assignment: Assignment, ids_T: Tensor, positions_T: Tensor, valid_T: Tensor) -> None:
        """One batch: its rows, and of each of its tokens the id, the place in the corpus, and whether it counts."""
        start = 0
        for expert, rows in enumerate(assignment.rows_E.tolist()):
            token_R = assignment.token_R[start : start + rows]
            weight_R = assignment.weight_R[start : start + rows].detach().float().cpu()
            start += rows
            real = valid_T[token_R].to(torch.bool)
            token_R, weight_R = token_R[real], weight_R[real.cpu()]
            self.seen[expert] += len(token_R)
            if len(self.weights[expert]) == self.keep:  # all but a few need not be sorted with those that stay
                stronger = weight_R > self.weights[expert][-1]
                token_R, weight_R = token_R[stronger.to(token_R.device)], weight_R[stronger]
            weights = torch.cat([self.weights[expert], weight_R])
            best = weights.argsort(descending=True, stable=True)[: self.keep]
            self.weights[expert] = weights[best]
            self.tokens[expert] = torch.cat([self.tokens[expert], ids_T[token_R].cpu()])[best]
            self.positions[expert] = torch.cat([self.positions[expert], positions_T[token_R].cpu()])[best]


class Attribution:
    """Collects the strongest tokens of every expert of a model while it runs.

    attribution = Attribution(model)
    for ids_BS in batches:
        with attribution.watch(ids_BS):
            model(ids_BS)
    """

    def __init__(self, model: nn.Module, *, keep: int = KEPT) -> None:
        self.routers = {name: module for name, module in model.named_modules() if isinstance(module, Router)}
        self.layers = {name: StrongestTokens(router.weight.shape[0], keep) for name, router in self.routers.items()}
        self.num_tokens = 0

    @contextmanager
    def watch(self, ids_BS: Tensor, valid_BS: Tensor | None = None) -> Iterator[None]:
        """Record the routing of one forward pass over these tokens. Positions count tokens since the first batch."""
        ids_T = ids_BS.flatten()
        valid_T = torch.ones_like(ids_T, dtype=torch.bool) if valid_BS is None else valid_BS.flatten().to(torch.bool)
        positions_T = torch.arange(self.num_tokens, self.num_tokens + ids_T.numel(), device=ids_T.device)

        def record(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _inputs: Any, output: tuple[Assignment, Any]) -> None:
                self.layers[name].add(output[0], ids_T, positions_T, valid_T)

            return hook

        handles = [router.register_forward_hook(record(name)) for name, router in self.routers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        self.num_tokens += ids_T.numel()

    def save(self, folder: Path) -> None:
        """`attribution.json` (counts) and one tensor file with all weights, token ids and positions."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors, counts = {}, {}
        for name, layer in self.layers.items():
            counts[name] = layer.seen
            for expert in range(len(layer.seen)):
                tensors[f"{name}.{expert}.weights"] = layer.weights[expert]
                tensors[f"{name}.{expert}.tokens"] = layer.tokens[expert]
                tensors[f"{name}.{expert}.positions"] = layer.positions[expert]
        save_file(tensors, folder / "attribution.safetensors")
        record = {"num_tokens": self.num_tokens, "rows": counts}
        (folder / "attribution.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class TokenKind:
    """A class of tokens, told by their text."""

    name: str
    holds: Callable[[str], bool]


_BRACKETS_AND_OPERATORS = set("{}[]()<>;=+-*/%&|^~!@#$\\_`")
_FUNCTION_WORDS = {
    "the",
    "of",
    "and",
    "to",
    "a",
    "in",
    "is",
    "that",
    "it",
    "for",
    "on",
    "with",
    "as",
    "was",
    "by",
    "at",
    "from",
    "be",
    "this",
    "are",
    "or",
    "an",
    "not",
    "but",
    "have",
    "has",
    "had",
    "which",
}
# The blog's table, in the order in which they are tried; the first that holds names the token.
KINDS = (
    TokenKind("whitespace", lambda text: not text.strip()),
    TokenKind("part of a character", lambda text: "\ufffd" in text),  # bytes that are no UTF-8 by themselves
    TokenKind("number", lambda text: text.strip().isnumeric()),
    TokenKind("code", lambda text: any(char in _BRACKETS_AND_OPERATORS for char in text)),
    TokenKind("punctuation", lambda text: not any(char.isalnum() for char in text)),
    TokenKind("function word", lambda text: text.strip().lower() in _FUNCTION_WORDS),
    TokenKind("other script", lambda text: any(char.isalpha() and ord(char) > 0x24F for char in text)),
    TokenKind("word piece", lambda text: not text.startswith((" ", "Ġ", "▁"))),
    TokenKind("word", lambda text: True),
)


def kind_of(text: str) -> str:
    return next(kind.name for kind in KINDS if kind.holds(text))


def kind_shares(layer: StrongestTokens, decode: Callable[[int], str]) -> list[dict[str, float]]:
    """For each expert the share of its kept tokens that is of each kind."""
    shares = []
    for tokens in layer.tokens:
        counts = Counter[str]()
        for token, times in Counter(tokens.tolist()).items():
            counts[kind_of(decode(token))] += times
        shares.append({kind.name: counts[kind.name] / max(1, len(tokens)) for kind in KINDS})
    return shares


def report(attribution: Attribution, decode: Callable[[int], str], *, examples: int = 12) -> str:
    """A page of HTML: for each layer a heat map of experts by kinds of token, and each expert's commonest tokens."""
    parts = [
        "<!doctype html><meta charset=utf-8><title>Expert attribution</title>",
        "<style>body{font:14px sans-serif;margin:2em}td,th{padding:.2em .5em}th{text-align:left;font-weight:500}"
        "td.n{text-align:right}code{background:#f4f4f4;padding:0 .2em}</style>",
        f"<h1>Expert attribution</h1><p>{attribution.num_tokens:,} tokens.</p>",
    ]
    for name, layer in attribution.layers.items():
        parts.append(f"<h2>{html.escape(name)}</h2><table><tr><th>expert<th>rows<th>kept")
        parts.extend(f"<th>{kind.name}" for kind in KINDS)
        parts.append("<th>commonest among the strongest</tr>")
        for expert, shares in enumerate(kind_shares(layer, decode)):
            common = Counter(layer.tokens[expert].tolist()).most_common(examples)
            shown = " ".join(f"<code>{html.escape(decode(token))}</code>" for token, _ in common)
            parts.append(f"<tr><th>{expert}<td class=n>{layer.seen[expert]:,}<td class=n>{len(layer.tokens[expert]):,}")
            parts.extend(_cell(share) for share in shares.values())
            parts.append(f"<td>{shown}</tr>")
        parts.append("</table>")
    return "\n".join(parts)


def _cell(share: float) -> str:
    """Darker for more; the text stays readable on either."""
    lightness, ink = 97 - 52 * share, "#fff" if share > 0.6 else "#111"
    return f"<td class=n style='background:hsl(210 70% {lightness:.0f}%);color:{ink}'>{share:.0%}"
