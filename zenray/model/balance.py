"""Keeping experts evenly loaded: the losses, the loss-free bias, and what a run should look at.

T tokens, E experts, K experts per token. Everything here is per layer and takes counts and sums over tokens, so that
a caller can add them up over micro-batches and over ranks first (global-batch balancing, arXiv 2501.11873).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from zenray.model.config import RouterConfig


class RouterStats(NamedTuple):
    """Sums over the real (not padding) tokens of one layer's batch. `prob_sum_E` and `z_sum` carry gradients."""

    load_E: Tensor  # float32: tokens that chose each expert
    prob_sum_E: Tensor  # float32: router probabilities, summed over tokens
    z_sum: Tensor  # float32 scalar: logsumexp(logits)², summed over tokens
    num_tokens: Tensor  # float32 scalar
    overflow_E: Tensor | None = None  # float32: choices that an expert had no room for (capacity, in training)
    fallback_tokens: Tensor | None = None  # float32 scalar: tokens that lost at least one expert to that
    cutoff_E: Tensor | None = None  # float32: the batch's expert-choice cut-offs, where experts choose


def switch_loss(stats: RouterStats, load_E: Tensor | None = None) -> Tensor:
    """E · Σ fᵢ·Pᵢ (Switch, arXiv 2101.03961), with f a share of choices, so 1 when even whatever K is.

    transformers' value is K times this, and mixes all layers before multiplying. `load_E`: counts of the global batch,
    where they are known (arXiv 2501.11873); P stays local, as gradients flow through it.
    """
    load_E = stats.load_E if load_E is None else load_E
    share_E = load_E / load_E.sum().clamp(min=1)
    mean_prob_E = stats.prob_sum_E / stats.num_tokens.clamp(min=1)
    return load_E.numel() * (share_E * mean_prob_E).sum()


def cv_squared_loss(stats: RouterStats) -> Tensor:
    """Squared coefficient of variation of the experts' importance (Shazeer, arXiv 1701.06538): the blog's variance."""
    mean = stats.prob_sum_E.mean()
    return stats.prob_sum_E.var(correction=0) / mean.square().clamp(min=1e-20)


def z_loss(stats: RouterStats) -> Tensor:
    """Mean squared logsumexp of the router's logits (ST-MoE, arXiv 2202.08906): keeps logits small."""
    return stats.z_sum / stats.num_tokens.clamp(min=1)


def router_loss(stats: RouterStats, config: RouterConfig, load_E: Tensor | None = None) -> Tensor:
    """One layer's share of the training loss, coefficients applied. The model's is the sum over its layers."""
    loss = stats.z_sum.new_zeros(())
    experts_choose = stats.cutoff_E is not None  # then the load is even by construction
    if config.balance_loss == "switch" and not experts_choose:
        loss = loss + config.balance_coefficient * switch_loss(stats, load_E)
    elif config.balance_loss == "cv2" and not experts_choose:
        loss = loss + config.balance_coefficient * cv_squared_loss(stats)
    if config.z_coefficient:
        loss = loss + config.z_coefficient * z_loss(stats)
    return loss


@torch.no_grad()
def update_selection_bias(bias_E: Tensor, load_E: Tensor, rate: float = 1e-3) -> None:
    """Raise the bias of underloaded experts and lower that of overloaded ones by `rate`, in place (arXiv 2408.15664).

    Call it once per optimizer step, on the counts of the global batch.
    """
    bias_E.add_(torch.sign(load_E.mean() - load_E).to(bias_E.dtype), alpha=rate)


@dataclass(frozen=True)
class LoadReport:
    """How even one layer's load is. Even: entropy_ratio = effective_ratio = 1, max_violation = 0."""

    load: tuple[float, ...]  # share of all choices, per expert
    entropy_ratio: float  # H / log E: the blog's "utilization entropy … of maximum"
    effective_ratio: (
        float  # exp(H) / E: the share of experts in effective use; 0.95 of entropy_ratio is 0.78 here at 128
    )
    max_violation: float  # largest load / mean load − 1 (MaxVio, arXiv 2408.15664)


def load_report(load_E: Tensor) -> LoadReport:
    """Metrics of one layer's counts, over whatever window the caller summed them."""
    experts = load_E.numel()
    total = float(load_E.sum())
    if total == 0 or experts == 1:
        return LoadReport(load=(1 / experts,) * experts, entropy_ratio=1.0, effective_ratio=1.0, max_violation=0.0)
    share_E = load_E.to(torch.float64) / total
    entropy = float(-(share_E * share_E.clamp(min=1e-300).log()).sum())
    return LoadReport(
        load=tuple(share_E.tolist()),
        entropy_ratio=entropy / math.log(experts),
        effective_ratio=math.exp(entropy) / experts,
        max_violation=float(share_E.max()) * experts - 1,
    )
