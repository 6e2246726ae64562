"""Ray Serve and Ray Jobs through the REST API of a Ray dashboard: the backend of a cluster on this machine."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

import httpx

from zenray.spec.errors import ClusterUnavailable
from zenray.spec.job_life import ClusterJob, ClusterJobState, JobLaunch
from zenray.spec.serving import ApplicationState, ApplicationStatus, ServeApplication, ServeStatus

_APPLICATIONS = "/api/serve/applications/"
_JOBS = "/api/jobs/"
_TIMEOUT_S = 30.0
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_TRACEBACK = "Traceback (most recent call last):"
_STARTING = frozenset({"STARTING", "RECOVERING", "UPDATING", "PENDING_MIGRATION"})


class LocalCluster:
    """The ClusterBackend of a local Ray head. `token` is asked for at every call: it may change with a restart."""

    def __init__(
        self,
        dashboard_url: str,
        *,
        token: Callable[[], str],
        serve_port: int,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._token = token
        self._serve_port = serve_port
        self._client = httpx.Client(base_url=dashboard_url, timeout=_TIMEOUT_S, trust_env=False, transport=transport)

    def serve_status(self) -> ServeStatus:
        """See ClusterBackend."""
        return read_status(self._call("GET", _APPLICATIONS).json())

    def apply(self, applications: Sequence[ServeApplication]) -> None:
        """See ClusterBackend. Nothing wished and nothing there starts nothing."""
        if not applications and not self._call("GET", _APPLICATIONS).json()["controller_info"]:
            return
        self._call("PUT", _APPLICATIONS, json=serve_document(applications, serve_port=self._serve_port))

    def submit(self, launch: JobLaunch) -> None:
        """See ClusterBackend. The job runs with this process's Python."""
        answer = self._ask("POST", _JOBS, json=job_document(launch))
        # Ray refuses an id that it has, with 400 or 500 by version, and its words in a traceback.
        if answer.status_code != 200 and f"{launch.id} already exists" not in answer.text:
            raise _refusal(answer, "POST", _JOBS)

    def jobs(self) -> dict[str, ClusterJob]:
        """See ClusterBackend. Drivers that nobody submitted are left out."""
        found = (read_job(details) for details in self._call("GET", _JOBS).json())
        return {job.id: job for job in found if job is not None}

    def job_logs(self, id: str) -> str:
        """See ClusterBackend."""
        path = f"{_JOBS}{id}/logs"
        answer = self._ask("GET", path)
        if answer.status_code == 404:
            return ""
        if answer.status_code != 200:
            raise _refusal(answer, "GET", path)
        return _COLOUR.sub("", answer.json()["logs"] or "")

    def cancel(self, id: str) -> None:
        """See ClusterBackend."""
        path = f"{_JOBS}{id}/stop"
        answer = self._ask("POST", path)
        if answer.status_code not in (200, 404):
            raise _refusal(answer, "POST", path)

    def close(self) -> None:
        self._client.close()

    def _call(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        answer = self._ask(method, path, **arguments)
        if answer.status_code != 200:
            raise _refusal(answer, method, path)
        return answer

    def _ask(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        try:
            headers = {"authorization": f"Bearer {self._token()}"}
            return self._client.request(method, path, headers=headers, **arguments)
        except (httpx.HTTPError, OSError) as error:
            raise ClusterUnavailable(
                f"Ray's dashboard at {self._client.base_url} cannot be reached: {error or type(error).__name__}.",
                hint="The supervisor starts a dead Ray again; its log lies in the folder of the platform.",
                retry_after_s=1,
            ) from None


def _refusal(answer: httpx.Response, method: str, path: str) -> ClusterUnavailable:
    if answer.status_code in (401, 403):
        return ClusterUnavailable(
            f"Ray refused the token ({answer.status_code}).", hint="Another Ray may listen on this port."
        )
    return ClusterUnavailable(
        f"Ray's dashboard answered {method} {path} with {answer.status_code}: {condense(answer.text)[:500]}",
        retry_after_s=1,
    )


def job_document(launch: JobLaunch) -> dict[str, Any]:
    """The body with which Ray Jobs starts an attempt; Ray runs the entrypoint in a shell."""
    return {
        "submission_id": launch.id,
        "entrypoint": shlex.join([sys.executable, "-m", launch.module, *launch.arguments]),
        "runtime_env": {"env_vars": launch.environment},
    }


def read_job(details: dict[str, Any]) -> ClusterJob | None:
    """One entry of Ray's list of jobs; None for a driver that was not submitted."""
    if details.get("type") != "SUBMISSION":
        return None
    return ClusterJob(
        id=details["submission_id"],
        state=ClusterJobState(details["status"]),
        message=condense(details.get("message") or ""),
    )


def serve_document(applications: Sequence[ServeApplication], *, serve_port: int) -> dict[str, Any]:
    """The whole Serve config document (`serveConfigV2`): these applications, bound to loopback."""
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": serve_port},
        "logging_config": {"enable_access_log": False},  # the gateway keeps the log; Serve's costs on every request
        "applications": [application.model_dump() for application in applications],
    }


def read_status(details: dict[str, Any]) -> ServeStatus:
    """Ray's `ServeInstanceDetails` as ServeStatus. A replica counts as running once its own port is a target."""
    targets: dict[str, str] = {}  # actor name → base URL
    for group in details.get("target_groups", ()):
        if group["protocol"] == "HTTP":
            prefix = group["route_prefix"].rstrip("/")
            targets |= {t["name"]: f"http://{t['ip']}:{t['port']}{prefix}" for t in group["targets"]}
    applications = {name: _application(name, found, targets) for name, found in details["applications"].items()}
    options = details.get("http_options")
    proxies = details.get("proxies", {}).values()
    up = options and any(proxy["status"] == "HEALTHY" for proxy in proxies)
    return ServeStatus(
        applications=applications, proxy_url=f"http://{options['host']}:{options['port']}" if options and up else None
    )


def _application(name: str, details: dict[str, Any], targets: dict[str, str]) -> ApplicationStatus:
    replicas = [r for deployment in details["deployments"].values() for r in deployment["replicas"]]
    running = {r["replica_id"]: targets[r["actor_name"]] for r in replicas if r["actor_name"] in targets}
    said = [details["message"], *(deployment["message"] for deployment in details["deployments"].values())]
    wished = (details.get("deployed_app_config") or {}).get("route_prefix")
    return ApplicationStatus(
        name=name,
        state=ApplicationState(details["status"]),
        message="\n".join(dict.fromkeys(condense(message) for message in said if message)),
        route_prefix=details["route_prefix"] or wished or "/",
        replica_urls=running,
        starting_replicas=sum(1 for replica in replicas if replica["state"] in _STARTING),
    )


def condense(message: str) -> str:
    """What went wrong, without the stack: Ray's own words, and the exceptions with their messages, each once."""
    kept: list[str] = []
    in_frame = False
    for line in _COLOUR.sub("", message).splitlines():
        in_frame = line.startswith('  File "') or (in_frame and line.startswith("    "))
        shown = line.replace(_TRACEBACK, "").rstrip()
        if not in_frame and shown and not shown.startswith("ray::") and shown not in kept:
            kept.append(shown)
    return "\n".join(kept)
