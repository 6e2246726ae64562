"""Tables of organisations and API keys."""

from __future__ import annotations

from sqlalchemy import JSON, Double, ForeignKey, String
from sqlalchemy.orm import Mapped, mapped_column

from zenray.control.db.base import Base


class Org(Base):
    __tablename__ = "orgs"

    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    cache_salt: Mapped[str] = mapped_column(String(64))  # separates its prefix cache from everybody else's
    created_at: Mapped[float] = mapped_column(Double)


class ApiKey(Base):
    """A key as its SHA-256. `shown` is what a list may show of it: the prefix and the last four characters."""

    __tablename__ = "api_keys"

    key_id: Mapped[str] = mapped_column(String(40), primary_key=True)
    sha256: Mapped[str] = mapped_column(String(64), unique=True)
    shown: Mapped[str] = mapped_column(String(64))
    org: Mapped[str] = mapped_column(ForeignKey("orgs.name"), index=True)
    name: Mapped[str | None] = mapped_column(String(100))
    user_id: Mapped[str | None] = mapped_column(String(200))
    scopes: Mapped[list[str]] = mapped_column(JSON)
    expires_at: Mapped[float | None] = mapped_column(Double)
    revoked_at: Mapped[float | None] = mapped_column(Double)
    created_at: Mapped[float] = mapped_column(Double)
