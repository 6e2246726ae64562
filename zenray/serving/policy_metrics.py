"""What the autoscaling policy tells Prometheus through Ray: the replicas that each of its signals asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


class PolicyMetrics:
    """The gauge of one policy. `gauge` is `ray.util.metrics.Gauge`, which Ray exports with `ray_` before its name."""

    def __init__(self, gauge: Callable[..., Any]) -> None:
        self._wish = gauge(
            "zenray_autoscaling_wish",
            description="Replicas that one signal of the autoscaling policy asks for; the largest counts.",
            tag_keys=("model_name", "application", "signal"),
        )

    def wished(self, model: str, application: str, wishes: Mapping[str, float]) -> None:
        for signal, replicas in wishes.items():
            tags = {"model_name": model, "application": application, "signal": signal}
            self._wish.set(replicas, tags=tags)
