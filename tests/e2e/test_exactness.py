"""Clients cut, gateway and control killed at random moments: the ledger equals what the gateway had read."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx
import openai
import pytest

from tests.e2e.platform import REAL, SCRIPTED, TestPlatform, charge_of, wait_until
from tests.e2e.tapped import read_tap

pytestmark = pytest.mark.e2e


@dataclass(frozen=True)
class Load:
    model: str
    requests: int
    cuts: int
    workers: int
    kills: tuple[tuple[int, str], ...]  # after how many finished requests, part
    prompt: Callable[[random.Random], str]


def storm(platform: TestPlatform, client: openai.OpenAI, load: Load, seed: int) -> None:
    """Send the load while parts are killed. Errors that a kill explains are expected; wrong bills are not."""
    rng = random.Random(seed)
    cut = set(rng.sample(range(load.requests), load.cuts))
    plans = [(load.prompt(rng), rng.randint(1, 12) if n in cut else None) for n in range(load.requests)]
    progress = threading.Condition()
    finished = 0

    def one(plan: tuple[str, int | None]) -> None:
        prompt, cut_after = plan
        for _ in range(900):  # a request that was refused because a part was down is sent anew
            try:
                stream = client.chat.completions.create(
                    model=load.model, messages=[{"role": "user", "content": prompt}], max_tokens=48, stream=True
                )
            except (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError):
                time.sleep(0.1)
                continue
            try:
                for number, _chunk in enumerate(stream, start=1):
                    if number == cut_after:
                        break
            except openai.OpenAIError:
                pass  # the gateway died under it, or its transport broke off
            except Exception as error:
                if "peer closed" not in str(error) and "incomplete" not in str(error):
                    raise
            finally:
                stream.close()
            return
        raise AssertionError("a request was refused for 90 s")

    def counted(plan: tuple[str, int | None]) -> None:
        nonlocal finished
        try:
            one(plan)
        finally:
            with progress:
                finished += 1
                progress.notify_all()

    def kill_all() -> None:
        for after, part in load.kills:
            with progress:
                while finished < after:
                    progress.wait()
            platform.kill(part)  # fails if there is none to kill

    with ThreadPoolExecutor(load.workers) as pool, ThreadPoolExecutor(1) as killer:
        killed = killer.submit(kill_all)
        list(pool.map(counted, plans))
        killed.result()


def check_books(platform: TestPlatform, org: str, least_requests: int) -> dict[str, int]:
    """Compare ledger, events and tap; returns what was in flight at cuts, by request."""
    sql = "SELECT * FROM usage_events WHERE org = ?"

    def settled() -> list[dict[str, object]]:
        first = platform.rows(sql, org)
        if len(first) < least_requests:  # a gateway that has met a dead control tries again after some seconds
            return []
        time.sleep(2.5)  # longer than the gateway's shipping interval: nothing comes twice, or late
        return first if len(first) == len(platform.rows(sql, org)) else []

    wait_until(lambda: _healthy(platform), "all parts are up again", 120)
    events = wait_until(settled, "the ledger has settled", 120)
    tap = read_tap(platform.tap_file)
    by_request = {str(event["request_id"]): event for event in events}
    assert len(by_request) == len(events), "no request is billed twice"

    in_flight: dict[str, int] = {}
    for request_id, event in by_request.items():
        read = tap.get(request_id, [])
        billed = (int(str(event["input_tokens"])), int(str(event["output_tokens"])))
        if event["outcome"] == "interrupted":
            # Killed between reading a piece and counting it: what was counted is what had been read before.
            assert billed in [(0, 0), *read], (request_id, billed, read)
            in_flight[request_id] = (read[-1][1] if read else 0) - billed[1]
        else:
            assert billed == (read[-1] if read else (0, 0)), (request_id, event["outcome"], billed, read[-3:])
    billable = {request_id for request_id, read in tap.items()} & _requests_of(platform, org, tap)
    assert billable <= set(by_request), "every request that the gateway read tokens of is billed"

    for event in events:
        tokens = [int(str(event[name])) for name in ("input_tokens", "cached_input_tokens", "output_tokens")]
        assert event["cost_nano_usd"] == charge_of(str(event["price"]), *tokens)
    spent = platform.rows(
        "SELECT sum(amount_nano_usd) AS s FROM ledger_entries WHERE org = ? AND amount_nano_usd < 0", org
    )
    assert -(spent[0]["s"] or 0) == sum(int(str(event["cost_nano_usd"])) for event in events)
    return in_flight


def _requests_of(platform: TestPlatform, org: str, tap: dict[str, list[tuple[int, int]]]) -> set[str]:
    """The tapped requests that are no other organisation's."""
    others = {row["request_id"] for row in platform.rows("SELECT request_id FROM usage_events WHERE org <> ?", org)}
    return set(tap) - others


def _healthy(platform: TestPlatform) -> bool:
    running = platform.home.running()
    try:
        return all(
            httpx.get(f"{url}/readyz", timeout=2).status_code == 200
            for url in (running.gateway_url, running.control_url)
        )
    except httpx.HTTPError:
        return False


def test_two_hundred_requests_fifty_cut_and_every_part_killed(platform: TestPlatform) -> None:
    client = platform.customer("storm")
    rng = random.Random(7)
    after = sorted(rng.sample(range(10, 190), 5))
    kills = tuple(zip(after, ("gateway", "control", "gateway", "control", "gateway"), strict=True))
    load = Load(
        SCRIPTED,
        requests=200,
        cuts=50,
        workers=16,
        kills=kills,
        prompt=lambda r: f"[[tokens={r.randint(4, 40)} delay_ms={r.choice([5, 20, 60])}]] tell me",
    )
    storm(platform, client, load, seed=11)
    in_flight = check_books(platform, "storm", load.requests)
    assert in_flight, "a kill of the gateway hit requests"
    print(f"interrupted: {len(in_flight)}, tokens in flight at the kills: {sum(in_flight.values())}")


def test_the_same_with_a_real_engine(platform: TestPlatform) -> None:
    client = platform.customer("realstorm")
    load = Load(
        REAL,
        requests=16,
        cuts=5,
        workers=4,
        kills=((3, "gateway"), (8, "control")),
        prompt=lambda r: f"Count from {r.randint(1, 50)} upwards.",
    )
    storm(platform, client, load, seed=5)
    assert check_books(platform, "realstorm", load.requests), "the kill of the gateway hit requests"
