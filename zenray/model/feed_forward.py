"""The two feed-forward kinds of a decoder layer: a dense SwiGLU, and routed experts beside an optional shared one.

B batch, S sequence, T tokens, D hidden.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zenray.model.balance import RouterStats
from zenray.model.blocks import BLOCKS, BlockContext, make_blocks, split_off_blocks
from zenray.model.config import MoDEConfig
from zenray.model.experts import ExpertBank, make_experts
from zenray.model.linear import Linear
from zenray.model.router import ExpertChoiceRouter, Router, TokenChoiceRouter


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)) (arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, width, bias=False)
        self.up_proj = Linear(hidden_size, width, bias=False)
        self.down_proj = Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MixtureOfExperts(nn.Module):
    """FFN(x) = Σ gᵢ·Eᵢ(x) over the token's experts (zen-mode blog), plus the shared expert where there is one."""

    def __init__(self, config: MoDEConfig, *, experts_choose: bool = False) -> None:
        super().__init__()
        self.gate: Router = ExpertChoiceRouter(config) if experts_choose else TokenChoiceRouter(config)
        self.experts = make_experts(config.hidden_size, config.expert_widths)
        self.blocks = make_blocks(config) if config.num_blocks else None
        width = config.shared_expert_width
        self.shared_expert = SwiGLU(config.hidden_size, width) if width else None
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False) if config.shared_expert_gate else None

    def forward(
        self, x_BSD: Tensor, valid_BS: Tensor | None = None, context: BlockContext | None = None
    ) -> tuple[Tensor, RouterStats]:
        """`context` is for experts of other kinds; without them it is not looked at."""
        x_TD = x_BSD.flatten(0, 1)
        assignment, stats = self.gate(x_TD, None if valid_BS is None else valid_BS.flatten())
        if self.blocks is None:
            y_TD = self.experts(x_TD, assignment)
        else:
            feed_forward, weights = split_off_blocks(assignment, len(self.blocks), x_TD.shape[0])
            y_TD = self.experts(x_TD, feed_forward)
            for block, weight_T in zip(self.blocks, weights, strict=True):
                y_TD = y_TD + weight_T.to(x_TD.dtype)[:, None] * block(x_BSD, context).flatten(0, 1)
        if self.shared_expert is not None:
            share = 1.0 if self.shared_expert_gate is None else torch.sigmoid(self.shared_expert_gate(x_TD))
            if assignment.lost_T is not None:  # the shared expert stands in for those that had no room
                share = share + assignment.lost_T.to(x_TD.dtype)[:, None]
            y_TD = y_TD + share * self.shared_expert(x_TD)
        return y_TD.view_as(x_BSD), stats


class ExpertModule(NamedTuple):
    """A bank of experts, or a domain block, which is one."""

    module: nn.Module
    numbers: range  # of its experts, in the layer's router; of the whole bank, where workers share it
    is_block: bool


def expert_modules(model: nn.Module) -> dict[str, ExpertModule]:
    """Every bank and block of a network, by name, in the routers' order: the feed-forward experts, then the blocks."""
    found = {}
    for layer_name, layer in model.named_modules():
        if not isinstance(layer, MixtureOfExperts):
            continue
        first = 0
        for name, part in layer.named_modules(prefix=layer_name):
            is_block = isinstance(part, tuple(BLOCKS.values()))
            if is_block or isinstance(part, ExpertBank):
                last = first + (part.whole_experts if isinstance(part, ExpertBank) else 1)
                found[name] = ExpertModule(part, range(first, last), is_block)
                first = last
    return found
