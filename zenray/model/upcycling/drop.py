"""Drop-Upcycling (arXiv 2502.19261): experts that are copies of a dense FFN with a part of each drawn anew.

Four modes, as the sources differ:

    joint        the paper: one set of neurons per expert, the same in gate, up and down; the drawn weights have mean
                 and deviation of those they replace. A share 1 − r of the neurons stays whole. r = 0.5 is its best.
    independent  the released code: a set of neurons for each of the three matrices. At r = 0.5 only (1 − r)³ = 12.5 %
                 of the neurons stay whole. (The code also permutes each expert's neurons, which changes no function.)
    rows         the drop-upcycling blog: *rows* of each matrix, from N(0, 0.02²), r = 8–12 %, 15 % for code. A row of
                 `down` is an output channel, not a neuron.
    copy         nothing is drawn anew.

D hidden, I width of the FFN. All draws are float32 on the CPU, from a generator that the caller seeds.
"""

from __future__ import annotations

import hashlib
from typing import Literal, NamedTuple

import torch
from torch import Tensor

DropMode = Literal["joint", "independent", "rows", "copy"]
ROWS_STD = 0.02


class FeedForwardWeights(NamedTuple):
    """One SwiGLU: down(silu(gate(x)) · up(x)). Neuron i is gate_ID[i], up_ID[i], down_DI[:, i]."""

    gate_ID: Tensor
    up_ID: Tensor
    down_DI: Tensor

    @property
    def width(self) -> int:
        return self.gate_ID.shape[0]

    def first(self, count: int) -> FeedForwardWeights:
        """A view of its first neurons."""
        return FeedForwardWeights(self.gate_ID[:count], self.up_ID[:count], self.down_DI[:, :count])


def drop(
    ffn: FeedForwardWeights,
    mode: DropMode,
    rate: float,
    generator: torch.Generator,
    into: FeedForwardWeights | None = None,
) -> FeedForwardWeights:
    """One expert: a copy of `ffn` of which a share `rate` is drawn anew. Kept weights are the same bits.

    Made in `into`, of the same shapes, where that is given: an expert's place in a bank needs no copy of its own.
    """
    made = FeedForwardWeights(*map(torch.empty_like, ffn)) if into is None else into
    shared = choose(ffn.width, rate, generator) if mode == "joint" and rate else None
    for old, new, axis in zip(ffn, made, (0, 0, 1), strict=True):
        new.copy_(old)
        if mode == "copy" or rate == 0:
            continue
        if mode == "rows":
            _redraw_rows_narrowly(new, rate, generator)
        else:
            _redraw(new, choose(ffn.width, rate, generator) if shared is None else shared, axis, generator)
    return made


def widen(expert: FeedForwardWeights, known: int, generator: torch.Generator) -> None:
    """Make the neurons after the first `known`, in place. They listen as the others do, and say nothing yet."""
    if known < expert.width:
        for matrix in (expert.gate_ID, expert.up_ID):
            matrix[known:] = _drawn_like(matrix[:known], matrix[known:].shape, generator)
        expert.down_DI[:, known:] = 0


def some_neurons(ffn: FeedForwardWeights, width: int, generator: torch.Generator) -> FeedForwardWeights:
    """`width` of the FFN's neurons, which say nothing yet."""
    index = torch.randperm(ffn.width, generator=generator)[:width].sort().values
    return FeedForwardWeights(ffn.gate_ID[index], ffn.up_ID[index], ffn.down_DI.new_zeros(ffn.down_DI.shape[0], width))


def choose(width: int, rate: float, generator: torch.Generator) -> Tensor:
    """Indices of round(rate · width) of `width` neurons, sorted."""
    return torch.randperm(width, generator=generator)[: round(rate * width)].sort().values


def seeded(seed: int, *path: int | str) -> torch.Generator:
    """A CPU generator for one draw, named by its path (layer, expert, …): independent of order and of device."""
    digest = hashlib.sha256("/".join(map(str, (seed, *path))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def _redraw(matrix: Tensor, index: Tensor, axis: int, generator: torch.Generator) -> None:
    """Replace the slices `index` of `matrix` along `axis` by N(μ, σ²), μ and σ those of the replaced weights."""
    old = matrix.index_select(axis, index)
    if old.numel():
        matrix.index_copy_(axis, index, _drawn_like(old, old.shape, generator))


def _drawn_like(old: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """New weights with the mean and the deviation of `old`, in its dtype."""
    as_float = old.to(torch.float32)
    # In place: fresh memory for each step costs more here than the arithmetic.
    new = torch.randn(shape, generator=generator).mul_(as_float.std(correction=0)).add_(as_float.mean())
    return new.to(old.dtype)


def _redraw_rows_narrowly(matrix: Tensor, rate: float, generator: torch.Generator) -> None:
    """The blog's `drop_upcycle`: at least one row, and exactly its count, int(rows · rate)."""
    rows = matrix.shape[0]
    index = torch.randperm(rows, generator=generator)[: max(1, int(rows * rate))]
    new = torch.randn((len(index), matrix.shape[1]), generator=generator) * ROWS_STD
    matrix.index_copy_(0, index, new.to(matrix.dtype))
