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


def drop(ffn: FeedForwardWeights, mode: DropMode, rate: float, generator: torch.Generator) -> FeedForwardWeights:
    """One expert: a copy of `ffn` of which a share `rate` is drawn anew. Kept weights are the same bits."""
    if mode == "copy" or rate == 0:
        return FeedForwardWeights(*(matrix.clone() for matrix in ffn))
    if mode == "rows":
        return FeedForwardWeights(*(_redraw_rows_narrowly(matrix, rate, generator) for matrix in ffn))
    shared = choose(ffn.width, rate, generator) if mode == "joint" else None
    redrawn = []
    for matrix, axis in zip(ffn, (0, 0, 1), strict=True):
        index = choose(ffn.width, rate, generator) if shared is None else shared
        redrawn.append(_redraw(matrix, index, axis, generator))
    return FeedForwardWeights(*redrawn)


def choose(width: int, rate: float, generator: torch.Generator) -> Tensor:
    """Indices of round(rate · width) of `width` neurons, sorted."""
    return torch.randperm(width, generator=generator)[: round(rate * width)].sort().values


def seeded(seed: int, *path: int | str) -> torch.Generator:
    """A CPU generator for one draw, named by its path (layer, expert, …): independent of order and of device."""
    digest = hashlib.sha256("/".join(map(str, (seed, *path))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def _redraw(matrix: Tensor, index: Tensor, axis: int, generator: torch.Generator) -> Tensor:
    """`matrix` with the slices `index` along `axis` replaced by N(μ, σ²), μ and σ those of the replaced weights."""
    old = matrix.index_select(axis, index).to(torch.float32)
    if not old.numel():
        return matrix.clone()
    # In place: fresh memory for each step costs more here than the arithmetic.
    new = torch.randn(old.shape, generator=generator).mul_(old.std(correction=0)).add_(old.mean())
    return matrix.clone().index_copy_(axis, index, new.to(matrix.dtype))


def _redraw_rows_narrowly(matrix: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """The blog's `drop_upcycle`: at least one row, and exactly its count, int(rows · rate)."""
    rows = matrix.shape[0]
    index = torch.randperm(rows, generator=generator)[: max(1, int(rows * rate))]
    new = torch.randn((len(index), matrix.shape[1]), generator=generator) * ROWS_STD
    return matrix.clone().index_copy_(0, index, new.to(matrix.dtype))
