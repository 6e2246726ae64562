"""Reads deployments as the views that decisions are made from, and writes decisions back through one door."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from zenray.control.db.published import Kind, PublishedEntry
from zenray.control.deployments.applications import launch_of, started_with
from zenray.control.deployments.rollout import DeploymentView, Phase, RevisionView
from zenray.control.deployments.tables import Deployment, DeploymentEvent, Revision
from zenray.spec.deployments import Canary, DeploymentState
from zenray.spec.serving import ServeApplication


@dataclass(frozen=True)
class Loaded:
    """A deployment as it was read: the view, the applications of its revisions, and the version of its row."""

    view: DeploymentView
    applications: dict[str, ServeApplication]
    row_version: int
    created_at: float
    updated_at: float
    published: str | None  # the route as gateways know it, JSON


def load_all(session: Session) -> list[Loaded]:
    """Every deployment that was ever asked for, by model."""
    revisions: dict[str, list[Revision]] = {}
    for revision in session.scalars(select(Revision).order_by(Revision.name)):
        revisions.setdefault(revision.model, []).append(revision)
    published = select(PublishedEntry.name, PublishedEntry.payload).where(PublishedEntry.kind == Kind.ROUTE)
    routes = {route.name: route.payload for route in session.execute(published)}
    rows = session.scalars(select(Deployment).order_by(Deployment.model))
    return [_loaded(row, revisions.get(row.model, []), routes.get(row.model)) for row in rows]


def load_one(session: Session, model: str) -> Loaded | None:
    row = session.get(Deployment, model)
    if row is None:
        return None
    revisions = list(session.scalars(select(Revision).where(Revision.model == model).order_by(Revision.name)))
    published = session.get(PublishedEntry, (Kind.ROUTE, model))
    return _loaded(row, revisions, published.payload if published else None)


def write(session: Session, before: DeploymentView | None, after: DeploymentView, *, now: float) -> None:
    """The one door for a deployment's state and its revisions' phases. A change of either leaves an event."""
    row = session.get_one(Deployment, after.model)
    known = {revision.name: revision for revision in before.revisions} if before else {}
    for revision in after.revisions:
        earlier = known.get(revision.name)
        if revision == earlier:
            continue
        stored = session.get_one(Revision, revision.name)
        stored.phase, stored.since = revision.phase, revision.since
        stored.was_ready, stored.message = revision.was_ready, revision.message
        if earlier is not None and revision.start != earlier.start:
            application = ServeApplication.model_validate_json(stored.application)
            stored.application = started_with(application, revision.start).model_dump_json()
        if earlier is None or earlier.phase is not revision.phase:
            said = f"{revision.phase.value}: {revision.message}" if revision.message else revision.phase.value
            _record(session, after, revision.name, row.state, said, now)
    if before is None or before.state is not after.state:
        _record(session, after, None, before.state if before else None, after.message, now)
    row.wanted_revision, row.stop = after.wanted, after.stop
    row.state, row.message = after.state, after.message
    row.canary = after.canary.model_dump_json() if after.canary else None
    row.row_version += 1
    row.updated_at = now
    session.flush()


def events_of(session: Session, model: str, limit: int) -> list[DeploymentEvent]:
    """The newest events first."""
    query = select(DeploymentEvent).where(DeploymentEvent.model == model)
    return list(session.scalars(query.order_by(DeploymentEvent.id.desc()).limit(limit)))


def _record(
    session: Session,
    view: DeploymentView,
    revision: str | None,
    from_state: str | None,
    message: str | None,
    now: float,
) -> None:
    session.add(
        DeploymentEvent(
            model=view.model,
            revision=revision,
            at=now,
            from_state=from_state,
            to_state=view.state,
            message=message,
        )
    )


def _loaded(row: Deployment, revisions: list[Revision], published: str | None) -> Loaded:
    applications = {r.name: ServeApplication.model_validate_json(r.application) for r in revisions}
    launches = {name: launch_of(application) for name, application in applications.items()}
    view = DeploymentView(
        model=row.model,
        wanted=row.wanted_revision,
        stop=row.stop,
        state=DeploymentState(row.state),
        message=row.message,
        canary=Canary.model_validate_json(row.canary) if row.canary else None,
        revisions=tuple(
            RevisionView(
                name=r.name,
                spec=launches[r.name].deployment,
                phase=Phase(r.phase),
                since=r.since,
                was_ready=r.was_ready,
                message=r.message,
                start=launches[r.name].start,
            )
            for r in revisions
        ),
    )
    return Loaded(view, applications, row.row_version, row.created_at, row.updated_at, published)
