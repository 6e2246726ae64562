"""Tables of deployments: the wish for each model, the revisions that were made for it, and what happened."""

from __future__ import annotations

from sqlalchemy import Boolean, Double, ForeignKey, Index, Integer, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from zenray.control.billing.tables import RowId
from zenray.control.db.base import Base


class Deployment(Base):
    """What was asked for one model. `row_version` changes with every write: the reconciler applies to what it read."""

    __tablename__ = "deployments"

    model: Mapped[str] = mapped_column(String(63), primary_key=True)
    wanted_revision: Mapped[str] = mapped_column(String(200))
    stop: Mapped[bool] = mapped_column(Boolean)  # undeployed: bring everything down
    state: Mapped[str] = mapped_column(String(16))
    message: Mapped[str | None] = mapped_column(Text)
    canary: Mapped[str | None] = mapped_column(Text)  # JSON of the wish's spec.deployments.Canary
    row_version: Mapped[int] = mapped_column(Integer)
    created_at: Mapped[float] = mapped_column(Double)
    updated_at: Mapped[float] = mapped_column(Double)


class Revision(Base):
    """One immutable Serve application; `name` is its name."""

    __tablename__ = "deployment_revisions"

    name: Mapped[str] = mapped_column(String(200), primary_key=True)
    model: Mapped[str] = mapped_column(ForeignKey("deployments.model"), index=True)
    application: Mapped[str] = mapped_column(Text)  # JSON of the spec.serving.ServeApplication, with its secret key
    phase: Mapped[str] = mapped_column(String(16))
    since: Mapped[float] = mapped_column(Double)  # when the phase began
    was_ready: Mapped[bool] = mapped_column(Boolean)
    message: Mapped[str | None] = mapped_column(Text)


class DeploymentEvent(Base):
    """A change of state, and why."""

    __tablename__ = "deployment_events"

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    model: Mapped[str] = mapped_column(String(63))
    revision: Mapped[str | None] = mapped_column(String(200))
    at: Mapped[float] = mapped_column(Double)
    from_state: Mapped[str | None] = mapped_column(String(16))
    to_state: Mapped[str] = mapped_column(String(16))
    message: Mapped[str | None] = mapped_column(Text)

    __table_args__ = (Index(None, "model", "at"),)
