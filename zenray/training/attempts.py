"""Ray Train's part of a run: a group of workers, started again after failures, but not for what the job did wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow.fs
import ray
from ray.train import CheckpointConfig, FailureConfig, Result, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from zenray.spec.errors import Conflict, InvalidDocument, InvalidRequest, NotFound, ZenrayError
from zenray.spec.training import TrainingJob
from zenray.training.worker import train_worker

_OWN = (InvalidRequest, InvalidDocument, NotFound, Conflict)


def fit(job: TrainingJob, name: str, about: dict[str, Any], filesystem: pyarrow.fs.FileSystem, folder: str) -> Result:
    """Run `train_worker` with `about` on the job's workers until they are done. Blocks; needs Ray.

    Checkpoints go into `folder` of the file system, under the run's name. A worker's or a machine's failure starts all
    of them again from the newest, `workers.max_failures` times; then ZenrayError. What a worker finds wrong with the
    job itself (InvalidValue, NotFound, Conflict) is raised at once.
    """
    workers = job.workers
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=about,
        torch_config=TorchConfig(backend="nccl" if workers.gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers.count,
            use_gpu=workers.gpu,
            resources_per_worker={"CPU": workers.cpus, **({"GPU": 1} if workers.gpu else {})},
        ),
        run_config=RunConfig(
            name=name,
            storage_path=folder,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=workers.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=job.checkpoints.keep),
            callbacks=[EndsForOwnErrors()],
        ),
    )
    try:
        return trainer.fit()
    except ray.train.TrainingFailedError as error:
        own = getattr(error, "controller_failure", None)
        if isinstance(own, _OWN):
            raise own from None
        raise ZenrayError(
            f"Run {name} failed: {causes(error)}.", hint="Run it again: it goes on from its last checkpoint."
        ) from error


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
