"""What zenray costs, end to end: the same load on vLLM's own server and through the whole platform, in one run.

    python -m benchmarks.end_to_end [--quick]

Brings up a platform as `zenray up` does (gateway, control, Ray Serve, SmolLM2-135M-Instruct), and beside it vLLM's own
API server on the same weights with the same settings and threads. Then it asks both in turn, several rounds, so that
what disturbs the machine disturbs both. Measured: the median of a request of one token by one client (whole answer),
and the tokens per second of 16 clients that stream 64 tokens each. Only ratios and differences of one run mean much.
"""

from __future__ import annotations

import argparse
import os
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.load import Load, drive
from benchmarks.report import Cell, print_report
from benchmarks.stand_in import wait_for
from benchmarks.vllm_server import Server, vllm_server
from zenray.cli.client import ControlClient
from zenray.cli.home import Home
from zenray.serving.engine.base import EngineLaunch
from zenray.serving.engine.vllm import engine_arguments, environment
from zenray.spec.deployments import DeploymentSpec

MODEL = "smollm2-135m"
CLUSTER_FILE = Path("clusters/local.yaml")
CLIENTS = 16
STREAM_TOKENS = 64
START_TIMEOUT_S = 240.0


@dataclass(frozen=True)
class Sizes:
    rounds: int
    single_requests: int  # of one token, by one client, in each round
    stream_requests: int  # of each of the clients, in each round


FULL = Sizes(rounds=7, single_requests=100, stream_requests=3)
QUICK = Sizes(rounds=3, single_requests=60, stream_requests=2)


@dataclass
class Target:
    """One of the two servers, and what was measured on it, round by round."""

    name: str
    base_url: str
    api_key: str
    p50_ms: list[float] = field(default_factory=list)
    tokens_per_s: list[float] = field(default_factory=list)
    first_chunk_ms: list[float] = field(default_factory=list)

    def measure(self, sizes: Sizes, seed: int) -> None:
        """One round. The first one is to be thrown away: it warms connections, caches and allocators."""
        one = Load(self.base_url, self.api_key, MODEL, 1, sizes.single_requests, 1, stream=False, seed=seed)
        self.p50_ms.append(1e3 * statistics.median(drive(one).latency_s))
        many = Load(
            self.base_url, self.api_key, MODEL, CLIENTS, sizes.stream_requests, STREAM_TOKENS, stream=True, seed=seed
        )
        outcome = drive(many)
        self.tokens_per_s.append(outcome.tokens_per_s)
        self.first_chunk_ms.append(1e3 * statistics.median(outcome.first_chunk_s))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.end_to_end", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="fewer requests; within eight minutes")
    sizes = QUICK if parser.parse_args().quick else FULL
    home = benchmark_home()
    with platform_up(home, local_deployment()) as zenray, own_server(home) as server:
        wait_for(f"{server.url}/health", server.process, server.log, timeout_s=START_TIMEOUT_S)
        vllm = Target("vLLM's own server", f"{server.url}/v1", server.key)
        for number in range(sizes.rounds + 1):
            seed = secrets.randbits(32)  # the same questions for both, and never before
            for target in (vllm, zenray) if number % 2 else (zenray, vllm):
                target.measure(sizes, seed)
            tell(f"round {number} of {sizes.rounds}" + (" (thrown away)" if number == 0 else ""))
    report(vllm, zenray, sizes)


def benchmark_home() -> Home:
    """`$ZENRAY_HOME`, else a home that benchmarks share."""
    os.environ.setdefault("ZENRAY_HOME", ".zenray/benchmark")
    home = Home.from_environment()
    home.root.mkdir(parents=True, exist_ok=True)
    return home


def local_deployment() -> dict[str, Any]:
    """The deployment of SmolLM2 that the local cluster file has."""
    listed = yaml.safe_load(CLUSTER_FILE.read_text(encoding="utf-8"))["deployments"]
    return next(one for one in listed if one["model"] == MODEL)


