"""An evaluation as a task of Ray, on a GPU that Ray finds for it."""

from __future__ import annotations

from pathlib import Path

import ray
import torch
from ray.exceptions import RayTaskError

from zenray.spec.errors import InvalidValue
from zenray.spec.evaluation import EvaluateJob, EvaluationResult
from zenray.spec.platform import StorageSettings
from zenray.storage.opening import open_store
from zenray.training.evaluate import evaluate
from zenray.training.events import EventPlace, EventStream
from zenray.training.places import can_grow, machines_of_cluster, places
from zenray.training.runner import connect


def evaluate_in_task(
    job: EvaluateJob, storage: StorageSettings, work_dir: Path, place: EventPlace, *, gpus: int
) -> EvaluationResult:
    """`evaluate` in another process, which has so many GPUs (0 or 1). Blocks, also until one is free.

    Starts Ray on this machine unless it is connected already. Raises what `evaluate` raises; InvalidValue on a single
    machine without a GPU.
    """
    connect()
    if gpus and not can_grow() and not places(machines_of_cluster(), {"GPU": gpus}):
        raise InvalidValue(
            f"{job.name} is to run on a GPU, and this machine has none.",
            hint="Take `gpu` out of the job: on the CPU it measures the same.",
        )
    task = ray.remote(num_gpus=gpus)(_evaluate)
    try:
        result: EvaluationResult = ray.get(task.remote(job, storage, work_dir.absolute(), place, gpus))
    except RayTaskError as error:
        raise error.cause from None
    return result


def _evaluate(
    job: EvaluateJob, storage: StorageSettings, work_dir: Path, place: EventPlace, gpus: int
) -> EvaluationResult:
    store = open_store(storage)
    with EventStream(store, place) as tell:
        return evaluate(job, store, work_dir, tell, device=torch.device("cuda" if gpus else "cpu"))
