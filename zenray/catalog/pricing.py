"""Prices and limits that no document gives: log-log interpolated on total parameters between those that it does.

Below the smallest anchor the smallest anchor's value holds; above the largest the line through the two largest goes on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from decimal import ROUND_HALF_EVEN, Context, Decimal, localcontext

from zenray.spec.money import Price

_EXACT = Context(prec=40)  # Decimal's ln and exp are correctly rounded: the same digits on every machine


def interpolate(total_parameters: int, anchors: Mapping[int, Decimal]) -> Decimal:
    """The value for `total_parameters`, unrounded. `anchors`: total parameters → value, at least two, all above 0."""
    if len(anchors) < 2 or min(anchors.values()) <= 0:
        raise ValueError(f"needs two anchors with values above 0, got {dict(anchors)}")
    sizes = sorted(anchors)
    if total_parameters <= sizes[0]:
        return anchors[sizes[0]]
    if total_parameters in anchors:
        return anchors[total_parameters]
    above = next((i for i, size in enumerate(sizes) if size > total_parameters), len(sizes) - 1)
    low, high = sizes[above - 1], sizes[above]
    with localcontext(_EXACT):
        share = (Decimal(total_parameters) / low).ln() / (Decimal(high) / low).ln()
        return anchors[low] * (share * (anchors[high] / anchors[low]).ln()).exp()


def round_significant(value: Decimal, digits: int) -> Decimal:
    """`value` to `digits` significant digits, half to even."""
    if value == 0:
        return value
    return value.quantize(Decimal(1).scaleb(value.adjusted() - digits + 1), rounding=ROUND_HALF_EVEN)


def make_price(input_usd_per_1k: Decimal, cached_input_usd_per_1k: Decimal, output_usd_per_1k: Decimal) -> Price:
    """A price whose version is a hash of its numbers, so that it changes exactly when one of them does."""
    plain = [_plain(number) for number in (input_usd_per_1k, cached_input_usd_per_1k, output_usd_per_1k)]
    return Price(
        version="p-" + hashlib.sha256("|".join(plain).encode()).hexdigest()[:12],
        input_usd_per_1k=Decimal(plain[0]),
        cached_input_usd_per_1k=Decimal(plain[1]),
        output_usd_per_1k=Decimal(plain[2]),
    )


def _plain(number: Decimal) -> str:
    """The one way to write a number: no exponent, no zeros at the end."""
    text = format(number, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text
