"""Routers: a linear map to one logit per expert, in float32 whatever the model's dtype, and a choice.

T tokens, D hidden, E experts, K experts per token.

    TokenChoiceRouter    each token takes its K likeliest experts
    ExpertChoiceRouter   each expert takes its likeliest tokens (training), or those above its threshold (anywhere)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zenray.model.balance import RouterStats, update_selection_bias
from zenray.model.capacity import apply_capacity
from zenray.model.config import MoDEConfig
from zenray.model.dispatch import Assignment, assign_mask, assign_top_k


class Router(nn.Module):
    """What both have: the weight, and the probabilities.

    What is learnt without gradients (buffers) is float32 in a model of any dtype: the steps of a bias and of a moving
    average are smaller than bfloat16 can add.
    """

    def __init__(self, config: MoDEConfig) -> None:
        super().__init__()
        self.router = config.router
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """`.to(bfloat16)` and its like are for the weight; buffers change device alone."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self

    def score(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(logits_TE, probs_TE), float32."""
        logits_TE = F.linear(x_TD.to(torch.float32), self.weight.to(torch.float32)) / self.router.temperature
        return logits_TE, logits_TE.softmax(dim=-1)

    def forward(self, x_TD: Tensor, valid_T: Tensor | None = None) -> tuple[Assignment, RouterStats]:
        """Who computes what, and the sums for balancing, in which only tokens with `valid_T` count."""
        raise NotImplementedError

    def after_step(self, stats: RouterStats) -> None:
        """What a router learns without gradients; called once per optimizer step, with the global batch's sums.

        Not part of `forward`: gradient checkpointing runs that twice, and must find the same router both times.
        """


class TokenChoiceRouter(Router):
    """route(x) = TopK(softmax(W x)) (zen-mode blog; Mixtral, Qwen3-MoE). Causal: a token's experts depend on it alone.

    With a capacity factor that holds only outside of training (zenray.model.capacity).
    """

    bias_E: Tensor | None

    def __init__(self, config: MoDEConfig) -> None:
        super().__init__(config)
        bias_E = torch.zeros(config.num_experts, dtype=torch.float32) if self.router.selection_bias else None
        self.register_buffer("bias_E", bias_E)

    def forward(self, x_TD: Tensor, valid_T: Tensor | None = None) -> tuple[Assignment, RouterStats]:
        logits_TE, probs_TE = self.score(x_TD)
        weights_TK, experts_TK = self.choose(probs_TE)
        stats = count(logits_TE, probs_TE, load_of(experts_TK, probs_TE.shape[1], valid_T), valid_T)
        assignment = assign_top_k(experts_TK, weights_TK, probs_TE.shape[-1])
        if self.training and self.router.capacity_factor is not None:
            return apply_capacity(assignment, stats, self.router.capacity_factor, valid_T)
        return assignment, stats

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

    def after_step(self, stats: RouterStats) -> None:
        if self.bias_E is not None:
            update_selection_bias(self.bias_E, stats.load_E)


class ExpertChoiceRouter(Router):
    """Experts choose tokens, each the same number (arXiv 2202.09368), so that the load is even without any loss.

    That choice looks at the whole batch, later tokens too: it is for training only. Its causal twin is the expert
    threshold (arXiv 2603.11535): expert i takes every token whose probability is above c_i, the moving average of
    the lowest probability that it chose in training. A token is then routed by itself alone, to as many experts as
    want it, or none. Weights are the plain probabilities, as in the paper, unless the configuration renormalises them.
    Outside of training thresholds are always used; in training, with `expert_choice_training =
    "threshold"`, after `threshold_warmup_steps`. Before the first step there is no threshold: tokens choose.
    """

    cutoff_E: Tensor
    steps: Tensor

    def __init__(self, config: MoDEConfig) -> None:
        super().__init__(config)
        self.register_buffer("cutoff_E", torch.zeros(config.num_experts, dtype=torch.float32))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x_TD: Tensor, valid_T: Tensor | None = None) -> tuple[Assignment, RouterStats]:
        logits_TE, probs_TE = self.score(x_TD)
        batch_TE, batch_cutoff_E = self.choose_tokens(probs_TE.detach(), valid_T)
        if self.training and self._learns_from_choice():
            chosen_TE = batch_TE
        elif int(self.steps):
            chosen_TE = probs_TE.detach() > self.cutoff_E
        else:
            top_TK = probs_TE.topk(self.router.experts_per_token, dim=-1).indices
            chosen_TE = torch.zeros_like(probs_TE, dtype=torch.bool).scatter_(1, top_TK, True)
        if valid_T is not None:
            chosen_TE = chosen_TE & valid_T.to(torch.bool)[:, None]
        weights_TE = probs_TE * chosen_TE
        if self.router.expert_choice_renormalize:
            weights_TE = weights_TE / weights_TE.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        stats = count(logits_TE, probs_TE, chosen_TE.sum(dim=0).to(torch.float32), valid_T)
        return assign_mask(chosen_TE, weights_TE), stats._replace(cutoff_E=batch_cutoff_E)

    def choose_tokens(self, probs_TE: Tensor, valid_T: Tensor | None) -> tuple[Tensor, Tensor]:
        """(chosen_TE, cutoff_E): each expert's likeliest T·K/E tokens (at least 1), and the last one's probability."""
        T, E = probs_TE.shape
        if valid_T is not None:
            probs_TE = probs_TE.masked_fill(~valid_T.to(torch.bool)[:, None], -1.0)
            T = max(1, int(valid_T.sum()))
        each = min(T, max(1, round(T * self.router.experts_per_token / E)))
        best = probs_TE.topk(each, dim=0)
        chosen_TE = torch.zeros_like(probs_TE, dtype=torch.bool).scatter_(0, best.indices, True)
        return chosen_TE, best.values[-1]

    def _learns_from_choice(self) -> bool:
        if self.router.expert_choice_training == "expert_choice":
            return True
        return int(self.steps) < self.router.threshold_warmup_steps

    @torch.no_grad()
    def after_step(self, stats: RouterStats) -> None:
        """Move the thresholds towards this step's cut-offs (their mean, where a step has several batches)."""
        assert stats.cutoff_E is not None
        if int(self.steps) == 0:
            self.cutoff_E.copy_(stats.cutoff_E)
        else:
            self.cutoff_E.lerp_(stats.cutoff_E.to(self.cutoff_E.dtype), 1 - self.router.threshold_decay)
        self.steps += 1


def load_of(experts_TK: Tensor, num_experts: int, valid_T: Tensor | None) -> Tensor:
    """load_E, float32: valid tokens that chose each expert."""
    T, K = experts_TK.shape
    ones_T = torch.ones(T, device=experts_TK.device) if valid_T is None else valid_T.to(torch.float32)
    empty_E = torch.zeros(num_experts, device=experts_TK.device)
    return empty_E.index_add_(0, experts_TK.flatten(), ones_T.repeat_interleave(K))


def count(logits_TE: Tensor, probs_TE: Tensor, load_E: Tensor, valid_T: Tensor | None) -> RouterStats:
    """The sums that balancing needs, over valid tokens."""
    T = probs_TE.shape[0]
    valid_T = torch.ones(T, device=probs_TE.device) if valid_T is None else valid_T.to(torch.float32)
    return RouterStats(
        load_E=load_E,
        prob_sum_E=valid_T @ probs_TE,
        z_sum=valid_T @ logits_TE.logsumexp(dim=-1).square(),
        num_tokens=valid_T.sum(),
    )