@contextmanager
def platform_up(home: Home, deployment: dict[str, Any]) -> Iterator[Target]:
    """`zenray up` from the cluster file, on free ports, with a customer; `zenray down` at the end."""
    file = home.root / "platform.yaml"
    document = yaml.safe_load(CLUSTER_FILE.read_text(encoding="utf-8"))
    document["ray"] |= {"gcs_port": 0, "dashboard_port": 0, "serve_port": 0}
    document["control"] |= {"port": 0}
    document["gateway"] |= {"port": 0}
    document["deployments"] = [deployment]
    file.write_text(yaml.safe_dump(document), encoding="utf-8")
    tell("starting the platform")
    zenray = [sys.executable, "-m", "zenray.cli.main"]
    try:
        subprocess.run([*zenray, "up", "-f", str(file), "--detach"], check=True)
        control = ControlClient.connect(home)
        org = f"benchmark-{secrets.token_hex(4)}"
        control.post("/admin/orgs", {"name": org})
        control.post(f"/admin/orgs/{org}/credits", {"amount_usd": "1000", "note": "benchmark"})
        key = control.post("/admin/keys", {"org": org, "scopes": [MODEL], "name": "benchmark"})["key"]
        yield Target("zenray", f"{home.running().gateway_url}/v1", key)
    finally:
        subprocess.run([*zenray, "down"], check=False)


@contextmanager
def own_server(home: Home) -> Iterator[Server]:
    """vLLM's own server, with the weights, settings and threads that the platform's replica has; still loading."""
    spec = DeploymentSpec.model_validate(local_deployment())
    launch = EngineLaunch(MODEL, spec.engine, spec.cpus_per_replica, spec.gpus_per_replica)
    arguments = engine_arguments(launch, served_weights(home))
    with vllm_server(arguments, environment(launch.cpus, launch.gpus), home.logs / "benchmark-vllm.log") as server:
        yield server


def served_weights(home: Home) -> Path:
    """The folder in the node's cache from which the platform's replica was started."""
    folders = sorted((home.cache / "weights" / MODEL).glob("*/safetensors"), key=lambda path: path.stat().st_mtime)
    if not folders:
        sys.exit(f"No weights of {MODEL} in {home.cache / 'weights'}, although it is deployed.")
    return folders[-1]


def tell(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def report(vllm: Target, zenray: Target, sizes: Sizes) -> None:
    """Medians over the rounds; difference and ratio are taken within each round first."""
    added_ms = [ours - theirs for ours, theirs in zip(zenray.p50_ms[1:], vllm.p50_ms[1:], strict=True)]
    ratios = [ours / theirs for ours, theirs in zip(zenray.tokens_per_s[1:], vllm.tokens_per_s[1:], strict=True)]
    rows: list[list[Cell]] = [
        [
            target.name,
            statistics.median(target.p50_ms[1:]),
            statistics.median(target.tokens_per_s[1:]),
            statistics.median(target.first_chunk_ms[1:]),
        ]
        for target in (vllm, zenray)
    ]
    print_report(
        f"{MODEL} on {os.cpu_count()} cores: vLLM's own server and the whole platform",
        [
            "asked",
            "1 token, 1 client: p50 ms",
            f"{CLIENTS} clients x {STREAM_TOKENS} tokens: tokens/s",
            "of these: first chunk p50 ms",
        ],
        rows,
        {
            "added_p50_ms": round(statistics.median(added_ms), 3),
            "throughput_ratio": round(statistics.median(ratios), 4),
            "added_p50_ms_rounds": [round(value, 3) for value in added_ms],
            "throughput_ratio_rounds": [round(value, 4) for value in ratios],
        },
        notes=[
            f"{sizes.rounds} rounds, after one thrown away; in each {sizes.single_requests} requests of one token, and "
            f"{CLIENTS} clients with {sizes.stream_requests} streams each.",
            "Difference and ratio are medians over the rounds; both servers run all the while, and only one is asked.",
        ],
    )


if __name__ == "__main__":
    main()
