"""Money: integer nano-dollars (1 nano-dollar = 10⁻⁹ USD), Decimal unit prices, one rounding function."""

from __future__ import annotations

from decimal import ROUND_HALF_EVEN, Decimal

from pydantic import BaseModel, ConfigDict, Field

NANO_USD_PER_USD = 10**9
TOKENS_PER_PRICED_UNIT = 1000


def round_nano_usd(amount: Decimal) -> int:
    """Whole nano-dollars, half to even. The only place in zenray where money is rounded."""
    return int(amount.quantize(Decimal(1), rounding=ROUND_HALF_EVEN))


def usd_to_nano_usd(usd: Decimal | str) -> int:
    """`"12.50"` USD as nano-dollars; an amount finer than a nano-dollar is refused with ValueError."""
    exact = Decimal(usd) * NANO_USD_PER_USD
    if exact != exact.to_integral_value():
        raise ValueError(f"{usd} USD is finer than a nano-dollar (0.000000001 USD)")
    return int(exact)


def format_usd(amount_nano_usd: int) -> str:
    """`"$0.000001234"`: exact, with at least two and at most nine places."""
    sign = "-" if amount_nano_usd < 0 else ""
    whole, nano = divmod(abs(amount_nano_usd), NANO_USD_PER_USD)
    places = f"{nano:09d}".rstrip("0").ljust(2, "0")
    return f"{sign}${whole:,}.{places}"


class Price(BaseModel):
    """What a model's tokens cost. All prices in USD per 1,000 tokens, as the HIP-39 table gives them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: str = Field(min_length=1, description="Changes whenever a number changes; stored with every charge.")
    input_usd_per_1k: Decimal = Field(ge=0)
    cached_input_usd_per_1k: Decimal = Field(ge=0)
    output_usd_per_1k: Decimal = Field(ge=0)

    def cost_nano_usd(self, input_tokens: int, cached_input_tokens: int, output_tokens: int) -> int:
        """The price of a request: three legs, each rounded once. `cached_input_tokens` is part of `input_tokens`."""
        if not 0 <= cached_input_tokens <= input_tokens or output_tokens < 0:
            raise ValueError(
                f"impossible usage: input {input_tokens}, cached {cached_input_tokens}, output {output_tokens}"
            )
        legs = (
            (input_tokens - cached_input_tokens, self.input_usd_per_1k),
            (cached_input_tokens, self.cached_input_usd_per_1k),
            (output_tokens, self.output_usd_per_1k),
        )
        return sum(round_nano_usd(tokens * usd * NANO_USD_PER_USD / TOKENS_PER_PRICED_UNIT) for tokens, usd in legs)
