"""Metrics to MLflow or Weights & Biases, for teams that have one of them. Both are optional packages."""

from __future__ import annotations

import importlib.util
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from zenray.spec.errors import InvalidValue
from zenray.spec.job_events import Evaluated, Step, parse_event
from zenray.spec.training import MlflowTracking, TrainingJob, WandbTracking

_log = logging.getLogger(__name__)

Event = dict[str, Any]
Log = Callable[[dict[str, float], int], None]
"""Metrics of a step."""
Opening = Callable[[], tuple[Log, Callable[[], object]]]
"""Opens a tracker: what logs to it, and what closes it."""
_MLFLOW_BATCH = 1000  # the most metrics that its server takes at once


def check_trackers(job: TrainingJob) -> None:
    """InvalidValue, with what to install, for a tracker that is asked for and not there. Before anything is trained."""
    wanted = {"mlflow": job.tracking.mlflow, "wandb": job.tracking.wandb}
    missing = [name for name, asked in wanted.items() if asked is not None and importlib.util.find_spec(name) is None]
    if missing:
        raise InvalidValue(
            f"This job asks for tracking by {' and '.join(missing)}, which is not installed.",
            hint="pip install 'zenray[tracking]', or take `tracking` out of the job.",
        )


@contextmanager
def tracked(job: TrainingJob, run: str) -> Iterator[Callable[[Event], None]]:
    """Within: what the yielded function is told also reaches the job's trackers, under the run's name.

    A run that goes on after a failure goes on there too. A tracker that fails, when it is opened or
    later, is said in the log once and left alone: a run of weeks does not end because a dashboard is away.
    """
    with ExitStack() as stack:
        trackers = [_Guarded(name, opening) for name, opening in _wanted(job, run)]
        for tracker in trackers:
            stack.callback(tracker.close)

        def tell(event: Event) -> None:
            metrics, step = metrics_of(event)
            for tracker in trackers if metrics else []:
                tracker.log(metrics, step)

        yield tell


def metrics_of(event: Event) -> tuple[dict[str, float], int]:
    """Names and finite values of an event, and the steps done; no metrics for what is neither step nor evaluation."""
    read = parse_event({"at": 0.0, **event})
    if isinstance(read, Evaluated):
        return _finite({f"validation_loss/{read.domain}": read.loss}), read.step
    if not isinstance(read, Step):
        return {}, 0
    plain = "loss lm_loss kl balance gradient_norm learning_rate tokens_per_s mfu memory_bytes communication_share"
    found: dict[str, float | None] = {name: getattr(read, name) for name in plain.split()}
    found |= {f"gradient_norm/{kind}": norm for kind, norm in read.gradient_norms.items()}
    of_layers: dict[str, Sequence[float]] = {
        "entropy_ratio": read.entropy_ratios,
        "effective_ratio": read.effective_ratios,
        "max_violation": read.max_violations,
        "dropped_choices": read.dropped_choices,
        "fallback_tokens": read.fallback_tokens,
    }
    for name, values in of_layers.items():
        found |= {f"{name}/layer_{layer}": value for layer, value in enumerate(values)}
    for layer, load in enumerate(read.loads):
        found |= {f"load/layer_{layer}/expert_{expert}": share for expert, share in enumerate(load)}
    return _finite(found), read.step + 1


def _finite(values: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)}


class _Guarded:
    """A tracker that is opened now, logged to until it fails once, and closed, whatever becomes of any of it."""

    def __init__(self, name: str, opening: Opening) -> None:
        self._name, self._has_failed = name, False
        self._log: Log | None = None
        self._close: Callable[[], object] | None = None
        with self._said_once():
            self._log, self._close = opening()

    def log(self, metrics: dict[str, float], step: int) -> None:
        if self._log is not None and not self._has_failed:
            with self._said_once():
                self._log(metrics, step)

    def close(self) -> None:
        if self._close is not None:
            with self._said_once():
                self._close()

    @contextmanager
    def _said_once(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not self._has_failed:
                _log.error("%s failed, and is told nothing more in this run: %s", self._name, error)
            self._has_failed = True


def _wanted(job: TrainingJob, run: str) -> Iterator[tuple[str, Opening]]:
    about = job.model_dump(mode="json", exclude={"data", "tracking"})
    if job.tracking.mlflow is not None:
        yield "MLflow", partial(_mlflow, job.tracking.mlflow, run, about)
    if job.tracking.wandb is not None:
        yield "Weights & Biases", partial(_wandb, job.tracking.wandb, run, about)


def _mlflow(wanted: MlflowTracking, run: str, about: Event) -> tuple[Log, Callable[[], object]]:
    import mlflow
    from mlflow.entities import Metric, Param

    client = mlflow.MlflowClient(tracking_uri=wanted.uri)
    known = client.get_experiment_by_name(wanted.experiment)
    experiment = known.experiment_id if known is not None else client.create_experiment(wanted.experiment)
    earlier = client.search_runs([experiment], filter_string=f"tags.`zenray.run` = '{run}'", max_results=1)
    if earlier:
        id = earlier[0].info.run_id
    else:
        id = client.create_run(experiment, tags={"zenray.run": run, "mlflow.runName": run}).info.run_id
        client.log_batch(id, params=[Param(name, str(value)[:500]) for name, value in about.items()])

    def log(metrics: dict[str, float], step: int) -> None:
        now_ms = int(time.time() * 1000)
        rows = [Metric(name, value, now_ms, step) for name, value in metrics.items()]
        for first in range(0, len(rows), _MLFLOW_BATCH):
            client.log_batch(id, metrics=rows[first : first + _MLFLOW_BATCH])

    return log, partial(client.set_terminated, id)


def _wandb(wanted: WandbTracking, run: str, about: Event) -> tuple[Log, Callable[[], object]]:
    import wandb

    opened = wandb.init(
        project=wanted.project, entity=wanted.entity, id=run, name=run, resume="allow", config=about, mode=wanted.mode
    )
    return lambda metrics, step: opened.log(metrics, step=step), opened.finish
