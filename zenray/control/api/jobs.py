"""Admin routes for jobs: submit, list, show, events, logs, cancel, resume."""

from __future__ import annotations

import json
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Query

from zenray.control.api.context import ControlContext
from zenray.control.api.schemas import JobDetail, JobEvents, JobLogs, JobSummary, Rows
from zenray.control.jobs.repository import events_after, list_jobs, newest_events, view_of
from zenray.control.jobs.service import cancel_job, get_job, resume_job, submit_job
from zenray.control.jobs.tables import JobEventRow, JobRow
from zenray.spec.job_events import parse_event
from zenray.spec.job_life import JobState
from zenray.spec.jobs import read_job
from zenray.storage.job_record import read_result
from zenray.storage.pinning import pin

EVENTS_SHOWN = 30
MOST_EVENTS = 1000


def jobs_router(control: ControlContext) -> APIRouter:
    router = APIRouter(prefix="/admin", dependencies=[Depends(control.admin_door.dependency())], tags=["jobs"])
    database, clock = control.database, control.clock

    @router.post("/jobs", status_code=201)
    def post(body: Annotated[dict[str, Any], Body(description="A job file, as JSON.")]) -> JobSummary:
        """Asks for this job. The same one again is the same job: under way, done, or gone on with if it failed."""
        job = pin(read_job(body, where="The job"), control.store)  # asks object storage: before the session
        with database.write() as session:
            return job_summary(submit_job(session, job, now=clock.now()))

    @router.get("/jobs")
    def get_all() -> Rows[JobSummary]:
        with database.read() as session:
            return Rows(data=[job_summary(row) for row in list_jobs(session)])

    @router.get("/jobs/{job}")
    def get(job: str) -> JobDetail:
        with database.read() as session:
            row = get_job(session, job)
            events = newest_events(session, row.id, EVENTS_SHOWN, without=("step", "progress"))
            summary, document = job_summary(row), json.loads(row.document)
            said = [_event(event) for event in events]
        result = read_result(control.store, summary.id)
        return JobDetail(
            **summary.model_dump(),
            document=document,
            events=said,
            result=None if result is None else result.model_dump(mode="json"),
        )

    @router.get("/jobs/{job}/events")
    def get_events(
        job: str,
        after: Annotated[int, Query(description="The `last` of an earlier answer; 0: from the beginning.")] = 0,
        limit: Annotated[int, Query(ge=1, le=MOST_EVENTS)] = MOST_EVENTS,
    ) -> JobEvents:
        """What the job said since then, and its state now."""
        with database.read() as session:
            row = get_job(session, job)
            events = events_after(session, row.id, after, limit)
            return JobEvents(
                job=job_summary(row), data=[_event(event) for event in events], last=events[-1].id if events else after
            )

    @router.get("/jobs/{job}/logs")
    def get_logs(job: str) -> JobLogs:
        """What the newest attempt's process has printed, as long as the cluster keeps it."""
        with database.read() as session:
            view = view_of(get_job(session, job))
        return JobLogs(id=view.id, attempt=view.attempt, logs=control.backend.job_logs(view.launch_id))

    @router.post("/jobs/{job}/cancel")
    def cancel(job: str) -> JobSummary:
        """Asks for its end; what it has published and its checkpoints stay."""
        with database.write() as session:
            return job_summary(cancel_job(session, job, now=clock.now()))

    @router.post("/jobs/{job}/resume")
    def resume(job: str) -> JobSummary:
        """Goes on from the last checkpoint."""
        with database.write() as session:
            return job_summary(resume_job(session, job, now=clock.now()))

    return router


def job_summary(row: JobRow) -> JobSummary:
    document = json.loads(row.document)
    into = document.get("into") or next(
        (phase["into"] for phase in reversed(document.get("phases", ())) if "into" in phase), None
    )
    return JobSummary(
        id=row.id,
        name=row.name,
        kind=row.kind,
        state=JobState(row.state),
        message=row.message,
        attempt=row.attempt,
        into=f"{into['model']}@{into['version']}" if into else None,
        progress=json.loads(row.progress) if row.progress else None,
        created_at=row.created_at,
        updated_at=row.updated_at,
        started_at=row.started_at,
        ended_at=row.ended_at,
    )


def _event(row: JobEventRow) -> dict[str, Any]:
    return parse_event(json.loads(row.body)).model_dump(mode="json")
