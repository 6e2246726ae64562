"""The passes of a step: what a worker computes for each of its batches, forward and back, and what it adds up.

B sequences of a pass, S tokens of each, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zenray.model.balance import RouterStats
from zenray.model.distillation import HeadLoss
from zenray.training.data.stream import Batch
from zenray.training.loss import Objective
from zenray.training.mesh import Mesh
from zenray.training.routing import StepRouting
from zenray.training.sharding import add_up_gradients
from zenray.training.trainable import Trainable, collect_gradients

Compute = Callable[[Batch, Tensor | None], tuple[HeadLoss | Tensor, list[RouterStats]]]
"""(loss, or hidden states for the next pipeline stage; router sums) of a batch and what the stage before made of it."""


class ForwardPasses(Protocol):
    """What a worker does for each batch, whoever decides when."""

    batches: Sequence[Batch]

    def forward(self, number: int, x_BSD: Tensor | None = None) -> Tensor:
        """Of a pass: its loss, or hidden states for the next pipeline stage. `x_BSD`: what the stage before made.

        Passes go forward in order, and back in the same order.
        """
        ...


class Passes(ForwardPasses, Protocol):
    """Forward and back: as `accumulate` orders it, or a pipeline's schedule."""

    def before_backward(self, is_last: bool) -> None:
        """`is_last`: of the step."""
        ...

    def after_backward(self) -> None: ...


def accumulate(passes: Passes) -> None:
    """All passes, each forward and back before the next."""
    for number in range(len(passes.batches)):
        loss = passes.forward(number)
        passes.before_backward(is_last=number + 1 == len(passes.batches))
        loss.backward()
        passes.after_backward()


class StepPasses:
    """Of a training step. Collective over the workers of a stage: all have equally many batches."""

    def __init__(
        self,
        batches: Sequence[Batch],
        compute: Compute,
        objective: Objective,
        trainables: Sequence[Trainable],
        mesh: Mesh,
    ) -> None:
        self.batches, self.routing = batches, StepRouting(objective.model, mesh)
        self._compute, self._objective, self._trainables, self._mesh = compute, objective, trainables, mesh
        counts = torch.tensor([[batch.ids_BS.numel(), batch.num_targets] for batch in batches], dtype=torch.int64)
        self.tokens, self.targets = map(int, mesh.add_up_stage(counts.sum(dim=0).to(mesh.device)))
        self._lm, self._kl, self._balance = torch.zeros(3, dtype=torch.double, device=mesh.device).unbind()

    def forward(self, number: int, x_BSD: Tensor | None = None) -> Tensor:
        found, stats = self._compute(self.batches[number].to(self._mesh.device), x_BSD)
        of_routers = self.routing.loss(stats, self.tokens)
        self._balance = self._balance + of_routers.detach().double()
        if isinstance(found, Tensor):
            return _with_loss(found, of_routers)
        self._lm, self._kl = self._lm + found.lm.double(), self._kl + found.kl.double()
        return found.total / max(self.targets, 1) + of_routers

    def before_backward(self, is_last: bool) -> None:
        add_up_gradients(self._objective, is_last)

    def after_backward(self) -> None:
        collect_gradients(self._trainables)

    def losses(self) -> tuple[Tensor, Tensor, Tensor]:
        """(lm, kl, balance) of the whole step; the first two as means over targets. Collective over all workers."""
        lm, kl = self._mesh.add_up(torch.stack([self._lm, self._kl])) / max(self.targets, 1)
        return lm, kl, self._mesh.add_up_stages(self._balance)


class EvaluationPasses:
    """Of held-out text: forward only."""

    def __init__(self, batches: Sequence[Batch], objective: Objective, mesh: Mesh) -> None:
        self.batches = batches
        self._objective, self._mesh = objective, mesh
        self._total = torch.zeros(2, dtype=torch.double, device=mesh.device)

    def forward(self, number: int, x_BSD: Tensor | None = None) -> Tensor:
        batch = self.batches[number]
        found, _ = self._objective(batch.to(self._mesh.device), x_BSD=x_BSD)
        if isinstance(found, Tensor):
            return found
        self._total[0] += found.lm.double()
        self._total[1] += batch.num_targets
        return found.lm

    def loss(self) -> float:
        """The mean over all workers' targets. Collective over all workers."""
        total = self._mesh.add_up(self._total)
        return float(total[0] / total[1].clamp(min=1))


def _with_loss(h_BSD: Tensor, loss: Tensor) -> Tensor:
    """`h_BSD`, in whose backward pass that of `loss` takes part (as Megatron-Core adds balance losses)."""
    found: Tensor = _WithLoss.apply(h_BSD, loss)
    return found


class _WithLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_BSD: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(torch.ones_like(loss))
        return h_BSD.view_as(h_BSD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh_BSD: Tensor) -> tuple[Tensor, Tensor]:
        (one,) = ctx.saved_tensors
        return dh_BSD, one
