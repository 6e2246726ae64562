"""What is known of the machines on which replicas will run, before anything is asked of Ray."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from zenray.catalog.gpus import find_gpu
from zenray.spec.platform import Nodes

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Machines:
    """`nodes`: as the platform file says; None: it does not say. `memory_bytes`: of one machine; None: not known."""

    nodes: Nodes | None = None
    memory_bytes: int | None = None

    @property
    def gpu_memory_bytes(self) -> int | None:
        """Of one GPU. InvalidValue for a GPU that the catalog does not have."""
        return None if self.nodes is None else find_gpu(self.nodes.gpu).memory_bytes


def memory_here_bytes(cgroup_limit: Path = _CGROUP_LIMIT) -> int:
    """This machine's memory, or what its container may have of it."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(memory_bytes, int(cgroup_limit.read_text(encoding="ascii")))
    except (OSError, ValueError):  # no container, or one without a limit, which says "max"
        return memory_bytes
