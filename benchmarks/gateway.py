"""What the gateway alone costs: against the upstream asked directly, a bare pass-through, and LiteLLM's proxy.

    python -m benchmarks.gateway [--quick]

The upstream is nginx that answers after exactly 20 ms in vLLM's shape; the load is wrk, one thread, 1, 16 and 64
clients that ask for whole answers. The gateway runs two processes with keys, scopes, leases, metering and its log on;
at the end every answer must have been billed. The pass-through is uvicorn with an aiohttp client, two workers, and
does nothing else. LiteLLM (two workers, no database) is installed into an environment of its own below .zenray/bench,
and left out with --quick. All contestants take turns in every round; ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import programs
from benchmarks.report import Cell, print_report
from benchmarks.stand_in import (
    KEY,
    MODEL,
    PROCESSES,
    Standing,
    billed,
    free_port,
    gateway_up,
    passthrough_up,
    running,
    upstream_up,
)  # fmt: skip

CLIENTS = (1, 16, 64)
MOST_SECONDS = 60
LITELLM_SLOWER = 3  # in shorter runs too few of its answers end
LITELLM = "1.109.0"  # 1.82.7 and 1.82.8 on the package index were malicious: never those
LITELLM_HOME = Path(".zenray/bench/litellm")
BODY = {
    "model": MODEL,
    "messages": [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "What is the capital of France?"},
    ],
    "max_tokens": 32,
    "temperature": 0.7,
}
REQUIREMENTS = """
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
for one in map(Requirement, requires("litellm")):
    if one.marker is None or one.marker.evaluate({"extra": "proxy"}):
        extras = "[" + ",".join(one.extras) + "]" if one.extras else ""
        print(one.name + extras + ("" if one.name in ("certifi", "litellm-proxy-extras") else str(one.specifier)))
