"""torch.compile over the layers of a network, by a field of the job."""

from __future__ import annotations

import torch

from zenray.model.experts import ExpertBank
from zenray.model.network import MoDE
from zenray.spec.errors import InvalidValue
from zenray.spec.training import Recompute


def compile_layers(model: MoDE, what: Recompute, device: torch.device, dtype: torch.dtype) -> None:
    """Let the compiler have each layer's forward and backward pass, in place. Once, before `recompute` and sharding.

    It works at the first step, for seconds to minutes. Exchanges between workers stay outside of what it fuses; and so
    do experts, unless in bfloat16 on a GPU: PyTorch compiles no other grouped product.
    InvalidValue for selective recomputation, which counts single operations that the compiler merges.
    """
    if what == "selective":
        raise InvalidValue(
            "Compiled layers cannot recompute selectively.",
            hint="Use activation_checkpointing: full or none, or compiled: false.",
            param="activation_checkpointing",
        )
    if device.type == "cpu" or dtype != torch.bfloat16:
        for bank in [part for part in model.modules() if isinstance(part, ExpertBank)]:
            bank.run = torch.compiler.disable(bank.run)  # type: ignore[method-assign]
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward)
