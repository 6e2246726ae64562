"""SwiGLU experts over sorted rows, forward and backward, by grouped matrix products.

D hidden, E experts, R rows sorted by expert, I width of an expert.

Where PyTorch has a fused kernel (CUDA) it is used: `torch.nn.functional.grouped_mm`. On a CPU that is a loop over
experts with several passes over memory; there this module's own loop does all of one expert while its rows are in
cache. The backward pass writes each product where it belongs; the forward pass does not, since selective recomputation
keeps products, and cannot keep one that was written into a part of something else.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from zenray.model.linear import times_transposed


def grouped_swiglu(
    x_RD: Tensor, gate_up_proj: Tensor, down_proj: Tensor, rows_E: Tensor, weight_R: Tensor | None = None
) -> Tensor:
    """y_RD = weight_R · down(silu(gate(x)) · up(x)) with each row's expert; weights of 1 where none are given.

    gate_up_proj (E, 2I, D), gate rows first; down_proj (E, D, I). The first rows_E[0] rows are expert 0's, and so on.
    The weight is applied before `down`: the same sum, over fewer numbers.
    """
    weight_R = x_RD.new_ones(x_RD.shape[0]) if weight_R is None else weight_R.to(x_RD.dtype)
    if x_RD.device.type == "cpu" and not torch.compiler.is_compiling():
        return _SwiGLULoop.apply(x_RD, gate_up_proj, down_proj, weight_R, rows_E.tolist())
    return swiglu_by_kernel(x_RD, gate_up_proj, down_proj, rows_E, weight_R)


def swiglu_by_kernel(x_RD: Tensor, gate_up_proj: Tensor, down_proj: Tensor, rows_E: Tensor, weight_R: Tensor) -> Tensor:
    """`grouped_swiglu` by PyTorch's grouped products and autograd, on any device."""
    ends_E = rows_E.cumsum(0).to(torch.int32)
    gate_RI, up_RI = grouped_linear(x_RD, gate_up_proj, ends_E).chunk(2, dim=-1)
    return grouped_linear(F.silu(gate_RI) * up_RI * weight_R[:, None], down_proj, ends_E)


def grouped_linear(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """y_RO: rows up to ends_E[0] times weight_EOI[0]ᵀ, the next up to ends_E[1] times weight_EOI[1]ᵀ, and so on."""
    return F.grouped_mm(x_RI, weight_EOI.transpose(-2, -1), offs=ends_E)


class _SwiGLULoop(torch.autograd.Function):
    """One expert after the other. Keeps the input and each expert's gate and up, and computes the rest again."""

    @staticmethod
    def forward(
        ctx: Any, x_RD: Tensor, gate_up_proj: Tensor, down_proj: Tensor, weight_R: Tensor, rows: list[int]
    ) -> Tensor:
        y_RD = x_RD.new_empty(x_RD.shape[0], down_proj.shape[1])
        kept: list[Tensor] = []
        for expert, part in parts_of(rows):
            kept.append(times_transposed(x_RD[part], gate_up_proj[expert]))
            gate, up = kept[-1].chunk(2, dim=-1)
            h = F.silu(gate).mul_(up).mul_(weight_R[part, None])
            y_RD[part] = times_transposed(h, down_proj[expert])
        ctx.save_for_backward(x_RD, gate_up_proj, down_proj, weight_R, *kept)
        ctx.rows = rows
        return y_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RD: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, gate_up_proj, down_proj, weight_R, *kept = ctx.saved_tensors
        needs_x, needs_gate_up, needs_down, needs_weight, _ = ctx.needs_input_grad
        dx_RD = torch.empty_like(x_RD) if needs_x else None
        d_gate_up = _for_gradient(gate_up_proj, ctx.rows) if needs_gate_up else None
        d_down = _for_gradient(down_proj, ctx.rows) if needs_down else None
        dweight_R = torch.empty_like(weight_R) if needs_weight else None
        for (expert, part), gate_up in zip(parts_of(ctx.rows), kept, strict=True):
            dy, weight = dy_RD[part], weight_R[part, None]
            gate, up = gate_up.chunk(2, dim=-1)
            silu = F.silu(gate)
            h = silu * up
            dh = times_transposed(dy, down_proj[expert].t())
            if dweight_R is not None:
                dweight_R[part] = (dh * h).sum(dim=-1)
            if d_down is not None:
                times_transposed(dy.t(), h.mul_(weight).t(), out=d_down[expert])
            if dx_RD is None and d_gate_up is None:
                continue
            dh.mul_(weight)
            d_both = torch.empty_like(gate_up)
            d_gate, d_up = d_both.chunk(2, dim=-1)
            torch.mul(dh, silu, out=d_up)
            torch.ops.aten.silu_backward.grad_input(dh.mul_(up), gate, grad_input=d_gate)
            if d_gate_up is not None:
                times_transposed(d_both.t(), x_RD[part].t(), out=d_gate_up[expert])
            if dx_RD is not None:
                times_transposed(d_both, gate_up_proj[expert].t(), out=dx_RD[part])
        return dx_RD, d_gate_up, d_down, dweight_R, None


def _for_gradient(weight: Tensor, rows: list[int]) -> Tensor:
    """Room for a gradient that the loop will write, zero for experts without rows."""
    gradient = torch.empty_like(weight)
    for expert, count in enumerate(rows):
        if not count:
            gradient[expert].zero_()
    return gradient


def parts_of(rows: list[int]) -> list[tuple[int, slice]]:
    """(expert, its rows) for each expert that has any."""
    found, start = [], 0
    for expert, count in enumerate(rows):
        if count:
            found.append((expert, slice(start, start + count)))
        start += count
    return found
