"""Which rows an expert layer computes: gathering tokens for their experts, and adding the results back up.

T tokens, D hidden, E experts, K experts per token, R rows ((token, expert) pairs, sorted by expert).

An expert layer is three steps, and experts know only the middle one: gather rows, run experts over rows, combine.
So expert parallelism is put between the steps, from outside.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class Assignment(NamedTuple):
    """The rows of one layer. Rows of expert 0 come first, then those of expert 1, and so on."""

    token_R: Tensor  # int64: the token that each row belongs to
    weight_R: Tensor  # float32: what the row's result is multiplied by; gradients flow through it to the router
    rows_E: Tensor  # int64: rows of each expert
    slot_TK: Tensor | None = None  # int64: the rows of each token, where every token has exactly K of them
    lost_T: Tensor | None = None  # float32: the weight of each token's rows that experts had no room for


def assign_top_k(experts_TK: Tensor, weights_TK: Tensor, num_experts: int) -> Assignment:
    """Rows for K given experts per token. Within an expert, rows are in the order of their tokens.

    Waits for no device: every shape is known before any value is.
    """
    T, K = experts_TK.shape
    flat = experts_TK.flatten()
    order_R = torch.argsort(flat, stable=True)
    slot_TK = torch.empty_like(order_R)
    slot_TK[order_R] = torch.arange(T * K, device=flat.device)
    return Assignment(
        token_R=order_R // K,
        weight_R=weights_TK.flatten().index_select(0, order_R),
        rows_E=flat.new_zeros(num_experts).scatter_add_(0, flat, torch.ones_like(flat)),
        slot_TK=slot_TK.view(T, K),
    )


def assign_mask(chosen_TE: Tensor, weights_TE: Tensor) -> Assignment:
    """Rows for any number of experts per token: one row where `chosen_TE` is True."""
    expert_R, token_R = chosen_TE.t().nonzero(as_tuple=True)
    return Assignment(
        token_R=token_R,
        weight_R=weights_TE[token_R, expert_R],
        rows_E=chosen_TE.sum(dim=0),
    )


def gather_rows(x_TD: Tensor, assignment: Assignment) -> Tensor:
    """x_RD: the input of every row."""
    if assignment.slot_TK is None:
        return x_TD.index_select(0, assignment.token_R)
    return _Gather.apply(x_TD, assignment.token_R, assignment.slot_TK)


def combine_rows(y_RD: Tensor, assignment: Assignment, num_tokens: int) -> Tensor:
    """y_TD: the sum of each token's rows (weighted already); zero for a token without rows.

    Deterministic where every token has K rows; the ragged case adds with atomics on a GPU.
    """
    if assignment.slot_TK is None:
        return y_RD.new_zeros(num_tokens, y_RD.shape[1]).index_add(0, assignment.token_R, y_RD)
    return _Combine.apply(y_RD, assignment.token_R, assignment.slot_TK)


class _Gather(torch.autograd.Function):
    """Rows of their tokens. The backward pass sums each token's K rows instead of scattering R rows into T."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_R: Tensor, slot_TK: Tensor) -> Tensor:
        ctx.save_for_backward(slot_TK)
        return x_TD.index_select(0, token_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_RD: Tensor) -> tuple[Tensor | None, ...]:
        (slot_TK,) = ctx.saved_tensors
        return _sum_rows(dx_RD, slot_TK), None, None


class _Combine(torch.autograd.Function):
    """The sum of each token's K rows. The backward pass gathers."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, token_R: Tensor, slot_TK: Tensor) -> Tensor:
        ctx.save_for_backward(token_R)
        return _sum_rows(y_RD, slot_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        (token_R,) = ctx.saved_tensors
        return dy_TD.index_select(0, token_R), None, None


def _sum_rows(y_RD: Tensor, slot_TK: Tensor) -> Tensor:
    """Gather and sum in one pass, which is what an embedding bag is; bfloat16 is summed in float32."""
    return F.embedding_bag(slot_TK, y_RD.contiguous(), mode="sum")
