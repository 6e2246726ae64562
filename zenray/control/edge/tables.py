"""Tables of gateways: who they are, and what of each organisation's balance they hold."""

from __future__ import annotations

from sqlalchemy import BigInteger, CheckConstraint, Double, String
from sqlalchemy.orm import Mapped, mapped_column

from zenray.control.db.base import Base


class Gateway(Base):
    """`boot_id`: the only start of the gateway that may lease; None before it ever leased and after it was lost."""

    __tablename__ = "gateways"

    gateway_id: Mapped[str] = mapped_column(String(128), primary_key=True)
    boot_id: Mapped[str | None] = mapped_column(String(128))
    first_seen_at: Mapped[float] = mapped_column(Double)
    last_seen_at: Mapped[float] = mapped_column(Double, index=True)
    lost_at: Mapped[float | None] = mapped_column(Double)


class GatewayBoot(Base):
    """A start of a gateway that has leased. One that is no longer the gateway's `boot_id` never leases again."""

    __tablename__ = "gateway_boots"

    gateway_id: Mapped[str] = mapped_column(String(128), primary_key=True)
    boot_id: Mapped[str] = mapped_column(String(128), primary_key=True)
    since: Mapped[float] = mapped_column(Double)


class LeaseHold(Base):
    """What one start of a gateway may spend of one balance: granted, less what it shipped usage for or gave back."""

    __tablename__ = "lease_holds"

    gateway_id: Mapped[str] = mapped_column(String(128), primary_key=True)
    boot_id: Mapped[str] = mapped_column(String(128), primary_key=True)
    org: Mapped[str] = mapped_column(String(63), primary_key=True, index=True)
    held_nano_usd: Mapped[int] = mapped_column(BigInteger)
    # The last numbered request and its answer: one that is sent again gets the same answer and changes nothing.
    last_sequence: Mapped[int | None] = mapped_column(BigInteger)
    last_granted_nano_usd: Mapped[int] = mapped_column(BigInteger)

    __table_args__ = (CheckConstraint("held_nano_usd >= 0", name="not_negative"),)
