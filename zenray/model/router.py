"""The router: a linear map to one logit per expert, in float32 whatever the model's dtype, and a choice.

T tokens, D hidden, E experts, K experts per token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zenray.model.balance import RouterStats
from zenray.model.config import MoDEConfig
from zenray.model.dispatch import Assignment, assign_top_k


class TokenChoiceRouter(nn.Module):
    """Each token takes its K likeliest experts: route(x) = TopK(softmax(W x)) (zen-mode blog; Mixtral, Qwen3-MoE)."""

    bias_E: Tensor | None

    def __init__(self, config: MoDEConfig) -> None:
        super().__init__()
        self.router = config.router
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        bias = torch.zeros(config.num_experts) if self.router.selection_bias else None
        self.register_buffer("bias_E", bias)

    def forward(self, x_TD: Tensor, valid_T: Tensor | None = None) -> tuple[Assignment, RouterStats]:
        """Who computes what, and the sums for balancing, in which only tokens with `valid_T` count."""
        logits_TE = F.linear(x_TD.to(torch.float32), self.weight.to(torch.float32)) / self.router.temperature
        probs_TE = logits_TE.softmax(dim=-1)
        weights_TK, experts_TK = self.choose(probs_TE)
        stats = count(logits_TE, probs_TE, experts_TK, valid_T)
        return assign_top_k(experts_TK, weights_TK, probs_TE.shape[-1]), stats

    def choose(self, probs_TE: Tensor) -> tuple[Tensor, Tensor]:
        """(weights_TK, experts_TK). The bias of loss-free balancing moves the choice, never the weights."""
        k = self.router.experts_per_token
        if self.bias_E is None:
            weights_TK, experts_TK = probs_TE.topk(k, dim=-1)
        else:
            experts_TK = (probs_TE.detach() + self.bias_E).topk(k, dim=-1).indices
            weights_TK = probs_TE.gather(-1, experts_TK)
        if self.router.renormalize:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        return weights_TK, experts_TK


def count(logits_TE: Tensor, probs_TE: Tensor, experts_TK: Tensor, valid_T: Tensor | None) -> RouterStats:
    """The sums that balancing needs, over valid tokens."""
    T, E = probs_TE.shape
    valid_T = torch.ones(T, device=probs_TE.device) if valid_T is None else valid_T.to(torch.float32)
    load_E = probs_TE.new_zeros(E).index_add_(
        0, experts_TK.flatten(), valid_T.repeat_interleave(experts_TK.shape[1], dim=0)
    )
    return RouterStats(
        load_E=load_E,
        prob_sum_E=valid_T @ probs_TE,
        z_sum=valid_T @ logits_TE.logsumexp(dim=-1).square(),
        num_tokens=valid_T.sum(),
    )
