"""The data path of DESIGN decision 4, on a real Ray: what a new Ray version could break unseen.

A Serve application by REST; each replica's own port in `target_groups`; everything on loopback; requests straight to a
replica autoscale it; the proxy's port wakes it from zero; a replica that leaves finishes what it began.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import orjson
import psutil
import pytest

from tests.cluster.backend_contract import ClusterBackendContract, Harness
from tests.cluster.ray_session import ANY_PORTS, RaySession
from tests.cluster.scripted_apps import AUTHORIZED, ENGINE_KEY
from tests.serving.engine_checks import check_replica
from tests.serving.tiny_model import make_tiny_model
from zenray.spec.deployments import Autoscaling, DeploymentSpec, EngineSettings
from zenray.spec.serving import ApplicationState, ApplicationStatus, ServeApplication
from zenray.storage.opening import open_store
from zenray.storage.versions import publish

pytestmark = pytest.mark.contract

USAGE = {"include_usage": True, "continuous_usage_stats": True}


def chat(words: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"[[{words}]]"}], "stream": True, "stream_options": USAGE} | fields


def rays_metrics(ray_session: RaySession, model: str, *names: str) -> list[str]:
    """Lines of Ray's pages for Prometheus with these names and this model's, once there are some of each name."""
    targets = Path(ray_session.record().temp_dir) / "prom_metrics_service_discovery.json"
    addresses = [target for entry in orjson.loads(targets.read_bytes()) for target in entry["targets"]]
    deadline = time.monotonic() + 60  # Ray's agent collects every few seconds
    while True:
        pages = [httpx.get(f"http://{address}/metrics", timeout=10).text for address in addresses]
        found = [line for page in pages for line in page.splitlines() if f'"{model}"' in line]
        shown = [line for line in found if line.split("{")[0].removeprefix("ray_") in names]
        if {line.split("{")[0].removeprefix("ray_") for line in shown} == set(names):
            return shown
        assert time.monotonic() < deadline, shown
        time.sleep(0.5)


@pytest.fixture(scope="module")
def harness(ray_session: RaySession) -> Harness:
    return Harness(ray_session.cluster, ray_session.publisher, pause=time.sleep)


class TestRayKeepsTheContract(ClusterBackendContract):
    """Ray Serve is started by the first application, so this class stands first."""


@pytest.fixture(scope="module")
def app(harness: Harness) -> ServeApplication:
    scaling = Autoscaling(
        min_replicas=0, max_replicas=3, target_ongoing_requests=2, upscale_delay_s=0.5, downscale_delay_s=2
    )
    app = harness.publisher.application("path", autoscaling=scaling)
    harness.cluster.apply([app])
    return app


class TestOneReplica:
    @pytest.fixture
    def running(self, harness: Harness, app: ServeApplication) -> ApplicationStatus:
        """With at least one replica, woken through the proxy if need be."""
        status = harness.application(app.name, lambda a: a.state is ApplicationState.RUNNING)
        if not status.replica_urls:
            httpx.get(f"{harness.cluster.serve_status().proxy_url}{app.route_prefix}/health", timeout=20)
        return harness.application(app.name, lambda a: bool(a.replica_urls))

    @pytest.fixture
    def replica(self, running: ApplicationStatus) -> Iterator[httpx.Client]:
        url = next(iter(running.replica_urls.values()))
        with httpx.Client(base_url=url, headers=AUTHORIZED, timeout=30) as client:
            yield client

    def test_a_version_that_may_sleep_proves_itself_first(self, running: ApplicationStatus) -> None:
        (url,) = running.replica_urls.values()
        assert httpx.URL(url).port in range(ANY_PORTS.first_replica_port, ANY_PORTS.first_replica_port + 1000)

    def test_chunks_arrive_when_they_are_made(self, replica: httpx.Client) -> None:
        arrivals: list[float] = []
        with replica.stream("POST", "/v1/chat/completions", json=chat("tokens=5 delay_ms=60")) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    arrivals.append(time.monotonic())
                    last = orjson.loads(line.removeprefix("data: "))
        assert last["usage"]["completion_tokens"] == 5
        assert arrivals[-1] - arrivals[0] > 0.2, "chunks were held back and sent together"

    def test_a_replica_does_what_every_replica_must(self, replica: httpx.Client) -> None:
        check_replica(str(replica.base_url), ENGINE_KEY, "path")

    def test_a_client_that_leaves_stops_the_engine(self, replica: httpx.Client) -> None:
        with replica.stream("POST", "/v1/chat/completions", json=chat("tokens=500 delay_ms=20")) as answer:
            first = orjson.loads(next(answer.iter_lines()).removeprefix("data: "))
        time.sleep(0.3)
        (request,) = replica.get("/scripted/emitted", params={"id": first["id"]}).json()["requests"]
        assert request["state"] == "cut"
        assert request["completion_tokens"] < 100

    def test_nothing_listens_beyond_loopback(self, ray_session: RaySession, running: ApplicationStatus) -> None:
        listening = [
            (process.name(), connection.laddr)
            for process in ray_session.record().processes()
            for connection in process.net_connections(kind="inet")
            if connection.status == psutil.CONN_LISTEN
        ]
        assert len(listening) > 5
        beyond = [found for found in listening if found[1].ip not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")]
        assert beyond == []

    def test_prometheus_and_the_dashboard_name_the_model(
        self, ray_session: RaySession, harness: Harness, app: ServeApplication, replica: httpx.Client
    ) -> None:
        """Ray's own port for metrics has the engine's load and the start's figures; the dashboard the application."""
        replica.post("/v1/chat/completions", json=chat("tokens=2"))
        wanted = (
            "zenray_engine_first_tokens",
            "zenray_replica_fetched_bytes",
            "zenray_autoscaling_wish",
            "serve_autoscaling_desired_replicas",
        )
        shown = rays_metrics(ray_session, "path", *wanted)
        assert all('model_name="path"' in line for line in shown if "zenray" in line)
        token = {"authorization": f"Bearer {ray_session.addresses.token()}"}
        page = httpx.get(f"{ray_session.addresses.dashboard_url}/api/serve/applications/", headers=token).json()
        assert list(page["applications"][app.name]["deployments"]) == ["path"]
        assert app.name.startswith("path--v1--")

    def test_rays_dashboard_asks_for_its_token(self, ray_session: RaySession) -> None:
        url = f"{ray_session.addresses.dashboard_url}/api/serve/applications/"
        assert httpx.get(url).status_code == 401

    def test_requests_straight_to_a_replica_scale_it_up_and_down_without_flapping(
        self, harness: Harness, app: ServeApplication, running: ApplicationStatus
    ) -> None:
        """Up while there is load, then only ever down, to zero; then the proxy's port wakes it."""

        enough = threading.Event()
        body = chat("tokens=20 delay_ms=100")
        prefix = app.route_prefix

        def ask(_: int) -> set[int]:
            statuses: set[int] = set()
            while not enough.is_set():  # a busy machine needs longer to start replicas
                # Asked anew each time, as gateways do: one that is falling asleep has left the targets already.
                status = harness.cluster.serve_status()
                urls = list(status.applications[app.name].replica_urls.values()) or [f"{status.proxy_url}{prefix}"]
                try:
                    answer = httpx.post(f"{urls[0]}/v1/chat/completions", json=body, headers=AUTHORIZED, timeout=120)
                    statuses.add(answer.status_code)
                except httpx.TransportError:
                    if statuses:  # under load no replica may drop a request; before, it may just have fallen asleep
                        raise
            return statuses

        with ThreadPoolExecutor(6) as pool:
            asking = [pool.submit(ask, number) for number in range(6)]
            try:
                harness.application(
                    app.name,
                    lambda a: len(a.replica_urls) == 3 or any(one.done() for one in asking),
                    within_s=120,  # an end, not a bound: a busy machine starts replicas slowly
                )
            finally:
                enough.set()
            assert [one.result() for one in asking] == [{200}] * 6
        counts: list[int] = []
        ended_at = time.monotonic()
        while not counts or counts[-1] > 0:
            status = harness.cluster.serve_status().applications[app.name]
            counts.append(len(status.replica_urls) + status.starting_replicas)
            assert time.monotonic() - ended_at < 60, counts
            time.sleep(0.1)
        assert counts == sorted(counts, reverse=True), "replicas were started after the load had ended"
        settled_until = time.monotonic() + 2
        while time.monotonic() < settled_until:
            assert harness.cluster.serve_status().applications[app.name].starting_replicas == 0
            time.sleep(0.2)

        proxy_url = harness.cluster.serve_status().proxy_url
        answer = httpx.post(
            f"{proxy_url}{app.route_prefix}/v1/completions", json={"prompt": "x"}, headers=AUTHORIZED, timeout=30
        )
        assert answer.json()["usage"]["completion_tokens"] == 16
        harness.application(app.name, lambda a: len(a.replica_urls) == 1)

    def test_a_killed_replica_is_replaced(
        self, harness: Harness, app: ServeApplication, running: ApplicationStatus, ray_session: RaySession
    ) -> None:
        ((replica_id, url),) = running.replica_urls.items()
        with pytest.raises(httpx.HTTPError):
            httpx.post(f"{url}/v1/chat/completions", json=chat("tokens=2 fail_after=1 fail=die"), headers=AUTHORIZED)
        begun_at = time.monotonic()
        harness.application(app.name, lambda a: replica_id not in a.replica_urls)
        print(f"a dead replica left the targets after {time.monotonic() - begun_at:.1f} s")
        assert time.monotonic() - begun_at < 10


