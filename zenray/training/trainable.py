"""The parameters of a run: which learn, which are experts, and the float32 masters that the optimiser moves.

E experts of a bank, F experts of it on this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from zenray.model.feed_forward import ExpertModule, expert_modules
from zenray.model.network import MoDE
from zenray.model.router import Router
from zenray.spec.errors import InvalidValue, suggest
from zenray.training.expert_parallel import expert_banks
from zenray.training.mesh import Mesh, chunk
from zenray.training.stages import is_on_both_ends

Kind = Literal["dense", "router", "expert"]


@dataclass(frozen=True)
class BankPlace:
    """Where a bank's parameters lie: this rank's experts among the whole bank's, and who may learn."""

    name: str
    count: int  # experts of the whole bank
    mine: slice  # of them, those of this rank
    frozen: tuple[int, ...]  # local numbers of this rank's experts that keep their weights


@dataclass
class Trainable:
    """One parameter. `master` is what the optimiser moves, in float32: the parameter itself, this worker's part of it
    where it is sharded (in the same memory), or a copy of one in half precision."""

    name: str
    kind: Kind
    parameter: nn.Parameter
    master: Tensor
    bank: BankPlace | None = None
    block: str | None = None  # the domain block, an expert by itself, whose parameter it is; not shared out like a bank
    is_on_both_ends: bool = False  # of a pipeline, whose first and last stage use one weight

    @property
    def is_sharded(self) -> bool:
        return isinstance(self.parameter, DTensor)

    @property
    def gradient(self) -> Tensor:
        assert self.master.grad is not None
        return self.master.grad


def choose(model: MoDE, parts: Sequence[str], dtype: torch.dtype = torch.float32) -> None:
    """Freeze, in place, all parameters that do not learn, and round them to the arithmetic's `dtype`.

    `parts`: "dense", "routers", "experts", "experts/GROUP". A domain block is an expert. InvalidValue for an unknown
    group, or when nothing is left.
    """
    learning = _learning_experts(model, parts)
    owners = _owners(model)
    routers = _router_names(model)
    found = False
    for name, parameter in model.named_parameters():
        if name in owners:
            learns = any(expert in learning for expert in owners[name][1].numbers)
        else:
            learns = ("routers" if name in routers else "dense") in parts
        parameter.requires_grad_(learns)
        if not learns:
            parameter.data = parameter.data.to(dtype)
        found = found or learns
    if not found:
        raise InvalidValue(f"Nothing of this network is in {', '.join(parts)}: nothing would learn.", param="train")


def trainables(model: MoDE, mesh: Mesh, parts: Sequence[str], dtype: torch.dtype = torch.float32) -> list[Trainable]:
    """The parameters that learn, in the network's order, once they lie as they will. In place, what is not sharded is
    rounded to the arithmetic's `dtype`; where FSDP gathers weights, it rounds them.

    A bank of which only some experts learn has `BankPlace.frozen`.
    """
    learning = _learning_experts(model, parts)
    owners = _owners(model)
    routers = _router_names(model)
    found = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind: Kind = "expert" if name in owners else "router" if name in routers else "dense"
        one = Trainable(name, kind, parameter, _master(parameter, dtype))
        one.is_on_both_ends = is_on_both_ends(name, model, mesh)
        if name in owners:
            owner, experts = owners[name]
            if experts.is_block:
                one.block = owner
            else:
                one.bank = _place(owner, experts.numbers, parameter, mesh, learning)
        found.append(one)
    return found


def bank_sizes(model: MoDE) -> dict[str, int]:
    """Experts of every whole bank, by its name."""
    return {name: bank.whole_experts for name, bank in expert_banks(model)}


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


def _router_names(model: MoDE) -> set[str]:
    return {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, Router)}


def _owners(model: MoDE) -> dict[str, tuple[str, ExpertModule]]:
    """The bank or block of every expert's parameter, by the parameter's name."""
    return {
        f"{owner}.{name}": (owner, experts)
        for owner, experts in expert_modules(model).items()
        for name, _ in experts.module.named_parameters()
    }


def _place(bank: str, held: range, parameter: nn.Parameter, mesh: Mesh, learning: set[int]) -> BankPlace:
    mine = mesh.chunk(len(held))
    if isinstance(parameter, DTensor) and parameter.placements == (Shard(0),):
        part = chunk(mine.stop - mine.start, parameter.device_mesh.size(), parameter.device_mesh.get_local_rank())
        mine = slice(mine.start + part.start, mine.start + part.stop)
    frozen = [local for local, expert in enumerate(held[mine]) if expert not in learning]
    return BankPlace(bank, len(held), mine, tuple(frozen))


def _master(parameter: nn.Parameter, dtype: torch.dtype) -> Tensor:
    if isinstance(parameter, DTensor):
        return parameter.to_local().detach().requires_grad_()
    if dtype == torch.float32:
        return parameter
    master = parameter.detach().clone().requires_grad_()
    parameter.data = parameter.data.to(dtype)
    return master


def named_tensors(model: MoDE) -> dict[str, Tensor]:
    """Parameters and buffers by the names that checkpoints use; the head only where it is a weight of its own."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@torch.no_grad()
def collect_gradients(trainables: Sequence[Trainable]) -> None:
    """Move what the last backward pass left into the masters: sums in float32 where it was half precision, this
    worker's part where it is sharded. Idempotent."""
    for one in trainables:
        gradient = one.parameter.grad
        if one.master is one.parameter or gradient is None:
            continue
        if isinstance(gradient, DTensor):  # whole, after the last pass: FSDP adds up those before
            one.master.grad = gradient.to_local()
        else:
            one.master.grad = gradient.float() if one.master.grad is None else one.master.grad.add_(gradient)
        one.parameter.grad = None


@torch.no_grad()
def publish_masters(trainables: Sequence[Trainable]) -> None:
    """Round the masters into the network, after the optimiser moved them or a checkpoint was read."""
    for one in trainables:
        if one.master is not one.parameter and not one.is_sharded:
            one.parameter.copy_(one.master)
