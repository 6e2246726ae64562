"""Money against exact fractions."""

from __future__ import annotations

from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from zenray.spec.money import Price, format_usd, round_nano_usd, usd_to_nano_usd

tokens = st.integers(min_value=0, max_value=10**9)
unit_prices = st.decimals(min_value=0, max_value=1000, places=9)


def price(price_in: Decimal | str, cached: Decimal | str, price_out: Decimal | str) -> Price:
    return Price.model_validate(
        {
            "version": "v",
            "input_usd_per_1k": price_in,
            "cached_input_usd_per_1k": cached,
            "output_usd_per_1k": price_out,
        }
    )


@given(tokens, tokens, tokens, unit_prices, unit_prices, unit_prices)
def test_a_cost_is_three_legs_each_rounded_once(
    uncached: int, cached: int, output: int, price_in: Decimal, price_cached: Decimal, price_out: Decimal
) -> None:
    # round() of a Fraction rounds half to even, with no limit on digits.
    legs = ((uncached, price_in), (cached, price_cached), (output, price_out))
    expected = sum(round(Fraction(count) * Fraction(usd) * 10**9 / 1000) for count, usd in legs)
    cost = price(price_in, price_cached, price_out).cost_nano_usd(uncached + cached, cached, output)
    assert cost == expected
    assert isinstance(cost, int)


@given(st.fractions(min_value=-(10**15), max_value=10**15, max_denominator=2**20))
def test_rounding_is_half_to_even(amount: Fraction) -> None:
    halves = Fraction(round(amount * 2), 2)  # whole and half amounts, where rounding is decided
    assert round_nano_usd(Decimal(halves.numerator) / Decimal(halves.denominator)) == round(halves)


@pytest.mark.parametrize(("amount", "rounded"), [("0.5", 0), ("1.5", 2), ("2.5", 2), ("-0.5", 0), ("2.5000001", 3)])
def test_rounding_by_example(amount: str, rounded: int) -> None:
    assert round_nano_usd(Decimal(amount)) == rounded


@given(tokens, tokens, tokens, tokens)
def test_more_tokens_never_cost_less(a: int, b: int, c: int, d: int) -> None:
    zen_7b = price("0.0003", "0.00015", "0.0006")
    assert zen_7b.cost_nano_usd(a, 0, b) <= zen_7b.cost_nano_usd(a + c, 0, b + d)
    assert zen_7b.cost_nano_usd(a + c, c, b) <= zen_7b.cost_nano_usd(a + c, 0, b)


def test_hip_39_prices_by_hand() -> None:
    assert price("0.0003", "0.00015", "0.0006").cost_nano_usd(1000, 0, 1000) == 900_000  # 0.0009 USD
    assert price("0.015", "0.0075", "0.03").cost_nano_usd(1, 0, 1) == 15_000 + 30_000
    assert price("0.0003", "0.00015", "0.0006").cost_nano_usd(3, 3, 0) == 450
    assert price("0.0000015", "0", "0").cost_nano_usd(1, 0, 0) == 2  # 1.5 nano-dollars
    assert price("0.0000005", "0", "0.0000005").cost_nano_usd(1, 0, 1) == 0  # two halves, each rounded to even


def test_the_thread_s_decimal_context_does_not_matter_up_to_28_digits() -> None:
    zen_7b = price("0.000300001", "0", "0.0006")
    exact = zen_7b.cost_nano_usd(123_456_789, 0, 987_654_321)
    with localcontext() as context:
        context.prec = 60
        assert zen_7b.cost_nano_usd(123_456_789, 0, 987_654_321) == exact


@pytest.mark.parametrize("usage", [(-1, 0, 0), (1, 2, 0), (1, -1, 0), (1, 0, -1)])
def test_impossible_usage_is_refused(usage: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="impossible usage"):
        price("1", "1", "1").cost_nano_usd(*usage)


@given(st.integers(min_value=-(10**18), max_value=10**18))
def test_an_amount_survives_being_written_and_read(amount_nano_usd: int) -> None:
    written = format_usd(amount_nano_usd)
    assert usd_to_nano_usd(written.replace("$", "").replace(",", "")) == amount_nano_usd
    whole, places = written.split(".")
    assert 2 <= len(places) <= 9
    assert whole.lstrip("-").startswith("$")


@pytest.mark.parametrize(
    ("amount_nano_usd", "written"),
    [
        (0, "$0.00"),
        (1, "$0.000000001"),
        (-1_500_000_000, "-$1.50"),
        (1_234_567_890_000_000, "$1,234,567.89"),
        (900_000, "$0.0009"),
    ],
)
def test_how_amounts_are_written(amount_nano_usd: int, written: str) -> None:
    assert format_usd(amount_nano_usd) == written


def test_an_amount_finer_than_a_nano_dollar_is_refused() -> None:
    assert usd_to_nano_usd("12.50") == 12_500_000_000
    with pytest.raises(ValueError, match="finer than a nano-dollar"):
        usd_to_nano_usd("0.0000000001")


@pytest.mark.parametrize("bad", [{"version": ""}, {"input_usd_per_1k": "-1"}, {"output_usd_per_1k": "NaN"}, {"x": 1}])
def test_an_impossible_price_is_refused(bad: dict[str, object]) -> None:
    whole = {"version": "v", "input_usd_per_1k": 1, "cached_input_usd_per_1k": 1, "output_usd_per_1k": 1}
    with pytest.raises(ValidationError):
        Price.model_validate(whole | bad)


@given(unit_prices)
def test_a_price_survives_json(unit_price: Decimal) -> None:
    one = price(unit_price, unit_price, unit_price)
    assert Price.model_validate_json(one.model_dump_json()) == one
