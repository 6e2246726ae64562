"""kill -9 at random moments: what the next boot bills equals, to the token, what a truth outside the meter saw.

The child keeps its truth in shared memory: for every request, what the engine had emitted (noted before each count)
and what had been passed on to the client (noted after it). A kill leaves at most one chunk a stream between the two.
"""

from __future__ import annotations

import mmap
import os
import random
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.gateway.metering.conftest import open_charge
from tests.gateway.metering.test_meter import Ledger
from zenray.gateway.metering import Charge, Meter, MeterFull
from zenray.spec.clock import SystemClock
from zenray.spec.usage import Outcome, Usage, UsageEvent

pytestmark = pytest.mark.contract

KILLS = 40
MAX_REQUESTS = 60_000
CHUNK_TOKENS = 3
CACHED_TOKENS = 2
NOTHING, ASKED, OPENED, ENDING, ENDED = range(5)


class Truth:
    """Four words for every request in anonymous shared memory; it outlives the child that writes it."""

    def __init__(self) -> None:
        self.words = memoryview(mmap.mmap(-1, MAX_REQUESTS * 32)).cast("Q")

    def note(self, request: int, **values: int) -> None:
        for name, value in values.items():
            self.words[request * 4 + ("state", "input", "emitted", "passed").index(name)] = value

    def of(self, request: int) -> Seen:
        return Seen(*self.words[request * 4 : request * 4 + 4])


class Seen(NamedTuple):
    state: int
    input_tokens: int
    emitted_tokens: int
    passed_tokens: int


def make(folder: Path) -> Meter:
    return Meter(folder, "gw-1", max_streams=32, max_wal_bytes=1 << 20, clock=SystemClock(), commit_interval_s=0.002)


def serve(folder: Path, truth: Truth, first_request: int, seed: int) -> None:
    """The child: sixteen streams at once, ended, cut and followed by others, shipped to nowhere now and then."""
    chance = random.Random(seed)
    meter = make(folder)
    streams: dict[int, tuple[Charge, int]] = {}
    request = first_request
    while True:
        if len(streams) < 16:
            input_tokens = chance.randrange(10, 500)
            truth.note(request, state=ASKED, input=input_tokens)
            try:
                streams[request] = (open_charge(meter, request_id=str(request)), 0)
            except MeterFull:  # the log is full: the parent will ship it
                truth.note(request, state=NOTHING)
                time.sleep(0.001)
            else:
                truth.note(request, state=OPENED)
                request += 1
        number = chance.choice(list(streams))
        charge, emitted = streams[number]
        if chance.random() < 0.2:
            truth.note(number, state=ENDING)
            end(charge, truth.of(number), cut=chance.random() < 0.3)
            truth.note(number, state=ENDED)
            del streams[number]
            continue
        emitted += CHUNK_TOKENS
        truth.note(number, emitted=emitted)
        charge.count(0, truth.of(number).input_tokens, emitted)
        truth.note(number, passed=emitted)
        streams[number] = (charge, emitted)


def end(charge: Charge, seen: Seen, *, cut: bool) -> None:
    if cut:
        charge.close(Outcome.CLIENT_GONE)
    else:
        final = {"input_tokens": seen.input_tokens, "output_tokens": seen.emitted_tokens}
        charge.close(Outcome.COMPLETED, Usage(**final, cached_input_tokens=CACHED_TOKENS), "stop")


def check(seen: Seen, event: UsageEvent | None) -> int:
    """The event is what the truth allows; the tokens that were in flight at the kill."""
    if event is None:
        assert seen.state in (NOTHING, ASKED)
        return 0
    read_tokens = seen.input_tokens if event.usage.output_tokens else 0
    assert event.usage.input_tokens == read_tokens or event.outcome == Outcome.COMPLETED
    match event.outcome:
        case Outcome.COMPLETED:
            assert seen.state in (ENDING, ENDED)
            expected: dict[str, Any] = {"input_tokens": seen.input_tokens, "output_tokens": seen.emitted_tokens}
            assert event.usage == Usage(**expected, cached_input_tokens=CACHED_TOKENS)
        case Outcome.CLIENT_GONE:
            assert seen.state in (ENDING, ENDED)
            assert event.usage.output_tokens == seen.emitted_tokens
        case _:
            assert event.outcome == Outcome.INTERRUPTED
            assert seen.state in (ASKED, OPENED, ENDING)
            assert event.usage.output_tokens in (seen.passed_tokens, seen.emitted_tokens)
            assert seen.emitted_tokens - seen.passed_tokens in (0, CHUNK_TOKENS)
    return seen.emitted_tokens - seen.passed_tokens


def wait_for_progress(truth: Truth, first_request: int, chance: random.Random) -> None:
    """Let the child answer some requests, or kill it while it takes over the log."""
    requests = chance.choice([0, 1, 20, chance.randrange(100)])
    until_s = time.monotonic() + 2
    while requests and truth.of(first_request + requests).state == NOTHING and time.monotonic() < until_s:
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.01))


def test_random_kills_bill_every_token_once(tmp_path: Path) -> None:
    chance = random.Random()
    truth, ledger, first_request = Truth(), Ledger(), 0
    for kill in range(KILLS):
        child = os.fork()
        if child == 0:
            try:
                serve(tmp_path / "wal", truth, first_request, kill)
            finally:
                os._exit(1)
        wait_for_progress(truth, first_request, chance)
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL  # it did not fail by itself
        while truth.of(first_request).state != NOTHING:
            first_request += 1
        if chance.random() < 0.5:  # else the next boot finds the logs of several
            meter = make(tmp_path / "wal")
            ledger.take(meter, limit=100)
            meter.close()
    meter = make(tmp_path / "wal")
    ledger.take(meter, limit=100)
    meter.close()
    billed = {int(event.request_id): event for event in ledger.events.values()}
    assert len(billed) == len(ledger.events)
    in_flight_tokens = sum(check(truth.of(request), billed.get(request)) for request in range(first_request))
    outcomes = [event.outcome for event in billed.values()]
    assert {*outcomes} == {Outcome.COMPLETED, Outcome.CLIENT_GONE, Outcome.INTERRUPTED}
    assert len(outcomes) > 10 * KILLS
    assert in_flight_tokens <= KILLS * CHUNK_TOKENS  # the child is one thread: one chunk a kill
