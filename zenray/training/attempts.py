"""Ray Train's part of a run: a group of workers, started again after failures, but not for what the job did wrong."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow.fs
import ray
from ray.train import CheckpointConfig, FailureConfig, Result, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME

from zenray.spec.errors import Conflict, InvalidDocument, InvalidRequest, NotFound, ZenrayError
from zenray.spec.platform import StorageSettings
from zenray.spec.training import TrainingJob
from zenray.training.events import EventPlace
from zenray.training.places import (
    NoRoomError,
    WaitsForRoom,
    can_grow,
    fewer_workers,
    free_on_machines,
    machines_of_cluster,
    needs_of,
    places,
    require_places,
)
from zenray.training.worker import train_worker

log = logging.getLogger(__name__)
_OWN = (InvalidRequest, InvalidDocument, NotFound, Conflict)


@dataclass(frozen=True)
class Attempt:
    """What Ray Train needs of a run. `about`: what `train_worker` gets; checkpoints go below `folder`, under `name`."""

    job: TrainingJob
    name: str
    about: dict[str, Any]
    storage: StorageSettings
    events: EventPlace
    filesystem: pyarrow.fs.FileSystem
    folder: str


def fit(attempt: Attempt) -> Result:
    """Run `train_worker` on the job's workers until they are done. Blocks; needs Ray.

    A worker's or a machine's failure starts all of them again from the newest checkpoint, `workers.max_failures`
    times; then ZenrayError. Where fewer have room for longer than `workers.replacement_patience_s`, so many go on as
    leave the steps what they are, or ZenrayError says which counts do. What a worker finds wrong with the job itself
    (InvalidValue, NotFound, Conflict) is raised at once.
    """
    job, count = attempt.job, attempt.job.workers.count
    needs = needs_of(job.workers)
    if not can_grow():
        require_places(machines_of_cluster(), count, needs)
    while True:
        try:
            return _with_workers(attempt, count)
        except NoRoomError:
            if not _has_checkpoint(attempt):
                continue  # nothing would be gained by being fewer: it waits for its turn
            count = _go_on_with(job, attempt.name, count, places(free_on_machines(), needs))
            log.warning("Run %s goes on with %d of %d workers.", attempt.name, count, job.workers.count)


def _with_workers(attempt: Attempt, count: int) -> Result:
    workers = attempt.job.workers
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=attempt.about,
        torch_config=TorchConfig(backend="nccl" if workers.gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=count, use_gpu=workers.gpu, resources_per_worker=needs_of(workers)),
        run_config=RunConfig(
            name=attempt.name,
            storage_path=attempt.folder,
            storage_filesystem=attempt.filesystem,
            failure_config=FailureConfig(max_failures=workers.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=attempt.job.checkpoints.keep),
            callbacks=[
                EndsForOwnErrors(),
                WaitsForRoom(attempt.storage, attempt.events, workers.replacement_patience_s),
            ],
        ),
    )
    try:
        return trainer.fit()
    except ray.train.TrainingFailedError as error:
        cause = getattr(error, "controller_failure", None)
        if isinstance(cause, (*_OWN, NoRoomError)):
            raise cause from None
        raise ZenrayError(
            f"Run {attempt.name} failed: {causes(error)}.", hint="Run it again: it goes on from its last checkpoint."
        ) from error


def _has_checkpoint(attempt: Attempt) -> bool:
    record = f"{attempt.folder}/{attempt.name}/{CHECKPOINT_MANAGER_SNAPSHOT_FILENAME}"
    return attempt.filesystem.get_file_info(record).type == pyarrow.fs.FileType.File


def _go_on_with(job: TrainingJob, name: str, before: int, left: int) -> int:
    """How many workers go on where `before` have found no room. ZenrayError with the legal counts where none can."""
    count = fewer_workers(job, min(left, before - 1))
    if count == 0:
        legal = [n for n in range(1, job.workers.count + 1) if fewer_workers(job, n) == n]
        raise ZenrayError(
            f"Run {name} waited for room for {before} workers in vain: there is room for {left}, and it can go on "
            f"with {' or '.join(map(str, legal))}.",
            hint="Run it again when machines are back: it goes on from its last checkpoint.",
        )
    return count


class EndsForOwnErrors(UserCallback):
    """Raises, in Ray Train's controller, an error that would come again. The controller's failure policy takes any
    error of a worker for a failure to be repeated; it does not repeat one that a callback raises."""

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, BaseException]) -> None:
        for _, failure in sorted(worker_exceptions.items()):
            error = getattr(failure, "_base_exc", failure)  # Ray wraps it together with its traceback
            if isinstance(error, _OWN):
                raise error


def causes(error: ray.train.TrainingFailedError) -> str:
    """What went wrong, each cause once, without the tracebacks, which stand in Ray's logs."""
    failures = getattr(error, "worker_failures", {})
    said: dict[str, list[int]] = {}
    for rank, failure in sorted(failures.items()):
        lines = str(failure).strip().splitlines()
        is_traceback = bool(lines) and lines[0].startswith("Traceback")
        found = lines[-1 if is_traceback else 0] if lines else type(failure).__name__
        said.setdefault(found.rstrip("."), []).append(rank)
    told = [f"worker {', '.join(map(str, ranks))}: {found}" for found, ranks in said.items()]
    return "; ".join(told) or str(error)
