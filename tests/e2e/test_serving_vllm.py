"""Serving while things change, with real models on vLLM: the short form in every run, the long ones nightly."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.e2e.platform import ELASTIC, REAL, TestPlatform, wait_until
from tests.e2e.serving_load import Load, deploy, endpoints, wait_for_answers, wait_for_replicas
from tests.e2e.test_exactness import check_books

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]  # the platform itself starts within the first test

JOB = Path(__file__).parents[2] / "jobs" / "upcycle-smollm2.yaml"
ENGINE = {"dtype": "float32", "max_model_len": 1024, "max_num_seqs": 16, "kv_cache_bytes": 268435456}
AS_IT_WAS = {"engine": ENGINE, "autoscaling": {"min_replicas": 1, "max_replicas": 1}, "graceful_shutdown_timeout_s": 5}
PROMPT = "Count from one to twenty."
MIXTURE = "smollm2-mode"  # what JOB makes


@pytest.fixture
def restored(platform: TestPlatform) -> Iterator[TestPlatform]:
    """The platform; the real model is afterwards deployed as other tests expect it."""
    yield platform
    deploy(platform, model=REAL, **AS_IT_WAS)


def test_two_models_answer_side_by_side_under_load(platform: TestPlatform) -> None:
    """A real engine and a scripted one, asked at once by one customer; each answer whole, billed at its own count."""
    deploy(platform, model=ELASTIC, version="v1", engine={"kind": "scripted"}, cpus_per_replica=0.1)
    client = platform.customer("sides")
    loads = [Load(client, REAL, PROMPT, max_tokens=12), Load(client, ELASTIC, "[[delay_ms=20]]", max_tokens=10)]
    with ThreadPoolExecutor(6) as pool:
        for asked in [pool.submit(load.ask) for load in loads for _ in range(6)]:
            assert asked.result().error is None
    assert [{asked.tokens for asked in load.answers} for load in loads] == [{12}, {10}]
    check_books(platform, "sides", 12)
    by_model = platform.rows(
        "SELECT model_answered, count(*) AS n FROM usage_events WHERE org = 'sides' GROUP BY model_answered"
    )
    assert {row["model_answered"]: row["n"] for row in by_model} == {REAL: 6, ELASTIC: 6}
    platform.zenray("undeploy", ELASTIC)


@pytest.mark.nightly
def test_one_two_one_none_one_on_vllm_without_a_failed_request(restored: TestPlatform) -> None:
    scaling = {"min_replicas": 0, "max_replicas": 2, "target_ongoing_requests": 3}
    deploy(
        restored,
        model=REAL,
        engine=ENGINE,
        autoscaling=scaling | {"upscale_delay_s": 1, "downscale_delay_s": 5},
        graceful_shutdown_timeout_s=60,
    )
    load = Load(restored.customer("realscale"), REAL, PROMPT, max_tokens=48)
    with load.running(6):
        load.clients = 6
        wait_for_replicas(restored, REAL, 2, 240)
        wait_for_answers(load, 6, 120)
        load.clients = 1
        wait_for_replicas(restored, REAL, 1, 120)
        load.clients = 0
        wait_for_replicas(restored, REAL, 0, 120)
        load.clients = 1
        wait_for_answers(load, 1, 240)
        load.clients = 0
    assert load.failed() == []
    check_books(restored, "realscale", len(load.answers))


@pytest.mark.nightly
def test_a_revision_is_rolled_on_vllm_without_a_failed_request(restored: TestPlatform) -> None:
    before = endpoints(restored, REAL)
    load = Load(restored.customer("realroll"), REAL, PROMPT, max_tokens=32)
    with load.running(3):
        load.clients = 3
        wait_for_answers(load, 3)
        deploy(restored, model=REAL, engine=ENGINE | {"max_num_seqs": 8}, graceful_shutdown_timeout_s=60)
        wait_until(
            lambda: (now := endpoints(restored, REAL)) and not set(now) & set(before),
            "the new revision alone is asked",
            240,
        )
        wait_for_answers(load, 3)
        load.clients = 0
    assert load.failed() == []
    check_books(restored, "realroll", len(load.answers))


@pytest.mark.nightly
def test_a_dense_size_and_its_mixture_are_up_at_once(platform: TestPlatform) -> None:
    """Two real sizes, asked at once: each answers as long as it does alone, and is billed for that."""
    platform.zenray("run", str(JOB), "--follow")
    mixture = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 4, "kv_cache_bytes": 134217728}
    deploy(platform, model=MIXTURE, engine=mixture)
    client = platform.customer("sizes")
    loads = [Load(client, model, PROMPT, max_tokens=16) for model in (REAL, MIXTURE)]
    alone = [load.ask() for load in loads]
    assert all(asked.error is None and 0 < asked.tokens <= 16 for asked in alone), alone
    with ThreadPoolExecutor(8) as pool:
        for asked in [pool.submit(load.ask) for _ in range(4) for load in loads]:
            assert asked.result().error is None
    assert [{asked.tokens for asked in load.answers} for load in loads] == [{asked.tokens} for asked in alone]
    check_books(platform, "sizes", 10)
    by_model = platform.rows(
        "SELECT model_answered, sum(output_tokens) AS n FROM usage_events WHERE org = 'sizes' GROUP BY model_answered"
    )
    expected = {load.model: 5 * asked.tokens for load, asked in zip(loads, alone, strict=True)}
    assert {row["model_answered"]: row["n"] for row in by_model} == expected
    platform.zenray("undeploy", MIXTURE)
