"""Prefix affinity: what is remembered, what is preferred, and what a day of traffic makes of it."""

from __future__ import annotations

import heapq
import os
import random
from collections import Counter, OrderedDict

from hypothesis import given
from hypothesis import strategies as st

from zenray.gateway.homes import SPAN_S, Homes
from zenray.gateway.replica_choice import (
    BLOCK_BYTES,
    MAX_PREFIX_BYTES,
    PrefixMemory,
    choose,
    home_key,
    name_blocks,
    prompt_prefix,
    slack,
)
from zenray.spec.edge import Endpoint

REPLICAS = [Endpoint(replica_id=name, url=f"http://{name}") for name in "abc"]


def text(seed: str, size_bytes: int) -> str:
    return "".join(random.Random(seed).choices("abcdefgh ", k=size_bytes))


def blocks_of(*contents: str, root: str = "m:acme") -> list[int]:
    body = {"messages": [{"role": "system", "content": content} for content in contents]}
    return name_blocks(root, prompt_prefix(body))


def pick(blocks: list[int], memory: PrefixMemory, outstanding: dict[str, int], **options: object) -> str:
    arguments = {"suspect_until": {}, "tried": (), "now": 0.0, "turn": 0} | options
    matched = memory.matched(blocks)
    replica = choose(REPLICAS, outstanding, blocks=blocks, matched=matched, **arguments)  # type: ignore[arg-type]
    assert replica
    return replica.replica_id


def test_what_knows_the_prompt_is_preferred_until_it_is_much_busier() -> None:
    memory, blocks = PrefixMemory(), blocks_of(text("x", 3000))
    memory.note(blocks, "b")
    longer = blocks_of(text("x", 3000), text("question", 500))
    known = len(blocks)
    for busy in range(slack(0, known) + 1):
        assert pick(longer, memory, {"b": busy}) == "b"
    assert pick(longer, memory, {"b": slack(0, known) + 1}) != "b"
    assert pick(longer, memory, {"a": 10, "b": 10 + slack(10, known), "c": 10}) == "b"
    assert pick(longer, memory, {"a": 10, "b": 11 + slack(10, known), "c": 12}) == "a"
    assert slack(0) == 2 and slack(0, 8) == 6 and slack(0, 64) == slack(0, 1000) == 10


def test_the_longest_match_wins_and_ties_go_to_the_less_busy() -> None:
    memory = PrefixMemory()
    memory.note(blocks_of(text("x", 1000)), "a")
    memory.note(blocks_of(text("x", 3000)), "b")
    asked = blocks_of(text("x", 3000), "and so on")
    assert pick(asked, memory, {"b": 1}) == "b"
    memory.note(asked, "c")
    assert pick(asked, memory, {"b": 1}) == "c"


def test_suspects_and_those_tried_are_not_preferred() -> None:
    memory, blocks = PrefixMemory(), blocks_of(text("x", 3000))
    memory.note(blocks, "b")
    assert pick(blocks, memory, {}, suspect_until={"b": 1.0}) != "b"
    assert pick(blocks, memory, {}, tried={"b"}) != "b"
    assert pick(blocks, memory, {}, tried={"a", "c"}, suspect_until={"b": 1.0}) == "b"


def test_a_replica_that_vanished_is_never_chosen() -> None:
    memory, blocks = PrefixMemory(), blocks_of(text("x", 3000))
    for _ in range(10):
        memory.note(blocks, "gone")
        assert pick(blocks, memory, {"gone": 0, "a": 5, "b": 7, "c": 7}) == "a"


def test_a_little_in_common_does_not_decide() -> None:
    memory = PrefixMemory()
    memory.note(blocks_of(text("header", BLOCK_BYTES)), "c")
    assert pick(blocks_of(text("header", BLOCK_BYTES) + text("x", 8000)), memory, {"c": 2, "b": 2}) == "a"


def test_gateways_that_know_nothing_of_each_other_agree() -> None:
    prompts = [blocks_of(text(str(number), 2000)) for number in range(200)]
    first = [pick(prompt, PrefixMemory(), {}, turn=0) for prompt in prompts]
    assert first == [pick(prompt, PrefixMemory(), {}, turn=number) for number, prompt in enumerate(prompts)]
    assert min(Counter(first).values()) > 40


