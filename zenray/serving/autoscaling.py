"""How many replicas: Ray Serve's autoscaler with our policy (`scaling.py`), fed with what the engines report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import ray.util.metrics

from zenray.serving.policy_metrics import PolicyMetrics
from zenray.serving.scaling import Signals, Targets, decide
from zenray.spec.deployments import Autoscaling
from zenray.spec.serving import Start

POLICY_PATH = "zenray.serving.autoscaling:Policy"
METRICS_INTERVAL_S = 1.0
LOOK_BACK_S = 3.0
_RUNNING_REQUESTS = "running_requests"  # what Ray 2.60 calls the requests that a replica has in flight
_MEMORY = "zenray"


def autoscaling_options(settings: Autoscaling, start: Start | None = None) -> dict[str, Any]:
    """Ray Serve's `autoscaling_config`.

    A deployment that may sleep still starts with one replica: a version that cannot run must show at once, not at the
    first request. It falls asleep after `downscale_delay_s`. With `start` it begins with as many as that says.
    """
    return {
        "min_replicas": settings.min_replicas,
        "initial_replicas": max(1, settings.min_replicas) if start is None else start.replicas,
        "max_replicas": settings.max_replicas,
        "target_ongoing_requests": settings.target_ongoing_requests,
        "upscale_delay_s": 0,  # both delays are the policy's own
        "downscale_delay_s": 0,
        "metrics_interval_s": METRICS_INTERVAL_S,
        "look_back_period_s": LOOK_BACK_S,
        "policy": {"policy_function": POLICY_PATH, "policy_kwargs": asdict(targets_of(settings, start))},
    }


def targets_of(settings: Autoscaling, start: Start | None = None) -> Targets:
    return Targets(
        ongoing_requests=settings.target_ongoing_requests,
        waiting_requests=settings.target_waiting_requests,
        kv_cache_use=settings.target_kv_cache_use,
        ttft_p99_s=settings.target_ttft_p99_s,
        upscale_delay_s=settings.upscale_delay_s,
        downscale_delay_s=settings.downscale_delay_s,
        start_replicas=start.replicas if start is not None else 0,
        start_hold_s=start.hold_s if start is not None else 0.0,
    )


class Policy:
    """What Ray Serve's controller calls with its AutoscalingContext, one instance for each deployment.

    Bounds and waking from zero stay Ray's. What each signal asks for is shown to Prometheus, through Ray.
    """

    def __init__(self, **targets: Any) -> None:
        self._targets = Targets(**targets)
        self._metrics = PolicyMetrics(ray.util.metrics.Gauge)

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        if ctx.current_num_replicas == 0:
            return ctx.target_num_replicas, {}
        decision = decide(signals_of(ctx), self._targets, ctx.policy_state.get(_MEMORY), ctx.current_time)
        self._metrics.wished(ctx.deployment_name, ctx.app_name, decision.wished)
        return decision.replicas, {_MEMORY: decision.memory}


def signals_of(ctx: Any) -> Signals:
    """What Ray's context says of the load. A replica that has not reported yet counts nothing."""
    raw = ctx.raw_metrics or {}

    def summed(name: str) -> float:
        return newest(raw.get(name, {}).values())

    return Signals(
        running=ctx.current_num_replicas,
        target=ctx.target_num_replicas,
        mean_requests=ctx.total_num_requests,
        newest_requests=summed(_RUNNING_REQUESTS) + ctx.total_queued_requests,
        computing=summed("computing"),
        waiting=summed("waiting"),
        kv_cache_use=summed("kv_cache_use"),
        first_tokens=summed("first_tokens"),
        late_first_tokens=summed("late_first_tokens"),
        most=ctx.capacity_adjusted_max_replicas,
    )


def newest(series: Iterable[Any]) -> float:
    """The sum of the last value of each series; a series that has no value yet counts nothing."""
    return float(sum(values[-1].value for values in series if len(values)))
