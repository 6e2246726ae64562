"""From zero replicas to the first token, against the start of vLLM's own server on the same model and machine.

    ZENRAY_HOME=.zenray/demo python -m benchmarks.cold_start [--quick]

`make demo` or `zenray up` has left SmolLM2-135M-Instruct in the store of ZENRAY_HOME. On a Ray head of its own the
model is deployed with no replica at rest; when it has fallen asleep, one question through Serve's proxy wakes it, as
the gateway does, and the clock runs until the answer of one token is there. vLLM's own server gets the same weights,
settings and threads: from its exec until it has answered the same question. In turn, several rounds.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

from benchmarks.end_to_end import flags, free_port
from benchmarks.report import print_report
from zenray.cli.home import Home
from zenray.cluster.head import LocalRay
from zenray.cluster.local import LocalCluster
from zenray.serving.engine.base import EngineLaunch
from zenray.serving.engine.vllm import engine_arguments, environment
from zenray.spec.deployments import Autoscaling, DeploymentSpec, EngineSettings
from zenray.spec.errors import NotFound
from zenray.spec.platform import RaySettings, StorageSettings
from zenray.spec.serving import ReplicaLaunch, ServeApplication
from zenray.storage.cache import fetch
from zenray.storage.opening import open_store
from zenray.storage.versions import newest

MODEL = "smollm2-135m"
ENGINE = EngineSettings(dtype="bfloat16", max_model_len=2048, max_num_seqs=16, kv_cache_bytes=1 << 28)
QUESTION = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
TIMEOUT_S = 240.0


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cold_start", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="one round instead of five")
    for ending in (signal.SIGTERM, signal.SIGINT):  # Ray is stopped however this ends
        signal.signal(ending, lambda *_: sys.exit(1))
    rounds = 1 if parser.parse_args().quick else 5
    storage = StorageSettings(uri=f"file:{Home.from_environment().root.resolve() / 'store'}")
    try:
        version = newest(open_store(storage), MODEL).ref.version
    except NotFound as error:
        sys.exit(f"{error} Run `make demo` first, and set ZENRAY_HOME to its folder.")
    spec = DeploymentSpec(
        model=MODEL,
        version=version,
        engine=ENGINE,
        autoscaling=Autoscaling(min_replicas=0, upscale_delay_s=0, downscale_delay_s=1),
        graceful_shutdown_timeout_s=5,
    )
    home = Path(tempfile.mkdtemp(prefix="zr-", dir="/tmp"))  # a short name: Ray's socket paths are limited
    ray = LocalRay(home, RaySettings(gcs_port=0, dashboard_port=0, serve_port=0, first_replica_port=34000))
    try:
        addresses = ray.start()
        cluster = LocalCluster(addresses.dashboard_url, token=addresses.token, serve_port=addresses.serve_port)
        platform_s, vllm_s = take_turns(cluster, spec, storage, home, rounds)
        cluster.close()
    finally:
        ray.stop()
        shutil.rmtree(home, ignore_errors=True)
    report(platform_s, vllm_s)


def take_turns(
    cluster: LocalCluster, spec: DeploymentSpec, storage: StorageSettings, home: Path, rounds: int
) -> tuple[list[float], list[float]]:
    key = secrets.token_urlsafe(24)
    folder = fetch(open_store(storage), spec.ref(), home / "cache")  # on the node already, for both
    launch = ReplicaLaunch(deployment=spec, storage=storage, cache_dir=str(home / "cache"))
    app = ServeApplication(
        name=spec.revision(),
        route_prefix=f"/{spec.revision()}",
        args=launch.model_dump(mode="json"),
        runtime_env={"env_vars": {"VLLM_API_KEY": key}},
    )
    cluster.apply([app])
    await_replicas(cluster, app, wanted=1)  # the start that proves it; then it falls asleep
    platform_s: list[float] = []
    vllm_s: list[float] = []
    for number in range(rounds):
        await_replicas(cluster, app, wanted=0)
        if number % 2:
            platform_s.append(wake(cluster, app, key))
            await_replicas(cluster, app, wanted=0)
            vllm_s.append(start_vllm(spec, folder, home, key))
        else:
            vllm_s.append(start_vllm(spec, folder, home, key))
            platform_s.append(wake(cluster, app, key))
        print(f"round {number + 1}: {platform_s[-1]:.1f} s from zero, vLLM's own {vllm_s[-1]:.1f} s", flush=True)
    return platform_s, vllm_s


def await_replicas(cluster: LocalCluster, app: ServeApplication, *, wanted: int) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while True:
        status = cluster.serve_status()
        found = status.applications.get(app.name)
        count = len(found.replica_urls) + found.starting_replicas if found else 0
        ready = len(found.replica_urls) == wanted and count == wanted if found else False
        if ready and status.proxy_url:
            return
        if time.monotonic() > deadline_s:
            sys.exit(f"Not {wanted} replicas within {TIMEOUT_S:.0f} s: {found}")
        time.sleep(0.2)


def wake(cluster: LocalCluster, app: ServeApplication, key: str) -> float:
    """Seconds from the question to its answer, of a model that sleeps."""
    proxy_url = cluster.serve_status().proxy_url
    began_s = time.perf_counter()
    ask(f"{proxy_url}{app.route_prefix}", key)
    return time.perf_counter() - began_s


def start_vllm(spec: DeploymentSpec, folder: Path, home: Path, key: str) -> float:
    """Seconds from the exec of vLLM's own server to its first answer."""
    launch = EngineLaunch(MODEL, spec.engine, spec.cpus_per_replica, spec.gpus_per_replica)
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags(engine_arguments(launch, folder))]
    command += ["--host", "127.0.0.1", "--port", str(port), "--disable-uvicorn-access-log"]
    variables = os.environ | environment(launch.cpus, launch.gpus) | {"VLLM_API_KEY": key}
    began_s = time.perf_counter()
    with (home / "vllm.log").open("wb") as log:
        process = subprocess.Popen(command, env=variables, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        while True:
            try:
                ask(f"http://127.0.0.1:{port}", key)
                return time.perf_counter() - began_s
            except httpx.TransportError:
                if process.poll() is not None or time.perf_counter() - began_s > TIMEOUT_S:
                    lines = (home / "vllm.log").read_text(errors="replace").splitlines()[-25:]
                    sys.exit("vLLM's own server did not start:\n" + "\n".join(lines))
                time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def ask(url: str, key: str) -> None:
    answer = httpx.post(
        f"{url}/v1/chat/completions",
        json=QUESTION,
        headers={"authorization": f"Bearer {key}"},
        timeout=httpx.Timeout(TIMEOUT_S, connect=3),
        trust_env=False,
    )
    answer.raise_for_status()
    if answer.json()["usage"]["completion_tokens"] != 1:
        raise ValueError(f"asked for one token: {answer.text}")


def report(platform_s: list[float], vllm_s: list[float]) -> None:
    """Medians; the ratio is taken within each round first."""
    ratios = [mine / other for mine, other in zip(platform_s, vllm_s, strict=True)]
    print_report(
        f"{MODEL} on {os.cpu_count()} cores: from nothing to the first token",
        ["started", "seconds", "fastest"],
        [
            ["vLLM's own server", statistics.median(vllm_s), min(vllm_s)],
            ["a sleeping deployment, asked through Serve's proxy", statistics.median(platform_s), min(platform_s)],
        ],
        {"ratio": round(statistics.median(ratios), 4), "ratio_rounds": [round(value, 4) for value in ratios]},
        notes=[f"{len(ratios)} rounds, in turn; the weights lie on the node's disk for both."],
    )


if __name__ == "__main__":
    main()
