"""What a replica tells Prometheus: under its model's name, and no value without its tags."""

from __future__ import annotations

from typing import Any

import pytest

from zenray.serving.engine.load import EngineLoad
from zenray.serving.policy_metrics import PolicyMetrics
from zenray.serving.replica_metrics import ReplicaMetrics
from zenray.serving.scaling import Memory, Signals, Targets, wishes
from zenray.spec.versions import VersionRef
from zenray.storage.cache import FetchReport

TAGS = {"model_name": "m", "version": "v1", "replica": "r"}


class Gauge:
    """Keeps what it is told, and refuses tags that it was not made with, as Ray's does."""

    told: dict[str, list[tuple[float, dict[str, str]]]] = {}

    def __init__(self, name: str, *, description: str, tag_keys: tuple[str, ...]) -> None:
        assert description and name not in self.told
        self._keys, self._told = tag_keys, self.told.setdefault(name, [])

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert set(tags) == set(self._keys) and isinstance(value, float)
        self._told.append((value, tags))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(Gauge, "told", {})
    return Gauge.told


def test_a_start_and_a_load_are_told(told: dict[str, Any]) -> None:
    metrics = ReplicaMetrics("m", "v1", "r", Gauge)
    ref = VersionRef(model="m", version="v1")
    metrics.started(2.0, 3.5, [FetchReport(ref, 10, 6, 4, 1.5), FetchReport(ref, 7, 0, 0, 0.25)])
    assert told["zenray_replica_start_s"] == [(2.0, TAGS | {"part": "files"}), (3.5, TAGS | {"part": "engine"})]
    assert told["zenray_replica_fetched_bytes"] == [(6.0, TAGS)]
    assert told["zenray_replica_resumed_bytes"] == [(4.0, TAGS)]
    assert told["zenray_replica_fetch_s"] == [(1.75, TAGS)]
    assert told["zenray_replica_cache_hits"] == told["zenray_replica_cache_misses"] == [(1.0, TAGS)]
    metrics.load(EngineLoad(3, 1, 0.5, 9, 2))
    assert told["zenray_engine_computing"] == [(3.0, TAGS)]
    assert told["zenray_engine_kv_cache_use"] == [(0.5, TAGS)]
    assert told["zenray_engine_late_first_tokens"] == [(2.0, TAGS)]


def test_each_signal_of_the_policy_shows_what_it_asks_for(told: dict[str, Any]) -> None:
    load = Signals(running=2, target=2, mean_requests=12, newest_requests=12, kv_cache_use=1.0)
    PolicyMetrics(Gauge).wished("m", "m--1--a", wishes(load, Targets(4, kv_cache_use=0.5), Memory(0.0), 0.0))
    told = {tags["signal"]: value for value, tags in told["zenray_autoscaling_wish"]}
    assert told == {"requests": 3.0, "queue": 0.0, "kv_cache": 2.0, "first_tokens": 0.0, "start": 0.0}
