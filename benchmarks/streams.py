"""What the gateway adds to streams: time to the first token, and how many streams it holds without a stall.

    python -m benchmarks.streams [--quick]

Streams of 64 chunks, 20 ms apart, from scripted engines (processes without a model that keep their times). One program
in a process of its own reads them all, raw, and notes when each chunk comes. First token: 64 streams at once, started
one after the other over a second, of the engine directly and through the gateway in turn. Held: more and more streams
at once through the gateway, two processes with metering and its log on, until in any stream two chunks are 100 ms or
more further apart than they were sent (`streams_held` is the last number without; the same is asked of the engines
directly, since engines and driver share the machine).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.report import Cell, print_report
from benchmarks.stand_in import KEY, MODEL, Standing, billed, gateway_up, running

CHUNKS = 64
GAP_MS = 20
STALL_MS = 100
ENGINES = 2
STREAMS = 64
HELD = (64, 128, 192, 256, 320, 384, 512)


@dataclass(frozen=True)
class Ask:
    """`streams` at once, dealt to `urls` by turns, started over `spread_s`."""

    urls: list[str]
    key: str
    model: str
    streams: int
    spread_s: float


@dataclass(frozen=True)
class Seen:
    """Of each stream the time to its first token, and by how much its slowest chunk was later than the gap, in ms."""

    ttft_ms: list[float]
    stall_ms: list[float]


async def read_streams(ask: Ask) -> Seen:
    ttft_ms: list[float] = []
    stall_ms: list[float] = []

    async def one(number: int) -> None:
        await asyncio.sleep(ask.spread_s * number / ask.streams)
        parts = urlsplit(ask.urls[number % len(ask.urls)])
        body = json.dumps(
            {
                "model": ask.model,
                "messages": [{"role": "user", "content": f"{number} [[tokens={CHUNKS} delay_ms={GAP_MS}]]"}],
                "max_tokens": CHUNKS,
                "stream": True,
            }
        )
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        began_s = time.perf_counter()
        writer.write(
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {ask.key}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode()
        )
        last_s = worst_s = 0.0
        tokens, rest = 0, b""
        while b"[DONE]" not in rest:
            data = await reader.read(1 << 16)
            if not data:
                raise RuntimeError(f"a stream ended after {tokens} tokens: {rest[-300:]!r}")
            now_s = time.perf_counter()
            rest = rest[-16:] + data
            new = data.count(b'"content":" t')
            if new and not tokens:
                ttft_ms.append((now_s - began_s) * 1e3)
            elif new:
                worst_s = max(worst_s, now_s - last_s - GAP_MS / 1e3)
            if new:
                tokens, last_s = tokens + new, now_s
        if tokens != CHUNKS:
            raise RuntimeError(f"{tokens} tokens instead of {CHUNKS}")
        stall_ms.append(worst_s * 1e3)
        writer.close()

    await asyncio.gather(*(one(number) for number in range(ask.streams)))
    return Seen(ttft_ms, stall_ms)


def drive(ask: Ask) -> Seen:
    """`read_streams` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.streams", "--read"]
    done = subprocess.run(command, input=json.dumps(asdict(ask)), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the driver failed:\n{done.stderr[-3000:]}")
    return Seen(**json.loads(done.stdout))


@contextmanager
def engines_up(folder: Path, count: int) -> Iterator[list[str]]:
    """Scripted engines under the key that the stand-in's routes name."""
    with ExitStack() as stack:
        urls = []
        for _ in range(count):
            command = [sys.executable, "-m", "zenray.serving.engine.scripted", "--model", "up"]
            environment = os.environ | {"VLLM_API_KEY": "engine-key"}
            process = stack.enter_context(
                running(command, log=folder / "engine.log", stdout=subprocess.PIPE, env=environment)
            )
            urls.append(f"http://127.0.0.1:{json.loads(process.stdout.readline())['port']}")
        yield urls


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streams", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, up to 256 streams")
    parser.add_argument("--read", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        print(json.dumps(asdict(asyncio.run(read_streams(Ask(**json.load(sys.stdin)))))))
        return
    rounds, held = (3, HELD[:4]) if arguments.quick else (7, HELD)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        urls = stack.enter_context(engines_up(folder, ENGINES))
        gateway, control, _ = stack.enter_context(gateway_up(folder / "gateway", Standing(urls)))
        targets = {"direct": Ask(urls, "engine-key", "up", STREAMS, 1.0)}
        targets["gateway"] = Ask([gateway], KEY, MODEL, STREAMS, 1.0)
        first: dict[str, list[Seen]] = {name: [] for name in targets}
        for number in range(rounds + 1):
            for name in list(targets) if number % 2 else list(targets)[::-1]:
                seen = drive(targets[name])
                if number:  # the first round warms up
                    first[name].append(seen)
        stalls = {name: _hold(targets[name], held, tries=2) for name in targets}
        asked = (rounds + 1) * STREAMS + sum(count for count, _ in stalls["gateway"]["runs"])
        found = billed(control, asked)
        if found != {"events": asked, "output_tokens": asked * CHUNKS}:
            raise RuntimeError(f"{asked} streams of {CHUNKS} tokens, and billed was {found}")
    report(first, stalls, rounds)


def _hold(ask: Ask, counts: tuple[int, ...], tries: int) -> dict[str, list[tuple[int, float]]]:
    """(streams, worst stall in ms) of each run, up to the first count that stalls in every try."""
    runs: list[tuple[int, float]] = []
    for count in counts:
        for _ in range(tries):
            seen = drive(Ask(ask.urls, ask.key, ask.model, count, 1.0))
            runs.append((count, max(seen.stall_ms)))
            if runs[-1][1] < STALL_MS:
                break
        else:
            break
    return {"runs": runs}


def held_streams(runs: list[tuple[int, float]]) -> int:
    return max((count for count, stall_ms in runs if stall_ms < STALL_MS), default=0)


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def report(first: dict[str, list[Seen]], stalls: dict[str, dict[str, list[tuple[int, float]]]], rounds: int) -> None:
    p99 = {name: [percentile(seen.ttft_ms, 0.99) for seen in runs] for name, runs in first.items()}
    added = [ours - theirs for ours, theirs in zip(p99["gateway"], p99["direct"], strict=True)]
    rows: list[list[Cell]] = []
    for name, runs in first.items():
        rows.append(
            [
                name,
                statistics.median(percentile(seen.ttft_ms, 0.5) for seen in runs),
                statistics.median(p99[name]),
                held_streams(stalls[name]["runs"]),
                "; ".join(f"{count}: {stall_ms:.0f}" for count, stall_ms in stalls[name]["runs"]),
            ]
        )
    print_report(
        f"Streams of {CHUNKS} chunks, {GAP_MS} ms apart, {os.cpu_count()} cores",
        ["through", f"{STREAMS} streams: first token p50 ms", "p99 ms", "held", "streams: worst stall ms"],
        rows,
        {
            "added_ttft_p99_ms": round(statistics.median(added), 3),
            "streams_held": held_streams(stalls["gateway"]["runs"]),
            "streams_held_direct": held_streams(stalls["direct"]["runs"]),
            "added_ttft_p99_ms_rounds": [round(value, 3) for value in added],
        },
        notes=[
            f"First token: medians of {rounds} rounds, after one thrown away. Every token was billed.",
            f"Held: no chunk {STALL_MS} ms or more late; a number that stalls is tried twice.",
        ],
    )


if __name__ == "__main__":
    main()
