"""Context parallelism: workers of a group compute parts of the same sequences, and see one another's keys and values.

Put into a finished network from outside. Everything but attention works on tokens alone; attention keeps its own
queries and gathers the keys and values of the whole sequence (as Llama 3 was trained, arXiv 2407.21783, section 3.3.2).
A sequence is cut into 2n chunks for n workers, of which worker r has the r-th from the front and the r-th from the
back. Each chunk's queries meet only the keys up to its own end, so all workers do the same work, and half of what a
product with all keys would be.

B batch, S tokens of a sequence on this worker, L of the whole sequence, H heads, N key/value heads, C head size,
n workers that share it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from zenray.model.attention import Attention
from zenray.model.config import MoDEConfig
from zenray.model.distillation import TopLogits
from zenray.model.network import MoDE
from zenray.spec.errors import InvalidValue
from zenray.spec.parallelism import check_sequence
from zenray.training.data.stream import Batch
from zenray.training.mesh import Mesh
from zenray.training.teachers import TopTeacher


@dataclass(frozen=True)
class BatchPart(Batch):
    """One worker's tokens of sequences that several workers share. Labels and positions are those in the sequence."""

    whole: Batch
    places_S: Tensor  # of this worker's tokens in the sequence

    def mask(self, window: int | None = None, of: Tensor | None = None) -> Tensor:
        """(B, 1, S, L): where this worker's tokens (`of`: those of these places alone) may look in the sequence."""
        return self.whole.mask(window, self.places_S if of is None else self.places_S[of])

    def sequences(self, which_B: Tensor) -> BatchPart:
        own = {name: getattr(self, name)[which_B] for name in vars(self.whole)}
        return BatchPart(**own, whole=self.whole.sequences(which_B), places_S=self.places_S)


def part_of(batch: Batch, mesh: Mesh) -> Batch:
    """What of a batch of whole sequences this worker computes: all of it, where nobody shares them. InvalidValue."""
    if mesh.context_size == 1:
        return batch
    places_S = own_places(batch.ids_BS.shape[1], mesh.context_size, mesh.context_rank)
    own = {name: tensor[:, places_S] for name, tensor in vars(batch).items()}
    return BatchPart(**own, whole=batch, places_S=places_S)


def own_places(length: int, workers: int, rank: int) -> Tensor:
    """The places in a sequence that worker `rank` of those that share it has, in order. InvalidValue."""
    check_sequence(length, workers)
    chunks = torch.arange(length).view(2 * workers, -1)
    return torch.cat([chunks[rank], chunks[2 * workers - 1 - rank]])


def check_experts(config: MoDEConfig, workers: int) -> None:
    """InvalidValue for spatial experts, whose grid knows whole sequences only, where workers share each."""
    if workers > 1 and any(group.kind == "spatial" for group in config.expert_groups):
        raise InvalidValue(
            f"Spatial experts need whole sequences, and {workers} workers share each.",
            hint="Leave context_parallel out: fully_sharded and expert_parallel share weights.",
            param="context_parallel",
        )


def share_sequences(model: MoDE, mesh: Mesh) -> None:
    """Let attention see whole sequences, in place. No collective. Nothing is done for a group of one. InvalidValue."""
    check_experts(model.config, mesh.context_size)
    if mesh.context_size == 1:
        return
    for attention in [part for part in model.modules() if isinstance(part, Attention)]:
        attention.attend = partial(_attend, mesh)  # type: ignore[method-assign]


def top_logits(teacher: TopTeacher, batch: Batch, mesh: Mesh) -> TopLogits:
    """What a teacher that is asked for whole sequences says of this worker's tokens. Collective over the group.

    Each sequence is asked for by one worker of the group, which tells the others.
    """
    if not isinstance(batch, BatchPart):
        return teacher.top_logits(batch)
    assert mesh.sequences is not None
    count, group = batch.whole.ids_BS.shape[0], mesh.context_group
    mine = {number: teacher.of(batch.whole, number) for number in range(mesh.context_rank, count, mesh.context_size)}
    found = []
    for number in range(count):
        owner = number % mesh.context_size
        shape = (batch.whole.ids_BS.shape[1], teacher.count)
        ids, log_probs = torch.empty(shape, dtype=torch.int32), torch.empty(shape)
        if owner == mesh.context_rank:
            ids.copy_(mine[number].ids_TN)
            log_probs.copy_(mine[number].log_probs_TN)
        told = [one.to(mesh.device) for one in (ids, log_probs)]
        for one in told:
            dist.broadcast(one, group=group, group_src=owner)
        found.append([one[batch.places_S.to(mesh.device)] for one in told])
    ids_TN, log_probs_TN = (torch.cat(parts) for parts in zip(*found, strict=True))
    return TopLogits(ids_TN, log_probs_TN, teacher.temperature)


def _attend(
    mesh: Mesh, q_BHSC: Tensor, k_BNSC: Tensor, v_BNSC: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """y_BHSC, k_BNLC, v_BNLC: this worker's queries over the keys of all, which lie in the sequence's order."""
    assert mask is not None
    k_BNLC, v_BNLC = _gather_sequence(torch.stack([k_BNSC, v_BNSC]), mesh).unbind()
    chunk, rank, workers = q_BHSC.shape[2] // 2, mesh.context_rank, mesh.context_size
    found = []
    for first, number in ((0, rank), (chunk, 2 * workers - 1 - rank)):
        own, end = slice(first, first + chunk), (number + 1) * chunk
        found.append(
            F.scaled_dot_product_attention(
                q_BHSC[:, :, own],
                k_BNLC[:, :, :end],
                v_BNLC[:, :, :end],
                attn_mask=mask[:, :, own, :end],
                enable_gqa=True,
            )
        )
    return torch.cat(found, dim=2), k_BNLC, v_BNLC


def _gather_sequence(x_2BNSC: Tensor, mesh: Mesh) -> Tensor:
    """(2, B, N, L, C): of all workers' tokens, in the sequence's order."""
    x_n2BNhtC = _Gather.apply(x_2BNSC.unflatten(3, (2, -1)), mesh.context_group, mesh.context_size)
    heads, tails = x_n2BNhtC.unbind(4)  # (n, 2, B, N, t, C): chunks from the front, and from the back
    return torch.cat([heads, tails.flip(0)]).movedim(0, 3).flatten(3, 4)


class _Gather(torch.autograd.Function):
    """Every worker's tensor, (n, …). The backward pass adds up what all workers' queries say of this worker's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, workers: int) -> Tensor:
        ctx.group, ctx.shape = group, x.shape
        out = x.new_empty(workers * x.shape[0], *x.shape[1:])
        dist.all_gather_single(out, x.contiguous(), group=group)
        return out.unflatten(0, (workers, -1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = dy.new_empty(ctx.shape)
        dist.reduce_scatter_single(dx, dy.contiguous().flatten(0, 1), group=ctx.group)
        return dx, None, None
