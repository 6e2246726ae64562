"""Ray Serve through the REST API of a Ray dashboard: the backend of a cluster on this machine."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import httpx

from zenray.spec.errors import ClusterUnavailable
from zenray.spec.serving import ApplicationState, ApplicationStatus, ServeApplication, ServeStatus

_PATH = "/api/serve/applications/"
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
        return read_status(self._call("GET").json())

    def apply(self, applications: Sequence[ServeApplication]) -> None:
        """See ClusterBackend. Nothing wished and nothing there starts nothing."""
        if not applications and not self._call("GET").json()["controller_info"]:
            return
        self._call("PUT", json=serve_document(applications, serve_port=self._serve_port))

    def close(self) -> None:
        self._client.close()

    def _call(self, method: str, **arguments: Any) -> httpx.Response:
        try:
            headers = {"authorization": f"Bearer {self._token()}"}
            answer = self._client.request(method, _PATH, headers=headers, **arguments)
        except (httpx.HTTPError, OSError) as error:
            raise ClusterUnavailable(
                f"Ray's dashboard at {self._client.base_url} cannot be reached: {error or type(error).__name__}.",
                hint="The supervisor starts a dead Ray again; its log lies in the folder of the platform.",
                retry_after_s=1,
            ) from None
        if answer.status_code == 200:
            return answer
        if answer.status_code in (401, 403):
            raise ClusterUnavailable(
                f"Ray refused the token ({answer.status_code}).", hint="Another Ray may listen on this port."
            )
        raise ClusterUnavailable(
            f"Ray's dashboard answered {method} {_PATH} with {answer.status_code}: {answer.text[:500]}", retry_after_s=1
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
