"""How many replicas: each signal by itself, all of them over time, and over what real replicas reported."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zenray.serving.scaling import (
    CUT,
    FIRST_TOKENS_WINDOW_S,
    RECOVERY_S,
    Limit,
    Memory,
    Signals,
    Targets,
    by_kv_cache,
    by_queue,
    by_requests,
    decide,
    replicas_wanted,
    wishes,
    with_peak,
)

TRACES = Path(__file__).parent / "traces"
TARGETS = Targets(ongoing_requests=2, downscale_delay_s=10)


def signals(running: int = 1, mean: float = 0, newest: float | None = None, **fields: Any) -> Signals:
    given_fields = {"target": running, "newest_requests": mean if newest is None else newest} | fields
    return Signals(running=running, mean_requests=mean, **given_fields)


def wanted_now(load: Signals, targets: Targets, limit: Limit | None = None) -> int:
    return replicas_wanted(wishes(load, targets, Memory(begun_at_s=0.0, starts=True, limit=limit), 0.0))


class TestOngoingRequests:
    @pytest.mark.parametrize(
        ("running", "mean", "newest", "expected"),
        [
            (1, 6, 6, 3),  # load: as many as it needs
            (3, 6, 6, 3),
            (3, 1, 0, 0.5),  # load is ending: the mean leads down
            (1, 5, 0, 1),  # load has ended, the mean does not know yet: no more than there are
            (1, 5, 3, 1.5),  # load is ending: no more than the newest count asks for
            (1, 3, 8, 1.5),  # a burst: the mean must follow first
            (2, 0, 0, 0),
        ],
    )
    def test_growing_needs_the_newest_count_and_the_mean(
        self, running: int, mean: float, newest: float, expected: float
    ) -> None:
        assert by_requests(signals(running, mean, newest), 2) == expected

    def test_replicas_that_are_starting_are_not_asked_for_again(self) -> None:
        assert by_requests(signals(1, 6, 5, target=3), 2) == 3

    @given(running=st.integers(1, 50), mean=st.floats(0, 1e4), each=st.floats(0.1, 100))
    def test_nothing_is_started_while_nothing_runs(self, running: int, mean: float, each: float) -> None:
        assert by_requests(signals(running, mean, 0.0), each) <= running

    @given(running=st.integers(1, 50), load=st.floats(0, 1e4), each=st.floats(0.1, 100))
    def test_steady_load_gets_what_rays_own_policy_gives(self, running: int, load: float, each: float) -> None:
        assert by_requests(signals(running, load), each) == pytest.approx(load / each)


class TestQueueAndCache:
    def test_everyone_who_waits_gets_a_place(self) -> None:
        full = signals(2, 20, computing=8, waiting=12)  # two replicas that compute 4 each
        assert by_queue(full, 0) == 5
        assert by_queue(full, 2) == 4  # two may wait at each of them
        assert by_queue(full, 6) == 0
        assert by_queue(full, None) == 0
        assert by_queue(signals(1, 3, computing=0, waiting=3), 0) == 4  # nothing computed: one place each

    def test_the_cache_counts_what_waits_too(self) -> None:
        assert by_kv_cache(signals(2, 8, computing=8, kv_cache_use=1.6), 0.8) == pytest.approx(2)
        assert by_kv_cache(signals(1, 12, computing=4, waiting=8, kv_cache_use=1.0), 0.75) == pytest.approx(4)
        assert by_kv_cache(signals(1, 1, kv_cache_use=0.5), None) == 0

    def test_the_largest_wish_counts(self) -> None:
        targets = Targets(ongoing_requests=16, waiting_requests=0, kv_cache_use=0.8)
        load = signals(1, 9, computing=4, waiting=5, kv_cache_use=0.95)
        assert wanted_now(load, targets) == 3
        assert wanted_now(load, Targets(ongoing_requests=16)) == 1
        assert wanted_now(load, targets, Limit(2, 0.0)) == 5
        assert wanted_now(load, replace(targets, start_replicas=7, start_hold_s=1)) == 7

    @given(
        st.integers(1, 20),
        st.floats(0, 500),
        st.floats(0, 500),
        st.floats(0, 20),
        st.floats(0, 500),
    )
    def test_more_load_never_asks_for_fewer(
        self, running: int, computing: float, waiting: float, use: float, more: float
    ) -> None:
        targets = Targets(ongoing_requests=7, waiting_requests=1, kv_cache_use=0.9)
        load = signals(running, computing + waiting, computing=computing, waiting=waiting, kv_cache_use=use)
        heavier = replace(load, waiting=waiting + more, mean_requests=load.mean_requests + more)
        heavier = replace(heavier, newest_requests=heavier.mean_requests)
        assert wanted_now(heavier, targets) >= wanted_now(load, targets)


class Loop:
    """A deployment whose replicas come `start_s` after they were asked for, and go at once."""

    def __init__(self, targets: Targets, *, start_s: float = 5, most: int = 20) -> None:
        self.targets, self.start_s, self.most = targets, start_s, most
        self.memory: Memory | None = None
        self.now_s, self.running, self.target = 0.0, 1, 1
        self.ready_at_s = 0.0
        self.targets_seen: list[int] = []

    def step(self, load: Signals, *, for_s: float = 1) -> int:
        """One decision with this load; `running` and `target` are the loop's own."""
        if self.now_s >= self.ready_at_s:
            self.running = self.target
        seen = replace(load, running=max(1, self.running), target=self.target, most=self.most)
        wanted, self.memory, _ = decide(seen, self.targets, self.memory, self.now_s)
        wanted = max(1, min(self.most, wanted))
        if wanted > self.target:
            self.ready_at_s = self.now_s + self.start_s
        self.running = min(self.running, wanted)
        self.target = wanted
        self.targets_seen.append(wanted)
        self.now_s += for_s
        return wanted


