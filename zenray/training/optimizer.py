"""What moves the masters: parameter groups, the learning rate as a function of the step, and the rules to choose from.

A rule is an optimiser behind one seam (`Rule`): how it is made, and what of it a checkpoint keeps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from zenray.spec.errors import InvalidValue
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


class Rule(Protocol):
    """An optimiser to choose by name, and its state in a checkpoint's words."""

    def make(self, groups: list[dict[str, Any]], settings: Optimisation) -> Optimizer:
        """Over masters in groups. InvalidValue where this machine cannot run it."""
        ...

    def start(self, optimizer: Optimizer, master: Tensor) -> None:
        """Give `master` the state of a run's first step, so that a checkpoint has it from the start."""
        ...

    def moments(self, optimizer: Optimizer, master: Tensor) -> dict[str, Tensor]:
        """What it remembers, in its own memory: tensors cut over the workers as `master` is, along the same axes. Only
        the last axis may be of another length."""
        ...

    def updates(self, optimizer: Optimizer, master: Tensor) -> int:
        """Steps taken so far."""
        ...

    def set_updates(self, optimizer: Optimizer, master: Tensor, count: int) -> None: ...


class FusedAdamW:
    """torch's own, one kernel for all of a weight."""

    def make(self, groups: list[dict[str, Any]], settings: Optimisation) -> Optimizer:
        return AdamW(groups, **_settings(settings), fused=True)

    def start(self, optimizer: Optimizer, master: Tensor) -> None:
        optimizer.state[master] = {
            "step": torch.zeros((), dtype=torch.float32, device=master.device),
            "exp_avg": torch.zeros_like(master, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(master, requires_grad=False),
        }

    def moments(self, optimizer: Optimizer, master: Tensor) -> dict[str, Tensor]:
        return {name: optimizer.state[master][name] for name in ("exp_avg", "exp_avg_sq")}

    def updates(self, optimizer: Optimizer, master: Tensor) -> int:
        return int(optimizer.state[master]["step"])

    def set_updates(self, optimizer: Optimizer, master: Tensor, count: int) -> None:
        optimizer.state[master]["step"].fill_(float(count))


class BlockwiseAdamW:
    """bitsandbytes' AdamW with moments in 8 bits (arXiv 2110.02861).

    A scale belongs to 256 neighbours in memory. Only weights whose rows are whole blocks are kept so: then no cut of a
    weight over workers cuts a block, and a checkpoint means the same at every layout.
    """

    BLOCK = 256

    def make(self, groups: list[dict[str, Any]], settings: Optimisation) -> Optimizer:
        try:
            from bitsandbytes.optim.adamw import AdamW8bit
        except ImportError as error:
            raise InvalidValue(
                f"adamw-8bit needs bitsandbytes, which cannot be loaded here: {error}.",
                hint="Install it (`make setup`), or use optimizer: adamw.",
                param="optimizer",
            ) from error
        return AdamW8bit(groups, **_settings(settings))

    def start(self, optimizer: Optimizer, master: Tensor) -> None:
        state: dict[str, Any] = {"step": 0}
        optimizer.state[master] = state
        is_small = master.dim() < 2 or master.shape[-1] % self.BLOCK != 0 or master.numel() == 0
        if not is_small:
            optimizer.fill_qmap()
        for number, name in ((1, "dynamic"), (2, "udynamic")):
            dtype = torch.float32 if is_small else torch.uint8
            state[f"state{number}"] = torch.zeros_like(master, dtype=dtype, requires_grad=False)
            if not is_small:
                state[f"qmap{number}"] = optimizer.name2qmap[name].to(master.device)
                state[f"absmax{number}"] = torch.zeros(master.numel() // self.BLOCK, device=master.device)

    def moments(self, optimizer: Optimizer, master: Tensor) -> dict[str, Tensor]:
        found, state = {}, optimizer.state[master]
        for number, name in ((1, "exp_avg"), (2, "exp_avg_sq")):
            if state["state1"].dtype == torch.float32:
                found[name] = state[f"state{number}"]
            else:
                scales = state[f"absmax{number}"].view(*master.shape[:-1], -1)
                found |= {f"{name}_codes": state[f"state{number}"], f"{name}_scales": scales}
        return found

    def updates(self, optimizer: Optimizer, master: Tensor) -> int:
        return int(optimizer.state[master]["step"])

    def set_updates(self, optimizer: Optimizer, master: Tensor, count: int) -> None:
        optimizer.state[master]["step"] = count


RULES: dict[str, Rule] = {"adamw": FusedAdamW(), "adamw-8bit": BlockwiseAdamW()}


def _settings(settings: Optimisation) -> dict[str, Any]:
    return {
        "lr": settings.learning_rate,
        "betas": (settings.beta1, settings.beta2),
        "eps": settings.epsilon,
    }


def make_optimizer(trainables: Sequence[Trainable], settings: Optimisation) -> Optimizer:
    """The optimiser that the settings name, with its state. Norms, biases and other vectors do not decay; routers learn
    at a rate of their own.

    A bank with frozen experts is not decayed by it, which would reach them too; see `decay_partly_frozen`.
    """
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for one in trainables:
        partly = one.bank is not None and bool(one.bank.frozen)
        decays = one.master.dim() > 1 and not partly
        groups.setdefault((one.kind == "router", decays), []).append(one.master)
    rule = RULES[settings.optimizer]
    optimizer = rule.make(
        [
            {
                "params": masters,
                "scale": settings.router_scale if is_router else 1.0,
                "weight_decay": settings.weight_decay if decays else 0.0,
            }
            for (is_router, decays), masters in groups.items()
        ],
        settings,
    )
    for one in trainables:
        rule.start(optimizer, one.master)
    return optimizer


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