class TestTheEndOfAnApplication:
    def test_what_cannot_run_says_why_and_a_replica_that_leaves_finishes_its_streams(self, harness: Harness) -> None:
        corrupt = harness.publisher.application("corrupt", tokens=3)
        stored = Path(harness.publisher.root) / "store" / "zen" / "corrupt" / "v1" / "safetensors" / "script.json"
        stored.chmod(0o600)
        stored.write_bytes(b'{"tokens":4}')
        app = harness.publisher.application("leaving", tokens=60, delay_ms=50, drain_s=20)
        keyless = app.model_copy(update={"name": "keyless", "route_prefix": "/keyless", "runtime_env": {}})
        harness.cluster.apply([corrupt, keyless, app])
        failed = harness.application(corrupt.name, lambda a: a.state is ApplicationState.DEPLOY_FAILED)
        assert "CorruptData" in failed.message
        assert "script.json" in failed.message
        assert "Traceback" not in failed.message
        failed = harness.application("keyless", lambda a: a.state is ApplicationState.DEPLOY_FAILED)
        assert "VLLM_API_KEY is not set" in failed.message

        (url,) = harness.application(app.name, lambda a: bool(a.replica_urls)).replica_urls.values()
        begun = threading.Event()

        def ask() -> str:
            with httpx.stream(
                "POST", f"{url}/v1/chat/completions", json=chat("tokens=60"), headers=AUTHORIZED
            ) as answer:
                lines = answer.iter_lines()
                first = next(lines)
                begun.set()
                return first + "".join(lines)

        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(ask)
            assert begun.wait(5)
            harness.cluster.apply([])
            assert asked.result(timeout=60).endswith("data: [DONE]")
        harness.until(lambda status: not status.applications)
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", httpx.URL(url).port or 0)) != 0


