"""Expert parallelism: each rank of a group keeps a share of every bank's experts, and rows travel to them and back.

Put into a finished network from outside. The three steps of an expert layer (gather, run, combine) stay; around `run`
come two exchanges. Rows arrive at an expert in the order of ranks, then tokens: the order that one process has.

R rows (token, expert), Q rows that arrived here, n ranks of the group, E experts, F experts of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from zenray.model.dispatch import Assignment, combine_rows, gather_rows
from zenray.model.experts import DiverseExperts, ExpertBank
from zenray.model.feed_forward import MixtureOfExperts
from zenray.model.network import MoDE
from zenray.training.mesh import Mesh


def banks_of(experts: nn.Module) -> list[ExpertBank]:
    """The banks of one layer, in the router's order."""
    return list(experts.banks) if isinstance(experts, DiverseExperts) else [experts]


def expert_banks(model: MoDE) -> Iterator[tuple[str, ExpertBank]]:
    """(name, bank) of every layer, in order."""
    return ((name, part) for name, part in model.named_modules() if isinstance(part, ExpertBank))


def parallelize(model: MoDE, mesh: Mesh) -> None:
    """Keep this rank's share of the experts, in place, and exchange rows. No collective; parameter names stay.
    Idempotent.

    A bank's experts are cut as DTensor's Shard(0) cuts them; they need not divide evenly. Nothing is done for a group
    of one.
    """
    if mesh.expert_size == 1:
        return
    for layer in [part for part in model.modules() if isinstance(part, MixtureOfExperts)]:
        if "forward" in vars(layer.experts):
            continue
        for bank in banks_of(layer.experts):
            mine = mesh.chunk(bank.num_experts)
            for name in ("gate_up_proj", "down_proj"):
                whole = getattr(bank, name)
                part = nn.Parameter(whole.detach()[mine].clone(), requires_grad=whole.requires_grad)
                setattr(bank, name, part)
            bank.num_experts, bank.first_expert = mine.stop - mine.start, mine.start
        layer.experts.forward = ExpertExchange(layer.experts, mesh).forward  # type: ignore[method-assign]


class ExpertExchange:
    """The forward pass of one layer's experts over a group. Not a module: it owns no parameters."""

    def __init__(self, experts: ExpertBank | DiverseExperts, mesh: Mesh) -> None:
        self._experts, self._group = experts, mesh.expert_group
        owners: list[list[int]] = [[] for _ in range(mesh.expert_size)]
        start = 0
        for bank in banks_of(experts):
            for rank, owned in enumerate(owners):
                mine = mesh.chunk(bank.whole_experts, rank)
                owned += range(start + mine.start, start + mine.stop)
            start += bank.whole_experts
        self._counts = [len(owned) for owned in owners]  # experts of each rank
        self._order_E = torch.tensor([expert for owned in owners for expert in owned])
        self._is_ordered = bool((self._order_E == torch.arange(start)).all())
        self._mine = self._counts[mesh.expert_rank]

    def forward(self, x_TD: Tensor, assignment: Assignment) -> Tensor:
        """y_TD, as the experts themselves would compute it. Collective over the group, also without any token."""
        assignment = self._by_owner(assignment)
        rows_nF, counted = self._send_counts(assignment.rows_E)
        x_RD, weight_R = gather_rows(x_TD, assignment), assignment.weight_R.to(x_TD.dtype)  # while the counts travel
        sent, received = self._split_sizes(assignment.rows_E, rows_nF, counted)
        x_QD, weight_Q = _AllToAll.apply(self._group, sent, received, x_RD, weight_R)
        # Rows came rank by rank, each rank's expert by expert; the grouped product wants expert by expert.
        to_experts_Q, to_ranks_Q = _transpose_blocks(rows_nF, sum(received))
        x_QD = _Permute.apply(x_QD, to_experts_Q, to_ranks_Q)
        weight_Q = _Permute.apply(weight_Q, to_experts_Q, to_ranks_Q)
        y_QD = self._experts.run(x_QD, rows_nF.sum(dim=0), weight_Q)
        y_QD = _Permute.apply(y_QD, to_ranks_Q, to_experts_Q)
        (y_RD,) = _AllToAll.apply(self._group, received, sent, y_QD)
        return combine_rows(y_RD, assignment, x_TD.shape[0])

    def _by_owner(self, assignment: Assignment) -> Assignment:
        """The same rows in the order of their experts' ranks, which for a single bank they have already."""
        if self._is_ordered:
            return assignment
        order_E = self._order_E.to(assignment.rows_E.device)
        order_R = _blocks(assignment.rows_E, order_E, assignment.token_R.numel())
        inverse_R = _inverse(order_R)
        slot_TK = assignment.slot_TK
        return assignment._replace(
            token_R=assignment.token_R[order_R],
            weight_R=assignment.weight_R[order_R],
            rows_E=assignment.rows_E[order_E],
            slot_TK=None if slot_TK is None else inverse_R[slot_TK],
        )

    def _send_counts(self, rows_E: Tensor) -> tuple[Tensor, dist.Work]:
        """rows_nF, the rows to receive from each rank for each expert of this one, once the work is done."""
        ranks = len(self._counts)
        rows_nF = rows_E.new_empty(ranks * self._mine)
        sizes = [self._mine] * ranks
        work = dist.all_to_all_single(rows_nF, rows_E.contiguous(), sizes, self._counts, self._group, async_op=True)
        return rows_nF.view(ranks, self._mine), work

    def _split_sizes(self, rows_E: Tensor, rows_nF: Tensor, counted: dist.Work) -> tuple[list[int], list[int]]:
        """Rows to send to each rank, and to receive from each: the one wait for the device."""
        counted.wait()
        sent_n = torch.stack([part.sum() for part in rows_E.split(self._counts)])
        sent, received = torch.stack([sent_n, rows_nF.sum(dim=1)]).tolist()
        return sent, received


