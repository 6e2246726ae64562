"""The state of a run on disk, as a torch distributed checkpoint: written at one layout of workers, read at any other.

Experts are written as shards of one whole tensor, so a checkpoint does not know how many workers made it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from zenray.spec.errors import CorruptData
from zenray.training.layout import layouts_of, local_part
from zenray.training.optimizer import RULES, Rule
from zenray.training.reading import StoredCheckpoint
from zenray.training.trainable import named_tensors, publish_masters
from zenray.training.trainer import Trainer

_WEIGHT, _MOMENT = "weights.", "moments."


def save(trainer: Trainer, step: int, folder: Path) -> None:
    """Write weights (float32 where they learn), moments and the number of steps done. Collective; blocks.

    Each worker writes its own files, the first also `.metadata`: folders of several workers are merged by copying.
    """
    write_state(state_of(trainer, step), folder)


def state_of(trainer: Trainer, step: int) -> dict[str, Any]:
    """All that a checkpoint keeps after `step` steps, by name; tensors share memory with the trainer."""
    state: dict[str, Any] = _tensors(trainer)
    state["step"] = torch.tensor(step)
    state["updates"] = torch.tensor(_updates(trainer))
    return state


def write_state(state: dict[str, Any], folder: Path, group: dist.ProcessGroup | None = None) -> None:
    """Write what `state_of` gave, or a copy of it. Collective over `group`: all workers; blocks. OSError, and
    CheckpointException when another worker had one."""
    with _quiet():
        dcp.save(state, checkpoint_id=folder, process_group=group, no_dist=not dist.is_initialized())


def load(trainer: Trainer, place: StoredCheckpoint | Path) -> int:
    """Read what `save` wrote, at whatever layout, into the trainer; returns the steps done. Collective.

    Each worker reads what it will hold, and no more.
    """
    state: dict[str, Any] = _tensors(trainer)
    state["step"], state["updates"] = torch.tensor(0), torch.tensor(0)
    with _quiet():
        dcp.load(state, storage_reader=StoredCheckpoint.at(place).reader(), no_dist=not dist.is_initialized())
    for one in trainer.trainables:
        _rule(trainer).set_updates(trainer.optimizer, one.master, int(state["updates"]))
    publish_masters(trainer.trainables)
    return int(state["step"])


def weight_shapes(place: StoredCheckpoint | Path) -> dict[str, tuple[int, ...]]:
    """Of the network's weights that a checkpoint has."""
    found = StoredCheckpoint.at(place).metadata.state_dict_metadata
    return {
        name.removeprefix(_WEIGHT): tuple(about.size)
        for name, about in found.items()
        if name.startswith(_WEIGHT) and isinstance(about, TensorStorageMetadata)
    }


def read_weight(place: StoredCheckpoint | Path, name: str) -> Tensor:
    """One whole tensor of a checkpoint, by the network's name for it. CorruptData when it is not there."""
    checkpoint = StoredCheckpoint.at(place)
    found = checkpoint.metadata.state_dict_metadata.get(_WEIGHT + name)
    if not isinstance(found, TensorStorageMetadata):
        raise CorruptData(f"The checkpoint in {checkpoint} has no weights {name!r}.")
    whole = torch.empty(found.size, dtype=found.properties.dtype)
    with _quiet():
        dcp.load({_WEIGHT + name: whole}, storage_reader=checkpoint.reader(), no_dist=True)
    return whole


def difference(one: Path, other: Path) -> list[str]:
    """Names of tensors that two checkpoints do not share bit for bit; [] when they are the same state."""
    contents = [FileSystemReader(folder).read_metadata().state_dict_metadata for folder in (one, other)]
    found = contents[0].keys() ^ contents[1].keys()
    for names in _batches(contents[0], sorted(contents[0].keys() & contents[1].keys())):
        pair = [_read_tensors(folder, metadata, names) for folder, metadata in zip((one, other), contents, strict=True)]
        for name in names:
            ours, theirs = (tensors[name] for tensors in pair)
            if ours.dtype != theirs.dtype or not torch.equal(ours, theirs):
                found.add(name)
    return sorted(found)


def _batches(metadata: dict[str, Any], names: list[str]) -> Iterator[list[str]]:
    """Names of tensors that are not too much at once."""
    batch: list[str] = []
    held_bytes = 0
    for name in names:
        batch.append(name)
        held_bytes += metadata[name].size.numel() * metadata[name].properties.dtype.itemsize
        if held_bytes > 256 << 20:
            yield batch
            batch, held_bytes = [], 0
    if batch:
        yield batch


def _read_tensors(folder: Path, metadata: dict[str, Any], names: list[str]) -> dict[str, Tensor]:
    tensors = {name: torch.empty(metadata[name].size, dtype=metadata[name].properties.dtype) for name in names}
    with _quiet():
        dcp.load(tensors, checkpoint_id=folder, no_dist=True)
    return tensors


@contextmanager
def _quiet() -> Iterator[None]:
    """Without DCP's warning that one process is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def _tensors(trainer: Trainer) -> dict[str, Any]:
    """Everything that changes, under one flat name each, sharing memory with the trainer."""
    layouts = layouts_of(trainer.model, trainer.mesh)
    held = {name: local_part(tensor) for name, tensor in named_tensors(trainer.model).items()}
    held |= {one.name: one.master.detach() for one in trainer.trainables}
    state = {_WEIGHT + name: layouts[name].as_part(tensor) for name, tensor in held.items()}
    for one in trainer.trainables:
        layout = layouts[one.name]
        for moment, local in _rule(trainer).moments(trainer.optimizer, one.master).items():
            state[f"{_MOMENT}{moment}.{one.name}"] = layout.with_last_axis(local).as_part(local)
    return state


def _rule(trainer: Trainer) -> Rule:
    return RULES[trainer.job.optimisation.optimizer]


def _updates(trainer: Trainer) -> int:
    """Steps that the optimiser took: fewer than the run's where some were skipped."""
    return _rule(trainer).updates(trainer.optimizer, trainer.trainables[0].master)
