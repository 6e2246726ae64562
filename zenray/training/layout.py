"""Which part of each whole tensor a worker holds, whatever cut it: the expert groups, FSDP, both or nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from zenray.model.network import MoDE
from zenray.training.mesh import Mesh, chunk
from zenray.training.trainable import bank_sizes, named_tensors


@dataclass(frozen=True)
class Layout:
    """Of one tensor. `shape` is the whole's; without a mesh every worker holds all of it."""

    shape: torch.Size
    mesh: DeviceMesh | None = None
    placements: tuple[Placement, ...] = ()

    def as_part(self, local: Tensor) -> Tensor:
        """`local`, in the same memory, as a part of the whole where it is one."""
        if self.mesh is None:
            return local
        stride = torch.empty(self.shape, device="meta").stride()
        if local.numel() == 0:  # whose other axes FSDP has not cut
            local = local.new_empty([part.stop - part.start for part in self.region()])
        return DTensor.from_local(local, self.mesh, self.placements, shape=self.shape, stride=stride)

    def with_last_axis(self, local: Tensor) -> Layout:
        """Of a tensor cut as this one whose last axis, which nothing cuts, may have another length."""
        return replace(self, shape=torch.Size((*self.shape[:-1], local.shape[-1]))) if len(self.shape) > 1 else self

    def region(self) -> tuple[slice, ...]:
        """Where this worker's part lies in the whole, on each axis. Axes of the mesh cut one after the other."""
        found = [slice(0, size) for size in self.shape]
        for axis, placement in enumerate(self.placements):
            if isinstance(placement, Shard):
                assert self.mesh is not None
                before = found[placement.dim]
                part = chunk(before.stop - before.start, self.mesh.size(axis), self.mesh.get_local_rank(axis))
                found[placement.dim] = slice(before.start + part.start, before.start + part.stop)
        return tuple(found)


def layouts_of(model: MoDE, mesh: Mesh) -> dict[str, Layout]:
    """Of every parameter and buffer."""
    sizes = bank_sizes(model)
    return {name: _layout(name, tensor, mesh, sizes) for name, tensor in named_tensors(model).items()}


def expert_placement(experts: int, rows: int, mesh: Mesh) -> Shard:
    """Where FSDP cuts a weight (experts, rows, columns) of a bank that expert groups have cut before.

    By experts where a worker has at least one for each replica, else through each expert's rows, where these divide
    (as in torchtitan). The same for all workers.
    """
    replicas = mesh.of_stage // mesh.expert_size
    of_worker = -(-experts // mesh.expert_size)
    return Shard(1) if of_worker < replicas and rows % replicas == 0 else Shard(0)


def local_part(tensor: Tensor) -> Tensor:
    """What of a parameter or buffer is in this worker's memory, without its gradient."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _layout(name: str, tensor: Tensor, mesh: Mesh, sizes: dict[str, int]) -> Layout:
    """A bank's experts are cut over their group first, then over its replicas."""
    experts = sizes.get(name.rpartition(".")[0])
    if experts is not None and mesh.device_mesh is not None and mesh.of_stage > 1:
        over_replicas = expert_placement(experts, tensor.shape[1], mesh) if mesh.fully_sharded else Replicate()
        return Layout(torch.Size((experts, *tensor.shape[1:])), mesh.device_mesh, (Shard(0), over_replicas))
    if isinstance(tensor, DTensor):
        return Layout(tensor.shape, tensor.device_mesh, tuple(tensor.placements))
    return Layout(tensor.shape)
