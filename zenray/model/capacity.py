"""Expert capacity (ZIP-0414): in training, what an expert has no room for goes to the fallback expert.

T tokens, E experts, K experts per token, R rows sorted by expert.

The fallback is the shared expert: it takes over the weight of the rows that were lost. Earlier tokens come first, so
that no token loses its place to a later one. Inference has no capacity: there every token gets its experts, and the
fallback never acts. Whoever trains with a capacity trains a slightly other function than is served; a factor large
enough that overflow is rare, or none in the last phase of training, closes the gap.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zenray.model.balance import RouterStats
from zenray.model.dispatch import Assignment


def expert_capacity(num_tokens: int, experts_per_token: int, num_experts: int, factor: float) -> int:
    """Rows that one expert takes: ceil(factor · T · K / E), at least 1."""
    return max(1, math.ceil(factor * num_tokens * experts_per_token / num_experts))


def apply_capacity(
    assignment: Assignment, stats: RouterStats, factor: float, valid_T: Tensor | None
) -> tuple[Assignment, RouterStats]:
    """The rows for which there is room, the lost weight of each token, and the counts of what overflowed.

    Padding takes no room: its rows are left out, and are not counted as lost.
    """
    T = assignment.slot_TK.shape[0] if assignment.slot_TK is not None else 0
    E = assignment.rows_E.numel()
    token_R, weight_R = assignment.token_R, assignment.weight_R
    expert_R = torch.arange(E, device=token_R.device).repeat_interleave(assignment.rows_E, output_size=token_R.numel())
    real_R = torch.ones_like(token_R, dtype=torch.bool) if valid_T is None else valid_T.to(torch.bool)[token_R]

    tokens = T if valid_T is None else int(valid_T.sum())
    capacity = expert_capacity(tokens, token_R.numel() // T, E, factor)
    before_R = real_R.cumsum(0) - real_R.long()  # real rows before this one, in all experts
    starts_E = assignment.rows_E.cumsum(0) - assignment.rows_E
    first_R = torch.cat([before_R, before_R.new_zeros(1)])[starts_E][expert_R]  # the extra one: experts without rows
    has_room_R = real_R & (before_R - first_R < capacity)
    lost_R = real_R & ~has_room_R

    lost_T = weight_R.new_zeros(T).index_add(0, token_R[lost_R], weight_R[lost_R])
    kept = Assignment(
        token_R=token_R[has_room_R],
        weight_R=weight_R[has_room_R],
        rows_E=torch.bincount(expert_R[has_room_R], minlength=E),
        lost_T=lost_T,
    )
    stats = stats._replace(
        overflow_E=torch.bincount(expert_R[lost_R], minlength=E).to(torch.float32),
        fallback_tokens=torch.zeros(T, device=token_R.device).index_fill_(0, token_R[lost_R], 1.0).sum(),
    )
    return kept, stats
