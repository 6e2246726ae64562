"""The experts of one layer: SwiGLU networks run over sorted rows by grouped matrix products.

T tokens, D hidden, E experts, R rows sorted by expert, I width of an expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zenray.model.dispatch import Assignment, combine_rows, gather_rows


class ExpertBank(nn.Module):
    """Experts of equal width, their weights fused: gate_up_proj (E, 2I, D), gate rows first; down_proj (E, D, I).

    Names and layout are those of transformers' Qwen3-MoE and Mixtral.
    """

    def __init__(self, num_experts: int, hidden_size: int, width: int) -> None:
        super().__init__()
        self.num_experts, self.width = num_experts, width
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, width))

    def forward(self, x_TD: Tensor, assignment: Assignment) -> Tensor:
        """y_TD: for each token the weighted sum of its experts' outputs."""
        y_RD = self.run(gather_rows(x_TD, assignment), assignment.rows_E)
        return combine_rows(y_RD, assignment, x_TD.shape[0])

    def run(self, x_RD: Tensor, rows_E: Tensor) -> Tensor:
        """y_RD: row r through its expert; the first rows_E[0] rows are expert 0's, and so on."""
        ends_E = rows_E.cumsum(0).to(torch.int32)
        gate_up = grouped_linear(x_RD.to(self.gate_up_proj.dtype), self.gate_up_proj, ends_E)
        gate_RI, up_RI = gate_up.chunk(2, dim=-1)
        return grouped_linear(F.silu(gate_RI) * up_RI, self.down_proj, ends_E)


class DiverseExperts(nn.Module):
    """Experts of different widths in one layer (ZIP-0414): one bank per run of equal widths, in the router's order."""

    def __init__(self, hidden_size: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.num_experts = len(widths)
        self.banks = nn.ModuleList(ExpertBank(count, hidden_size, width) for width, count in runs(widths))

    def forward(self, x_TD: Tensor, assignment: Assignment) -> Tensor:
        y_RD = self.run(gather_rows(x_TD, assignment), assignment.rows_E)
        return combine_rows(y_RD, assignment, x_TD.shape[0])

    def run(self, x_RD: Tensor, rows_E: Tensor) -> Tensor:
        counts = [bank.num_experts for bank in self.banks]
        per_bank = rows_E.split(counts)
        parts = x_RD.split([int(rows.sum()) for rows in per_bank])
        return torch.cat([bank.run(part, rows) for bank, part, rows in zip(self.banks, parts, per_bank, strict=True)])


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


def grouped_linear(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """y_RO: rows up to ends_E[0] times weight_EOI[0]ᵀ, the next up to ends_E[1] times weight_EOI[1]ᵀ, and so on."""
    return F.grouped_mm(x_RI, weight_EOI.transpose(-2, -1), offs=ends_E)
