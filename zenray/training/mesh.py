"""Who computes what: workers as a grid of replicas by expert-parallel ranks.

All workers are data-parallel to one another. Neighbouring ranks form an expert group, which shares one set of experts;
ranks of the same place in their groups hold the same experts. Fully sharded (ZeRO-3, arXiv 1910.02054), workers that
would hold the same weights hold parts of them: of dense ones all workers, of an expert's its replicas.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from zenray.spec.parallelism import Axes, check_axes


@dataclass(frozen=True)
class Mesh:
    """This worker's place. `device_mesh` has the axes (expert, replica): experts are cut by the first axis first.

    None: one process, no process group. `everyone` is all workers in a line, where weights are fully sharded.
    """

    device_mesh: DeviceMesh | None = None
    expert_size: int = 1
    everyone: DeviceMesh | None = None

    @classmethod
    def create(cls, expert_size: int, device: str = "cpu", *, fully_sharded: bool = False) -> Mesh:
        """The grid over the current process group; one worker where there is none. Collective. InvalidValue."""
        world = dist.get_world_size() if dist.is_initialized() else 1
        check_axes(world, Axes(expert=expert_size))
        if not dist.is_initialized():
            return cls()
        ranks = torch.arange(world).view(-1, expert_size).t()
        grid = DeviceMesh(device, ranks, mesh_dim_names=("expert", "replica"))
        everyone = init_device_mesh(device, (world,), mesh_dim_names=("everyone",)) if fully_sharded else None
        return cls(grid, expert_size, everyone)

    @property
    def fully_sharded(self) -> bool:
        return self.everyone is not None

    @property
    def device(self) -> torch.device:
        """Where this worker computes."""
        if self.device_mesh is None or self.device_mesh.device_type == "cpu":
            return torch.device("cpu")
        return torch.device(self.device_mesh.device_type, torch.accelerator.current_device_index())

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

    def add_up_parts(self, tensor: Tensor) -> Tensor:
        """The sum, in place, of what the workers found about their parts of the weights, each part counted once.

        What is said here of a weight that several workers hold alike must be said by one of them only.
        """
        return self.add_up(tensor) if self.fully_sharded else self.add_up_experts(tensor)

    def chunk(self, count: int, rank: int | None = None) -> slice:
        """Which of `count` experts a rank of the group holds (this one: None): as torch.chunk and DTensor cut."""
        return chunk(count, self.expert_size, self.expert_rank if rank is None else rank)


def chunk(count: int, ranks: int, rank: int) -> slice:
    """Which of `count` things a rank holds, as torch.chunk and DTensor cut: the last ranks may have fewer, or none."""
    size = -(-count // ranks)
    return slice(min(rank * size, count), min((rank + 1) * size, count))


def sum_of(tensors: list[Tensor]) -> Tensor:
    """The sum of scalars, in double precision."""
    if not tensors:
        return torch.zeros((), dtype=torch.double)
    return torch.stack([tensor.double() for tensor in tensors]).sum()
