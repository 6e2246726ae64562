"""What a person may do with a deployment: ask for it, look at it, take it down."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from sqlalchemy import select
from sqlalchemy.orm import Session

from zenray.control.db.published import Kind, publish
from zenray.control.deployments.applications import ApplicationFactory
from zenray.control.deployments.repository import Loaded, load_one, write
from zenray.control.deployments.rollout import DeploymentView, Phase, RevisionView
from zenray.control.deployments.tables import Deployment, Revision
from zenray.spec.deployments import DeploymentSpec, DeploymentState
from zenray.spec.errors import NotFound, suggest


class VersionSource(Protocol):
    """Where published versions are found. Talks to object storage: call it outside any session."""

    def resolve(self, spec: DeploymentSpec) -> DeploymentSpec:
        """The spec with an exact, published version and what was measured of it. NotFound, saying how to get one."""

    def stored_in(self, spec: DeploymentSpec, format: str) -> bool:
        """Whether the spec's version, or where it names none the one published last, is there in this format."""


def put_deployment(session: Session, spec: DeploymentSpec, factory: ApplicationFactory, *, now: float) -> Loaded:
    """Asks for exactly this spec (`version` filled in). The same again is a no-op, or, if it failed, a new attempt.

    Only another `canary` changes how the same revision takes over: without one, a canary is promoted.
    """
    name = spec.revision()
    row = session.get(Deployment, spec.model, with_for_update=True)
    if row is None:
        session.add(
            Deployment(
                model=spec.model,
                wanted_revision=name,
                stop=False,
                state=DeploymentState.PENDING,
                row_version=0,
                created_at=now,
                updated_at=now,
            )
        )
        session.flush()
    before = _load(session, spec.model) if row is not None else None
    if session.get(Revision, name) is None:
        application = factory.make(spec)
        session.add(
            Revision(
                name=name,
                model=spec.model,
                application=application.model_dump_json(),
                phase=Phase.GONE,
                since=now,
                was_ready=False,
            )
        )
        session.flush()
    current = _load(session, spec.model)
    if (
        before is not None
        and not before.view.stop
        and before.view.wanted == name
        and not _has_failed(before.view, name)
    ):
        if before.view.canary == spec.canary:
            return before
        write(session, before.view, replace(before.view, canary=spec.canary), now=now)
        return _load(session, spec.model)
    asked = replace(_asked_for(current.view, name, now), canary=spec.canary)
    write(session, before.view if before else None, asked, now=now)
    return _load(session, spec.model)


def stop_deployment(session: Session, model: str, *, now: float) -> Loaded:
    """Takes the route away at once; the reconciler drains and deletes what runs. Stopping twice is a no-op."""
    loaded = get_deployment(session, model, lock=True)
    if loaded.view.stop:
        return loaded
    publish(session, Kind.ROUTE, model, None)
    write(session, loaded.view, replace(loaded.view, stop=True, state=DeploymentState.STOPPING, message=None), now=now)
    return _load(session, model)


def get_deployment(session: Session, model: str, *, lock: bool = False) -> Loaded:
    """NotFound, with the nearest name, for a model that was never deployed."""
    if lock:
        session.get(Deployment, model, with_for_update=True)
    loaded = load_one(session, model)
    if loaded is None:
        known = session.scalars(select(Deployment.model))
        raise NotFound(f"{model!r} is not deployed.", hint=suggest(model, known), param="model")
    return loaded


def _asked_for(view: DeploymentView, name: str, now: float) -> DeploymentView:
    """The view with `name` wanted. What failed or is gone starts anew; what still runs is simply kept."""

    def renewed(revision: RevisionView) -> RevisionView:
        if revision.name != name or revision.phase.in_serve or revision.phase is Phase.QUEUED:
            return revision
        return replace(revision.to(Phase.QUEUED, now), was_ready=False)

    revisions = tuple(renewed(revision) for revision in view.revisions)
    serves = view.serving() is not None and not view.stop
    state = view.state if serves else DeploymentState.PENDING
    return replace(view, wanted=name, stop=False, state=state, message=None, revisions=revisions)


def _has_failed(view: DeploymentView, name: str) -> bool:
    return any(r.name == name and r.phase is Phase.FAILED for r in view.revisions)


def _load(session: Session, model: str) -> Loaded:
    loaded = load_one(session, model)
    assert loaded is not None
    return loaded
