"""Low-rank adapters (arXiv 2106.09685) on fused experts, without ever building an expert's full delta.

Each expert's matrix W (out, in) becomes W + (alpha / rank) · B A, with A (rank, in) and B (out, rank): the same numbers
as PEFT's `target_parameters`, which adds the delta of *every* expert to its weights in each step. Here a row meets only
its own expert's A and B.

D hidden, E experts, R rows sorted by expert, I width of an expert, Q rank.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from zenray.model.experts import ExpertBank, Experts
from zenray.model.grouped import grouped_linear, parts_of
from zenray.model.linear import times_transposed


class LoRAExperts(Experts):
    """An ExpertBank, frozen, with an adapter of its own for each expert. A is drawn, B is 0: at first nothing changes.

    gate and up share A, as they are one matrix in the fused layout.
    """

    def __init__(self, base: ExpertBank, rank: int, alpha: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.num_experts, self.width = base.num_experts, base.width
        self.rank, self.scaling = rank, alpha / rank
        weight, (experts, both, hidden) = base.gate_up_proj, base.gate_up_proj.shape
        self.gate_up_A = nn.Parameter(weight.new_empty(experts, rank, hidden))
        self.gate_up_B = nn.Parameter(weight.new_zeros(experts, both, rank))
        self.down_A = nn.Parameter(weight.new_empty(experts, rank, base.width))
        self.down_B = nn.Parameter(weight.new_zeros(experts, hidden, rank))
        for matrix in (self.gate_up_A, self.down_A):
            nn.init.uniform_(matrix, -1 / math.sqrt(matrix.shape[-1]), 1 / math.sqrt(matrix.shape[-1]))

    def run(self, x_RD: Tensor, rows_E: Tensor, weight_R: Tensor | None = None) -> Tensor:
        x_RD = x_RD.to(self.base.gate_up_proj.dtype)
        weight_R = x_RD.new_ones(x_RD.shape[0]) if weight_R is None else weight_R.to(x_RD.dtype)
        matrices = (self.base.gate_up_proj, self.base.down_proj)
        factors = (self.gate_up_A, self.gate_up_B, self.down_A, self.down_B)
        if x_RD.device.type == "cpu" and not torch.compiler.is_compiling():
            return _LoRALoop.apply(x_RD, weight_R, *factors, *matrices, self.scaling, rows_E.tolist())
        return lora_by_kernel(x_RD, weight_R, *factors, *matrices, self.scaling, rows_E)

    def deltas(self) -> tuple[Tensor, Tensor]:
        """What the adapters add to gate_up_proj and to down_proj, in their shapes."""
        return self.scaling * self.gate_up_B @ self.gate_up_A, self.scaling * self.down_B @ self.down_A

    @torch.no_grad()
    def merged(self) -> ExpertBank:
        """The base with the adapters added to its weights, in place; no longer adapted."""
        gate_up, down = self.deltas()
        self.base.gate_up_proj += gate_up
        self.base.down_proj += down
        return self.base


def add_expert_lora(model: nn.Module, rank: int, alpha: float) -> list[str]:
    """Wrap every expert bank of `model`; their names. All other parameters stay as trainable as they were."""
    names = [name for name, module in model.named_modules() if isinstance(module, ExpertBank)]
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoRAExperts(model.get_submodule(name), rank, alpha))
    return names


class PeftFactors(NamedTuple):
    """PEFT's layout of one parameter's adapter: A (E·Q, in) by expert, then rank; B (out, Q·E) by rank, then expert."""

    lora_A: Tensor
    lora_B: Tensor


def to_peft(a: Tensor, b: Tensor) -> PeftFactors:
    """From A (E, Q, in) and B (E, out, Q)."""
    return PeftFactors(a.reshape(-1, a.shape[-1]), b.permute(1, 2, 0).reshape(b.shape[1], -1))


def from_peft(factors: PeftFactors, num_experts: int) -> tuple[Tensor, Tensor]:
    """To A (E, Q, in) and B (E, out, Q)."""
    a, b = factors
    a = a.reshape(num_experts, -1, a.shape[-1])
    return a, b.reshape(b.shape[0], -1, num_experts).permute(2, 0, 1)


def lora_by_kernel(
    x_RD: Tensor,
    weight_R: Tensor,
    gate_up_A: Tensor,
    gate_up_B: Tensor,
    down_A: Tensor,
    down_B: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    scaling: float,
    rows_E: Tensor,
) -> Tensor:
    """By PyTorch's grouped products and autograd, on any device. They ask for ranks of a multiple of 16 bytes."""
    ends_E = rows_E.cumsum(0).to(torch.int32)

    def adapted(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return grouped_linear(x, weight, ends_E) + scaling * grouped_linear(grouped_linear(x, a, ends_E), b, ends_E)

    gate_RI, up_RI = adapted(x_RD, gate_up_proj, gate_up_A, gate_up_B).chunk(2, dim=-1)
    return adapted(F.silu(gate_RI) * up_RI * weight_R[:, None], down_proj, down_A, down_B)


class _LoRALoop(torch.autograd.Function):
    """One expert after the other, as in `grouped`; gradients for the input, the row weights and the four factors."""

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        weight_R: Tensor,
        gate_up_A: Tensor,
        gate_up_B: Tensor,
        down_A: Tensor,
        down_B: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        scaling: float,
        rows: list[int],
    ) -> Tensor:
        gate_up_RI = x_RD.new_empty(x_RD.shape[0], gate_up_proj.shape[1])
        y_RD = x_RD.new_empty(x_RD.shape[0], down_proj.shape[1])
        for e, part in parts_of(rows):
            x = x_RD[part]
            both = times_transposed(x, gate_up_proj[e]).addmm_(x @ gate_up_A[e].t(), gate_up_B[e].t(), alpha=scaling)
            gate_up_RI[part] = both
            gate, up = both.chunk(2, dim=-1)
            h = F.silu(gate).mul_(up).mul_(weight_R[part, None])
            y_RD[part] = times_transposed(h, down_proj[e]).addmm_(h @ down_A[e].t(), down_B[e].t(), alpha=scaling)
        ctx.save_for_backward(x_RD, weight_R, gate_up_A, gate_up_B, down_A, down_B, gate_up_proj, down_proj, gate_up_RI)
        ctx.scaling, ctx.rows = scaling, rows
        return y_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RD: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, weight_R, gate_up_A, gate_up_B, down_A, down_B, gate_up_proj, down_proj, gate_up_RI = ctx.saved_tensors
        scaling = ctx.scaling
        dx_RD, dweight_R = torch.empty_like(x_RD), torch.empty_like(weight_R)
        d_gate_up_A, d_gate_up_B = torch.zeros_like(gate_up_A), torch.zeros_like(gate_up_B)
        d_down_A, d_down_B = torch.zeros_like(down_A), torch.zeros_like(down_B)
        for e, part in parts_of(ctx.rows):
            x, dy, weight = x_RD[part], dy_RD[part], weight_R[part, None]
            gate, up = gate_up_RI[part].chunk(2, dim=-1)
            silu = F.silu(gate)
            h = silu * up
            # Through down: y = h' Wᵀ + s (h' Aᵀ) Bᵀ, where h' = h · weight.
            d_low = (dy @ down_B[e]).mul_(scaling)
            dh = times_transposed(dy, down_proj[e].t()).addmm_(d_low, down_A[e])
            dweight_R[part] = (dh * h).sum(dim=-1)
            h.mul_(weight)
            torch.mm(d_low.t(), h, out=d_down_A[e])
            torch.mm(dy.t(), (h @ down_A[e].t()).mul_(scaling), out=d_down_B[e])
            # Through silu(gate) · up.
            dh.mul_(weight)
            d_both = torch.empty_like(gate_up_RI[part])
            d_gate, d_up = d_both.chunk(2, dim=-1)
            torch.mul(dh, silu, out=d_up)
            torch.ops.aten.silu_backward.grad_input(dh.mul_(up), gate, grad_input=d_gate)
            # Through gate and up, fused: as through down.
            d_low = (d_both @ gate_up_B[e]).mul_(scaling)
            times_transposed(d_both, gate_up_proj[e].t(), out=dx_RD[part]).addmm_(d_low, gate_up_A[e])
            torch.mm(d_low.t(), x, out=d_gate_up_A[e])
            torch.mm(d_both.t(), (x @ gate_up_A[e].t()).mul_(scaling), out=d_gate_up_B[e])
        return dx_RD, dweight_R, d_gate_up_A, d_gate_up_B, d_down_A, d_down_B, None, None, None, None
