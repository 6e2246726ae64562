"""Tables of jobs: each as it was submitted and as it stands, and everything that it and control said about it."""

from __future__ import annotations

from sqlalchemy import Double, ForeignKey, Index, Integer, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from zenray.control.billing.tables import RowId
from zenray.control.db.base import Base

LONGEST_EVENT_NAME = 32


class JobRow(Base):
    """One job. `row_version` changes with every write: the reconciler applies to what it read."""

    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(String(100), primary_key=True)  # the name and a digest: spec.jobs.job_id
    name: Mapped[str] = mapped_column(String(63), index=True)
    kind: Mapped[str] = mapped_column(String(16))
    document: Mapped[str] = mapped_column(Text)  # JSON of the job, its versions pinned
    state: Mapped[str] = mapped_column(String(16), index=True)
    message: Mapped[str | None] = mapped_column(Text)
    attempt: Mapped[int] = mapped_column(Integer)  # a number in the name under which the cluster knows it
    lost: Mapped[int] = mapped_column(Integer)  # attempts in a row that the cluster lost
    events_read: Mapped[int] = mapped_column(Integer)  # appends of its journal that are in `job_events`
    progress: Mapped[str | None] = mapped_column(Text)  # JSON of its newest step or piece of work
    row_version: Mapped[int] = mapped_column(Integer)
    created_at: Mapped[float] = mapped_column(Double)
    updated_at: Mapped[float] = mapped_column(Double)
    started_at: Mapped[float | None] = mapped_column(Double)
    ended_at: Mapped[float | None] = mapped_column(Double)


class JobEventRow(Base):
    """One event, the job's own or a change of its state, in the order in which control learned of them."""

    __tablename__ = "job_events"

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    job: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    at: Mapped[float] = mapped_column(Double)
    event: Mapped[str] = mapped_column(String(LONGEST_EVENT_NAME))  # cut off there; whole in the body
    body: Mapped[str] = mapped_column(Text)  # JSON of a spec.job_events.JobEvent

    __table_args__ = (Index(None, "job", "id"),)
