"""One replica of a deployment: fetches its weights, starts its engine, and answers on a port of its own.

Deployed as its application's own ingress with late binding (`serve.ingress()`), so that under direct ingress Ray Serve
gives each replica a port, and the engine's own HTTP application answers there behind the guard.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from pathlib import Path

import ray.util.metrics
from ray import serve

from zenray.serving.engine.base import Engine, EngineLaunch, open_engine
from zenray.serving.guard import AsgiApp, Guard
from zenray.serving.loopback import keep_on_loopback
from zenray.serving.replica_metrics import ReplicaMetrics
from zenray.spec.errors import InvalidValue
from zenray.spec.serving import ReplicaLaunch
from zenray.storage.cache import FetchReport, fetch
from zenray.storage.opening import open_store

KEY_VARIABLE = "VLLM_API_KEY"
_log = logging.getLogger("ray.serve")


class Replica:
    """What Ray Serve constructs. A failure here becomes the message of the application."""

    async def __init__(self, launch: ReplicaLaunch) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        # Taken out of the environment: engines start processes, and none of them needs it.
        self._key = os.environ.pop(KEY_VARIABLE, "")
        if not self._key:
            raise InvalidValue(
                f"{KEY_VARIABLE} is not set for this replica.",
                hint="Set it in `runtime_env.env_vars` of the Serve application: a replica's port needs a key.",
            )
        self._engine: Engine | None = None
        self._metrics: ReplicaMetrics | None = None
        keep_on_loopback()
        begun_at = time.monotonic()
        self._engine = open_engine(_engine_launch(launch))
        # The weights are on their way while the engine's code is loaded: two cores, two things to wait for.
        fetched: list[FetchReport] = []
        (folder, draft), _ = await asyncio.gather(
            asyncio.to_thread(_fetch_weights, launch, fetched), asyncio.to_thread(self._engine.prepare)
        )
        prepared_at = time.monotonic()
        self._app = await self._engine.start(folder, draft)
        ready_at = time.monotonic()
        _log.info(
            "%s is ready: %.1f s for its files and the engine's code, %.1f s for the engine",
            launch.deployment.ref(),
            prepared_at - begun_at,
            ready_at - prepared_at,
        )
        for report in fetched:
            _log.info("%s", report)
        ref, replica = launch.deployment.ref(), serve.get_replica_context().replica_id.unique_id
        self._metrics = ReplicaMetrics(ref.model, ref.version, replica, ray.util.metrics.Gauge)
        self._metrics.started(prepared_at - begun_at, ready_at - prepared_at, fetched)

    async def __serve_build_asgi_app__(self) -> AsgiApp:
        assert self._engine is not None
        return Guard(self._app, key=self._key, allowed=self._engine.routes)

    async def check_health(self) -> None:
        """Called by Ray Serve; raising replaces the replica."""
        if self._engine is not None:
            await self._engine.check_health()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Ray Serve about once a second; `zenray.serving.autoscaling` reads it under the same names."""
        if self._engine is None or self._metrics is None:
            return {}
        load = self._engine.load()
        self._metrics.load(load)
        return load.as_metrics()

    async def __del__(self) -> None:
        engine, self._engine = getattr(self, "_engine", None), None
        if engine is not None:
            await engine.stop()


def _fetch_weights(launch: ReplicaLaunch, fetched: list[FetchReport]) -> tuple[Path, Path | None]:
    """The folders of the model and of the one that drafts for it."""
    store, cache_dir, draft = open_store(launch.storage), Path(launch.cache_dir), launch.deployment.engine.draft
    draft_ref = draft.ref() if draft is not None else None
    folder = fetch(store, launch.deployment.ref(), cache_dir, on_done=fetched.append)
    if draft_ref is None:
        return folder, None
    return folder, fetch(store, draft_ref, cache_dir, on_done=fetched.append)


def _engine_launch(launch: ReplicaLaunch) -> EngineLaunch:
    spec = launch.deployment
    return EngineLaunch(
        model=spec.model,
        settings=spec.engine,
        cpus=spec.cpus_per_replica,
        gpus=spec.gpus_per_replica,
        ttft_target_s=spec.autoscaling.target_ttft_p99_s,
    )
