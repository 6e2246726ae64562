"""How many replicas, from a deployment's autoscaling settings: Ray Serve's own autoscaler, told what we want."""

from __future__ import annotations

from typing import Any

from zenray.spec.deployments import Autoscaling

METRICS_INTERVAL_S = 1.0
LOOK_BACK_S = 3.0


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
    }