class TestOverTime:
    def test_fewer_only_after_the_whole_delay_and_no_fewer_than_its_peak(self) -> None:
        loop = Loop(TARGETS)
        assert loop.step(signals(mean=12)) == 6
        for second in range(30):
            loop.step(signals(mean=8 if second == 5 else 2))
        # When the peak of 6 is 10 s old the lull would do with 1, but 4 were needed once since.
        assert loop.targets_seen == [6] * 11 + [4] * 6 + [1] * 14

    def test_more_only_when_more_were_wanted_all_the_time(self) -> None:
        targets = replace(TARGETS, upscale_delay_s=5)
        loop = Loop(targets)
        for second in range(20):
            loop.step(signals(mean=2 if second == 4 else 6))
        assert loop.targets_seen == [1] * 10 + [3] * 10  # the wish that began at 5 lasts 5 s at 10

    def test_a_queue_needs_no_proof_that_load_lasts(self) -> None:
        targets = replace(TARGETS, upscale_delay_s=5, waiting_requests=1)
        assert decide(signals(mean=6, computing=4, waiting=1), targets, None, 0.0)[0] == 1
        assert decide(signals(mean=6, computing=4, waiting=2), targets, None, 0.0)[0] == 3

    def test_a_spike_that_is_over_is_not_grown_for(self) -> None:
        """Ray's upscale delay asks whether more are wanted all the time: a remembered peak must not answer."""
        loop = Loop(TARGETS)
        loop.step(signals(mean=2))
        wanted, memory, _ = decide(signals(1, mean=10), TARGETS, loop.memory, 1.0)
        assert wanted == 5
        assert decide(signals(1, mean=2), TARGETS, memory, 2.0)[0] == 1  # Ray did not grow: one is there

    def test_who_has_just_begun_to_look_takes_nothing_away(self) -> None:
        wanted, memory, _ = decide(signals(5, mean=0), TARGETS, None, 100.0)
        assert wanted == 5
        assert decide(signals(5, mean=0), TARGETS, memory, 109.9)[0] == 5
        assert decide(signals(5, mean=0), TARGETS, memory, 110.1)[0] == 0

    def test_a_start_with_many_keeps_them_until_the_load_has_come(self) -> None:
        """A revision that takes over from eight replicas has no load before it does."""
        loop = Loop(replace(TARGETS, start_replicas=8, start_hold_s=60))
        loop.running = loop.target = 8
        for second in range(100):
            loop.step(signals(mean=0 if second < 50 else 12))
        assert loop.targets_seen == [8] * 70 + [6] * 30  # held, then the usual delay, then what the load needs

    def test_who_wakes_or_is_looked_at_anew_does_not_grow_to_its_start(self) -> None:
        """Ray keeps nothing of us over a sleep, nor over a restart of Serve's controller; the targets stay as given."""
        targets = replace(TARGETS, start_replicas=8, start_hold_s=60)
        for awake in (1, 3):
            loop = Loop(targets)
            loop.running = loop.target = awake
            for _ in range(30):
                loop.step(signals(mean=2))
            assert loop.targets_seen == [awake] * 10 + [1] * 20

    @given(st.lists(st.integers(0, 40), min_size=20, max_size=60), st.integers(1, 8))
    def test_it_never_falls_below_what_the_last_seconds_needed(self, loads: list[int], start_s: int) -> None:
        loop = Loop(TARGETS, start_s=start_s)
        for position, load in enumerate(loads):
            before = loop.target
            wanted = loop.step(signals(mean=load))
            needed = max(-(-max(0, n) // 2) for n in loads[max(0, position - 10) : position + 1])
            assert wanted >= min(before, needed)
            assert wanted <= max(before, -(-load // 2), 1)

    @given(st.floats(0.1, 40), st.integers(1, 20), st.floats(0, 1), st.floats(0, 1))
    def test_steady_load_changes_nothing_twice(self, load: float, begin: int, use: float, waits: float) -> None:
        """Whatever it begins with: one change at most in each direction, then the same count for good."""
        loop = Loop(Targets(ongoing_requests=4, waiting_requests=1, kv_cache_use=0.8, downscale_delay_s=10))
        loop.running = loop.target = begin
        for _ in range(60):
            loop.step(signals(mean=load, computing=load * (1 - waits), waiting=load * waits / 4, kv_cache_use=use * 3))
        changes = [b - a for a, b in zip([begin, *loop.targets_seen], loop.targets_seen, strict=False) if a != b]
        assert len(changes) <= 2 and not (changes and changes[0] < 0 < changes[-1]), changes
        assert len(set(loop.targets_seen[30:])) == 1

    def test_peaks_stay_few(self) -> None:
        peaks: tuple[tuple[float, int], ...] = ()
        for tick in range(10_000):
            peaks = with_peak(peaks, tick / 10, (tick * 7919) % 13, 600)
            assert [count for _, count in peaks] == sorted({count for _, count in peaks}, reverse=True)
            assert len(peaks) <= 13


class TestFirstTokens:
    targets = Targets(ongoing_requests=16, ttft_p99_s=0.5, downscale_delay_s=10)

    def late(self, each: float, running: int = 2, late: float = 5, of: float = 100, **fields: Any) -> Signals:
        load = each * running
        return signals(running, load, first_tokens=of, late_first_tokens=late, **fields)

    def limit_after(self, load: Signals, *, memory: Memory | None = None, now_s: float = 100.0) -> Limit | None:
        return decide(load, self.targets, memory, now_s).memory.limit

    def test_late_tokens_give_a_replica_fewer_requests(self) -> None:
        wanted, memory, _ = decide(self.late(10), self.targets, None, 100.0)
        assert (wanted, memory.limit) == (2, Limit(8.0, 100.0))
        assert decide(self.late(10), self.targets, memory, 101.0)[0] == 3  # 20 requests, 8 each

    @pytest.mark.parametrize(
        ("late", "of"),
        [(0, 100), (1, 100), (1, 10), (2, 200)],  # p99 is in time exactly when at most one in a hundred is late
    )
    def test_tokens_in_time_change_nothing(self, late: float, of: float) -> None:
        assert self.limit_after(self.late(10, late=late, of=of)) is None

    def test_nothing_is_learnt_while_there_are_too_few_or_where_none_can_help(self) -> None:
        assert self.limit_after(self.late(17)) is None  # three are wanted: tokens are late because one is missing
        assert self.limit_after(self.late(10, most=2)) is None
        assert self.limit_after(self.late(1)) is None
        short = Memory(begun_at_s=0, short_at_s=100 - FIRST_TOKENS_WINDOW_S / 2)
        assert self.limit_after(self.late(10), memory=short) is None
        assert self.limit_after(self.late(10), memory=replace(short, short_at_s=60)) is not None

    def test_a_second_cut_waits_for_tokens_that_came_after_the_first(self) -> None:
        memory = decide(self.late(10), self.targets, None, 100.0).memory
        assert self.limit_after(self.late(7.5), memory=memory, now_s=129.0) == memory.limit
        again = self.limit_after(self.late(7.5), memory=memory, now_s=131.0)
        assert again is not None and again.requests == pytest.approx(CUT * 7.5)

    def test_what_was_learnt_is_given_back_slowly(self) -> None:
        limit = Limit(8.0, 100.0)
        assert limit.now(100.0, 16) == 8.0
        assert limit.now(100.0 + RECOVERY_S, 16) == pytest.approx(10.0)
        assert limit.now(100.0 + 100 * RECOVERY_S, 16) == 16

    def test_a_deployment_that_is_late_at_a_load_settles_with_few_changes(self) -> None:
        """Half an hour of 30 requests at once on a model whose first tokens are late with more than 5 at a replica."""
        loop = Loop(self.targets, start_s=20)
        for _ in range(1800):
            each = 30 / max(1, loop.running)
            loop.step(signals(mean=30, first_tokens=100, late_first_tokens=50 if each > 5 else 0))
        assert 6 <= loop.target <= 8
        assert turns(loop.targets_seen) <= 1
        assert 30 / loop.running <= 5


def trace(name: str) -> list[dict[str, Any]]:
    """Ray's contexts as our policy got them, about two a second; the first line says what was run."""
    return [json.loads(line) for line in (TRACES / name).read_text().splitlines()[1:]]


def replayed(entries: Iterable[dict[str, Any]], targets: Targets) -> list[int]:
    """The decisions over recorded signals, with the replicas that really ran; asleep: as Ray decided."""
    memory, decided = None, []
    for entry in entries:
        if entry["running"] == 0:
            memory = None
            decided.append(entry["target"])
            continue
        fields = {key: value for key, value in entry.items() if key not in ("at_s", "decided")}
        wanted, memory, _ = decide(Signals(**fields), targets, memory, entry["at_s"])
        decided.append(wanted)
    return decided


def turns(counts: list[int]) -> int:
    """How often growing follows shrinking, or the reverse."""
    steps = [b - a for a, b in pairwise(counts) if a != b]
    return sum((a > 0) != (b > 0) for a, b in pairwise(steps))


class TestRecordedTraces:
    coming_and_going = Targets(ongoing_requests=2, upscale_delay_s=1, downscale_delay_s=4)

    def test_it_follows_load_and_never_grows_after_it_has_ended(self) -> None:
        """What made Ray's own policy grow again here: the mean of the window still shows load that has ended."""
        entries = trace("load_comes_and_goes.jsonl")
        decided = replayed(entries, self.coming_and_going)
        assert set(decided) == {0, 1, 2, 3}
        stale = 0
        for before, after, count, next_count in zip(entries, entries[1:], decided, decided[1:], strict=False):
            if before.get("newest_requests") == after.get("newest_requests") == 0:
                assert next_count <= max(count, after["target"]), after
                stale += after["mean_requests"] > 2 * after["running"]
        assert stale or any(entry.get("mean_requests", 0) > entry.get("newest_requests", 0) for entry in entries)

    def test_one_direction_at_a_time(self) -> None:
        """Two loads come and go: up, down, up, down, and no other turn."""
        decided = replayed(trace("load_comes_and_goes.jsonl"), self.coming_and_going)
        assert turns(decided) == 3, decided

    def test_a_full_engine_is_seen_by_its_queue_where_requests_alone_say_nothing(self) -> None:
        entries = trace("vllm_fills_up.jsonl")
        full = [position for position, entry in enumerate(entries) if entry.get("waiting", 0) >= 2]
        assert len(full) > 30
        alone = replayed(entries, Targets(ongoing_requests=16))
        queue = replayed(entries, Targets(ongoing_requests=16, waiting_requests=1))
        assert set(alone) <= {0, 1}
        assert {queue[position] for position in full} <= {2, 3, 4}
        assert queue[0] == 1 and queue[-1] <= 1

    def test_late_first_tokens_of_a_real_engine_lower_what_a_replica_is_given(self) -> None:
        entries = trace("vllm_fills_up.jsonl")
        targets = Targets(ongoing_requests=16, ttft_p99_s=1.0)
        assert max(replayed(entries, targets)) == 1, "with one replica at most there is nothing to learn"
        free = [entry | {"most": 8} for entry in entries]
        assert max(replayed(free, targets)) >= 2
        assert replayed(free, targets)[-1] <= 1
