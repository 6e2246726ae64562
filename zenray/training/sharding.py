"""Fully sharded weights (ZeRO-3, arXiv 1910.02054) by torch's FSDP2: no worker holds a whole network between steps.

A layer's weights are gathered before they are used and let go after; gradients are scattered to those who own the
parts. Dense weights are cut over all workers, an expert's over the workers that hold it: an expert group has cut the
experts themselves before (see `expert_parallel`).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, ShardPlacementResult
from torch.distributed.tensor import Shard

from zenray.model.network import MoDE
from zenray.training.expert_parallel import expert_banks
from zenray.training.layout import expert_placement
from zenray.training.loss import Objective
from zenray.training.mesh import Mesh


def shard(objective: Objective, mesh: Mesh, dtype: torch.dtype) -> None:
    """Cut the weights of `objective` in place, `dtype` being that of the arithmetic. Collective.

    Nothing is done where `mesh` is not fully sharded. Gradients are summed in float32, not averaged: the loss is a
    share of the whole batch's already. From then on the network may be run by `objective` alone.
    """
    if mesh.everyone is None or mesh.device_mesh is None:
        return
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    model = objective.model
    replicas = FSDPMeshInfo(mesh.device_mesh["replica"], shard_mesh_dim=0) if mesh.expert_size > 1 else None
    placed: dict[nn.Parameter, Shard | ShardPlacementResult] = {}
    for _, bank in expert_banks(model):
        for weight in bank.parameters():
            placement = expert_placement(bank.whole_experts, weight.shape[1], mesh)
            placed[weight] = placement if replicas is None else ShardPlacementResult(placement, replicas)
    empty = {weight for weight in placed if weight.shape[0] == 0}  # of a worker without experts: FSDP knows no such
    for layer in model.model.layers:
        # One part with two groups of weights: a part within it would gather in the midst of what is recomputed.
        fully_shard(layer, mesh=mesh.everyone, shard_placement_fn=placed.get, mp_policy=precision, ignored_params=empty)
    if _embeds_apart(model):
        fully_shard(model.model.embed_tokens, mesh=mesh.everyone, mp_policy=precision)
    fully_shard(objective, mesh=mesh.everyone, mp_policy=precision)
    register_fsdp_forward_method(objective, "hidden_states")
    _order_gathering(objective)
    for part in objective.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo knows sums only
            part.set_reduce_scatter_unused_params(True)


def _order_gathering(objective: Objective) -> None:
    """In the backward pass, gather the layer before while a layer computes, in an order that all workers share.

    FSDP's own order goes by groups of weights: a worker without experts has fewer, and would wait elsewhere.
    """
    model = objective.model
    before: nn.Module = model.model.embed_tokens if _embeds_apart(model) else objective
    for layer in model.model.layers:
        layer.set_modules_to_backward_prefetch([before])
        before = layer
    objective.set_modules_to_backward_prefetch([before])


def _embeds_apart(model: MoDE) -> bool:
    """Whether there is an embedding, and no head that is the same weight."""
    return isinstance(model.model.embed_tokens, nn.Embedding) and not model.config.tie_word_embeddings


def add_up_gradients(objective: nn.Module, is_last: bool) -> None:
    """Whether the next backward pass scatters gradients: only a step's last one needs to."""
    if isinstance(objective, FSDPModule):
        objective.set_requires_gradient_sync(is_last)


def let_go(objective: nn.Module) -> None:
    """Back to this worker's parts, after a forward pass that no backward pass follows."""
    if isinstance(objective, FSDPModule):
        objective.reshard()
