"""What engines report of their load: first tokens over a window, vLLM's statistics, the scripted engine's."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from zenray.serving.engine.base import EngineLaunch, EngineLoad
from zenray.serving.engine.load import FirstTokens
from zenray.serving.engine.scripted_replica import ScriptedReplicaEngine
from zenray.serving.engine.vllm import Observed, ray_stat_logger
from zenray.spec.deployments import EngineSettings


def test_first_tokens_are_counted_over_a_window_and_late_ones_apart() -> None:
    tokens = FirstTokens(0.5, window_s=30)
    for second in range(100):
        tokens.add(0.6 if second % 10 == 0 else 0.5, now_s=second)
    assert tokens.counts(99.9) == (31, 3)  # of the seconds 69 to 99; 70, 80 and 90 were late
    assert tokens.counts(200.0) == (0, 0)
    assert len(tokens._seconds) == 0
    free = FirstTokens(None)
    free.add(1e9, now_s=0)
    assert free.counts(0) == (1, 0)


def step(running: int, waiting: int, use: float, skipped: int = 0) -> SimpleNamespace:
    return SimpleNamespace(
        num_running_reqs=running, num_waiting_reqs=waiting, num_skipped_waiting_reqs=skipped, kv_cache_usage=use
    )


def test_vllms_statistics_are_summed_over_data_parallel_engines() -> None:
    observed = Observed(0.5)
    assert observed.load(0.0, idle=False) == EngineLoad()
    observed.record(0, step(3, 1, 0.5), SimpleNamespace(time_to_first_tokens_iter=[0.1, 0.7]), 10.0)
    observed.record(1, step(2, 0, 0.25, skipped=2), None, 10.0)
    observed.record(0, None, SimpleNamespace(time_to_first_tokens_iter=[0.2]), 11.0)
    assert observed.load(11.0, idle=False) == EngineLoad(
        computing=5, waiting=3, kv_cache_use=0.375, first_tokens=3, late_first_tokens=1
    )
    # An idle engine takes no step, and so never says that its last request is gone.
    assert observed.load(11.0, idle=True) == EngineLoad(first_tokens=3, late_first_tokens=1)


def test_ray_is_not_told_of_each_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the loggers after it are. vLLM itself is not imported, which takes seconds; that it has the name is read."""
    told = []

    class Logger:
        def record(self, *what: object) -> None:
            told.append(what)

    name = "vllm.v1.metrics.ray_wrappers"
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(RayPrometheusStatLogger=Logger))
    logger = ray_stat_logger()()
    stats = SimpleNamespace(inter_token_latencies_iter=[0.1, 0.2], time_to_first_tokens_iter=[0.3])
    logger.record("scheduler", stats, None, 1)
    logger.record("scheduler", None)
    ours = SimpleNamespace(inter_token_latencies_iter=[], time_to_first_tokens_iter=[0.3])
    assert told == [("scheduler", ours, None, 1), ("scheduler", None, None, 0)]
    assert stats.inter_token_latencies_iter == [0.1, 0.2]
    found = importlib.util.find_spec("vllm")
    assert found is not None and found.origin is not None
    logs = (Path(found.origin).parent / "v1/metrics/loggers.py").read_text()
    assert "in iteration_stats.inter_token_latencies_iter:" in logs


async def test_a_scripted_engine_reports_what_it_does(tmp_path: Path) -> None:
    (tmp_path / "script.json").write_text('{"kv_cache_use": 0.3, "first_ms": 2}')
    launch = EngineLaunch(model="m", settings=EngineSettings(kind="scripted"), cpus=1, gpus=0, ttft_target_s=0.001)
    engine = ScriptedReplicaEngine(launch)
    assert engine.load() == EngineLoad()
    app = await engine.start(tmp_path)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://replica") as client:
        await client.post("/v1/completions", json={"prompt": "x"})
    assert engine.load() == EngineLoad(first_tokens=1, late_first_tokens=1)
    app.truth.open(SimpleNamespace(id="a", state="running"))  # type: ignore[attr-defined]
    assert engine.load().as_metrics() == {
        "computing": 1.0,
        "waiting": 0.0,
        "kv_cache_use": pytest.approx(0.3),
        "first_tokens": 1.0,
        "late_first_tokens": 1.0,
    }
