"""From zero replicas to the first token, against the start of vLLM's own server on the same model and machine.

    python -m benchmarks.cold_start [--quick]

On a platform of its own (`zenray up`) SmolLM2-135M-Instruct is deployed with no replica at rest; when it has fallen
asleep, one question to the gateway wakes it, and the clock runs until the answer of one token is there. vLLM's own
server gets the same weights, settings and threads: from its exec until it has answered the same question. In turn,
several rounds; the weights lie on the node's disk for both.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time

import httpx

from benchmarks.end_to_end import MODEL, Target, benchmark_home, local_deployment, own_server, platform_up, tell
from benchmarks.report import print_report
from benchmarks.vllm_server import Server
from zenray.cli.client import ControlClient
from zenray.cli.home import Home

SLEEPY = {"min_replicas": 0, "max_replicas": 1, "upscale_delay_s": 0, "downscale_delay_s": 1}
QUESTION = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
TIMEOUT_S = 240.0


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cold_start", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="two rounds instead of five")
    rounds = 2 if parser.parse_args().quick else 5
    home = benchmark_home()
    deployment = local_deployment() | {"autoscaling": SLEEPY, "graceful_shutdown_timeout_s": 5}
    platform_s: list[float] = []
    vllm_s: list[float] = []
    with platform_up(home, deployment) as target:
        control = ControlClient.connect(home)
        for number in range(rounds):
            await_sleep(control)
            turns = [(platform_s, lambda: wake(target)), (vllm_s, lambda: start(home))]
            for seconds, turn in turns if number % 2 else turns[::-1]:
                seconds.append(turn())
            tell(f"round {number + 1}: {platform_s[-1]:.1f} s from zero, vLLM's own {vllm_s[-1]:.1f} s")
    report(platform_s, vllm_s)


def await_sleep(control: ControlClient) -> None:
    """Until no replica is left, and the machine is quiet again."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline_s:
        row = next(row for row in control.get("/admin/deployments")["data"] if row["model"] == MODEL)
        if row["state"] == "asleep":
            return time.sleep(2)
        time.sleep(0.5)
    sys.exit(f"{MODEL} did not fall asleep within {TIMEOUT_S:.0f} s: {row}")


def wake(target: Target) -> float:
    """Seconds from the question to the gateway to its answer, of a model that sleeps."""
    began_s = time.perf_counter()
    ask(target.base_url, target.api_key)
    return time.perf_counter() - began_s


def start(home: Home) -> float:
    """Seconds from the exec of vLLM's own server to its first answer."""
    with own_server(home) as server:
        while True:
            try:
                ask(f"{server.url}/v1", server.key)
                return time.perf_counter() - server.began_s
            except httpx.TransportError:
                give_up_if_dead(server)
                time.sleep(0.05)


def give_up_if_dead(server: Server) -> None:
    if server.process.poll() is not None or time.perf_counter() - server.began_s > TIMEOUT_S:
        lines = server.log.read_text(errors="replace").splitlines()[-25:]
        sys.exit("vLLM's own server did not start:\n" + "\n".join(lines))


def ask(url: str, key: str) -> None:
    answer = httpx.post(
        f"{url}/chat/completions",
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
            ["a sleeping deployment, asked through the gateway", statistics.median(platform_s), min(platform_s)],
        ],
        {"ratio": round(statistics.median(ratios), 4), "ratio_rounds": [round(value, 4) for value in ratios]},
        notes=[f"{len(ratios)} rounds, in turn; the weights lie on the node's disk for both."],
    )


if __name__ == "__main__":
    main()
