"""Activation checkpointing: what a layer's forward pass throws away and the backward pass computes again.

full        all of a layer but its input (arXiv 1604.06174)
selective   norms, activations, rows put in order, exchanges between workers (which write in place, so that
            torch cannot keep them); results of matrix products and of attention are kept
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from zenray.model.network import MoDE
from zenray.spec.training import Recompute


def recompute(model: MoDE, what: Recompute) -> None:
    """Set what the network's layers recompute, in place. Once, before the weights are sharded."""
    model.model.gradient_checkpointing = False  # the decoder's own wraps FSDP's hooks; ours lies within them
    if what == "none":
        return
    for layer in model.model.layers:
        layer.forward = _recomputed(layer, layer.forward, what)


def _recomputed(layer: nn.Module, forward: Callable[..., Any], what: Recompute) -> Callable[..., Any]:
    options: dict[str, Any] = {"use_reentrant": False}
    if what == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)

    def run(*inputs: Any) -> Any:
        if not (layer.training and torch.is_grad_enabled()):
            return forward(*inputs)
        return checkpoint(forward, *inputs, **options)

    return run


def _policy(context: Any, operation: Any, *inputs: Any, **_: Any) -> CheckpointPolicy:
    is_cheap = operation not in _kept()
    if operation is torch.ops.aten.mm.default and inputs[0].shape[0] == 1:
        is_cheap = True  # a vector, and torch.matmul changes the result's shape in place, which may not be kept
    return CheckpointPolicy.PREFER_RECOMPUTE if is_cheap else CheckpointPolicy.MUST_SAVE


@cache
def _kept() -> set[Any]:
    """Operations that cost more than the memory of their result."""
    aten = torch.ops.aten
    found = {
        aten.mm.default,
        aten.addmm.default,
        aten.linear.default,
        aten._grouped_mm.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
    }
    if torch.backends.mkldnn.is_available():
        found.add(torch.ops.mkldnn._linear_pointwise.default)
    return found
