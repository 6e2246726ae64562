"""What a run keeps of its events: as much for a deep network of many experts as for a small one, and nothing lost."""

from __future__ import annotations

import json
from typing import Any

import pytest

from zenray.training.history import History


def step(number: int, loads: list[list[float]], tokens: int = 10, was_skipped: bool = False) -> dict[str, Any]:
    figures = {"entropy_ratios": [0.5], "fallback_tokens": [3]}
    of_layers = {name: value * len(loads) for name, value in figures.items()} | {"loads": loads}
    about = {"event": "step", "step": number, "loss": 2.5, "tokens": tokens, "was_skipped": was_skipped}
    return about | of_layers


def kept(history: History) -> list[dict[str, Any]]:
    return [json.loads(line) for line in history.lines()]


def test_what_is_kept_of_a_step_does_not_grow_with_layers_and_experts() -> None:
    sizes = []
    for layers, experts in ((2, 4), (60, 128)):
        history = History(10_000)
        history.add(step(0, [[1 / experts] * experts] * layers))
        before = len("".join(history._lines))
        for number in range(1, 99):
            history.add(step(number, [[1 / experts] * experts] * layers))
        sizes.append(len("".join(history._lines)) - before)
        assert "loads" not in kept(history)[50]
    assert sizes[0] == sizes[1]


def test_loads_are_kept_as_means_and_counts_as_sums_since_the_time_before() -> None:
    history = History(400)
    for number in range(400):
        first = number in (0, 396)
        history.add(step(number, [[float(first), float(not first)]], tokens=40 if first else 20))
    found = {event["step"]: event for event in kept(history) if "loads" in event}
    assert list(found) == [0, *range(3, 400, 4)]
    assert found[399]["loads"] == [[pytest.approx(0.4), pytest.approx(0.6)]]
    assert found[399]["loads_tokens"] == 100 and found[3]["loads_tokens"] == 60
    assert found[399]["entropy_ratios"] == [0.5] and found[399]["fallback_tokens"] == [12], "counts are added up"


def test_a_skipped_step_is_not_in_the_means() -> None:
    history = History(400)
    for number, was_skipped in enumerate((True, False, True, False)):
        history.add(step(number, [[float(was_skipped), float(not was_skipped)]], was_skipped=was_skipped))
    first, last = (event for event in kept(history) if "entropy_ratios" in event)
    assert first["loads"] == [] and last["loads"] == [[0.0, 1.0]] and last["loads_tokens"] == 20


def test_a_history_that_is_taken_up_goes_on_as_if_it_had_never_been_put_down() -> None:
    unbroken, broken = History(1000), History(1000)
    for number in range(37):
        event = step(number, [[0.1 * (number % 7), 0.3]], tokens=number + 1)
        unbroken.add(event)
        broken.add(event)
        resumed = History(1000)
        resumed.restore(kept(broken))
        broken = resumed
    assert broken.lines() == unbroken.lines() and broken.events == unbroken.events


def test_workers_but_the_first_keep_only_what_decides_about_faults() -> None:
    history = History(10, is_written=False)
    history.add({"event": "rolled_back", "step": 2, "from": 3})
    history.add(step(0, [[0.5, 0.5]]))
    assert history.lines() == []
    assert history.events == [
        {"event": "rolled_back", "step": 2, "from": 3},
        {"event": "step", "step": 0, "loss": 2.5, "was_skipped": False},
    ]
