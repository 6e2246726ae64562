"""Reading what Ray's dashboard says: states, addresses, and messages without a stack."""

from __future__ import annotations

from typing import Any

import httpx
import orjson
import pytest

from zenray.cluster.local import LocalCluster, condense, read_status
from zenray.spec.errors import ClusterUnavailable
from zenray.spec.job_life import JobLaunch
from zenray.spec.serving import ApplicationState, ServeApplication

EMPTY: dict[str, Any] = {"controller_info": {}, "proxies": {}, "applications": {}, "target_capacity": None}


def details(*, target: str, replica_state: str = "RUNNING") -> dict[str, Any]:
    """As Ray 2.60 answers, cut down to what is read: one application with one replica."""
    replica = {"replica_id": "2hsyx8i5", "actor_name": "SERVE_REPLICA::app#m#2hsyx8i5", "state": replica_state}
    application = {
        "route_prefix": "/app",
        "status": "RUNNING",
        "message": "",
        "deployed_app_config": {"route_prefix": "/app"},
        "deployments": {"m": {"message": "", "replicas": [replica]}},
    }
    port = 30000 if target.startswith("SERVE_REPLICA") else 8000
    targets = [{"ip": "127.0.0.1", "port": port, "instance_id": "", "name": target}]
    return EMPTY | {
        "controller_info": {"node_id": "n"},
        "http_options": {"host": "127.0.0.1", "port": 8000},
        "proxies": {"n": {"status": "HEALTHY"}},
        "applications": {"app": application},
        "target_groups": [
            {"protocol": "HTTP", "route_prefix": "/app", "targets": targets, "app_name": "app"},
            {"protocol": "gRPC", "route_prefix": "/app", "targets": targets, "app_name": "app"},
        ],
    }


def test_a_running_replica_has_the_address_of_its_own_port() -> None:
    status = read_status(details(target="SERVE_REPLICA::app#m#2hsyx8i5"))
    assert status.proxy_url == "http://127.0.0.1:8000"
    assert status.applications["app"].replica_urls == {"2hsyx8i5": "http://127.0.0.1:30000/app"}


def test_the_proxy_is_no_replica() -> None:
    found = read_status(details(target="SERVE_PROXY_ACTOR-n", replica_state="STARTING")).applications["app"]
    assert found.replica_urls == {}
    assert (found.state, found.starting_replicas) == (ApplicationState.RUNNING, 1)


def test_nothing_was_ever_applied() -> None:
    assert read_status(EMPTY).applications == {}
    assert read_status(EMPTY).proxy_url is None


RAY_MESSAGE = """\
Deploying app 'toy' failed with exception:
Traceback (most recent call last):
  File "a.py", line 926, in _reconcile
    args = ray.get(
ray.exceptions.RayTaskError(RuntimeError): \x1b[36mray::build_serve_application()\x1b[39m (pid=1, ip=127.0.0.1)
  File "b.py", line 1843, in build
    raise RuntimeError(err_str) from None
RuntimeError: Traceback (most recent call last):
  File "c.py", line 29, in options
    spec = launch.deployment
zenray.spec.errors.CorruptData: model.safetensors: 5 bytes differ.
Publish it again.
"""


def test_a_message_keeps_the_cause_and_loses_the_stack() -> None:
    assert condense(RAY_MESSAGE) == (
        "Deploying app 'toy' failed with exception:\n"
        "ray.exceptions.RayTaskError(RuntimeError): ray::build_serve_application() (pid=1, ip=127.0.0.1)\n"
        "RuntimeError:\n"
        "zenray.spec.errors.CorruptData: model.safetensors: 5 bytes differ.\nPublish it again."
    )
    assert condense("all is well") == "all is well"


def cluster_answering(handler: Any) -> LocalCluster:
    return LocalCluster("http://ray", token=lambda: "secret", serve_port=8123, transport=httpx.MockTransport(handler))


def test_the_document_binds_to_loopback_and_carries_the_token() -> None:
    seen: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json=EMPTY)

    cluster_answering(handler).apply([ServeApplication(name="a", route_prefix="/a", args={"x": 1})])
    (request,) = seen
    document = orjson.loads(request.content)
    assert request.headers["authorization"] == "Bearer secret"
    assert document["http_options"] == {"host": "127.0.0.1", "port": 8123}
    assert document["applications"][0]["import_path"] == "zenray.serving.app:build"


def test_wishing_for_nothing_where_nothing_is_starts_nothing() -> None:
    methods: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        methods.append(request.method)
        return httpx.Response(200, json=EMPTY)

    cluster_answering(handler).apply([])
    assert methods == ["GET"]


@pytest.mark.parametrize(("status", "said"), [(401, "token"), (500, "500"), (503, "GCS may be down")])
def test_a_cluster_that_does_not_answer_well_is_unavailable(status: int, said: str) -> None:
    with pytest.raises(ClusterUnavailable, match=said):
        cluster_answering(lambda _: httpx.Response(status, text="The GCS may be down")).serve_status()


def test_a_cluster_that_is_away_is_unavailable() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("connection refused", request=request)

    with pytest.raises(ClusterUnavailable, match="connection refused"):
        cluster_answering(handler).serve_status()


def test_a_job_is_submitted_with_its_id_and_quoted() -> None:
    seen: list[Any] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(orjson.loads(request.content))
        return httpx.Response(200, json={"submission_id": "a-1"})

    launch = JobLaunch(id="a-1", arguments=("--store", "file:/a folder"), environment={"A": "1"})
    cluster_answering(handler).submit(launch)
    (document,) = seen
    assert document["submission_id"] == "a-1" and document["runtime_env"] == {"env_vars": {"A": "1"}}
    assert document["entrypoint"].endswith("-m zenray.training --store 'file:/a folder'")


def test_an_id_that_ray_has_is_left_alone_and_any_other_refusal_is_said() -> None:
    known = "ValueError: Job with submission_id a-1 already exists. Please use a different submission_id."
    cluster_answering(lambda _: httpx.Response(500, text=known)).submit(JobLaunch(id="a-1"))
    with pytest.raises(ClusterUnavailable, match="No available agent"):
        cluster_answering(lambda _: httpx.Response(500, text="No available agent")).submit(JobLaunch(id="a-1"))


def test_only_submitted_jobs_are_read() -> None:
    listed = [
        {"type": "DRIVER", "submission_id": None, "status": "RUNNING"},
        {
            "type": "SUBMISSION",
            "submission_id": "a-1",
            "status": "FAILED",
            "message": "exit code 1\n\x1b[31mboom\x1b[0m",
        },
    ]
    (job,) = cluster_answering(lambda _: httpx.Response(200, json=listed)).jobs().values()
    assert (job.id, job.state, job.message) == ("a-1", "FAILED", "exit code 1\nboom")
    unknown = cluster_answering(lambda _: httpx.Response(404, text="does not exist"))
    assert unknown.job_logs("b") == ""
    unknown.cancel("b")
