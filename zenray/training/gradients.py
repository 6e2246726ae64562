"""From the gradients of single passes to the one gradient of a step, the same on every layout of workers.

Each worker's loss is its part of a sum over the whole batch, so gradients are added up, never averaged: a dense
parameter's over all workers, and so a domain block's, which all of them hold; another expert's over those that hold it,
because within a group every token's contribution has already reached it. There is no factor to get wrong. Where weights
are sharded, FSDP has added up the same way.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from zenray.model.gradients import ExpertGradient, clip_expert_gradients, expert_squares
from zenray.training.mesh import Mesh, sum_of
from zenray.training.trainable import Kind, Trainable

BUCKET_BYTES = 64 << 20
LARGE_BYTES = 1 << 20


@dataclass(frozen=True)
class GradientNorms:
    """Before the global clip. `total` is of all gradients after experts were clipped; each parameter counts once."""

    total: float
    by_kind: dict[str, float]
    by_expert: dict[str, list[float]] = field(default_factory=dict)  # bank or block: each expert's, before its clip

    @property
    def is_finite(self) -> bool:
        return bool(torch.isfinite(torch.tensor(self.total)))


@torch.no_grad()
def reduce_gradients(trainables: Sequence[Trainable], mesh: Mesh) -> None:
    """Add gradients up over the workers that share a parameter, in place. Collective. Frozen experts' become zero.

    An embedding that is the head too, on the first and the last pipeline stage, ends with one gradient on both.
    """
    for one in trainables:
        if one.master.grad is None:  # its part of the network was never reached
            one.master.grad = torch.zeros_like(one.master)
        if one.bank is not None and one.bank.frozen:
            one.gradient[list(one.bank.frozen)] = 0
    if mesh.of_stage > 1 and not mesh.fully_sharded:
        groups: dict[bool, list[Tensor]] = defaultdict(list)
        for one in trainables:
            groups[one.bank is not None].append(one.gradient)
        _all_reduce(groups[False], mesh.stage_group)
        if mesh.of_stage > mesh.expert_size:
            _all_reduce(groups[True], mesh.replica_group)
    for one in trainables:
        if one.is_on_both_ends:
            dist.all_reduce(one.gradient, group=mesh.ends_group)


def _all_reduce(gradients: list[Tensor], group: dist.ProcessGroup | None) -> None:
    """Large ones where they lie, small ones in buckets: few messages, few copies. All are on their way at once."""
    small = [gradient for gradient in gradients if gradient.nbytes < LARGE_BYTES]
    works = [
        dist.all_reduce(gradient, group=group, async_op=True)
        for gradient in gradients
        if gradient.nbytes >= LARGE_BYTES
    ]
    buckets: list[tuple[Tensor, list[Tensor]]] = []
    bucket: list[Tensor] = []
    for index, gradient in enumerate(small):
        bucket.append(gradient)
        if index + 1 < len(small) and sum(one.nbytes for one in bucket) < BUCKET_BYTES:
            continue
        flat = _flatten_dense_tensors(bucket)
        works.append(dist.all_reduce(flat, group=group, async_op=True))
        buckets.append((flat, bucket))
        bucket = []
    for work in works:
        work.wait()
    for flat, bucket in buckets:
        for one, reduced in zip(bucket, _unflatten_dense_tensors(flat, bucket), strict=True):
            one.copy_(reduced)


@torch.no_grad()
def clip_gradients(
    trainables: Sequence[Trainable], mesh: Mesh, *, clip_norm: float, expert_clip_norm: float | None
) -> GradientNorms:
    """Clip each expert's gradient (zen-mode blog), then all of it together, in place. Collective; after reduction.

    `by_expert` has this stage's.
    """
    experts = [found for one in trainables if (found := _of_experts(one)) is not None]
    squares, by_kind = _squares(trainables, experts, mesh)
    clipped = squares if expert_clip_norm is None else clip_expert_gradients(experts, squares, expert_clip_norm)
    by_kind["expert"] = sum_of([square_E.sum() for square_E in clipped.values()])
    squared = mesh.add_up_stages(torch.stack([square.to(mesh.device) for square in by_kind.values()]))
    by_kind = dict(zip(by_kind, squared, strict=True))
    total = float(squared.sum().sqrt())
    if total > clip_norm:
        for one in trainables:
            one.gradient.mul_(clip_norm / total)
    return GradientNorms(
        total,
        {kind: float(square.sqrt()) for kind, square in by_kind.items()},
        {bank: square_E.sqrt().tolist() for bank, square_E in squares.items()},
    )


def _of_experts(one: Trainable) -> ExpertGradient | None:
    if one.bank is not None:
        return ExpertGradient(one.bank.name, one.bank.count, one.bank.mine, one.gradient)
    return None if one.block is None else ExpertGradient(one.block, 1, slice(0, 1), one.gradient[None])


def _squares(
    trainables: Sequence[Trainable], experts: Sequence[ExpertGradient], mesh: Mesh
) -> tuple[dict[str, Tensor], dict[Kind, Tensor]]:
    """‖g‖² of every expert of this stage, by bank and block, and of its dense parameters and routers; double, the same
    on all workers of the stage. What is on both ends of a pipeline counts on the first stage.

    Of what workers hold parts of, it is the sum over them. A sum with zeros is exact, so the layout does not show.
    """
    squares = expert_squares(experts)
    kinds: tuple[Kind, ...] = ("dense", "router")
    counted = [one for one in trainables if not (one.is_on_both_ends and mesh.is_last_stage)]
    by_kind = {
        kind: sum_of([_square(one.gradient) for one in counted if one.kind == kind]).to(mesh.device) for kind in kinds
    }
    blocks = {one.block for one in trainables}
    cut = [square_E for bank, square_E in squares.items() if mesh.fully_sharded or bank not in blocks]
    cut += by_kind.values() if mesh.fully_sharded else []
    if cut:
        parts = mesh.add_up_parts(torch.cat([square.flatten() for square in cut]))
        for square, summed in zip(cut, parts.split([one.numel() for one in cut]), strict=True):
            square.copy_(summed.view_as(square))
    return squares, by_kind


def _square(gradient: Tensor) -> Tensor:
    return torch.linalg.vector_norm(gradient).double().square()
