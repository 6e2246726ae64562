"""The parameters of a run: which learn, which are experts, and the float32 masters that the optimiser moves.

E experts of a bank, F experts of it on this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from zenray.model.network import MoDE
from zenray.model.router import Router
from zenray.spec.errors import InvalidValue, suggest
from zenray.training.expert_parallel import expert_banks
from zenray.training.mesh import Mesh

Kind = Literal["dense", "router", "expert"]


@dataclass(frozen=True)
class BankPlace:
    """Where a bank's parameters lie: its experts in the network's layer, this rank's among them, and who may learn."""

    layer: str  # the bank's name
    first: int  # in the layer, of the bank's first expert
    count: int  # experts of the whole bank
    mine: slice  # of them, those of this rank
    frozen: tuple[int, ...]  # local numbers of this rank's experts that keep their weights


@dataclass
class Trainable:
    """One parameter. `master` is what the optimiser moves: the parameter itself in float32, else a float32 copy."""

    name: str
    kind: Kind
    parameter: nn.Parameter
    master: Tensor
    bank: BankPlace | None = None

    @property
    def gradient(self) -> Tensor:
        assert self.master.grad is not None
        return self.master.grad


def select(model: MoDE, mesh: Mesh, parts: Sequence[str], sizes: dict[str, int]) -> list[Trainable]:
    """The parameters that learn, in the network's order; all others are frozen, in place.

    `parts`: "dense", "routers", "experts", "experts/GROUP". `sizes`: of every bank before it was cut. A bank of which
    only some experts learn has `BankPlace.frozen`. InvalidValue for an unknown group, or when nothing is left.
    """
    learning = _learning_experts(model, parts)
    places = _bank_places(model, mesh, learning, sizes)
    routers = {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, Router)}
    found = []
    for name, parameter in model.named_parameters():
        place = places.get(name.rpartition(".")[0])
        kind: Kind = "expert" if place else "router" if name in routers else "dense"
        if place:
            held = range(place.first, place.first + place.count)
            learns = any(expert in learning for expert in held)
        else:
            learns = ("routers" if kind == "router" else "dense") in parts
        parameter.requires_grad_(learns)
        if learns:
            found.append(Trainable(name, kind, parameter, _master(parameter), place))
    if not found:
        raise InvalidValue(f"Nothing of this network is in {', '.join(parts)}: nothing would learn.", param="train")
    return found


def bank_sizes(model: MoDE) -> dict[str, int]:
    """Experts of every bank, by its name. Take it before the banks are cut."""
    return {name: bank.num_experts for name, bank in expert_banks(model)}


def _learning_experts(model: MoDE, parts: Sequence[str]) -> set[int]:
    """Experts (numbers in their layer) that learn."""
    if "experts" in parts:
        return set(range(model.config.num_experts))
    names = [part.partition("/")[2] for part in parts if part.startswith("experts/")]
    known = [group.name for group in model.config.expert_groups]
    for name in names:
        if name not in known:
            raise InvalidValue(f"There is no expert group {name!r}.", hint=suggest(name, known), param="train")
    return {expert for name in names for expert in model.config.group_range(name)}


def _bank_places(model: MoDE, mesh: Mesh, learning: set[int], sizes: dict[str, int]) -> dict[str, BankPlace]:
    places: dict[str, BankPlace] = {}
    before: dict[str, int] = {}  # experts of the layer's earlier banks
    for name, _ in expert_banks(model):
        layer = name.partition(".experts")[0]
        first, count = before.get(layer, 0), sizes[name]
        before[layer] = first + count
        mine = mesh.chunk(count)
        frozen = [local for local in range(mine.stop - mine.start) if first + mine.start + local not in learning]
        places[name] = BankPlace(name, first, count, mine, tuple(frozen))
    return places


def _master(parameter: nn.Parameter) -> Tensor:
    if parameter.dtype == torch.float32:
        return parameter
    return parameter.detach().float().requires_grad_()


def named_tensors(model: MoDE) -> dict[str, Tensor]:
    """Parameters and buffers by the names that checkpoints use; the head only where it is a weight of its own."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@torch.no_grad()
def collect_gradients(trainables: Sequence[Trainable]) -> None:
    """Move what the last backward pass left in half precision into the masters' float32 sums. Idempotent."""
    for one in trainables:
        if one.master is one.parameter:
            continue
        if one.parameter.grad is not None:
            gradient = one.parameter.grad.float()
            one.master.grad = gradient if one.master.grad is None else one.master.grad.add_(gradient)
            one.parameter.grad = None


@torch.no_grad()
def publish_masters(trainables: Sequence[Trainable]) -> None:
    """Round the masters into the network, after the optimiser moved them or a checkpoint was read."""
    for one in trainables:
        if one.master is not one.parameter:
            one.parameter.copy_(one.master)
