"""Prometheus gauges of jobs: how many are in each state, and where those stand that run."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy.exc import SQLAlchemyError

from zenray.control.db.engine import Database
from zenray.control.jobs.repository import active, list_jobs
from zenray.spec.job_events import Step, parse_event
from zenray.spec.job_life import JobState

_OF_A_STEP: dict[str, tuple[str, Callable[[Step], float | None]]] = {
    "zenray_job_step": ("Optimiser steps done.", lambda step: step.step + 1),
    "zenray_job_loss": ("Loss of the newest step.", lambda step: step.loss),
    "zenray_job_lm_loss": ("Next-token loss of the newest step.", lambda step: step.lm_loss),
    "zenray_job_kl": ("Distance to the teachers in the newest step.", lambda step: step.kl),
    "zenray_job_tokens_per_second": ("Tokens trained on in a second.", lambda step: step.tokens_per_s),
    "zenray_job_gradient_norm": ("Norm of all gradients before the clip.", lambda step: step.gradient_norm),
    "zenray_job_mfu_ratio": ("Share of the hardware's peak arithmetic.", lambda step: step.mfu),
    "zenray_job_memory_bytes": ("The most that one worker has held.", lambda step: step.memory_bytes),
    "zenray_job_communication_ratio": (
        "Share of a step's time spent communicating.",
        lambda step: step.communication_share,
    ),
}
_OF_A_LAYER: dict[str, tuple[str, Callable[[Step], Sequence[float]]]] = {
    "zenray_job_entropy_ratio": ("H / log E of the layer's load; 1 is even.", lambda step: step.entropy_ratios),
    "zenray_job_effective_ratio": ("exp(H) / E of the layer's load; 1 is even.", lambda step: step.effective_ratios),
    "zenray_job_dropped_choices": ("Choices of experts without room.", lambda step: step.dropped_choices),
    "zenray_job_fallback_tokens": ("Tokens that lost an expert so.", lambda step: step.fallback_tokens),
    "zenray_job_max_violation": ("MaxVio of the layer's load; 0 is even.", lambda step: step.max_violations),
}


class JobGauges(Collector):
    """Read from the database when somebody scrapes; nothing while the database is away."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def describe(self) -> Iterable[Metric]:
        return []  # so that registering does not read the database

    def collect(self) -> Iterable[Metric]:
        try:
            with self._database.read() as session:
                counts = Counter(row.state for row in list_jobs(session))
                rows = [row for row in active(session) if row.progress]
                steps = [((row.name, row.id), parse_event(json.loads(row.progress or ""))) for row in rows]
        except SQLAlchemyError:
            return []
        states = GaugeMetricFamily("zenray_jobs", "Jobs in each state.", labels=["state"])
        for state in JobState:
            states.add_metric([state.value], counts[state.value])
        return [states, *_of_steps([(job, step) for job, step in steps if isinstance(step, Step)])]


def _of_steps(steps: list[tuple[tuple[str, str], Step]]) -> Iterable[Metric]:
    """`steps`: each with its job's name and id; several jobs may have one name."""
    for metric, (about, of) in _OF_A_STEP.items():
        family = GaugeMetricFamily(metric, about, labels=["job", "id"])
        for job, step in steps:
            value = of(step)
            if value is not None and not math.isnan(value):
                family.add_metric([*job], value)
        yield family
    for metric, (about, of_layers) in _OF_A_LAYER.items():
        family = GaugeMetricFamily(metric, about, labels=["job", "id", "layer"])
        for job, step in steps:
            for layer, value in enumerate(of_layers(step)):
                family.add_metric([*job, str(layer)], value)
        yield family
