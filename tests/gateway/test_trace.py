"""Replica choice on recorded traffic: what it finds in caches, how evenly it loads, how long prompts wait."""

from __future__ import annotations

import heapq
import json
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.gateway.make_trace import make
from tests.gateway.test_replica_choice import CachingReplica, text
from zenray.gateway.homes import Homes
from zenray.gateway.replica_choice import (
    BLOCK_BYTES,
    MAX_PREFIX_BYTES,
    Chooser,
    choose,
    name_blocks,
    slack,
)
from zenray.spec.edge import Endpoint

TRACE = Path(__file__).parent / "traces" / "chats.jsonl"
BYTES_PER_TOKEN = 4
PREFILL_S_PER_BLOCK = 0.02  # 3,200 tokens a second
DECODE_S_PER_TOKEN = 0.02


@dataclass(frozen=True)
class Outcome:
    cached_share: float  # of all prompt blocks
    wait_s: float  # mean time until the prompt is computed
    most_beyond_least: int  # requests at the chosen replica beyond the least busy one's
    requests: Counter[str]


@cache
def trace() -> list[tuple[float, list[int], int]]:
    """(arrival, blocks of the whole prompt, output tokens); built as the gateway names blocks."""
    written: dict[str, str] = {}
    requests = []
    for line in TRACE.read_text().splitlines():
        at_s, prompt, output_tokens = json.loads(line)
        for name, tokens in prompt:
            if name not in written:
                written[name] = text(name, BYTES_PER_TOKEN * tokens)
        whole = "".join(written[name] for name, _ in prompt).encode()
        requests.append((at_s, name_blocks("m:acme", whole), output_tokens))
    return requests


def replay(policy: str, *, replicas: int, processes: int, capacity_blocks: int, speed: float = 1.0) -> Outcome:
    """The trace through `processes` gateways that share homes; `speed` 2: twice the traffic."""
    ends = [Endpoint(replica_id=f"r{number}", url=f"http://r{number}") for number in range(replicas)]
    caches = {one.replica_id: CachingReplica(capacity_blocks) for one in ends}
    homes = Homes()
    choosers = [Chooser(homes) for _ in range(processes)]
    outstanding: list[Counter[str]] = [Counter() for _ in range(processes)]
    in_all: Counter[str] = Counter()
    prefill_free_s = Counter[str]()
    running: list[tuple[float, str, int]] = []
    cached = asked = most_beyond = 0
    waited_s = 0.0
    requests: Counter[str] = Counter()
    for turn, (at_s, blocks, output_tokens) in enumerate(trace()):
        now_s, process = at_s / speed, turn % processes
        while running and running[0][0] <= now_s:
            _, name, owner = heapq.heappop(running)
            outstanding[owner][name] -= 1
            in_all[name] -= 1
        seen = blocks[: MAX_PREFIX_BYTES // BLOCK_BYTES]
        busy = outstanding[process]
        if policy == "affinity":
            chosen, _ = choosers[process].choose(ends, busy, {}, (), now_s, seen)
            assert chosen
            least = min(busy[one.replica_id] for one in ends)
            assert busy[chosen.replica_id] <= least + slack(least, len(seen))
        else:
            chosen = ends[turn % replicas] if policy == "turns" else choose(ends, busy, {}, (), now_s, turn)
            assert chosen
        name = chosen.replica_id
        most_beyond = max(most_beyond, in_all[name] - min(in_all[one.replica_id] for one in ends))
        found = caches[name].serve(blocks)
        cached, asked = cached + found, asked + len(blocks)
        requests[name] += 1
        busy[name] += 1
        in_all[name] += 1
        prefill_free_s[name] = max(prefill_free_s[name], now_s) + PREFILL_S_PER_BLOCK * (len(blocks) - found)  # type: ignore[assignment]
        waited_s += prefill_free_s[name] - now_s
        heapq.heappush(running, (prefill_free_s[name] + DECODE_S_PER_TOKEN * output_tokens, name, process))
    return Outcome(cached / asked, waited_s / len(trace()), most_beyond, requests)


def test_the_trace_is_what_its_program_makes() -> None:
    assert [json.loads(line) for line in TRACE.read_text().splitlines()] == json.loads(json.dumps(make()))


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize(("replicas", "speed"), [(2, 1.0), (3, 1.5), (6, 3.0)])
def test_more_is_cached_and_prompts_wait_less_than_by_turns_or_by_load_alone(
    processes: int, replicas: int, speed: float
) -> None:
    size = {"replicas": replicas, "processes": processes, "capacity_blocks": 300, "speed": speed}
    ours = replay("affinity", **size)  # type: ignore[arg-type]
    for other in ("turns", "load"):
        theirs = replay(other, **size)  # type: ignore[arg-type]
        assert ours.cached_share > 1.15 * theirs.cached_share, (other, ours, theirs)
        assert ours.wait_s < 0.75 * theirs.wait_s, (other, ours, theirs)
    assert max(ours.requests.values()) < 2 * len(trace()) / replicas, ours
