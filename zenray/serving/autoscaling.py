"""How many replicas: Ray Serve's autoscaler with a policy of ours, which never starts a replica for load that is gone.

Ray decides by the mean of ongoing requests over a window. When load ends, the mean still shows it for as long as the
window is, and a deployment that was just made smaller grows again. Here growing also needs the newest counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from zenray.spec.deployments import Autoscaling

POLICY_PATH = "zenray.serving.autoscaling:policy"
METRICS_INTERVAL_S = 1.0
LOOK_BACK_S = 3.0
_RUNNING_REQUESTS = "running_requests"  # what Ray 2.60 calls the requests that a replica has in flight


def autoscaling_options(settings: Autoscaling) -> dict[str, Any]:
    """Ray Serve's `autoscaling_config`.

    A deployment that may sleep still starts with one replica: a version that cannot run must show at once, not at the
    first request. It falls asleep after `downscale_delay_s`.
    """
    return {
        "min_replicas": settings.min_replicas,
        "initial_replicas": max(1, settings.min_replicas),
        "max_replicas": settings.max_replicas,
        "target_ongoing_requests": settings.target_ongoing_requests,
        "upscale_delay_s": settings.upscale_delay_s,
        "downscale_delay_s": settings.downscale_delay_s,
        "metrics_interval_s": METRICS_INTERVAL_S,
        "look_back_period_s": LOOK_BACK_S,
        "policy": {"policy_function": POLICY_PATH},
    }


def policy(ctx: Any) -> tuple[float, dict[str, Any]]:
    """Called by Ray Serve's controller with its AutoscalingContext; delays, bounds and waking from zero stay Ray's."""
    if ctx.current_num_replicas == 0:
        return ctx.target_num_replicas, {}
    series = (ctx.raw_metrics or {}).get(_RUNNING_REQUESTS, {}).values()
    wanted = replicas_wanted(
        running=ctx.current_num_replicas,
        target=ctx.target_num_replicas,
        mean_requests=ctx.total_num_requests,
        newest_requests=newest(series) + ctx.total_queued_requests,
        requests_per_replica=ctx.config.get_target_ongoing_requests(),
    )
    return wanted, {}


def replicas_wanted(
    *, running: int, target: int, mean_requests: float, newest_requests: float, requests_per_replica: float
) -> float:
    """The number of replicas for this load, before delays and bounds.

    `mean_requests` is the mean over the window, `newest_requests` the last known count. To have fewer than now, the
    mean must fall; to have more than now, both must ask for more.
    """
    now = max(running, target)
    by_mean = mean_requests / requests_per_replica
    if by_mean <= now:
        return by_mean
    return max(float(now), min(by_mean, newest_requests / requests_per_replica))


def newest(series: Iterable[Any]) -> float:
    """The sum of the last value of each series; a series that has no value yet counts nothing."""
    return float(sum(values[-1].value for values in series if len(values)))
