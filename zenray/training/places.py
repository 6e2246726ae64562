"""Room for a run's workers on the cluster: whether there can ever be enough, what is missing now, how few can go on.

Of one worker `needs`, such as {"CPU": 1, "GPU": 1}. Pure functions, but for the callback in Ray Train's controller.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.train.v2._internal.execution.callback import WorkerGroupCallback

from zenray.spec.errors import InvalidValue, StorageUnavailable
from zenray.spec.job_events import Placed
from zenray.spec.parallelism import most_workers
from zenray.spec.platform import StorageSettings
from zenray.spec.training import TrainingJob, Workers
from zenray.storage.job_record import job_journal
from zenray.storage.opening import open_store
from zenray.training.events import EventPlace

Resources = Mapping[str, float]
log = logging.getLogger(__name__)


def needs_of(workers: Workers) -> dict[str, float]:
    return {"CPU": workers.cpus, **({"GPU": 1.0} if workers.gpu else {})}


def places(machines: Iterable[Resources], needs: Resources) -> int:
    """How many workers the machines have room for."""
    return sum(min(math.floor(one.get(name, 0) / need + 1e-9) for name, need in needs.items()) for one in machines)


def require_places(machines: list[Resources], count: int, needs: Resources) -> None:
    """InvalidValue where no more machines can come, and these, with nothing else on them, have too little."""
    found = places(machines, needs)
    if found < count:
        total = {name: sum(one.get(name, 0) for one in machines) for name in needs}
        raise InvalidValue(
            f"{count} workers need {count} × {_said(needs)}, and this machine has {_said(total)}: room for {found}.",
            hint="Use fewer `workers.count`, or fewer `workers.cpus` for each (parts of one are possible).",
            param="workers",
        )


def missing(free: Resources, count: int, needs: Resources) -> str | None:
    """What `count` workers wait for, where less is free than they need."""
    if all(free.get(name, 0) >= count * need - 1e-9 for name, need in needs.items()):
        return None
    return f"they need {count} × {_said(needs)}, and {_said({name: free.get(name, 0) for name in needs})} is free"


def fewer_workers(job: TrainingJob, left: int) -> int:
    """The most workers, at most `left`, with which the job's steps stay what they are; 0 where no count does it."""
    axes = job.workers.axes
    for count in range(most_workers(left, axes), 0, -axes.step):
        if job.sequences_per_step % (axes.data(count) * job.sequences_per_pass) == 0:
            return count
    return 0


def machines_of_cluster() -> list[Resources]:
    """What each machine that lives has, in use or not. Needs Ray."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def free_on_machines() -> list[Resources]:
    """What of each machine that lives is not in use. Needs Ray."""
    return list(available_resources_per_node().values())


def can_grow() -> bool:
    """Whether machines may join: not where Ray listens on loopback alone, as it does on one machine. Needs Ray."""
    return not all(node["NodeManagerAddress"].startswith("127.") for node in ray.nodes())


class NoRoomError(Exception):
    """Workers have waited for room for longer than the job's patience."""


class WaitsForRoom(WorkerGroupCallback):
    """In Ray Train's controller: tells the job's journal when workers wait for room, every minute, and when they start.
    A wait of more than `patience_s` ends with NoRoomError, which the controller does not try again.

    Ray Train itself waits as long as it takes, and shows nothing.
    """

    def __init__(self, storage: StorageSettings, place: EventPlace, patience_s: float | None = None) -> None:
        self._storage, self._place, self._patience_s = storage, place, patience_s
        self._is_waiting = False
        self._since_s: float | None = None  # of the workers that are to start now: the first attempt

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        if self._since_s is None:
            self._since_s = time.monotonic()
        elif self._patience_s is not None and time.monotonic() - self._since_s >= self._patience_s:
            raise NoRoomError(f"There was no room for all workers in {self._patience_s:g} s.")
        count, needs = worker_group_context.num_workers, worker_group_context.resources_per_worker
        lacking = missing(ray.available_resources(), count, needs)
        if lacking is not None:
            self._is_waiting = True
            self._tell(Placed(phase=self._place.phase, count=count, missing=lacking))

    def after_worker_group_start(self, worker_group: Any) -> None:
        self._since_s = None
        if self._is_waiting:
            self._is_waiting = False
            self._tell(Placed(phase=self._place.phase, count=len(worker_group)))

    def _tell(self, event: Placed) -> None:
        try:
            job_journal(open_store(self._storage), self._place.job).append([event.model_dump(mode="json")])
        except StorageUnavailable as error:
            log.warning("It cannot be told what workers wait for: %s", error)


def _said(resources: Resources) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in resources.items())
