"""Interpolation against floating point and against its own laws; price versions."""

from __future__ import annotations

import math
from decimal import Decimal
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zenray.catalog.pricing import interpolate, make_price, round_significant

ANCHORS = {
    7 * 10**9: Decimal("0.0003"),
    32 * 10**9: Decimal("0.0015"),
    72 * 10**9: Decimal("0.004"),
    480 * 10**9: Decimal("0.015"),
}
sizes = st.integers(min_value=10**6, max_value=10**14)


def reference(total: int) -> float:
    points = sorted((math.log(size), math.log(float(value))) for size, value in ANCHORS.items())
    x = max(math.log(total), points[0][0])
    (x0, y0), (x1, y1) = next((pair for pair in pairwise(points) if x <= pair[1][0]), (points[-2], points[-1]))
    return math.exp(y0 + (x - x0) / (x1 - x0) * (y1 - y0))


@given(sizes)
def test_log_log_line_between_anchors(total: int) -> None:
    assert float(interpolate(total, ANCHORS)) == pytest.approx(reference(total), rel=1e-9)


@given(sizes, sizes)
def test_larger_is_never_cheaper(one: int, other: int) -> None:
    small, large = sorted((one, other))
    assert interpolate(small, ANCHORS) <= interpolate(large, ANCHORS)


def test_anchors_are_met_exactly() -> None:
    for size, value in ANCHORS.items():
        assert interpolate(size, ANCHORS) == value
    assert interpolate(1, ANCHORS) == Decimal("0.0003")


@pytest.mark.parametrize("anchors", [{}, {1: Decimal(1)}, {1: Decimal(1), 2: Decimal(0)}])
def test_too_few_or_impossible_anchors(anchors: dict[int, Decimal]) -> None:
    with pytest.raises(ValueError, match="two anchors"):
        interpolate(1, anchors)


@pytest.mark.parametrize(
    ("value", "digits", "rounded"),
    [
        ("0.00062512", 3, "0.000625"),
        ("0.0099999", 3, "0.0100"),
        ("0.0012345", 4, "0.001234"),
        ("729.4", 2, "730"),
        ("84.2", 2, "84"),
        ("0", 3, "0"),
    ],
)
def test_significant_digits(value: str, digits: int, rounded: str) -> None:
    assert round_significant(Decimal(value), digits) == Decimal(rounded)


prices = st.decimals(min_value=0, max_value=100, places=6)


@given(prices, prices, prices, prices, prices, prices)
def test_a_version_changes_exactly_when_a_number_does(
    a: Decimal, b: Decimal, c: Decimal, d: Decimal, e: Decimal, f: Decimal
) -> None:
    one, other = make_price(a, b, c), make_price(d, e, f)
    assert (one.version == other.version) == ((a, b, c) == (d, e, f))


def test_a_version_does_not_depend_on_how_a_number_is_written() -> None:
    one = make_price(Decimal("0.10"), Decimal("0.0500"), Decimal("20"))
    other = make_price(Decimal("1E-1"), Decimal("0.05"), Decimal("2E+1"))
    assert one == other
    assert str(one.output_usd_per_1k) == "20"
