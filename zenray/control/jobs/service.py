"""What a person may do with a job: submit it, look at it, cancel it, resume it."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from zenray.control.jobs.life import CANCELLED
from zenray.control.jobs.repository import add, change, find_job
from zenray.control.jobs.tables import JobRow
from zenray.spec.errors import Conflict, NotFound, suggest
from zenray.spec.job_life import JobState
from zenray.spec.jobs import Job, job_id


def submit_job(session: Session, job: Job, *, now: float) -> JobRow:
    """Records a job (with its versions pinned) to be run. Idempotent: one that is under way or done stays as it is,
    one that failed or was cancelled goes on, with the workers that this document names."""
    id = job_id(job)
    row = session.get(JobRow, id, with_for_update=True)
    if row is None:
        row = JobRow(
            id=id,
            name=job.name,
            kind=job.kind,
            document=job.model_dump_json(),
            state=JobState.QUEUED,
            attempt=1,
            lost=0,
            events_read=0,
            row_version=0,
            created_at=now,
            updated_at=now,
        )
        add(session, row, now=now)
        return row
    if JobState(row.state).can_be_resumed:
        row.document = job.model_dump_json()
        _again(session, row, now=now)
    return row


def cancel_job(session: Session, name: str, *, now: float) -> JobRow:
    """Asks for its end. A second time is a no-op; Conflict for a job that is over."""
    row = get_job(session, name, lock=True)
    state = JobState(row.state)
    if state in (JobState.CANCELLING, JobState.CANCELLED):
        return row
    if not state.can_be_cancelled:
        raise Conflict(f"{row.id} is over: it {_verb(state)}.", hint="Only a job that is not over can be cancelled.")
    to = JobState.CANCELLING if state.may_become(JobState.CANCELLING) else JobState.CANCELLED
    change(session, row, to, CANCELLED, now=now)
    return row


def resume_job(session: Session, name: str, *, now: float) -> JobRow:
    """Goes on from the last checkpoint. A job that is under way stays as it is; Conflict for one that is done."""
    row = get_job(session, name, lock=True)
    state = JobState(row.state)
    if state.can_be_resumed:
        _again(session, row, now=now)
    elif state is JobState.CANCELLING:
        raise Conflict(f"{row.id} is being cancelled.", hint="Resume it when it is cancelled.")
    elif state.is_final:
        raise Conflict(f"{row.id} {_verb(state)}: there is nothing to go on with.")
    return row


def get_job(session: Session, name: str, *, lock: bool = False) -> JobRow:
    """By id or, the newest of them, by name. NotFound with the nearest."""
    row = find_job(session, name, lock=lock)
    if row is None:
        known = set(session.scalars(select(JobRow.name))) | set(session.scalars(select(JobRow.id)))
        raise NotFound(f"There is no job {name!r}.", hint=suggest(name, known), param="job")
    return row


def _again(session: Session, row: JobRow, *, now: float) -> None:
    row.attempt += 1
    row.lost = 0
    change(session, row, JobState.QUEUED, None, now=now)


def _verb(state: JobState) -> str:
    return {JobState.SUCCEEDED: "succeeded", JobState.FAILED: "failed"}.get(state, f"was {state.value}")
