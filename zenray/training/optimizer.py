"""AdamW over the masters: parameter groups, the learning rate as a function of the step, and partly frozen banks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.optim import AdamW, Optimizer

from zenray.spec.training import Optimisation
from zenray.training.trainable import Trainable


def learning_rate(step: int, steps: int, settings: Optimisation) -> float:
    """Of step `step` (from 0) of `steps`: up in a line, then down along a cosine to its final share."""
    highest = settings.learning_rate
    if step < settings.warmup_steps:
        return highest * (step + 1) / settings.warmup_steps
    after = steps - 1 - settings.warmup_steps
    progress = min(1.0, (step - settings.warmup_steps) / after) if after > 0 else 1.0
    share = settings.final_share + (1 - settings.final_share) * 0.5 * (1 + math.cos(math.pi * progress))
    return highest * share


def make_optimizer(trainables: Sequence[Trainable], settings: Optimisation) -> Optimizer:
    """AdamW. Norms, biases and other vectors do not decay; routers learn at a rate of their own.

    A bank with frozen experts is not decayed by AdamW, which would reach them too; see `decay_partly_frozen`.
    """
    groups: dict[tuple[bool, bool], list[torch.Tensor]] = {}
    for one in trainables:
        partly = one.bank is not None and bool(one.bank.frozen)
        decays = one.master.dim() > 1 and not partly
        groups.setdefault((one.kind == "router", decays), []).append(one.master)
    return AdamW(
        [
            {
                "params": masters,
                "scale": settings.router_scale if is_router else 1.0,
                "weight_decay": settings.weight_decay if decays else 0.0,
            }
            for (is_router, decays), masters in groups.items()
        ],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        fused=True,
    )


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


@torch.no_grad()
def decay_partly_frozen(trainables: Sequence[Trainable], settings: Optimisation, rate: float) -> None:
    """AdamW's decay for the learning experts of banks in which others are frozen. Before the optimiser's step."""
    for one in trainables:
        if one.bank is not None and one.bank.frozen:
            learning = [local for local in range(one.master.shape[0]) if local not in one.bank.frozen]
            one.master[learning] *= 1 - rate * settings.weight_decay
