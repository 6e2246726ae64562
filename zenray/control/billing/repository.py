"""Statements of the ledger that must be exact on both databases."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import Table, insert, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from zenray.control.billing.tables import Account, LedgerEntry, UsageRecord

_ACCOUNTS: Table = Account.__table__  # type: ignore[assignment]
_LEDGER: Table = LedgerEntry.__table__  # type: ignore[assignment]
_USAGE: Table = UsageRecord.__table__  # type: ignore[assignment]


def insert_ignoring_conflicts(session: Session, table: Table) -> Any:
    """INSERT … ON CONFLICT DO NOTHING, in the dialect of the session's database."""
    dialect = sqlite if session.get_bind().dialect.name == "sqlite" else postgresql
    return dialect.insert(table).on_conflict_do_nothing()


def lock_accounts(session: Session, orgs: Iterable[str]) -> dict[str, Account]:
    """The accounts, locked until the commit, in one order for everybody; made with a balance of 0 if missing."""
    names = sorted(set(orgs))
    for name in names:
        session.execute(insert_ignoring_conflicts(session, _ACCOUNTS).values(org=name, balance_nano_usd=0))
    rows = session.scalars(
        select(Account).where(Account.org.in_(names)).order_by(Account.org).with_for_update(),
        execution_options={"populate_existing": True},
    )
    return {row.org: row for row in rows}


def insert_usage(session: Session, rows: Sequence[dict[str, Any]]) -> set[str]:
    """Inserts the rows whose billing key is new; returns exactly those keys."""
    statement = insert_ignoring_conflicts(session, _USAGE).returning(_USAGE.c.billing_key)
    return set(session.execute(statement, rows).scalars())


def insert_entries(session: Session, rows: Sequence[dict[str, Any]]) -> None:
    """Appends to the ledger. A second entry of one (source, source_id, kind) is an IntegrityError."""
    session.execute(insert(_LEDGER), rows)
