"""Each expert's gradient in a network that lies whole on one worker."""

from __future__ import annotations

from torch import nn

from zenray.model.feed_forward import expert_modules
from zenray.model.gradients import ExpertGradient


def expert_gradients(model: nn.Module) -> list[ExpertGradient]:
    """Those that a backward pass left in a whole network."""
    found = []
    for bank, (module, numbers, is_block) in expert_modules(model).items():
        for parameter in module.parameters():
            if parameter.grad is not None:
                values_F = parameter.grad[None] if is_block else parameter.grad
                found.append(ExpertGradient(bank, len(numbers), slice(0, len(numbers)), values_F))
    return found