def test_a_prompt_s_home_draws_back_what_was_sent_elsewhere_in_a_rush() -> None:
    memory, blocks = PrefixMemory(), blocks_of(text("x", 3000))
    memory.note(blocks, "b")
    memory.note(blocks, "c")  # when b was too busy
    assert pick(blocks, memory, {"b": 2}, home="b") == "b"
    long = blocks_of(text("x", 3000), text("conversation", 8000))
    memory.note(long, "c")
    assert pick(long, memory, {"b": 0, "c": 2}, home="b") == "c"  # which knows far more of it


def test_a_home_that_another_process_has_chosen_is_known() -> None:
    blocks = blocks_of(text("x", 3000))
    for home in "abc":
        assert pick(blocks, PrefixMemory(), {home: 2}, home=home) == home
        assert pick(blocks, PrefixMemory(), {home: 20}, home=home) != home
    assert pick(blocks, PrefixMemory(), {}, home="gone") in "abc"


def test_new_prompts_go_to_those_that_are_home_to_the_fewest() -> None:
    held = {"a": 3, "b": 1, "c": 2}
    for number in range(20):
        blocks = blocks_of(text(str(number), 2000))
        bearable = slack(0, 4)
        assert pick(blocks, PrefixMemory(), {"b": bearable}, held=held.__getitem__) == "b"
        assert pick(blocks, PrefixMemory(), {"b": bearable + 1}, held=held.__getitem__) == "c"
        assert pick(blocks, PrefixMemory(), {"b": 30, "a": 10, "c": 10 + slack(10, 4)}, held=held.__getitem__) == "c"


def test_a_prompt_whose_home_is_too_busy_goes_to_the_least_busy() -> None:
    held = {"a": 0, "b": 5, "c": 9}
    blocks = blocks_of(text("x", 3000))
    assert pick(blocks, PrefixMemory(), {"a": 2, "b": 30}, home="b", held=held.__getitem__) == "c"


def test_what_only_another_process_asked_is_believed_of_a_home() -> None:
    memory, blocks = PrefixMemory(), blocks_of(text("x", 12_000))
    memory.note(blocks, "a")
    assert pick(blocks, memory, {}, home="b") == "b"  # where it has been at home since another process settled it
    memory.note(blocks[:8], "b")
    assert pick(blocks, memory, {}, home="b") == "a"  # now it is known that b has seen little of it


def test_homes_are_agreed_on_across_processes() -> None:
    homes = Homes()
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        for number in range(100):
            homes.settle(home_key(blocks_of(text(str(number), 2000))), "ab"[number % 2], 1.0)
        os.write(write, b".")
        os._exit(0)
    assert os.read(read, 1) == b"." and os.waitpid(pid, 0)[1] == 0
    keys = [home_key(blocks_of(text(str(number), 2000))) for number in range(100)]
    assert [homes.find(key, REPLICAS) for key in keys] == ["ab"[number % 2] for number in range(100)]
    assert [homes.held(name, 1.0) for name in "abc"] == [50, 50, 0]
    assert homes.find(keys[0], REPLICAS[1:]) is None  # its replica is gone
    homes.settle(keys[0], "c", 1.0)
    assert homes.find(keys[0], REPLICAS) == "c" and [homes.held(name, 1.0) for name in "abc"] == [49, 50, 1]
    os.close(read)
    os.close(write)


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.sampled_from("abc")), max_size=100))
def test_a_small_table_forgets_but_never_lies(settled: list[tuple[int, str]]) -> None:
    homes, truth = Homes(slots=8), {}
    for key, name in settled:
        homes.settle(key, name, 1.0)
        truth[key] = name
        assert homes.find(key, REPLICAS) == name
    for key, name in truth.items():
        assert homes.find(key, REPLICAS) in (None, name) or any(
            other % 8 == key % 8 and other >> 32 == key >> 32 for other in truth if other != key
        )
    assert sum(homes.held(name, 1.0) for name in "abc") <= 8


def test_homes_that_nobody_asks_for_are_not_counted() -> None:
    homes = Homes(slots=64)
    for key in range(10):
        homes.settle(key << 32 | key, "a", 0.0)
    for span in range(6):  # four of them go on being asked for, and each is counted once
        for key in range(4):
            for _ in range(3):
                homes.settle(key << 32 | key, "a", SPAN_S * span)
        assert homes.held("a", SPAN_S * span) == (10 if span < 2 else 4)
    homes.settle(0, "b", 5 * SPAN_S)
    assert (homes.held("a", 5 * SPAN_S), homes.held("b", 5 * SPAN_S)) == (3, 1)
    assert homes.held("a", 7 * SPAN_S) == homes.held("b", 100 * SPAN_S) == 0
    assert homes.find(9 << 32 | 9, REPLICAS) == "a"  # it is not forgotten


