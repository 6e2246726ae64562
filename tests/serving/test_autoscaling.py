"""The autoscaling policy: it follows load, and is not fooled by load that has ended."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zenray.serving.autoscaling import replicas_wanted


def wanted(running: int, mean: float, newest: float, *, target: int | None = None, each: float = 2) -> float:
    return replicas_wanted(
        running=running,
        target=running if target is None else target,
        mean_requests=mean,
        newest_requests=newest,
        requests_per_replica=each,
    )


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
def test_growing_needs_the_newest_count_and_the_mean(running: int, mean: float, newest: float, expected: float) -> None:
    assert wanted(running, mean, newest) == expected


def test_replicas_that_are_starting_are_not_asked_for_again() -> None:
    assert wanted(1, 6, 5, target=3) == 3


@given(
    running=st.integers(1, 50),
    mean=st.floats(0, 1e4),
    each=st.floats(0.1, 100),
)
def test_nothing_is_started_while_nothing_runs(running: int, mean: float, each: float) -> None:
    assert wanted(running, mean, 0.0, each=each) <= running


@given(running=st.integers(1, 50), load=st.floats(0, 1e4), each=st.floats(0.1, 100))
def test_steady_load_gets_what_rays_own_policy_gives(running: int, load: float, each: float) -> None:
    assert wanted(running, load, load, each=each) == pytest.approx(load / each)


def test_a_fall_of_load_never_makes_the_deployment_grow_again() -> None:
    """The window's mean lags by three ticks, and every decision takes effect at once: 3 → 1 → … must not rise."""
    history = [6.0] * 6 + [0.0] * 12
    running, seen = 3, []
    for tick in range(3, len(history)):
        mean = sum(history[tick - 3 : tick]) / 3
        count = wanted(running, mean, history[tick])
        running = max(1, round(count)) if count < running else int(count)
        seen.append(running)
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] == 1
