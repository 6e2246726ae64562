"""What the gateway adds to streams: time to the first token, and how many streams it holds without a stall.

    python -m benchmarks.streams [--quick]

Streams of 64 chunks, 20 ms apart, in vLLM's shape, from nginx. A compiled program (`stream_reader.c`) reads them all
and notes when each chunk comes. First token: 64 streams at once, started one after the other over a second, of the
upstream directly and through the gateway in turn; compared are the 99th percentiles of all rounds' streams together.
Held: more and more streams at once through the gateway, two processes with metering and its log on, until in any stream
two chunks are 100 ms or more further apart than they were sent (`streams_held` is the last number without; the same is
asked of the upstream directly, since all share the machine).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from benchmarks.programs import compiled
from benchmarks.report import Cell, print_report
from benchmarks.stand_in import KEY, MODEL, Standing, billed, gateway_up, streaming_upstream_up

CHUNKS = 64
GAP_MS = 20
STALL_MS = 100
SPREAD_MS = 1000
STREAMS = 64
HELD = (64, 128, 192, 256, 384, 512, 768, 1024)
BODY = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Tell a long story."}],
    "max_tokens": CHUNKS,
    "stream": True,
}


@dataclass(frozen=True)
class Ask:
    """Whom the driver asks, and how."""

    url: str
    key: str
    body: Path


@dataclass(frozen=True)
class Seen:
    """Of each stream the time to its first token, and by how much its slowest chunk was later than the gap, in ms.

    `cpu_us`: processor time of the gateway for each chunk that was sent; 0 where there is none.
    """

    ttft_ms: list[float]
    stall_ms: list[float]
    cpu_us: float


def read(ask: Ask, streams: int, gateway: psutil.Process | None = None) -> Seen:
    """`streams` at once, started over a second. RuntimeError when one is not as it should be."""
    numbers = [str(number) for number in (streams, SPREAD_MS, CHUNKS, GAP_MS, urlsplit(ask.url).port)]
    before_s = _cpu_s(gateway)
    command = [str(compiled("stream_reader.c")), str(ask.body), ask.key, *numbers]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{ask.url}, {streams} streams: {done.stderr}")
    cpu_us = (_cpu_s(gateway) - before_s) / (streams * CHUNKS) * 1e6
    return Seen(**json.loads(done.stdout), cpu_us=cpu_us)


def _cpu_s(gateway: psutil.Process | None) -> float:
    if gateway is None:
        return 0.0
    times = [one.cpu_times() for one in (gateway, *gateway.children())]
    return sum(one.user + one.system for one in times)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streams", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, up to 256 streams")
    rounds, held = (6, HELD[:4]) if parser.parse_args().quick else (16, HELD)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        upstream = stack.enter_context(streaming_upstream_up(folder, CHUNKS, GAP_MS / 1e3))
        url, control, pid = stack.enter_context(gateway_up(folder / "gateway", Standing([upstream])))
        gateway = psutil.Process(pid)
        body = folder / "body.json"
        body.write_text(json.dumps(BODY))
        asks = {"direct": (Ask(upstream, "engine-key", body), None), "gateway": (Ask(url, KEY, body), gateway)}
        first: dict[str, list[Seen]] = {name: [] for name in asks}
        for number in range(rounds + 1):
            for name in list(asks) if number % 2 else list(asks)[::-1]:
                seen = read(asks[name][0], STREAMS, asks[name][1])
                if number:  # the first round warms up
                    first[name].append(seen)
        stalls = {name: _hold(*asks[name], held, tries=2) for name in asks}
        asked = (rounds + 1) * STREAMS + sum(count for count, _, _ in stalls["gateway"])
        found = billed(control, asked)
        if (found["events"], found["output_tokens"]) != (asked, asked * CHUNKS):
            raise RuntimeError(f"{asked} streams of {CHUNKS} tokens, and billed was {found}")
    report(first, stalls, rounds)


def _hold(
    ask: Ask, gateway: psutil.Process | None, counts: tuple[int, ...], tries: int
) -> list[tuple[int, float, float]]:
    """(streams, worst stall in ms, cpu_us) of each run, up to the first count that stalls in every try."""
    runs: list[tuple[int, float, float]] = []
    for count in counts:
        for _ in range(tries):
            seen = read(ask, count, gateway)
            runs.append((count, max(seen.stall_ms), seen.cpu_us))
            if runs[-1][1] < STALL_MS:
                break
        else:
            break
    return runs


def held_streams(runs: list[tuple[int, float, float]]) -> int:
    return max((count for count, stall_ms, _ in runs if stall_ms < STALL_MS), default=0)


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def report(first: dict[str, list[Seen]], stalls: dict[str, list[tuple[int, float, float]]], rounds: int) -> None:
    ttft_ms = {name: [value for seen in runs for value in seen.ttft_ms] for name, runs in first.items()}
    p99 = {name: percentile(values, 0.99) for name, values in ttft_ms.items()}
    by_round = [
        percentile(ours.ttft_ms, 0.99) - percentile(theirs.ttft_ms, 0.99)
        for ours, theirs in zip(first["gateway"], first["direct"], strict=True)
    ]
    rows: list[list[Cell]] = []
    for name in first:
        rows.append(
            [
                name,
                statistics.median(ttft_ms[name]),
                p99[name],
                held_streams(stalls[name]),
                "; ".join(f"{count}: {stall_ms:.0f}" for count, stall_ms, _ in stalls[name]),
            ]
        )
    cpu_us = statistics.median(us for _, _, us in stalls["gateway"])
    print_report(
        f"Streams of {CHUNKS} chunks, {GAP_MS} ms apart, {os.cpu_count()} cores",
        ["through", f"{STREAMS} streams: first token p50 ms", "p99 ms", "held", "streams: worst stall ms"],
        rows,
        {
            "added_ttft_p99_ms": round(p99["gateway"] - p99["direct"], 3),
            "streams_held": held_streams(stalls["gateway"]),
            "streams_held_direct": held_streams(stalls["direct"]),
            "added_ttft_p50_ms": round(statistics.median(ttft_ms["gateway"]) - statistics.median(ttft_ms["direct"]), 3),
            "added_ttft_p99_ms_rounds": [round(value, 3) for value in by_round],
            "cpu_us_per_chunk": round(cpu_us, 1),
        },
        notes=[
            f"First token: of {rounds} rounds, after one thrown away. Every token was billed.",
            f"Held: no chunk {STALL_MS} ms or more late; a number that stalls is tried twice.",
            f"Processor time of the gateway per chunk, with what a stream's begin and end take: {cpu_us:.0f} us.",
        ],
    )


if __name__ == "__main__":
    main()
