"""What gateways are to know: one row per key, organisation and route, with the version at which it last changed.

Whoever changes something that gateways must hear of calls `publish` in the same transaction. Versions come from one
counter row, whose lock is held until the commit: a higher version is never visible before a lower one, so a gateway
that asks for "everything after V" misses nothing. A version is also at least the time in milliseconds, so it goes on
rising when the database is replaced or restored from a backup.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import StrEnum

from pydantic import BaseModel
from sqlalchemy import BigInteger, CheckConstraint, Index, Integer, String, Text, case, select, update
from sqlalchemy.orm import Mapped, Session, mapped_column

from zenray.control.db.base import Base


class Kind(StrEnum):
    KEY = "key"
    ORG = "org"
    ROUTE = "route"


class PublishedEntry(Base):
    __tablename__ = "published_entries"

    kind: Mapped[str] = mapped_column(String(16), primary_key=True)
    name: Mapped[str] = mapped_column(String(128), primary_key=True)
    version: Mapped[int] = mapped_column(BigInteger)
    payload: Mapped[str | None] = mapped_column(Text)  # JSON of the spec.edge entry; None: removed

    __table_args__ = (Index(None, "version"),)


class PublishedVersion(Base):
    """One row. `version`: the newest change. `floor`: a gateway that knows less than this gets everything."""

    __tablename__ = "published_version"

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    version: Mapped[int] = mapped_column(BigInteger)
    floor: Mapped[int] = mapped_column(BigInteger)

    __table_args__ = (CheckConstraint("id = 1", name="one_row"),)


def publish(
    session: Session, kind: Kind, name: str, entry: BaseModel | None, *, now_s: Callable[[], float] = time.time
) -> bool:
    """Tells gateways of a new, changed or (None) removed entry. False, and no new version, if they know it already."""
    payload = None if entry is None else entry.model_dump_json()
    row = session.get(PublishedEntry, (kind, name), with_for_update=True)
    if (row.payload if row else None) == payload:
        return False
    version = _next_version(session, now_s())
    if row is None:
        session.add(PublishedEntry(kind=kind, name=name, version=version, payload=payload))
    else:
        row.payload, row.version = payload, version
    session.flush()
    return True


def current_version(session: Session) -> int:
    return session.scalars(select(PublishedVersion.version)).one()


def read_published(session: Session, since: int) -> tuple[int, bool, list[PublishedEntry]]:
    """The version, whether it is everything, and the entries changed after `since` (all live ones if everything)."""
    state = session.scalars(select(PublishedVersion)).one()
    full = since < state.floor or since > state.version
    # An entry newer than `state.version` may be among them (it was committed in between): it will be sent again.
    changed = PublishedEntry.payload.is_not(None) if full else PublishedEntry.version > since
    return state.version, full, list(session.scalars(select(PublishedEntry).where(changed)))


def raise_floor(session: Session, *, now_s: Callable[[], float] = time.time) -> int:
    """Makes every gateway fetch everything once more. Called when control starts: the database may be another one."""
    version = _next_version(session, now_s())
    session.execute(update(PublishedVersion).values(floor=version))
    return version


def _next_version(session: Session, now_s: float) -> int:
    at_least = int(now_s * 1000)
    following = PublishedVersion.version + 1
    statement = (
        update(PublishedVersion)
        .values(version=case((following > at_least, following), else_=at_least))
        .returning(PublishedVersion.version)
        .execution_options(synchronize_session=False)
    )
    return session.execute(statement).scalar_one()