"""


@dataclass(frozen=True)
class Measured:
    requests_per_s: float
    p50_ms: float
    requests: int


@dataclass
class Contestant:
    name: str
    url: str
    slower: int = 1  # runs are so many times as long
    rounds: dict[int, list[Measured]] = field(default_factory=lambda: {clients: [] for clients in CLIENTS})


def wrk(url: str, clients: int, seconds: int, script: Path) -> Measured:
    """One run, longer when nothing was answered in time. RuntimeError when any answer was not 200."""
    program, environment = programs.wrk()
    command = [
        str(program),
        "-t1",
        f"-c{clients}",
        f"-d{seconds}s",
        "--timeout",
        "30s",
        "--latency",
        "-s",
        str(script),
        url,
    ]
    command[-1] += "/v1/chat/completions"
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    if "Non-2xx" in text or "Socket errors" in text:
        raise RuntimeError(f"{url} with {clients} clients:\n{text}")
    rate, p50, count = (
        re.search(r"Requests/sec:\s+([\d.]+)", text),
        re.search(r"50%\s+([\d.]+)(us|ms|s)\b", text),
        re.search(r"(\d+) requests in", text),
    )
    if not (rate and p50 and count):
        raise RuntimeError(f"wrk said:\n{text}")
    if int(count[1]) == 0 and seconds < MOST_SECONDS:
        return wrk(url, clients, 2 * seconds, script)
    return Measured(float(rate[1]), float(p50[1]) * {"us": 1e-3, "ms": 1.0, "s": 1e3}[p50[2]], int(count[1]))


def write_load(folder: Path) -> Path:
    script = folder / "post.lua"
    script.write_text(
        'wrk.method = "POST"\nwrk.headers["Content-Type"] = "application/json"\n'
        f'wrk.headers["Authorization"] = "Bearer {KEY}"\nwrk.body = [[{json.dumps(BODY)}]]\n'
    )
    return script


def install_litellm() -> str | None:
    """Install once; why it could not be, or None. Of two packages that nothing here uses (certifi's list, migrations of
    a database) any version will do, for the sake of package indexes that are some days behind."""
    python = LITELLM_HOME.absolute() / "bin/python"
    done = LITELLM_HOME / f"installed-{LITELLM}"
    if done.exists():
        return None
    venv.create(LITELLM_HOME, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    try:
        subprocess.run([*pip, "--no-deps", f"litellm=={LITELLM}"], check=True, capture_output=True, text=True)
        listed = subprocess.run([str(python), "-c", REQUIREMENTS], check=True, capture_output=True, text=True).stdout
        requirements = LITELLM_HOME / "requirements.txt"
        requirements.write_text(listed)
        subprocess.run([*pip, "-r", str(requirements)], check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        reasons = [line for line in error.stderr.splitlines() if line.startswith("ERROR")]
        return (reasons or [error.stderr[-300:]])[-1][:300]
    done.touch()
    return None


@contextmanager
def litellm_up(folder: Path, upstream_url: str) -> Iterator[str]:
    port = free_port()
    upstream = {"model": "openai/up", "api_base": upstream_url + "/v1", "api_key": "engine-key"}
    config = {
        "model_list": [{"model_name": MODEL, "litellm_params": upstream}],
        "general_settings": {"master_key": KEY},
    }
    (folder / "litellm.yaml").write_text(json.dumps(config))  # JSON is YAML
    command = [str(LITELLM_HOME.resolve() / "bin/litellm"), "--config", str(folder / "litellm.yaml")]
    command += ["--host", "127.0.0.1", "--port", str(port), "--num_workers", str(PROCESSES)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"}
    url = f"http://127.0.0.1:{port}"
    log = folder / "litellm.log"
    with running(command, url + "/health/liveliness", ready_s=300, log=log, env=environment, cwd=folder):
        yield url


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gateway", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds, without LiteLLM")
    quick = parser.parse_args().quick
    rounds, seconds = (2, 2) if quick else (4, 3)
    why_not = "left out by --quick" if quick else install_litellm()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        script = write_load(folder)
        upstream = stack.enter_context(upstream_up(folder))
        gateway, control, _ = stack.enter_context(gateway_up(folder / "gateway", Standing([upstream])))
        contestants = [
            Contestant("direct", upstream),
            Contestant("pass-through", stack.enter_context(passthrough_up(folder, upstream))),
            Contestant("gateway", gateway),
        ]
        if why_not is None:
            contestants.append(Contestant("litellm", stack.enter_context(litellm_up(folder, upstream)), LITELLM_SLOWER))
        answered = [wrk(one.url, 16, 1, script).requests for one in contestants][2]
        for number in range(rounds):
            for clients in CLIENTS:
                for one in contestants if number % 2 else contestants[::-1]:
                    one.rounds[clients].append(wrk(one.url, clients, seconds * one.slower, script))
            print(f"round {number + 1} of {rounds}", flush=True)
        answered += sum(run.requests for runs in contestants[2].rounds.values() for run in runs)
        found = billed(control, answered)["events"]
        if found < answered:
            raise RuntimeError(f"{answered} answers, and only {found} were billed")
    report({one.name: one for one in contestants}, why_not, rounds, seconds)


def report(contestants: dict[str, Contestant], why_not: str | None, rounds: int, seconds: int) -> None:
    def within(name: str, other: str, clients: int, how: Callable[[Measured, Measured], float]) -> float | None:
        if other not in contestants:
            return None
        pairs = zip(contestants[name].rounds[clients], contestants[other].rounds[clients], strict=True)
        return round(statistics.median(how(ours, theirs) for ours, theirs in pairs), 3)

    def rate(ours: Measured, theirs: Measured) -> float:
        return ours.requests_per_s / theirs.requests_per_s

    def added(ours: Measured, theirs: Measured) -> float:
        return ours.p50_ms - theirs.p50_ms

    rows: list[list[Cell]] = []
    for one in contestants.values():
        row: list[Cell] = [one.name]
        for runs in one.rounds.values():
            row.append(statistics.median(run.requests_per_s for run in runs))
            row.append(statistics.median(run.p50_ms for run in runs))
        rows.append(row)
    print_report(
        f"Whole answers through the gateway, upstream of 20 ms, {os.cpu_count()} cores",
        ["through", *(text for clients in CLIENTS for text in (f"{clients}: requests/s", f"{clients}: p50 ms"))],
        rows,
        {
            "added_p50_ms": within("gateway", "direct", 1, added),
            "vs_passthrough_c16": within("gateway", "pass-through", 16, rate),
            "vs_passthrough_c64": within("gateway", "pass-through", 64, rate),
            "vs_litellm_c64": within("gateway", "litellm", 64, rate),
            "passthrough_added_p50_ms": within("pass-through", "direct", 1, added),
            "litellm": why_not or LITELLM,
        },
        notes=[
            f"Medians of {rounds} rounds of {seconds} s (LiteLLM: {seconds * LITELLM_SLOWER} s).",
            "Differences and ratios are taken within a round.",
            "Every answer of the gateway was billed.",
            *([f"LiteLLM: {why_not}."] if why_not else []),
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
