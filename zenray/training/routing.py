"""Routing over the whole batch: what each layer's routers did on all workers, and the losses computed from it.

Capacity and expert choice look at one worker's pass alone (zenray.model.router), so with them, and only with them, a
result depends on how many workers there are.

E experts of a layer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zenray.model.balance import LoadReport, RouterStats, load_report
from zenray.model.network import MoDE
from zenray.training.mesh import Mesh

_MEANS = {"cutoff_E"}  # over workers and passes; everything else in RouterStats is a sum


class LayerReport(NamedTuple):
    """One sparse layer in one step. The counts are of capacity, which only training has."""

    load: LoadReport
    dropped_choices: int  # an expert had no room for the token that chose it
    fallback_tokens: int  # which lost at least one expert so: the shared expert stands in, where there is one


class StepRouting:
    """The routing of one optimiser step, pass by pass."""

    def __init__(self, model: MoDE, mesh: Mesh) -> None:
        """`model`: this worker's stage of it, where there are several."""
        self._model, self._mesh = model, mesh
        self._passes = 0
        self._totals: list[RouterStats] = []  # of each sparse layer, over the stage's workers and the passes so far

    def loss(self, stats: list[RouterStats], step_tokens: int) -> Tensor:
        """The balance losses of one pass, as its share of the step's `step_tokens`. Collective: one small sum.

        The value is that of the whole batch, the same on every worker; the gradient is this worker's part of it. Loads
        are those of all passes of the step so far (global-batch balancing with accumulation, arXiv 2501.11873).
        """
        if not stats:
            return torch.zeros((), device=self._mesh.device)
        whole = self._over_workers(stats)
        self._passes += 1
        new = [_each(layer, Tensor.detach) for layer in whole]
        self._totals = [_add(*pair) for pair in zip(self._totals, new, strict=True)] if self._totals else new
        loads = [layer.load_E for layer in self._totals]
        return self._model.router_loss(whole, loads) * (whole[0].num_tokens.detach() / step_tokens)

    def finish(self) -> None:
        """Let the routers learn what they learn without gradients. Once, after the optimiser's step."""
        if self._totals:
            parts = self._passes * self._mesh.of_stage
            means = [{name: getattr(layer, name) for name in _MEANS} for layer in self._totals]
            taken = [{name: value / parts for name, value in one.items() if value is not None} for one in means]
            totals = [layer._replace(**mean) for layer, mean in zip(self._totals, taken, strict=True)]
            self._model.model.after_step(totals)

    def report(self) -> list[LayerReport]:
        """What each sparse layer of all pipeline stages did in this step. Collective."""
        sparse = sorted(self._model.config.sparse_layers)
        named = self._model.model.layers.named_children()
        mine = [sparse.index(int(number)) for number, layer in named if layer.is_sparse]
        found = torch.zeros(len(sparse), self._model.config.num_experts + 2, device=self._mesh.device)
        for row, layer in zip(mine, self._totals, strict=True):
            found[row, :-2] = layer.load_E
            if layer.overflow_E is not None and layer.fallback_tokens is not None:
                found[row, -2:] = torch.stack([layer.overflow_E.sum(), layer.fallback_tokens])
        found = self._mesh.add_up_stages(found)
        lost = found[:, -2:].long().tolist()
        return [LayerReport(load_report(load_E), *counts) for load_E, counts in zip(found[:, :-2], lost, strict=True)]

    def _over_workers(self, stats: list[RouterStats]) -> list[RouterStats]:
        """Sums over all workers in value; gradients reach this worker's part only."""
        if self._mesh.of_stage == 1:
            return stats
        values = [value for layer in stats for value in layer if value is not None]
        summed = self._mesh.add_up_stage(torch.cat([value.detach().reshape(-1) for value in values]))
        parts = iter(summed.split([value.numel() for value in values]))
        # total + (mine − mine): exactly the total, with the gradient of mine.
        return [_each(layer, lambda mine: next(parts).view_as(mine) + (mine - mine.detach())) for layer in stats]


def _each(layer: RouterStats, change) -> RouterStats:  # type: ignore[no-untyped-def]
    return RouterStats(*(None if value is None else change(value) for value in layer))


def _add(one: RouterStats, other: RouterStats) -> RouterStats:
    return RouterStats(*(None if a is None or b is None else a + b for a, b in zip(one, other, strict=True)))
