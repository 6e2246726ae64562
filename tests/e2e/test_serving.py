"""Serving while things change: scaled to and from zero, rolled over, a replica killed; only the engine is scripted."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import openai
import psutil
import pytest

from tests.e2e.platform import ELASTIC, ELASTIC_TOKENS, TestPlatform, wait_until
from tests.e2e.serving_load import Load, deploy, endpoints, wait_for_answers, wait_for_replicas
from tests.e2e.test_exactness import check_books

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]  # the platform itself starts within the first test

SCRIPTED = {"kind": "scripted"}
STEADY = {"min_replicas": 1, "max_replicas": 1}


@pytest.fixture
def elastic(platform: TestPlatform) -> Iterator[TestPlatform]:
    """The platform; what a test deploys as ELASTIC is taken down after it."""
    yield platform
    platform.zenray("undeploy", ELASTIC, check=False)


@pytest.mark.parametrize("rounds", [2, pytest.param(12, marks=pytest.mark.nightly)])
def test_one_two_one_none_one_under_load_without_a_failed_request(elastic: TestPlatform, rounds: int) -> None:
    scaling = {"min_replicas": 0, "max_replicas": 2, "target_ongoing_requests": 3}
    deploy(
        elastic,
        model=ELASTIC,
        version="v1",
        engine=SCRIPTED,
        autoscaling=scaling | {"upscale_delay_s": 0.5, "downscale_delay_s": 2},
        cpus_per_replica=0.1,
        graceful_shutdown_timeout_s=30,
    )
    client = elastic.customer(f"elastic-{rounds}")
    load = Load(client, ELASTIC, "[[tokens=16 delay_ms=60]]")
    with load.running(6):
        for _ in range(rounds):
            load.clients = 6
            wait_for_replicas(elastic, ELASTIC, 2)  # from none (or from one, at first) by way of one
            wait_for_answers(load, 12)
            load.clients = 1
            wait_for_replicas(elastic, ELASTIC, 1)
            wait_for_answers(load, 2)
            load.clients = 0
            wait_for_replicas(elastic, ELASTIC, 0)
        load.clients = 1  # the one that wakes it waits for it
        wait_for_answers(load, 2)
        load.clients = 0
    assert load.failed() == []
    assert {asked.tokens for asked in load.answers} == {16}
    check_books(elastic, f"elastic-{rounds}", len(load.answers))


def test_a_revision_is_rolled_under_load_without_a_failed_request(elastic: TestPlatform) -> None:
    def roll(version: str) -> None:
        deploy(
            elastic,
            model=ELASTIC,
            version=version,
            engine=SCRIPTED,
            autoscaling=STEADY,
            cpus_per_replica=0.1,
            graceful_shutdown_timeout_s=30,
        )

    roll("v1")
    client = elastic.customer("rolled")
    load = Load(client, ELASTIC, "[[delay_ms=40]]")
    with load.running(8):
        load.clients = 8
        wait_for_answers(load, 8)
        for version in ("v2", "v1"):
            before = len(load.answers)
            roll(version)
            wait_until(
                lambda: [asked.tokens for asked in load.answers[-8:]] == [ELASTIC_TOKENS[version]] * 8,  # noqa: B023
                f"{version} answers alone",
                60,
            )
            assert {asked.tokens for asked in load.answers[before:]} <= set(ELASTIC_TOKENS.values())
        load.clients = 0
    assert load.failed() == []
    check_books(elastic, "rolled", len(load.answers))


def test_a_killed_replica_ends_its_own_streams_with_an_error_and_no_others(elastic: TestPlatform) -> None:
    deploy(
        elastic,
        model=ELASTIC,
        version="v1",
        engine=SCRIPTED,
        autoscaling={"min_replicas": 2, "max_replicas": 2},
        cpus_per_replica=0.1,
        graceful_shutdown_timeout_s=30,
    )
    urls = wait_for_replicas(elastic, ELASTIC, 2)
    client = elastic.customer("bereaved")
    load = Load(client, ELASTIC, "[[tokens=150 delay_ms=50]]")
    with load.running(8):
        load.clients = 8
        wait_until(lambda: sum(shares := [running(elastic, url) for url in urls]) == 8 and min(shares) >= 2, "work", 60)
        victim, survivor = urls
        killed = process_of(victim)
        load.clients = 0  # no new ones: whoever fails was under way
        under_way = ids(elastic, victim)
        killed.kill()
        wait_until(lambda: load.failed(), "the streams of the killed replica end", 120)
    failed = load.failed()
    assert 0 < len(failed) <= len(under_way)
    assert all(isinstance(error, openai.APIError) for error in failed), failed
    assert all("replica was lost in the middle of the answer" in str(error) for error in failed), failed
    assert {asked.tokens for asked in load.answers if asked.error is None} == {150}

    check_books(elastic, "bereaved", len(load.answers))
    billed = {
        row["request_id"]: row["output_tokens"]
        for row in elastic.rows("SELECT request_id, output_tokens FROM usage_events WHERE org = 'bereaved'")
    }
    counted = {request["id"].removeprefix("chatcmpl-"): request for request in emitted(elastic, survivor)}
    assert counted.keys() <= billed.keys()
    assert {id: billed[id] for id in counted} == {id: found["completion_tokens"] for id, found in counted.items()}
    wait_for_replicas(elastic, ELASTIC, 2)  # Ray Serve has started another
    assert victim not in endpoints(elastic, ELASTIC)
    assert load.ask().error is None


def emitted(platform: TestPlatform, url: str) -> list[dict[str, object]]:
    """What the scripted engine at this replica's own port says that it emitted."""
    rows = platform.rows("SELECT application FROM deployment_revisions WHERE model = ? ORDER BY since DESC", ELASTIC)
    name = httpx.URL(url).path.strip("/")
    application = next(a for a in (json.loads(row["application"]) for row in rows) if a["name"] == name)
    key = application["runtime_env"]["env_vars"]["VLLM_API_KEY"]
    answer = httpx.get(f"{url}/scripted/emitted", headers={"authorization": f"Bearer {key}"}, timeout=10)
    found: list[dict[str, object]] = answer.raise_for_status().json()["requests"]
    return found


def ids(platform: TestPlatform, url: str) -> set[str]:
    return {str(request["id"]) for request in emitted(platform, url) if request["state"] == "running"}


def running(platform: TestPlatform, url: str) -> int:
    return len(ids(platform, url))


def process_of(url: str) -> psutil.Process:
    """The process that listens on a replica's port."""
    port = httpx.URL(url).port
    for connection in psutil.net_connections(kind="tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
            return psutil.Process(connection.pid)
    raise AssertionError(f"nobody listens on {url}")
