"""Who computes what: workers as a grid of replicas by expert-parallel ranks.

All workers are data-parallel to one another. Neighbouring ranks form an expert group, which shares one set of experts;
ranks of the same place in their groups hold the same experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from zenray.spec.errors import InvalidValue


@dataclass(frozen=True)
class Mesh:
    """This worker's place. `device_mesh` has the axes (replica, expert); None: one process, no process group."""

    device_mesh: DeviceMesh | None = None
    expert_size: int = 1

    @classmethod
    def create(cls, expert_size: int, device: str = "cpu") -> Mesh:
        """The grid over the current process group; one worker where there is none. Collective. InvalidValue."""
        world = dist.get_world_size() if dist.is_initialized() else 1
        if world % expert_size:
            legal = ", ".join(str(size) for size in range(1, world + 1) if world % size == 0)
            raise InvalidValue(
                f"{world} workers cannot form expert groups of {expert_size}.",
                hint=f"With {world} workers expert_parallel can be {legal}.",
                param="expert_parallel",
            )
        if not dist.is_initialized():
            return cls()
        grid = init_device_mesh(device, (world // expert_size, expert_size), mesh_dim_names=("replica", "expert"))
        return cls(grid, expert_size)

    @property
    def world(self) -> int:
        return 1 if self.device_mesh is None else self.device_mesh.size()

    @property
    def rank(self) -> int:
        return 0 if self.device_mesh is None else dist.get_rank()

    @property
    def expert_rank(self) -> int:
        """This worker's place in its expert group."""
        return self.rank % self.expert_size

    @property
    def expert_group(self) -> dist.ProcessGroup | None:
        return None if self.device_mesh is None else self.device_mesh.get_group("expert")

    @property
    def replica_group(self) -> dist.ProcessGroup | None:
        """The workers that hold the same experts."""
        return None if self.device_mesh is None else self.device_mesh.get_group("replica")

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum over all workers, in place and the same on each."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def add_up_experts(self, tensor: Tensor) -> Tensor:
        """The sum over this worker's expert group, in place."""
        if self.expert_size > 1:
            dist.all_reduce(tensor, group=self.expert_group)
        return tensor

    def chunk(self, count: int, rank: int | None = None) -> slice:
        """Which of `count` experts a rank of the group holds (this one: None): as torch.chunk and DTensor cut."""
        rank = self.expert_rank if rank is None else rank
        size = -(-count // self.expert_size)
        return slice(min(rank * size, count), min((rank + 1) * size, count))


def sum_of(tensors: list[Tensor]) -> Tensor:
    """The sum of scalars, in double precision."""
    if not tensors:
        return torch.zeros((), dtype=torch.double)
    return torch.stack([tensor.double() for tensor in tensors]).sum()