@pytest.mark.nightly
def test_real_vllm_takes_the_same_path(ray_session: RaySession, harness: Harness, tmp_path: Path) -> None:
    """A model of random weights on real vLLM, in a replica with a port of its own; e2e does this with a real model."""
    weights = tmp_path / "weights"
    make_tiny_model(weights)
    publisher = harness.publisher
    engine = EngineSettings(dtype="float32", max_model_len=256, kv_cache_bytes=1 << 26)
    spec = DeploymentSpec(model="tiny", version="v1", engine=engine, graceful_shutdown_timeout_s=5)
    publish(open_store(publisher.storage), spec.ref(), weights)
    app = publisher.serving(spec)
    harness.cluster.apply([app])
    status = harness.until(lambda s: bool(s.applications[app.name].replica_urls), within_s=150)
    (url,) = status.applications[app.name].replica_urls.values()
    check_replica(url, ENGINE_KEY, "tiny")
    of_vllm = ("num_requests_running", "generation_tokens_total", "time_to_first_token_seconds_bucket")
    shown = rays_metrics(ray_session, "tiny", *(f"vllm_{name}" for name in of_vllm))
    assert all('model_name="tiny"' in line and 'engine="0"' in line for line in shown)
    assert max(float(line.rsplit(" ", 1)[1]) for line in shown if "generation_tokens_total" in line) > 0
    harness.cluster.apply([])
