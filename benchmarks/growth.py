"""Whether a request costs the same with many keys and many deployments, and whether memory stays flat.

    python -m benchmarks.growth [--quick]

Three gateways of one process each, before one nginx: 10 keys and 1 deployment; 10,000 keys; 100 deployments. wrk, 16
clients, asks each in turn, every request with another key and model. Compared is the processor time per request, which
other programs on the machine disturb less than the clock. Then the first gateway alone answers a million requests (with
--quick 20,000): its resident set is noted every tenth, and the first tenth is warming up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.gateway import BODY, wrk
from benchmarks.report import print_report
from benchmarks.stand_in import MODEL, Standing, gateway_up, key_name, upstream_up

CLIENTS = 16
FILLING_CLIENTS = 64
TENTHS = 10
MOST_FILLING_S = 1200
STANDINGS = {"10 keys, 1 deployment": (10, 1), "10,000 keys": (10_000, 1), "100 deployments": (10, 100)}
SCRIPT = """
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
local count = 0
request = function()
  count = count + 1
  wrk.headers["Authorization"] = "Bearer {key}" .. ((count * 7919) % {keys})
  local model = (count * 31) % {deployments}
  local name = model == 0 and "{model}" or "{model}-" .. model
  return wrk.format(nil, nil, nil, (string.gsub([[{body}]], "MODEL", name)))
end
"""


@dataclass
class Grown:
    url: str
    process: psutil.Process
    script: Path
    cpu_us: list[float] = field(default_factory=list)
    requests: int = 0

    def measure(self, seconds: int) -> None:
        before_s = self._cpu_s()
        requests = wrk(self.url, CLIENTS, seconds, self.script).requests
        self.cpu_us.append((self._cpu_s() - before_s) / requests * 1e6)
        self.requests += requests

    def fill(self, requests: int, most_s: float) -> list[tuple[int, int]]:
        """(requests answered, resident bytes) every tenth of so many requests; fewer when `most_s` is over."""
        noted: list[tuple[int, int]] = []
        answered, until_s = 0, time.monotonic() + most_s
        while answered < requests and time.monotonic() < until_s:
            answered += wrk(self.url, FILLING_CLIENTS, 5, self.script).requests
            if answered >= requests * (len(noted) + 1) // TENTHS:
                noted.append((answered, self.process.memory_info().rss))
                print(f"{time.strftime('%H:%M:%S')}  {answered:,} of {requests:,} requests", flush=True)
        if not noted or noted[-1][0] < answered:
            noted.append((answered, self.process.memory_info().rss))
        return noted

    def _cpu_s(self) -> float:
        times = self.process.cpu_times()
        return times.user + times.system


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds, 20,000 requests for memory")
    rounds, seconds, filling = (4, 2, 20_000) if parser.parse_args().quick else (15, 5, 1_000_000)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        upstream = stack.enter_context(upstream_up(folder, delay_s=0.005))
        grown: dict[str, Grown] = {}
        for number, (name, (keys, deployments)) in enumerate(STANDINGS.items()):
            standing = Standing([upstream], keys=keys, deployments=deployments)
            url, _, pid = stack.enter_context(gateway_up(folder / str(number), standing, processes=1))
            script = folder / f"{number}.lua"
            body = json.dumps(BODY | {"model": "MODEL"})
            words = {"key": key_name(0)[:-1], "keys": keys, "deployments": deployments, "model": MODEL, "body": body}
            script.write_text(_fill(words))
            grown[name] = Grown(url, psutil.Process(pid), script)
        few, many_keys, many_deployments = grown.values()
        for number in range(rounds + 1):
            for one in list(grown.values())[:: 1 if number % 2 else -1]:
                one.measure(seconds)
            if number == 0:  # warm: every key, model and connection has been met
                for one in grown.values():
                    one.cpu_us.clear()
        memory = few.fill(filling, MOST_FILLING_S)
    report(grown, few, many_keys, many_deployments, memory, rounds)


def _fill(words: dict[str, object]) -> str:
    script = SCRIPT
    for name, value in words.items():
        script = script.replace("{" + name + "}", str(value))
    return script


def report(
    grown: dict[str, Grown],
    few: Grown,
    many_keys: Grown,
    many_deployments: Grown,
    memory: list[tuple[int, int]],
    rounds: int,
) -> None:
    def ratio(many: Grown) -> float:
        return round(statistics.median(b / a for a, b in zip(few.cpu_us, many.cpu_us, strict=True)), 3)

    (warm, warm_bytes), (last, last_bytes) = memory[0], memory[-1]
    print_report(
        "Processor time of one request, by what the gateway knows",
        ["knows", "us per request", "requests"],
        [[name, statistics.median(one.cpu_us), one.requests] for name, one in grown.items()],
        {
            "keys_ratio": ratio(many_keys),
            "deployments_ratio": ratio(many_deployments),
            "memory_ratio": round(last_bytes / warm_bytes, 3),
            "memory_growth_bytes": last_bytes - warm_bytes,
            "memory_requests": last - warm,
        },
        notes=[
            f"{rounds} rounds after one thrown away; ratios are medians of those within a round.",
            "Resident MiB of the first gateway after so many requests: "
            + "; ".join(f"{answered:,}: {rss_bytes / 2**20:.1f}" for answered, rss_bytes in memory),
        ],
    )


if __name__ == "__main__":
    main()
