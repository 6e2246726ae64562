"""A load driver in a process of its own: some clients of the OpenAI API, each asking one thing after the other.

    python -m benchmarks.load < load.json      # a Load as JSON; prints its Outcome as JSON

It speaks HTTP with aiohttp and reads of an answer only the usage at its end, so that on a small machine the driver
takes as little as it can from what is measured. Every request asks something else; two loads with one `seed` ask the
same.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass

import aiohttp

ANIMALS = ("heron", "badger", "otter", "falcon", "hedgehog", "salmon", "beetle", "lynx", "marten", "cormorant")
PLACES = ("by the river", "in the old town", "on the island", "under the bridge", "behind the mill", "in the harbour")
TIMEOUT_S = 300


@dataclass(frozen=True)
class Load:
    """`clients` at once, each with `requests_per_client` chat requests of at most `max_tokens`."""

    base_url: str  # ends with /v1
    api_key: str
    model: str
    clients: int
    requests_per_client: int
    max_tokens: int
    stream: bool
    seed: int
    prefix: str = ""  # stands before every question: words for a scripted engine


@dataclass(frozen=True)
class Outcome:
    """What the driver saw. Times in seconds; `latency_s` has one entry for each request that was answered."""

    took_s: float
    latency_s: list[float]
    first_chunk_s: list[float]
    output_tokens: int
    failures: list[str]

    @property
    def tokens_per_s(self) -> float:
        return self.output_tokens / self.took_s


def drive(load: Load) -> Outcome:
    """Run `load` in a fresh process. RuntimeError, with what was answered, when any request failed."""
    command = [sys.executable, "-m", "benchmarks.load"]
    done = subprocess.run(command, input=json.dumps(asdict(load)), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the load driver failed:\n{done.stderr}")
    outcome = Outcome(**json.loads(done.stdout))
    if outcome.failures:
        raise RuntimeError(f"{len(outcome.failures)} requests to {load.base_url} failed, first: {outcome.failures[0]}")
    return outcome


def question(seed: int, client: int, number: int) -> str:
    """A question that is asked once, and that a small model answers at length."""
    animal, place = ANIMALS[(client + number) % len(ANIMALS)], PLACES[(client * 7 + number) % len(PLACES)]
    return f"[{seed}.{client}.{number}] Tell a long and detailed story about a {animal} {place}."


async def run(load: Load) -> Outcome:
    latency_s: list[float] = []
    first_chunk_s: list[float] = []
    failures: list[str] = []
    output_tokens = 0

    async def one_client(session: aiohttp.ClientSession, client: int) -> None:
        nonlocal output_tokens
        for number in range(load.requests_per_client):
            body = {
                "model": load.model,
                "messages": [{"role": "user", "content": load.prefix + question(load.seed, client, number)}],
                "max_tokens": load.max_tokens,
                "temperature": 0,
            }
            if load.stream:
                body |= {"stream": True, "stream_options": {"include_usage": True}}
            began_s = time.perf_counter()
            try:
                first_s, tokens = await _ask(session, load, body)
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                failures.append(f"{type(error).__name__}: {error}")
                return
            latency_s.append(time.perf_counter() - began_s)
            first_chunk_s.append(first_s - began_s)
            output_tokens += tokens

    headers = {"authorization": f"Bearer {load.api_key}"}
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=load.clients)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector) as session:
        began_s = time.perf_counter()
        await asyncio.gather(*(one_client(session, client) for client in range(load.clients)))
        took_s = time.perf_counter() - began_s
    return Outcome(took_s, latency_s, first_chunk_s, output_tokens, failures)


async def _ask(session: aiohttp.ClientSession, load: Load, body: dict[str, object]) -> tuple[float, int]:
    """The time of the first bytes of the answer, and the output tokens by its usage. ValueError when refused or cut."""
    async with session.post(f"{load.base_url}/chat/completions", json=body) as answer:
        first_s, pieces = 0.0, []
        async for piece in answer.content.iter_any():
            first_s = first_s or time.perf_counter()
            pieces.append(piece)
        raw = b"".join(pieces)
        if answer.status != 200:
            raise ValueError(f"{answer.status}: {raw[:300].decode(errors='replace')}")
    if load.stream:
        if not raw.rstrip().endswith(b"data: [DONE]"):
            raise ValueError(f"the stream was cut: …{raw[-200:]!r}")
        raw = next(line[6:] for line in reversed(raw.splitlines()) if line.startswith(b"data: {"))
    return first_s, json.loads(raw)["usage"]["completion_tokens"]


if __name__ == "__main__":
    print(json.dumps(asdict(asyncio.run(run(Load(**json.load(sys.stdin)))))))
