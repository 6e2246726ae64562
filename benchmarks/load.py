"""Clients of the OpenAI API that each ask one thing after the other, driven by a compiled program (`load_driver.c`).

Every request asks something else; two loads with one `seed` ask the same.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.programs import compiled

ANIMALS = ("heron", "badger", "otter", "falcon", "hedgehog", "salmon", "beetle", "lynx", "marten", "cormorant")
PLACES = ("by the river", "in the old town", "on the island", "under the bridge", "behind the mill", "in the harbour")


@dataclass(frozen=True)
class Load:
    """`clients` at once, each with `requests_per_client` chat requests of at most `max_tokens`."""

    base_url: str  # http://127.0.0.1:PORT/v1
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
    """What the driver saw. Times in seconds; `latency_s` has one entry for each answer."""

    took_s: float
    latency_s: list[float]
    first_chunk_s: list[float]
    output_tokens: int

    @property
    def tokens_per_s(self) -> float:
        return self.output_tokens / self.took_s


def drive(load: Load) -> Outcome:
    """Ask all of `load`. RuntimeError, with what was answered, when any request is refused or cut."""
    with tempfile.TemporaryDirectory() as folder:
        bodies = Path(folder) / "bodies.jsonl"
        bodies.write_text("".join(json.dumps(body) + "\n" for body in _bodies(load)))
        about = (urlsplit(load.base_url).port, load.clients, load.requests_per_client)
        command = [str(_driver()), str(bodies), load.api_key, *map(str, about)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"asking {load.base_url} failed: {done.stderr}")
    return Outcome(**json.loads(done.stdout))


@cache
def _driver() -> Path:
    return compiled("load_driver.c")


def _bodies(load: Load) -> list[dict[str, object]]:
    """Those of the first client first."""
    about: dict[str, object] = {"model": load.model, "max_tokens": load.max_tokens, "temperature": 0}
    if load.stream:
        about |= {"stream": True, "stream_options": {"include_usage": True}}
    return [
        about | {"messages": [{"role": "user", "content": load.prefix + question(load.seed, client, number)}]}
        for client in range(load.clients)
        for number in range(load.requests_per_client)
    ]


def question(seed: int, client: int, number: int) -> str:
    """A question that is asked once, and that a small model answers at length."""
    animal, place = ANIMALS[(client + number) % len(ANIMALS)], PLACES[(client * 7 + number) % len(PLACES)]
    return f"[{seed}.{client}.{number}] Tell a long and detailed story about a {animal} {place}."
