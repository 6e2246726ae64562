"""Tables of money: the append-only ledger, the usage behind it, and one account row per organisation."""

from __future__ import annotations

from sqlalchemy import BigInteger, Double, Index, Integer, String, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from zenray.control.db.base import Base

# SQLite numbers rows by itself only in a column that it calls INTEGER.
RowId = BigInteger().with_variant(Integer, "sqlite")


class LedgerEntry(Base):
    """An amount that an organisation was given (positive) or owes (negative). Triggers refuse any later change."""

    __tablename__ = "ledger_entries"

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    org: Mapped[str] = mapped_column(String, index=True)
    amount_nano_usd: Mapped[int] = mapped_column(BigInteger)
    kind: Mapped[str] = mapped_column(String(16))
    source: Mapped[str] = mapped_column(String(32))
    source_id: Mapped[str] = mapped_column(String)
    note: Mapped[str | None] = mapped_column(Text)
    at: Mapped[float] = mapped_column(Double)

    __table_args__ = (UniqueConstraint("source", "source_id", "kind"),)


class Account(Base):
    """The sum of an organisation's entries, kept in the same transaction, and the row that is locked to spend it."""

    __tablename__ = "accounts"

    org: Mapped[str] = mapped_column(String, primary_key=True)
    balance_nano_usd: Mapped[int] = mapped_column(BigInteger)


class UsageRecord(Base):
    """One `spec.usage.UsageEvent`, as a gateway shipped it, with what it cost."""

    __tablename__ = "usage_events"

    billing_key: Mapped[str] = mapped_column(String, primary_key=True)
    request_id: Mapped[str] = mapped_column(String)
    attempt: Mapped[int] = mapped_column(Integer)
    org: Mapped[str] = mapped_column(String)
    user_id: Mapped[str | None] = mapped_column(String)
    key_id: Mapped[str] = mapped_column(String)
    model_asked: Mapped[str] = mapped_column(String)
    model_answered: Mapped[str] = mapped_column(String)
    adapter: Mapped[str | None] = mapped_column(String)
    quantization: Mapped[str | None] = mapped_column(String)
    input_tokens: Mapped[int] = mapped_column(BigInteger)
    cached_input_tokens: Mapped[int] = mapped_column(BigInteger)
    output_tokens: Mapped[int] = mapped_column(BigInteger)
    price: Mapped[str] = mapped_column(Text)  # JSON of the spec.money.Price that was charged
    cost_nano_usd: Mapped[int] = mapped_column(BigInteger)
    latency_ms: Mapped[float | None] = mapped_column(Double)
    ttft_ms: Mapped[float | None] = mapped_column(Double)
    finish_reason: Mapped[str | None] = mapped_column(String)
    outcome: Mapped[str] = mapped_column(String)
    at: Mapped[float] = mapped_column(Double)
    day: Mapped[str] = mapped_column(String(10))  # UTC day of `at`, YYYY-MM-DD

    __table_args__ = (Index(None, "org", "at"), Index(None, "at"))