def test_nothing_is_shared_between_roots() -> None:
    memory = PrefixMemory()
    memory.note(blocks_of(text("x", 3000), root="m:acme"), "b")
    assert memory.matched(blocks_of(text("x", 3000), root="m:other")) == {}


def test_prefixes_end_at_four_thousand_tokens_and_are_whole_blocks() -> None:
    assert len(blocks_of(text("x", 10 * MAX_PREFIX_BYTES))) == MAX_PREFIX_BYTES // BLOCK_BYTES
    assert blocks_of("short") == []
    long, longer = blocks_of(text("x", 2000)), blocks_of(text("x", 2000), "more" * 100)
    assert longer[: len(long)] == long and len(longer) > len(long)


def test_what_a_template_renders_first_comes_first() -> None:
    messages = [{"role": "system", "content": "s" * 600}, {"role": "user", "content": [{"type": "text", "text": "u"}]}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert prompt_prefix({"messages": messages, "tools": tools}).startswith(b'[{"type":"function"')
    assert prompt_prefix({"messages": messages}).startswith(b"system\0sss")
    assert prompt_prefix({"prompt": "x" * 99_999}) == b"x" * MAX_PREFIX_BYTES
    assert prompt_prefix({"prompt": [1, 2, 3]}) == b"[1,2,3]"


@given(st.lists(st.tuples(st.integers(0, 30), st.sampled_from("abcdef")), max_size=200), st.integers(1, 40))
def test_memory_is_bounded_and_tells_no_tales(sent: list[tuple[int, str]], max_blocks: int) -> None:
    memory = PrefixMemory(max_blocks)
    truth: dict[int, set[str]] = {}
    for number, replica_id in sent:
        blocks = [10 * (number // 4), 10 * (number // 4) + 1, 1000 + number][: 1 + number % 3]
        memory.note(blocks, replica_id)
        for block in blocks:
            truth.setdefault(block, set()).add(replica_id)
        assert len(memory) <= max_blocks
        for name, depth in memory.matched(blocks).items():
            assert depth <= len(blocks) and all(name in truth[block] for block in blocks[:depth])


class CachingReplica:
    """An engine's prefix cache: least recently used blocks go first; only a chain from the start is of use."""

    def __init__(self, capacity_blocks: int) -> None:
        self._capacity_blocks = capacity_blocks
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def serve(self, blocks: list[int]) -> int:
        cached = 0
        while cached < len(blocks) and blocks[cached] in self._blocks:
            cached += 1
        for block in reversed(blocks):
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while len(self._blocks) > self._capacity_blocks:
            self._blocks.popitem(last=False)
        return cached


def simulate(*, affinity: bool, rate: float, seed: int = 1) -> tuple[float, int]:
    """Share of prompt blocks found cached, and the most requests at one replica; 3 replicas that hold half of all."""
    chance = random.Random(seed)
    replicas = {one.replica_id: CachingReplica(capacity_blocks=60) for one in REPLICAS}
    memory = PrefixMemory()
    outstanding: Counter[str] = Counter()
    ends: list[tuple[float, str]] = []
    systems = [text(f"system {number}", 10 * BLOCK_BYTES) for number in range(12)]
    cached = asked = busiest = 0
    now_s = 0.0
    for turn in range(2000):
        now_s += chance.expovariate(rate)
        while ends and ends[0][0] <= now_s:
            outstanding[heapq.heappop(ends)[1]] -= 1
        blocks = blocks_of(chance.choice(systems), text(str(turn), 2 * BLOCK_BYTES))
        matched = memory.matched(blocks) if affinity else {}
        chosen = choose(REPLICAS, outstanding, {}, (), now_s, turn, blocks=blocks if affinity else (), matched=matched)
        assert chosen
        name = chosen.replica_id
        memory.note(blocks, name)
        hit = replicas[name].serve(blocks)
        cached, asked = cached + hit, asked + len(blocks)
        outstanding[name] += 1
        busiest = max(busiest, outstanding[name])
        heapq.heappush(ends, (now_s + 0.2 + 0.05 * (len(blocks) - hit), name))
    return cached / asked, busiest


def test_prompts_that_share_a_beginning_meet_without_crowding_one_replica() -> None:
    for rate in (2.0, 8.0):
        with_affinity, busiest = simulate(affinity=True, rate=rate)
        without, busiest_without = simulate(affinity=False, rate=rate)
        assert with_affinity > 1.5 * without, (rate, with_affinity, without)
        assert busiest <= busiest_without + slack(busiest_without, known=12)
