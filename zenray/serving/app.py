"""From a ReplicaLaunch to a Ray Serve application: the import path that control writes into the Serve document."""

from __future__ import annotations

from typing import Any

from ray import serve

from zenray.serving.autoscaling import autoscaling_options
from zenray.serving.replica import Replica
from zenray.spec.serving import ReplicaLaunch

# The engine queues by itself and knows best how much it can take; Serve must not hold requests back before it.
MAX_ONGOING_REQUESTS = 8192


def build(args: dict[str, Any]) -> serve.Application:
    """The application of one revision. Neither loads nor imports the engine: each replica does.

    Ray Serve calls it with `args` of the application: a ReplicaLaunch; an unknown key fails the deployment.
    """
    launch = ReplicaLaunch.model_validate(args)
    deployment = serve.deployment(serve.ingress()(Replica)).options(**deployment_options(launch))
    return deployment.bind(launch)


def deployment_options(launch: ReplicaLaunch) -> dict[str, Any]:
    """Ray Serve's options for the deployment, named after the model."""
    spec = launch.deployment
    return {
        "name": spec.model,
        "autoscaling_config": autoscaling_options(spec.autoscaling, launch.start),
        "max_ongoing_requests": MAX_ONGOING_REQUESTS,
        "graceful_shutdown_timeout_s": spec.graceful_shutdown_timeout_s,
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": 2.0,
        "health_check_timeout_s": 30.0,
        "max_constructor_retry_count": 2,
        "ray_actor_options": {
            "num_cpus": spec.cpus_per_replica,
            "num_gpus": spec.gpus_per_replica,
        },
    }
