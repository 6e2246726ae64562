"""Who computes what: workers as a grid of pipeline stages by replicas by expert-parallel ranks.

A stage has equally many neighbouring ranks, which hold the same layers; what a worker computes goes on to the worker of
the same place in the next stage. Workers of a stage are data-parallel to one another: each computes its part of the
batch. Neighbouring ranks form a context group, which reads the same sequences, each rank its part of them; and an
expert group, which shares one set of experts; ranks of the same place in their expert groups hold the same experts.
Fully sharded (ZeRO-3, arXiv 1910.02054), workers that would hold the same weights hold parts of them: of dense ones all
workers of the stage, of an expert's its replicas.
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
    """This worker's place. `device_mesh`, of its stage, has the axes (expert, replica): experts are cut by the first
    axis first.

    None: one process, no process group. `everyone` is the stage's workers in a line, where weights are fully sharded;
    `sequences` has the axes (reader, context), where workers share sequences.
    """

    device_mesh: DeviceMesh | None = None
    expert_size: int = 1
    everyone: DeviceMesh | None = None
    sequences: DeviceMesh | None = None
    stages: int = 1
    stage_group: dist.ProcessGroup | None = None  # the workers of this stage; None: all there are
    pipeline_group: dist.ProcessGroup | None = None  # the workers of this place, stage by stage
    ends_group: dist.ProcessGroup | None = None  # of these the first and the last

    @classmethod
    def create(
        cls,
        expert_size: int = 1,
        device: str = "cpu",
        *,
        fully_sharded: bool = False,
        context_size: int = 1,
        stages: int = 1,
    ) -> Mesh:
        """The grid over the current process group; one worker where there is none. Collective. InvalidValue."""
        world = dist.get_world_size() if dist.is_initialized() else 1
        check_axes(world, Axes(stages, context_size, expert_size))
        if not dist.is_initialized():
            return cls()
        ranks = torch.arange(world).view(stages, -1, expert_size).transpose(1, 2)
        grid = DeviceMesh(device, ranks, mesh_dim_names=("pipeline", "expert", "replica"))["expert", "replica"]
        line = everyone = sequences = None
        if fully_sharded or stages > 1:
            line = init_device_mesh(device, (stages, world // stages), mesh_dim_names=("pipeline", "everyone"))
            everyone = line["everyone"] if fully_sharded else None
        if context_size > 1:
            readers = (world // context_size, context_size)
            sequences = init_device_mesh(device, readers, mesh_dim_names=("reader", "context"))
        if stages == 1 or line is None:
            return cls(grid, expert_size, everyone, sequences)
        pipeline = line.get_group("pipeline")
        ends = pipeline if stages == 2 else _ends(stages, world // stages)
        return cls(grid, expert_size, everyone, sequences, stages, line.get_group("everyone"), pipeline, ends)

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
    def of_stage(self) -> int:
        """Workers of each stage."""
        return 1 if self.device_mesh is None else self.device_mesh.size()

    @property
    def world(self) -> int:
        return self.of_stage * self.stages

    @property
    def rank(self) -> int:
        return 0 if self.device_mesh is None else dist.get_rank()

    @property
    def stage(self) -> int:
        return self.rank // self.of_stage

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.stages - 1

    @property
    def place(self) -> int:
        """This worker's number in its stage."""
        return self.rank % self.of_stage

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

    @property
    def context_size(self) -> int:
        """Workers that share each sequence."""
        return 1 if self.sequences is None else self.sequences.size(1)

    @property
    def context_rank(self) -> int:
        """This worker's place among those that share its sequences."""
        return self.rank % self.context_size

    @property
    def context_group(self) -> dist.ProcessGroup | None:
        return None if self.sequences is None else self.sequences.get_group("context")

    @property
    def readers(self) -> int:
        """Groups of a stage's workers that read different sequences."""
        return self.of_stage // self.context_size

    @property
    def reader(self) -> int:
        """Which of them this worker belongs to; those of one place in all stages read the same."""
        return self.place // self.context_size

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum over all workers of all stages, in place and the same on each."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def add_up_stage(self, tensor: Tensor) -> Tensor:
        """The sum over the workers of this worker's stage, in place."""
        if self.of_stage > 1:
            dist.all_reduce(tensor, group=self.stage_group)
        return tensor

    def add_up_stages(self, tensor: Tensor) -> Tensor:
        """The sum over the stages, in place, of what is the same on all workers of each."""
        if self.stages > 1:
            dist.all_reduce(tensor, group=self.pipeline_group)
        return tensor

    def add_up_experts(self, tensor: Tensor) -> Tensor:
        """The sum over this worker's expert group, in place."""
        if self.expert_size > 1:
            dist.all_reduce(tensor, group=self.expert_group)
        return tensor

    def add_up_parts(self, tensor: Tensor) -> Tensor:
        """The sum, in place, of what a stage's workers found about their parts of its weights, each counted once.

        What is said here of a weight that several workers hold alike must be said by one of them only.
        """
        return self.add_up_stage(tensor) if self.fully_sharded else self.add_up_experts(tensor)

    def chunk(self, count: int, rank: int | None = None) -> slice:
        """Which of `count` experts a rank of the group holds (this one: None): as torch.chunk and DTensor cut."""
        return chunk(count, self.expert_size, self.expert_rank if rank is None else rank)


def _ends(stages: int, of_stage: int) -> dist.ProcessGroup | None:
    """The group of the first and the last worker of this worker's place. Collective over all workers."""
    found = None
    for place in range(of_stage):
        ranks = [place, (stages - 1) * of_stage + place]
        group = dist.new_group(ranks)
        found = group if dist.get_rank() in ranks else found
    return found


def chunk(count: int, ranks: int, rank: int) -> slice:
    """Which of `count` things a rank holds, as torch.chunk and DTensor cut: the last ranks may have fewer, or none."""
    size = -(-count // ranks)
    return slice(min(rank * size, count), min((rank + 1) * size, count))


def sum_of(tensors: list[Tensor]) -> Tensor:
    """The sum of scalars, in double precision."""
    if not tensors:
        return torch.zeros((), dtype=torch.double)
    return torch.stack([tensor.double() for tensor in tensors]).sum()
