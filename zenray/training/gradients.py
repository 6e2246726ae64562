"""From the gradients of single passes to the one gradient of a step, the same on every layout of workers.

Each worker's loss is its part of a sum over the whole batch, so gradients are added up, never averaged: a dense
parameter's over all workers, an expert's over those that hold it, because within a group every token's contribution
has already reached it. There is no factor to get wrong. Where weights are sharded, FSDP has added up the same way.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from zenray.training.mesh import Mesh, sum_of
from zenray.training.trainable import Kind, Trainable

BUCKET_BYTES = 64 << 20
LARGE_BYTES = 1 << 20


@dataclass(frozen=True)
class GradientNorms:
    """Before the global clip. `total` is of all gradients after experts were clipped; each parameter counts once."""

    total: float
    by_kind: dict[str, float]
    by_expert: dict[str, list[float]] = field(default_factory=dict)  # bank: one for each expert, before its clip

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
            groups[one.kind == "expert"].append(one.gradient)
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

    An expert's gradient is that of its gate, up and down matrices in one layer. `by_expert` has this stage's.
    """
    squares, by_kind = _squares(trainables, mesh)
    scales = {}
    for bank, square_E in squares.items():
        scales[bank] = torch.ones_like(square_E)
        if expert_clip_norm is not None:
            scales[bank] = (expert_clip_norm / (square_E.sqrt() + 1e-6)).clamp(max=1.0)
    by_kind["expert"] = sum_of([(squares[bank] * scales[bank].square()).sum() for bank in squares])
    squared = mesh.add_up_stages(torch.stack([square.to(mesh.device) for square in by_kind.values()]))
    by_kind = dict(zip(by_kind, squared, strict=True))
    total = float(squared.sum().sqrt())
    whole = min(1.0, clip_norm / (total + 1e-6))
    for one in trainables:
        if one.bank is not None:
            if whole < 1 or expert_clip_norm is not None:
                mine_F = scales[one.bank.layer][one.bank.mine] * whole
                one.gradient.mul_(mine_F.to(one.gradient.dtype)[:, None, None])
        elif whole < 1:
            one.gradient.mul_(whole)
    return GradientNorms(
        total,
        {kind: float(square.sqrt()) for kind, square in by_kind.items()},
        {bank: square_E.sqrt().tolist() for bank, square_E in squares.items()},
    )


def _squares(trainables: Sequence[Trainable], mesh: Mesh) -> tuple[dict[str, Tensor], dict[Kind, Tensor]]:
    """‖g‖² of every expert of every bank of this stage, and of its dense parameters and routers; double, the same on
    all workers of the stage. What is on both ends of a pipeline counts on the first stage.

    An expert's is the sum over those that hold parts of it. A sum with zeros is exact, so the layout does not show.
    """
    squares: dict[str, Tensor] = {}
    for one in trainables:
        if one.bank is not None:
            empty = torch.zeros(one.bank.count, dtype=torch.double, device=one.gradient.device)
            square_E = squares.setdefault(one.bank.layer, empty)
            square_E[one.bank.mine] += _square(one.gradient.flatten(1), dim=1)
    kinds: tuple[Kind, ...] = ("dense", "router")
    counted = [one for one in trainables if not (one.is_on_both_ends and mesh.is_last_stage)]
    by_kind = {
        kind: sum_of([_square(one.gradient) for one in counted if one.kind == kind]).to(mesh.device) for kind in kinds
    }
    held_once = squares | (by_kind if mesh.fully_sharded else {})
    if held_once:
        parts = mesh.add_up_parts(torch.cat([square.flatten() for square in held_once.values()]))
        for square, summed in zip(
            held_once.values(), parts.split([one.numel() for one in held_once.values()]), strict=True
        ):
            square.copy_(summed.view_as(square))
    return squares, by_kind


def _square(gradient: Tensor, dim: int | None = None) -> Tensor:
    return torch.linalg.vector_norm(gradient, dim=dim).double().square()
