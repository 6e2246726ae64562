"""What Ray Serve costs at a replica's own port: the scripted engine under uvicorn alone, and in replicas.

    python -m benchmarks.replica_port [--quick]

The engine makes a token in no time, so that all that is seen is the way: every other millisecond would hide it. One Ray
head holds a replica for each way of setting Ray up; each round asks all of them in turn, uvicorn alone first and last
by turns, and ratios are taken within a round. CPU time is the server process's own, and swings less than the clock.
"""

from __future__ import annotations

import argparse
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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.load import Load, Outcome, drive
from benchmarks.report import Cell, print_report
from zenray.cluster.head import LocalRay
from zenray.cluster.local import LocalCluster
from zenray.cluster.session import SessionRecord
from zenray.spec.deployments import DeploymentSpec, EngineSettings
from zenray.spec.platform import RaySettings, StorageSettings
from zenray.spec.serving import ReplicaLaunch, ServeApplication
from zenray.storage.opening import open_store
from zenray.storage.versions import publish

MODEL = "scripted"
CLIENTS = 16
TOKENS = 64
PACE_MS = 10  # from token to token: about what a small model does on two cores
SCRIPT = {"tokens": 4096}  # more than is asked for: `max_tokens` decides
START_TIMEOUT_S = 120.0
THREAD = "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD"
# Each replica's own environment is stronger than what the head hands down, so one head holds them all.
WAYS: dict[str, dict[str, str]] = {
    "replica, as zenray sets Ray up": {},
    "the same at nice 15": {},
    "application in its own thread": {THREAD: "1"},
    "the same at nice 15: Ray's defaults": {THREAD: "1"},
    "throughput optimized": {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", THREAD: "0"},
}
NICE = {"the same at nice 15": 15, "the same at nice 15: Ray's defaults": 15}


@dataclass(frozen=True)
class Sizes:
    rounds: int
    single_requests: int  # of one token, by one client, in each round
    requests_per_client: int  # of each of the clients, in each round, whole and streamed
    paced_per_client: int  # the same, streamed at an engine's pace


FULL = Sizes(rounds=9, single_requests=300, requests_per_client=20, paced_per_client=4)
QUICK = Sizes(rounds=5, single_requests=200, requests_per_client=15, paced_per_client=2)


@dataclass
class Target:
    """One server, and what was measured on it, round by round."""

    name: str
    url: str
    key: str
    process: psutil.Process
    p50_ms: list[float] = field(default_factory=list)
    requests_per_s: list[float] = field(default_factory=list)
    tokens_per_s: list[float] = field(default_factory=list)
    cpu_us_per_token: list[float] = field(default_factory=list)

    def measure(self, sizes: Sizes) -> None:
        one = self._drive(1, sizes.single_requests, 1, stream=False)
        self.p50_ms.append(1e3 * statistics.median(one.latency_s))
        whole = self._drive(CLIENTS, sizes.requests_per_client, TOKENS, stream=False)
        self.requests_per_s.append(len(whole.latency_s) / whole.took_s)
        streamed = self._drive(CLIENTS, sizes.requests_per_client, TOKENS, stream=True)
        self.tokens_per_s.append(streamed.tokens_per_s)
        cpu_before_s = self._cpu_s()
        paced = self._drive(CLIENTS, sizes.paced_per_client, TOKENS, stream=True, prefix=f"[[delay_ms={PACE_MS}]] ")
        self.cpu_us_per_token.append(1e6 * (self._cpu_s() - cpu_before_s) / paced.output_tokens)

    def forget(self) -> None:
        for series in (self.p50_ms, self.requests_per_s, self.tokens_per_s, self.cpu_us_per_token):
            series.clear()

    def _cpu_s(self) -> float:
        used = self.process.cpu_times()
        return used.user + used.system

    def _drive(self, clients: int, requests: int, max_tokens: int, *, stream: bool, prefix: str = "") -> Outcome:
        load = Load(f"{self.url}/v1", self.key, MODEL, clients, requests, max_tokens, stream, seed=0, prefix=prefix)
        return drive(load)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.replica_port", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="fewer requests; within three minutes")
    for ending in (signal.SIGTERM, signal.SIGINT):  # Ray is stopped however this ends
        signal.signal(ending, lambda *_: sys.exit(1))
    sizes = QUICK if parser.parse_args().quick else FULL
    key = secrets.token_urlsafe(24)
    with uvicorn_up(key) as alone, replicas_up(key) as replicas:
        targets = [alone, *replicas]
        for number in range(sizes.rounds + 1):
            for target in targets if number % 2 else reversed(targets):
                target.measure(sizes)
                if number == 0:
                    target.forget()  # connections, caches and allocators are warm now
            print(f"{time.strftime('%H:%M:%S')}  round {number} of {sizes.rounds}", flush=True)
    report(alone, replicas, sizes)


@contextmanager
def uvicorn_up(key: str) -> Iterator[Target]:
    command = [sys.executable, "-m", "zenray.serving.engine.scripted", "--model", MODEL]
    command += ["--script", " ".join(f"{name}={value}" for name, value in SCRIPT.items())]
    environment = os.environ | {"VLLM_API_KEY": key}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            port = json.loads(process.stdout.readline())["port"]
            yield Target("uvicorn alone", f"http://127.0.0.1:{port}", key, psutil.Process(process.pid))
        finally:
            process.terminate()


@contextmanager
def replicas_up(key: str) -> Iterator[list[Target]]:
    """One Ray head, as `zenray up` starts it, and an application for each of WAYS."""
    home = Path(tempfile.mkdtemp(prefix="zr-", dir="/tmp"))  # a short name: Ray's socket paths are limited
    ray = LocalRay(home, RaySettings(gcs_port=0, dashboard_port=0, serve_port=0, first_replica_port=33000))
    try:
        addresses = ray.start()
        cluster = LocalCluster(addresses.dashboard_url, token=addresses.token, serve_port=addresses.serve_port)
        ways = {name: application(home, f"way{index}", key, WAYS[name]) for index, name in enumerate(WAYS)}
        cluster.apply(list(ways.values()))
        urls = await_replicas(cluster, ways)
        targets = [Target(name, url, key, process_at(home, url)) for name, url in urls.items()]
        for target in targets:
            renice(target.process, NICE.get(target.name, 0))
        yield targets
        cluster.close()
    finally:
        ray.stop()
        shutil.rmtree(home, ignore_errors=True)


def application(home: Path, version: str, key: str, environment: dict[str, str]) -> ServeApplication:
    storage = StorageSettings(uri=f"file:{home / 'store'}")
    engine = EngineSettings(kind="scripted")
    spec = DeploymentSpec(
        model=MODEL, version=version, engine=engine, cpus_per_replica=0.1, graceful_shutdown_timeout_s=0
    )
    files = home / "files" / version
    files.mkdir(parents=True)
    (files / "script.json").write_text(json.dumps(SCRIPT), encoding="utf-8")
    publish(open_store(storage), spec.ref(), files)
    launch = ReplicaLaunch(deployment=spec, storage=storage, cache_dir=str(home / "cache"))
    return ServeApplication(
        name=spec.revision(),
        route_prefix=f"/{spec.revision()}",
        args=launch.model_dump(mode="json"),
        runtime_env={"env_vars": {"VLLM_API_KEY": key} | environment},
    )


def await_replicas(cluster: LocalCluster, ways: dict[str, ServeApplication]) -> dict[str, str]:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while True:
        found = cluster.serve_status().applications
        urls = {name: list(found[app.name].replica_urls.values()) for name, app in ways.items() if app.name in found}
        if len(urls) == len(ways) and all(urls.values()):
            return {name: listed[0].rstrip("/") for name, listed in urls.items()}
        if time.monotonic() > deadline_s:
            sys.exit(f"Not all replicas were up after {START_TIMEOUT_S:.0f} s: {found}")
        time.sleep(0.5)


def process_at(home: Path, url: str) -> psutil.Process:
    """The process of the session that listens at this address."""
    port = int(url.split("/")[2].rpartition(":")[2])
    record = SessionRecord.read(home / "ray.json")
    for process in record.processes() if record else ():
        listening = [c for c in process.net_connections(kind="tcp") if c.status == psutil.CONN_LISTEN]
        if any(connection.laddr.port == port for connection in listening):
            return process
    raise RuntimeError(f"no process of the session listens on port {port}")


def renice(process: psutil.Process, niceness: int) -> None:
    """Every thread of it: Linux keeps niceness by thread."""
    for thread in process.threads():
        os.setpriority(os.PRIO_PROCESS, thread.id, niceness)


def report(alone: Target, replicas: list[Target], sizes: Sizes) -> None:
    """Medians over the rounds; differences and ratios are taken within each round first."""
    rows: list[list[Cell]] = []
    result: dict[str, dict[str, float]] = {}
    for target in (alone, *replicas):
        added_ms = statistics.median(mine - other for mine, other in zip(target.p50_ms, alone.p50_ms, strict=True))
        requests = ratio(target.requests_per_s, alone.requests_per_s)
        tokens = ratio(target.tokens_per_s, alone.tokens_per_s)
        cpu_us = statistics.median(target.cpu_us_per_token)
        result[target.name] = {
            "added_p50_ms": round(added_ms, 3),
            "requests_ratio": round(requests, 4),
            "tokens_ratio": round(tokens, 4),
            "cpu_us_per_token": round(cpu_us, 1),
        }
        p50_ms = statistics.median(target.p50_ms)
        per_s = statistics.median(target.requests_per_s), statistics.median(target.tokens_per_s)
        rows.append([target.name, p50_ms, added_ms, per_s[0], requests, per_s[1], tokens, cpu_us])
    columns = [
        "server",
        "1 token: p50 ms",
        "added",
        "requests/s",
        "ratio",
        "tokens/s",
        "ratio",
        f"CPU µs/token at {PACE_MS} ms",
    ]
    notes = [
        f"{sizes.rounds} rounds after one thrown away; in each {sizes.single_requests} requests of one token by one "
        f"client, and {CLIENTS} clients x {sizes.requests_per_client} answers of {TOKENS} tokens, whole and streamed; "
        f"CPU time of the server's process while each streams {sizes.paced_per_client}, a token every {PACE_MS} ms.",
    ]
    print_report("The scripted engine, at its port", columns, rows, result, notes=notes)


def ratio(mine: list[float], other: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(mine, other, strict=True))


if __name__ == "__main__":
    main()
