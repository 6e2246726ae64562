"""Applies usage and credits to the ledger, each once, and answers what an organisation has left."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from zenray.control.billing.repository import insert_entries, insert_usage, lock_accounts
from zenray.control.billing.tables import Account, LedgerEntry
from zenray.spec.errors import Conflict, InvalidValue
from zenray.spec.money import NANO_USD_PER_USD, format_usd
from zenray.spec.usage import UsageEvent

MAX_CREDIT_NANO_USD = 100_000_000 * NANO_USD_PER_USD


@dataclass(frozen=True)
class RecordedUsage:
    """What a batch changed: the events that were not known before, each with its cost in nano-USD."""

    received: int
    charged: list[tuple[UsageEvent, int]]


def record_usage(session: Session, events: Sequence[UsageEvent]) -> RecordedUsage:
    """Events and their ledger entries, in the caller's transaction; a billing key seen before is left as it is."""
    by_key = {event.billing_key: event for event in reversed(events)}  # the first of a key counts
    if not by_key:
        return RecordedUsage(len(events), [])
    accounts = lock_accounts(session, (event.org for event in by_key.values()))
    rows = {key: _usage_row(event) for key, event in sorted(by_key.items())}
    new_keys = insert_usage(session, list(rows.values()))
    spent: defaultdict[str, int] = defaultdict(int)
    entries = []
    for key in sorted(new_keys):
        row = rows[key]
        spent[row["org"]] += row["cost_nano_usd"]
        entries.append(
            {
                "org": row["org"],
                "amount_nano_usd": -row["cost_nano_usd"],
                "kind": "usage",
                "source": "usage",
                "source_id": key,
                "note": None,
                "at": row["at"],
            }
        )
    if entries:
        insert_entries(session, entries)
    for org, cost in spent.items():
        accounts[org].balance_nano_usd -= cost
    session.flush()
    return RecordedUsage(len(events), [(by_key[key], rows[key]["cost_nano_usd"]) for key in sorted(new_keys)])


def add_credit(
    session: Session, org: str, amount_nano_usd: int, *, idempotency_key: str, note: str | None, now: float
) -> tuple[LedgerEntry, bool]:
    """The entry, and whether it is new. The same key again gives the first entry; with another amount, Conflict."""
    if not 0 < amount_nano_usd <= MAX_CREDIT_NANO_USD:
        raise InvalidValue(
            f"A credit of {format_usd(amount_nano_usd)} is not possible.",
            hint=f"Give more than $0 and at most {format_usd(MAX_CREDIT_NANO_USD)}.",
            param="amount_usd",
        )
    account = lock_accounts(session, [org])[org]
    source_id = f"{org}/{idempotency_key}"
    earlier = session.scalars(
        select(LedgerEntry).where(
            LedgerEntry.source == "credit", LedgerEntry.source_id == source_id, LedgerEntry.kind == "credit"
        )
    ).one_or_none()
    if earlier is not None:
        if earlier.amount_nano_usd != amount_nano_usd:
            raise Conflict(
                f"The idempotency key {idempotency_key!r} was used for {format_usd(earlier.amount_nano_usd)}, "
                f"not {format_usd(amount_nano_usd)}.",
                hint="Use a new key for a new credit.",
                param="idempotency_key",
            )
        return earlier, False
    entry = LedgerEntry(
        org=org, amount_nano_usd=amount_nano_usd, kind="credit", source="credit", source_id=source_id, note=note, at=now
    )
    session.add(entry)
    account.balance_nano_usd += amount_nano_usd
    session.flush()
    return entry, True


def balance_nano_usd(session: Session, org: str) -> int:
    """What the organisation has, not counting what is lent out. 0 if it never had anything."""
    return session.scalars(select(Account.balance_nano_usd).where(Account.org == org)).one_or_none() or 0


def balances(session: Session) -> dict[str, int]:
    """Nano-USD by organisation, for those that ever had any."""
    rows = session.execute(select(Account.org, Account.balance_nano_usd))
    return {row.org: row.balance_nano_usd for row in rows}


def _usage_row(event: UsageEvent) -> dict[str, Any]:
    return {
        "billing_key": event.billing_key,
        "request_id": event.request_id,
        "attempt": event.attempt,
        "org": event.org,
        "user_id": event.user_id,
        "key_id": event.key_id,
        "model_asked": event.model_asked,
        "model_answered": event.model_answered,
        "adapter": event.adapter,
        "quantization": event.quantization,
        "input_tokens": event.usage.input_tokens,
        "cached_input_tokens": event.usage.cached_input_tokens,
        "output_tokens": event.usage.output_tokens,
        "price": event.price.model_dump_json(),
        "cost_nano_usd": event.cost_nano_usd(),
        "latency_ms": event.latency_ms,
        "ttft_ms": event.ttft_ms,
        "finish_reason": event.finish_reason,
        "outcome": event.outcome.value,
        "at": event.at,
        "day": datetime.fromtimestamp(event.at, UTC).strftime("%Y-%m-%d"),
    }
