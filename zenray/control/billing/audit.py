"""Whether every balance is the sum of its ledger entries: the materialised figure against the truth behind it."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from zenray.control.billing.service import balances
from zenray.control.billing.tables import LedgerEntry
from zenray.spec.clock import Clock

_MOST_OF_THE_TIME = 0.01


@dataclass(frozen=True)
class LedgerDifference:
    org: str
    entries_nano_usd: int
    account_nano_usd: int


def check_ledger(session: Session) -> list[LedgerDifference]:
    """Every account whose balance is not the sum of its entries. Empty when all is well."""
    total = func.sum(LedgerEntry.amount_nano_usd)
    entries = {
        org: int(amount) for org, amount in session.execute(select(LedgerEntry.org, total).group_by(LedgerEntry.org))
    }
    accounts = balances(session)
    return [
        LedgerDifference(org, entries.get(org, 0), accounts.get(org, 0))
        for org in sorted(entries.keys() | accounts.keys())
        if entries.get(org, 0) != accounts.get(org, 0)
    ]


@dataclass(frozen=True)
class Finding:
    checked_at: float
    differences: tuple[LedgerDifference, ...]


class LedgerAudit:
    """Checks when asked, but spends at most a hundredth of the time on it: a check reads the whole ledger."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._last: Finding | None = None
        self._next_at_s = 0.0  # monotonic

    def newest(self, session: Session) -> Finding:
        """The last finding, or a new one when enough time has gone by since."""
        begun_at_s = self._clock.monotonic()
        if self._last is None or begun_at_s >= self._next_at_s:
            found = Finding(self._clock.now(), tuple(check_ledger(session)))
            ended_at_s = self._clock.monotonic()
            self._last, self._next_at_s = found, ended_at_s + (ended_at_s - begun_at_s) / _MOST_OF_THE_TIME
        return self._last
