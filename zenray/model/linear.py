"""Products of matrices by the faster of PyTorch's two libraries: the same sums.

PyTorch gives float32 on a CPU to MKL, which runs at half of oneDNN's speed on AMD, and up to a third faster than it on
Intel. T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Linear(nn.Linear):
    """torch's, by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x (…, I) times weightᵀ, plus the bias: (…, O). Where PyTorch multiplies well by itself, it does."""
    is_plain = x.dtype == weight_OI.dtype == torch.float32 and x.device.type == "cpu" and bias_O is None
    if not is_plain or x.numel() == 0 or not onednn_is_faster() or torch.compiler.is_compiling():
        return F.linear(x, weight_OI, bias_O)
    return _Linear.apply(x, weight_OI)


def times_transposed(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ bᵀ for matrices, written to `out` where it is given. None of them needs to be contiguous."""
    if a.dtype == torch.float32 and a.device.type == "cpu" and onednn_is_faster():
        product = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
        return product if out is None else out.copy_(product)
    return torch.mm(a, b.t(), out=out)


@cache
def onednn_is_faster() -> bool:
    """Whether float32 products on this machine's processor are oneDNN's to make: where it is not Intel's."""
    cpu = Path("/proc/cpuinfo")
    is_intels = cpu.is_file() and "GenuineIntel" in cpu.read_text(errors="replace")
    return torch.backends.mkldnn.is_available() and not is_intels


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        return times_transposed(_rows(x), weight_OI).view(*x.shape[:-1], weight_OI.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_OI = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        dx = times_transposed(_rows(dy), weight_OI.t()).view_as(x) if needs_x else None
        return dx, times_transposed(_rows(dy).t(), _rows(x).t()) if needs_weight else None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])
