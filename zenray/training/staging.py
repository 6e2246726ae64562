"""Checkpoints beside the training: a copy of the state is taken at once, and written by another thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from zenray.training.checkpointing import state_of, write_state
from zenray.training.disk import raise_if_full
from zenray.training.trainer import Trainer

Write = Callable[[Path], None]
"""Puts this worker's part of a checkpoint into a folder. Blocks; collective with the other workers' calls."""


_IF_FULL = (
    "Free some space, or keep fewer checkpoints waiting (checkpoints.most_waiting), and run the job again: it goes on "
    "from the checkpoint before."
)


class Stager:
    """One copy of a trainer's state in memory. Made by all workers at once: its writers have a group of their own, so
    that they never meet the training's messages."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._buffers: dict[str, Tensor] = {}
        self._is_free = threading.Event()
        self._is_free.set()

    def take(self, step: int) -> Write:
        """Copy the state after `step` steps; returns what writes the copy, once. Waits until the last one is written.

        The writer raises StorageUnavailable where the disk is full.
        """
        self._is_free.wait()
        copied = {name: self._copy(name, value) for name, value in state_of(self._trainer, step).items()}
        self._is_free.clear()

        def write(folder: Path) -> None:
            try:
                with torch.no_grad():
                    write_state(copied, folder, self._group)
            except (OSError, CheckpointException) as error:
                needed_mb = sum(tensor.nbytes for tensor in self._buffers.values()) / 1e6
                takes = f"the checkpoint of step {step} takes {needed_mb:,.0f} MB on each worker"
                raise_if_full(error, folder, takes, _IF_FULL)
                raise
            finally:
                self._is_free.set()

        return write

    def _copy(self, name: str, value: Any) -> Any:
        """In a buffer that is kept: new memory would cost more than the copying."""
        local = value.to_local() if isinstance(value, DTensor) else value
        buffer = self._buffers.get(name)
        if buffer is None:
            buffer = torch.empty(local.shape, dtype=local.dtype, device="cpu", pin_memory=local.is_cuda)
            self._buffers[name] = buffer
        buffer.copy_(local)
        if isinstance(value, DTensor):
            return DTensor.from_local(
                buffer, _on_cpu(value), value.placements, shape=value.shape, stride=value.stride(), run_check=False
            )
        return buffer


def _on_cpu(value: DTensor) -> Any:
    """The mesh of a part whose copy is in the CPU's memory; only ranks and places matter for writing."""
    mesh = value.device_mesh
    if mesh.device_type == "cpu":
        return mesh
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh("cpu", mesh.mesh, mesh_dim_names=mesh.mesh_dim_names, _init_backend=False)
