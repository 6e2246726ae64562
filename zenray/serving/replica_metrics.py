"""What a replica tells Prometheus through Ray, under its model's name: load, first tokens, how its start went.

Ray serves the metrics of all processes of a node on one port, beside its autoscaler's own and vLLM's (`ray_vllm_…`,
labelled `model_name`, `engine` and `ReplicaId`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zenray.serving.engine.load import EngineLoad
from zenray.storage.cache import FetchReport

LOAD_GAUGES = {
    "computing": "Sequences in the engine's batch.",
    "waiting": "Sequences that the engine holds back.",
    "kv_cache_use": "Share of the KV cache in use, 0 to 1.",
    "first_tokens": "First tokens of the last 30 s.",
    "late_first_tokens": "First tokens of the last 30 s that came later than the deployment's target.",
}
START_GAUGES = {
    "start_s": "Seconds of this replica's start, by part: files (with the engine's code), engine.",
    "fetched_bytes": "Bytes of weights that came from the store for this replica.",
    "resumed_bytes": "Bytes of weights that an earlier, broken attempt had left.",
    "fetch_s": "Seconds until the weights were there and verified.",
    "cache_hits": "Versions found in the node's cache (the model, its draft).",
    "cache_misses": "Versions that had to be fetched.",
}


class ReplicaMetrics:
    """Gauges of one replica. `gauge` is `ray.util.metrics.Gauge`; Ray itself adds node and process."""

    def __init__(self, model: str, version: str, replica: str, gauge: Callable[..., Any]) -> None:
        self._tags = {"model_name": model, "version": version, "replica": replica}
        keys = tuple(self._tags)
        self._load = {
            name: gauge(f"zenray_engine_{name}", description=text, tag_keys=keys) for name, text in LOAD_GAUGES.items()
        }
        self._start = {
            name: gauge(
                f"zenray_replica_{name}",
                description=text,
                tag_keys=(*keys, "part") if name == "start_s" else keys,
            )
            for name, text in START_GAUGES.items()
        }

    def started(self, files_s: float, engine_s: float, fetched: list[FetchReport]) -> None:
        for part, seconds in (("files", files_s), ("engine", engine_s)):
            self._start["start_s"].set(seconds, tags=self._tags | {"part": part})
        values = {
            "fetched_bytes": sum(report.fetched_bytes for report in fetched),
            "resumed_bytes": sum(report.resumed_bytes for report in fetched),
            "fetch_s": sum(report.took_s for report in fetched),
            "cache_hits": sum(report.was_cached for report in fetched),
            "cache_misses": sum(not report.was_cached for report in fetched),
        }
        for name, value in values.items():
            self._start[name].set(float(value), tags=self._tags)

    def load(self, load: EngineLoad) -> None:
        for name, value in load.as_metrics().items():
            self._load[name].set(value, tags=self._tags)
