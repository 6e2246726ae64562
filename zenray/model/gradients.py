"""Each expert's gradient by itself: how long it is, and keeping it at or below a norm.

E experts of a bank, F of them with values here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class ExpertGradient(NamedTuple):
    """The gradient of one weight of a bank's experts, or what of it is on this worker. A block is a bank of one."""

    bank: str
    experts: int  # of the whole bank
    here: slice  # of them, those with values
    values_F: Tensor  # (F, …)


@torch.no_grad()
def expert_squares(gradients: Sequence[ExpertGradient]) -> dict[str, Tensor]:
    """‖g‖² of each expert over all its weights in one layer, by bank: (E,), double; 0 where nothing of it is here.

    Where workers hold parts of the experts, or of each, the whole's is the sum over them, each part counted once.
    """
    squares: dict[str, Tensor] = {}
    for bank, experts, here, values_F in gradients:
        none_E = torch.zeros(experts, dtype=torch.double, device=values_F.device)
        square_E = squares.setdefault(bank, none_E)
        square_E[here] += torch.linalg.vector_norm(values_F.flatten(1), dim=1).double().square()
    return squares


@torch.no_grad()
def clip_expert_gradients(
    gradients: Sequence[ExpertGradient], squares: dict[str, Tensor], max_norm: float
) -> dict[str, Tensor]:
    """Scale each expert's gradient to a norm of at most `max_norm`, in place; its squares afterwards.

    "Prevents any single expert from dominating early training" (zen-mode blog). Before a global clip. `squares` are
    those of `expert_squares`, of whole experts: a scale depends on its expert's gradient alone, whoever holds that.
    """
    scales = {bank: (max_norm / square_E.sqrt().clamp(min=1e-12)).clamp(max=1) for bank, square_E in squares.items()}
    for bank, _, here, values_F in gradients:
        scale_F = scales[bank][here].to(values_F.dtype)
        values_F.mul_(scale_F.view(-1, *(1 for _ in values_F.shape[1:])))
    return {bank: square_E * scales[bank].square() for bank, square_E in squares.items()}
