"""Usage events for tests."""

from __future__ import annotations

from decimal import Decimal

from zenray.spec.money import Price
from zenray.spec.usage import Outcome, Usage, UsageEvent

PRICE = Price(
    version="test-1",
    input_usd_per_1k=Decimal("0.001"),
    cached_input_usd_per_1k=Decimal("0.0001"),
    output_usd_per_1k=Decimal("0.002"),
)
OUTPUT_TOKEN_NANO_USD = 2_000


def event(
    sequence: int,
    *,
    org: str = "acme",
    gateway: str = "g1",
    boot: str = "b1",
    output_tokens: int = 10,
    input_tokens: int = 0,
    cached_input_tokens: int = 0,
    at: float = 1_700_000_000.0,
    model: str = "small",
    key_id: str = "key_1",
) -> UsageEvent:
    return UsageEvent(
        billing_key=f"{gateway}:{boot}:{sequence}",
        request_id=f"req-{sequence}",
        org=org,
        key_id=key_id,
        model_asked=model,
        model_answered=model,
        usage=Usage(input_tokens=input_tokens, cached_input_tokens=cached_input_tokens, output_tokens=output_tokens),
        price=PRICE,
        finish_reason="stop",
        outcome=Outcome.COMPLETED,
        at=at,
    )
