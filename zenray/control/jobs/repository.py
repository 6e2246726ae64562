"""Reads jobs, and writes what happened to them through one door."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from zenray.control.jobs.life import Decision, JobView
from zenray.control.jobs.tables import LONGEST_EVENT_NAME, JobEventRow, JobRow
from zenray.spec.errors import Conflict
from zenray.spec.job_events import Ended, JobEvent, Note, Placed, Progress, StateChanged, Step, parse_event
from zenray.spec.job_life import JobState

_SHOWN = (Step, Progress, Placed)


def view_of(row: JobRow) -> JobView:
    return JobView(row.id, JobState(row.state), row.message, row.attempt, row.lost)


def change(session: Session, row: JobRow, to: JobState, message: str | None, *, now: float) -> None:
    """The one door for a job's state, which also writes the event. Conflict for a state that cannot follow."""
    before = JobState(row.state)
    if to is not before:
        if not before.may_become(to):
            raise Conflict(f"{row.id} is {before.value}: it cannot become {to.value}.")
        row.ended_at = now if to.is_final else None
        if to is JobState.RUNNING:
            row.started_at = row.started_at or now
        _record(session, row, before.value, to.value, message, now)
    row.state, row.message = to, message
    row.row_version += 1
    row.updated_at = now
    session.flush()


def add(session: Session, row: JobRow, *, now: float) -> None:
    """A new job, with its first event."""
    session.add(row)
    session.flush()
    _record(session, row, None, row.state, None, now)
    session.flush()


def apply(session: Session, row: JobRow, decision: Decision, *, now: float) -> None:
    """Write a decision down, if it changes anything."""
    message = _storable(decision.message) if decision.message is not None else None
    if decision.state is JobState(row.state) and message == row.message and decision.attempt == row.attempt:
        return
    row.attempt, row.lost = decision.attempt, decision.lost
    change(session, row, decision.state, message, now=now)


def keep_events(session: Session, row: JobRow, events: Sequence[JobEvent], read: int, *, now: float) -> None:
    """The job's own events, from its journal up to append `read`. Control's order is the journal's."""
    if read == row.events_read:
        return
    if events:
        kept = [
            {
                "job": row.id,
                "at": event.at,
                "event": _storable(event.event)[:LONGEST_EVENT_NAME],
                "body": event.model_dump_json(),
            }
            for event in events
        ]
        session.execute(insert(JobEventRow), kept)
    newest = next((event for event in reversed(events) if isinstance(event, _SHOWN)), None)
    if newest is not None:
        row.progress = newest.model_dump_json()
    if any(isinstance(event, Step) for event in events):
        row.lost = 0  # it got somewhere: another loss of the cluster is not its fault
    row.events_read = read
    row.row_version += 1
    row.updated_at = now
    session.flush()


def active(session: Session) -> list[JobRow]:
    """Jobs that are not over."""
    states = [state for state in JobState if not state.is_final]
    return list(session.scalars(select(JobRow).where(JobRow.state.in_(states)).order_by(JobRow.created_at)))


def list_jobs(session: Session) -> list[JobRow]:
    """All jobs, the newest first."""
    return list(session.scalars(select(JobRow).order_by(JobRow.created_at.desc(), JobRow.id)))


def find_job(session: Session, name: str, *, lock: bool = False) -> JobRow | None:
    """By id, or the newest of that name."""
    query = select(JobRow).where((JobRow.id == name) | (JobRow.name == name))
    query = query.order_by((JobRow.id == name).desc(), JobRow.created_at.desc()).limit(1)
    return session.scalars(query.with_for_update() if lock else query).one_or_none()


def events_after(session: Session, job: str, after: int, limit: int) -> list[JobEventRow]:
    """Events whose number is above `after`, oldest first."""
    query = select(JobEventRow).where(JobEventRow.job == job, JobEventRow.id > after)
    return list(session.scalars(query.order_by(JobEventRow.id).limit(limit)))


def newest_events(session: Session, job: str, limit: int, *, without: Sequence[str] = ()) -> list[JobEventRow]:
    """The newest events, oldest of them first."""
    query = select(JobEventRow).where(JobEventRow.job == job, JobEventRow.event.not_in(without))
    return list(reversed(list(session.scalars(query.order_by(JobEventRow.id.desc()).limit(limit)))))


def parse_records(records: Sequence[dict[str, Any]]) -> list[JobEvent]:
    """Records of a journal as events; one that is not well formed is kept as a note of what it was."""
    events: list[JobEvent] = []
    for record in records:
        try:
            events.append(parse_event(record))
        except ValueError as error:
            events.append(Note(event="unreadable", record=json.dumps(record)[:500], error=str(error)[:200]))
    return events


def last_word(session: Session, job: str, unwritten: Sequence[JobEvent]) -> str | None:
    """Why the newest attempt's process says it failed; None where it did not come to say so."""
    query = select(JobEventRow).where(JobEventRow.job == job, JobEventRow.event.in_(("ended", "state")))
    kept = [
        parse_event(json.loads(row.body)) for row in session.scalars(query.order_by(JobEventRow.id.desc()).limit(9))
    ]
    for event in (*reversed(unwritten), *kept):
        if isinstance(event, Ended):
            return event.message if event.outcome == "failed" else None
        if isinstance(event, StateChanged) and event.to_state == JobState.STARTING:
            return None  # what stands before is an earlier attempt's
    return None


def _storable(text: str) -> str:
    """PostgreSQL keeps no NUL in a text. (JSON writes it as an escape.)"""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}")


def _record(
    session: Session, row: JobRow, from_state: str | None, to_state: str, message: str | None, now: float
) -> None:
    event = StateChanged(at=now, from_state=from_state, to_state=to_state, message=message)
    session.add(JobEventRow(job=row.id, at=now, event=event.event, body=event.model_dump_json()))
