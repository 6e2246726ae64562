"""Which worker counts and axes fit together."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zenray.spec.errors import InvalidValue
from zenray.spec.parallelism import Axes, check_axes, check_sequence, divisors, most_workers, near_counts
from zenray.spec.training import Workers

sizes = st.integers(1, 6)
axes = st.builds(Axes, pipeline=sizes, context=sizes, expert=sizes)


def is_legal(workers: int, axes: Axes) -> bool:
    try:
        check_axes(workers, axes)
    except InvalidValue:
        return False
    return True


@given(st.integers(1, 200), axes)
def test_legal_counts_are_the_multiples_of_the_step(workers: int, axes: Axes) -> None:
    assert is_legal(workers, axes) == (workers % axes.step == 0)


@given(st.integers(1, 200), axes)
def test_a_legal_factorisation_leaves_nobody_out(workers: int, axes: Axes) -> None:
    if is_legal(workers, axes):
        assert axes.pipeline * axes.context * axes.data(workers) == workers
        assert axes.pipeline * axes.expert * axes.replicas(workers) == workers


@given(st.integers(1, 200), axes)
def test_what_is_offered_instead_is_legal_and_nearest(workers: int, axes: Axes) -> None:
    offered = near_counts(workers, axes)
    assert offered and all(is_legal(count, axes) for count in offered)
    assert not any(is_legal(count, axes) for count in range(min(offered) + 1, max(offered)))
    left = most_workers(workers, axes)
    assert left <= workers < left + axes.step
    assert left == 0 or is_legal(left, axes)


@pytest.mark.parametrize(
    ("workers", "axes", "param", "said"),
    [
        (3, Axes(expert=2), "expert_parallel", "expert_parallel can be 1, 3; with these axes there can be 2, 4"),
        (
            6,
            Axes(expert=4),
            "expert_parallel",
            "expert_parallel can be 1, 2, 3, 6; with these axes there can be 4, 8",
        ),
        (7, Axes(pipeline=2), "pipeline_parallel", "pipeline_parallel can be 1, 7"),
        (8, Axes(pipeline=2, expert=3), "expert_parallel", "expert_parallel can be 1, 2, 4"),
        (8, Axes(context=3), "context_parallel", "context_parallel can be 1, 2, 4, 8"),
        (1, Axes(expert=4), "expert_parallel", "expert_parallel can be 1; with these axes there can be 4 workers"),
    ],
)
def test_the_refusal_names_the_axis_and_what_is_legal(workers: int, axes: Axes, param: str, said: str) -> None:
    with pytest.raises(InvalidValue) as refused:
        check_axes(workers, axes)
    assert refused.value.param == param
    assert said in str(refused.value.hint)


def test_a_job_file_is_held_to_the_same_rule() -> None:
    with pytest.raises(ValueError, match=r"3 workers cannot form expert groups of 2.*expert_parallel can be 1, 3"):
        Workers(count=3, expert_parallel=2)
    assert divisors(12) == [1, 2, 3, 4, 6, 12]


@given(st.integers(8, 4096), st.integers(1, 16))
def test_a_sequence_that_is_refused_is_told_lengths_that_are_not(tokens: int, context: int) -> None:
    if context == 1 or tokens % (2 * context) == 0:
        check_sequence(tokens, context)
        return
    with pytest.raises(InvalidValue) as refused:
        check_sequence(tokens, context)
    numbers = [int(found.replace(",", "")) for found in re.findall(r"\d[\d,]*(?= or| tokens)", str(refused.value.hint))]
    assert numbers
    for legal in numbers:
        check_sequence(legal, context)
