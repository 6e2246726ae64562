"""An evaluation as a task of Ray, on a GPU that Ray finds for it."""

from __future__ import annotations

from pathlib import Path

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from zenray.spec.errors import InvalidValue, ZenrayError
from zenray.spec.evaluation import EvaluateJob, EvaluationResult
from zenray.spec.job_events import Placed
from zenray.spec.platform import StorageSettings
from zenray.storage.opening import open_store
from zenray.training.evaluate import Questions, evaluate, questions_of
from zenray.training.events import EventPlace, EventStream
from zenray.training.places import can_grow, machines_of_cluster, missing, places
from zenray.training.runner import connect


def evaluate_in_task(
    job: EvaluateJob, storage: StorageSettings, work_dir: Path, tell: EventStream, *, gpus: int
) -> EvaluationResult:
    """`evaluate` in another process, which has so many GPUs (0 or 1). Blocks, also until one is free; `tell` has what
    it waits for.

    Starts Ray on this machine unless it is connected already. Raises what `evaluate` raises; InvalidValue on a single
    machine without a GPU; ZenrayError where the process dies.
    """
    questions = questions_of(job)  # here, where the files are
    connect()
    if gpus and not can_grow() and not places(machines_of_cluster(), {"GPU": gpus}):
        raise InvalidValue(
            f"{job.name} is to run on a GPU, and this machine has none.",
            hint="Take `gpu` out of the job: on the CPU it measures the same.",
        )
    lacking = missing(ray.available_resources(), 1, {"CPU": 1.0, **({"GPU": 1.0} if gpus else {})})
    if lacking is not None:
        tell(Placed(count=1, missing=lacking))
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(_evaluate)
    about = (job, storage, work_dir.absolute(), tell.place, questions)
    try:
        result: EvaluationResult = ray.get(task.remote(*about, gpus=gpus, has_waited=lacking is not None))
    except RayTaskError as error:
        raise error.cause from None
    except RayError as error:
        raise ZenrayError(f"{job.name} died: {error}", hint="Run it again.") from error
    return result


def _evaluate(
    job: EvaluateJob,
    storage: StorageSettings,
    work_dir: Path,
    place: EventPlace,
    questions: Questions,
    *,
    gpus: int,
    has_waited: bool,
) -> EvaluationResult:
    store = open_store(storage)
    with EventStream(store, place) as tell:
        if has_waited:
            tell(Placed(count=1))
        return evaluate(job, store, work_dir, tell, questions, device=torch.device("cuda" if gpus else "cpu"))
