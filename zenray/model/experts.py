"""The experts of one layer: SwiGLU networks run over sorted rows by grouped matrix products.

T tokens, D hidden, E experts, R rows sorted by expert, I width of an expert.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zenray.model.dispatch import Assignment, combine_rows, gather_rows
from zenray.model.grouped import grouped_swiglu


class Experts(nn.Module):
    """The experts of a layer: a token's experts each compute a row, and their sum is its result."""

    def forward(self, x_TD: Tensor, assignment: Assignment) -> Tensor:
        """y_TD: for each token the weighted sum of its experts' outputs."""
        y_RD = self.run(gather_rows(x_TD, assignment), assignment.rows_E, assignment.weight_R)
        return combine_rows(y_RD, assignment, x_TD.shape[0])

    def run(self, x_RD: Tensor, rows_E: Tensor, weight_R: Tensor | None = None) -> Tensor:
        """y_RD: row r through its expert, times its weight; the first rows_E[0] rows are expert 0's, and so on."""
        raise NotImplementedError


class ExpertBank(Experts):
    """Experts of equal width, their weights fused: gate_up_proj (E, 2I, D), gate rows first; down_proj (E, D, I).

    Names and layout are those of transformers' Qwen3-MoE and Mixtral.
    """

    def __init__(self, num_experts: int, hidden_size: int, width: int) -> None:
        super().__init__()
        self.num_experts, self.width = num_experts, width
        self.first_expert, self.whole_experts = 0, num_experts  # of the whole bank, where workers share it
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, width))

    def run(self, x_RD: Tensor, rows_E: Tensor, weight_R: Tensor | None = None) -> Tensor:
        x_RD = x_RD.to(self.gate_up_proj.dtype)
        return grouped_swiglu(x_RD, self.gate_up_proj, self.down_proj, rows_E, weight_R)


class DiverseExperts(Experts):
    """Experts of different widths in one layer (ZIP-0414): one bank per run of equal widths, in the router's order."""

    def __init__(self, hidden_size: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.num_experts = len(widths)
        self.banks = nn.ModuleList(ExpertBank(count, hidden_size, width) for width, count in runs(widths))

    def run(self, x_RD: Tensor, rows_E: Tensor, weight_R: Tensor | None = None) -> Tensor:
        """Each bank computes the rows of its own experts."""
        per_bank = rows_E.split([bank.num_experts for bank in self.banks])
        sizes = [int(rows.sum()) for rows in per_bank]
        weights = (None,) * len(sizes) if weight_R is None else weight_R.split(sizes)
        inputs = zip(self.banks, x_RD.split(sizes), per_bank, weights, strict=True)
        return torch.cat([bank.run(x, rows, weight) for bank, x, rows, weight in inputs])


def make_experts(hidden_size: int, widths: tuple[int, ...]) -> ExpertBank | DiverseExperts:
    """One bank where all widths are equal, else a bank for each run of equal widths."""
    if len(set(widths)) == 1:
        return ExpertBank(len(widths), hidden_size, widths[0])
    return DiverseExperts(hidden_size, widths)


def runs(widths: tuple[int, ...]) -> list[tuple[int, int]]:
    """(width, how many) for each run of equal neighbours: (8, 8, 4) gives [(8, 2), (4, 1)]."""
    found: list[tuple[int, int]] = []
    for width in widths:
        if found and found[-1][0] == width:
            found[-1] = (width, found[-1][1] + 1)
        else:
            found.append((width, 1))
    return found
