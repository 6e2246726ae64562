"""What is done to experts' gradients: each expert clipped by itself, and groups of experts trained alone.

E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from zenray.model.config import MoDEConfig
from zenray.model.experts import ExpertBank
from zenray.model.network import Decoder
from zenray.model.router import Router
from zenray.spec.errors import InvalidValue

Reduce = Callable[[Tensor], Tensor]


@torch.no_grad()
def clip_expert_gradients(model: nn.Module, max_norm: float, *, reduce: Reduce | None = None) -> dict[str, Tensor]:
    """Scale each expert's gradient (all its matrices together) to a norm of at most `max_norm`, in place.

    "Prevents any single expert from dominating early training" (zen-mode blog). Call it before global clipping.
    Returns the norms before, (E,) float32, by bank. Every norm is a function of that expert's own gradient only, so it
    does not depend on how experts are spread over ranks. Where the matrices *of one expert* are themselves cut over
    ranks: DTensors bring their own reduction; for plain tensors `reduce` must sum the squares over those ranks.
    """
    norms = {}
    for name, bank in model.named_modules():
        if not isinstance(bank, ExpertBank):
            continue
        gradients = [parameter.grad for parameter in bank.parameters() if parameter.grad is not None]
        if not gradients:
            continue
        squares_E = sum(gradient.float().square().sum(dim=(1, 2)) for gradient in gradients)
        norm_E = (squares_E if reduce is None else reduce(squares_E)).sqrt()
        scale_E = (max_norm / norm_E.clamp(min=1e-12)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(scale_E[:, None, None].to(gradient.dtype))
        norms[name] = norm_E
    return norms


def train_only_groups(model: nn.Module, config: MoDEConfig, groups: Iterable[str]) -> None:
    """Freeze all but the experts of these groups: a group is re-distilled while router and shared layers stay (HIP-39).

    Experts share fused parameters, so those of other groups get zero gradients rather than none: use an optimizer
    without weight decay on them, and a fresh one, whose moments are zero.
    """
    chosen_E = torch.zeros(config.num_experts, dtype=torch.bool)
    for group in groups:
        chosen_E[list(config.group_range(group))] = True
    if not chosen_E.any():
        raise InvalidValue("No expert group was named: nothing would be trained.")
    model.requires_grad_(False)
    for decoder in (module for module in model.modules() if isinstance(module, Decoder)):
        for layer in decoder.layers:
            if layer.is_sparse:
                feed_forward, blocks = chosen_E.split([config.num_experts - config.num_blocks, config.num_blocks])
                _train_experts(layer.mlp.experts, feed_forward)
                for block, chosen in zip(layer.mlp.blocks or (), blocks.tolist(), strict=True):
                    block.requires_grad_(chosen)


def train_only_routers(model: nn.Module) -> None:
    """Freeze all but the routers (ZIP-0414, step 4)."""
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Router):
            module.requires_grad_(True)


def _train_experts(experts: nn.Module, chosen_E: Tensor) -> None:
    banks = [module for module in experts.modules() if isinstance(module, ExpertBank)]
    for bank, mask in zip(banks, chosen_E.split([bank.num_experts for bank in banks]), strict=True):
        if not mask.any():
            continue
        for parameter in bank.parameters():
            parameter.requires_grad_(True)
            if not mask.all():
                parameter.register_hook(
                    lambda gradient, mask=mask: gradient * mask.to(gradient.device, gradient.dtype)[:, None, None]
                )
