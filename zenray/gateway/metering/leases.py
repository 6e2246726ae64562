"""Credit that control has lent to this gateway, organisation by organisation: what may still be promised to engines.

The protocol, seen from the gateway (control's half is in `zenray.control.edge`):

- `available = granted - reserved - spent`. A request is admitted only if its worst case is available, so what is
  admitted is covered before any engine is asked.
- Control's hold on an organisation's balance for a gateway is `granted in total - settled in the ledger by it`. The
  grants of all gateways and the settled spend never pass the balance: one row lock in control.
- Lease requests of one organisation go one at a time, numbered upwards (`LeaseRequest.sequence`). When an answer is
  lost the request is sent again under its number, and control answers as before without counting it twice. A request
  whose answer never comes leaves the hold too large, never too small, until the gateway's next boot.
- Credit that lies idle is given back in the next request. It is taken off here first, so at no moment do both sides
  count on it.
- A gateway begins each boot with no credit at all. It first ships its whole log, and then asks under its new boot id;
  control then releases what the older boots of the same gateway id still hold: whatever they spent is in the ledger.
- A hold does not expire by itself: its holder may still have usage to ship. A gateway whose disk is lost is declared
  lost by an operator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from zenray.spec.clock import Clock


@dataclass
class _Credit:
    granted_nano_usd: int = 0
    reserved_nano_usd: int = 0
    spent_nano_usd: int = 0
    shortfall_nano_usd: int = 0  # the largest reserve refused since the last grant
    balance_nano_usd: int | None = None  # as control last told it
    rate_nano_usd_per_s: float = 0.0
    rate_at_s: float = 0.0
    used_at_s: float = 0.0

    @property
    def available_nano_usd(self) -> int:
        return self.granted_nano_usd - self.reserved_nano_usd - self.spent_nano_usd


class LeaseBook:
    """Credit per organisation. Pure arithmetic over a clock; not for several threads at once."""

    def __init__(
        self, clock: Clock, *, horizon_s: float = 5.0, first_wish_nano_usd: int = 10_000_000, idle_s: float = 30.0
    ) -> None:
        self._clock = clock
        self._horizon_s = horizon_s
        self._first_wish_nano_usd = first_wish_nano_usd
        self._idle_s = idle_s
        self._credits: dict[str, _Credit] = {}

    def granted(self, org: str, granted_nano_usd: int, balance_nano_usd: int | None = None) -> None:
        """Control's answer: so much more may be spent; `balance_nano_usd` is what the organisation has in all."""
        credit = self._credit(org)
        credit.granted_nano_usd += granted_nano_usd
        credit.shortfall_nano_usd = 0
        credit.balance_nano_usd = balance_nano_usd

    def reserve(self, org: str, amount_nano_usd: int) -> bool:
        """Set a request's worst case aside. False: not covered; ask control for `wanted` and try again, or refuse."""
        credit = self._credit(org)
        credit.used_at_s = self._clock.monotonic()
        if amount_nano_usd > credit.available_nano_usd:
            credit.shortfall_nano_usd = max(credit.shortfall_nano_usd, amount_nano_usd)
            return False
        credit.reserved_nano_usd += amount_nano_usd
        return True

    def settle(self, org: str, reserved_nano_usd: int, spent_nano_usd: int) -> None:
        """A request has ended: its reserve is free again, what it cost is gone."""
        credit = self._credit(org)
        if reserved_nano_usd > credit.reserved_nano_usd or min(reserved_nano_usd, spent_nano_usd) < 0:
            raise ValueError(f"{org}: {reserved_nano_usd} to settle of {credit.reserved_nano_usd} reserved")
        credit.reserved_nano_usd -= reserved_nano_usd
        credit.spent_nano_usd += spent_nano_usd
        now_s = self._clock.monotonic()
        credit.used_at_s = now_s
        credit.rate_nano_usd_per_s = self._rate(credit, now_s) + spent_nano_usd / self._horizon_s
        credit.rate_at_s = now_s

    def available(self, org: str) -> int:
        credit = self._credits.get(org)
        return credit.available_nano_usd if credit else 0

    def wanted(self, org: str) -> int:
        """How much more to ask control for; 0 while there is enough.

        Some seconds of the current spending beyond what is available, at least what a refused request lacked. Of a
        balance that is small beside that, an eighth at a time, so that other gateways find something too.
        """
        credit = self._credit(org)
        now_s = self._clock.monotonic()
        lacking = max(0, credit.shortfall_nano_usd - credit.available_nano_usd, -credit.available_nano_usd)
        target = max(int(self._rate(credit, now_s) * self._horizon_s), self._first_wish_nano_usd)
        if not lacking and credit.available_nano_usd >= target // 2:
            return 0
        wish = max(0, target - credit.available_nano_usd)
        if credit.balance_nano_usd is not None:
            wish = min(wish, max(credit.balance_nano_usd, 0) // 8)
        return max(wish, lacking)

    def give_back(self, org: str) -> int:
        """Take idle credit out of the book, for a lease request that is sent right away. 0 while the org is active."""
        credit = self._credits.get(org)
        if credit is None or credit.reserved_nano_usd or self._clock.monotonic() - credit.used_at_s < self._idle_s:
            return 0
        if credit.available_nano_usd < 0:
            return 0
        del self._credits[org]
        return credit.available_nano_usd

    def orgs(self) -> list[str]:
        """Organisations that have credit or asked for it."""
        return list(self._credits)

    def _credit(self, org: str) -> _Credit:
        credit = self._credits.get(org)
        if credit is None:
            now_s = self._clock.monotonic()
            credit = self._credits[org] = _Credit(rate_at_s=now_s, used_at_s=now_s)
        return credit

    def _rate(self, credit: _Credit, now_s: float) -> float:
        """Spending per second, an exponential average over the horizon."""
        elapsed_s = max(0.0, now_s - credit.rate_at_s)
        return credit.rate_nano_usd_per_s * math.exp(-elapsed_s / self._horizon_s)