def _transpose_blocks(rows_nF: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Where each row comes from when blocks in the order (rank, expert) become (expert, rank), and the way back."""
    n, F = rows_nF.shape
    order = torch.arange(n * F, device=rows_nF.device).view(n, F).t().flatten()
    there = _blocks(rows_nF.flatten(), order, num_rows)
    return there, _inverse(there)


def _blocks(rows: Tensor, order: Tensor, num_rows: int) -> Tensor:
    """The index that puts blocks of `rows[i]` rows each into `order`. `num_rows`, their sum, is known here: asking the
    device for it would wait for all that is under way there."""
    starts = rows.cumsum(0) - rows
    lengths = rows[order]
    ends = lengths.cumsum(0)
    shift = torch.repeat_interleave(starts[order] - (ends - lengths), lengths, output_size=num_rows)
    return torch.arange(num_rows, device=rows.device) + shift


def _inverse(order: Tensor) -> Tensor:
    found = torch.empty_like(order)
    found[order] = torch.arange(order.numel(), device=order.device)
    return found


class _AllToAll(torch.autograd.Function):
    """Rows to and from every rank of a group, in one or several tensors. The backward pass sends each gradient the way
    its row came."""

    @staticmethod
    def forward(
        ctx: Any, group: dist.ProcessGroup, sent: list[int], received: list[int], *rows: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.group, ctx.sent, ctx.received = group, sent, received
        return _all_to_all(rows, group, sent, received)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *_all_to_all(gradients, ctx.group, ctx.received, ctx.sent)


def _all_to_all(
    tensors: tuple[Tensor, ...], group: dist.ProcessGroup, sent: list[int], received: list[int]
) -> tuple[Tensor, ...]:
    """On their way together, so that a small one costs no wait of its own."""
    there = [x.new_empty(sum(received), *x.shape[1:]) for x in tensors]
    works = [
        dist.all_to_all_single(out, x.contiguous(), received, sent, group, async_op=True)
        for out, x in zip(there, tensors, strict=True)
    ]
    for work in works:
        work.wait()
    return tuple(there)


class _Permute(torch.autograd.Function):
    """Rows in another order. The backward pass gathers too, where autograd's would scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return dy.index_select(0, inverse), None, None
