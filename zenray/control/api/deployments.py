"""Admin routes for deployments, models and their versions."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Depends

from zenray.control.api.context import ControlContext
from zenray.control.api.schemas import (
    DeploymentDetail,
    DeploymentRow,
    EventRow,
    ModelRow,
    Rows,
    VersionRow,
    route_urls,
)
from zenray.control.deployments.defaults import with_catalogs_defaults
from zenray.control.deployments.feasibility import check_runnable
from zenray.control.deployments.repository import Loaded, events_of, load_all
from zenray.control.deployments.service import get_deployment, put_deployment, stop_deployment
from zenray.spec.deployments import DeploymentSpec, DeploymentState
from zenray.spec.errors import InvalidValue
from zenray.storage.versions import list_versions

EVENTS_SHOWN = 50


def deployments_router(control: ControlContext) -> APIRouter:
    router = APIRouter(prefix="/admin", dependencies=[Depends(control.admin_door.dependency())], tags=["deployments"])
    database, clock = control.database, control.clock

    @router.put("/deployments/{model}")
    def put(model: str, body: DeploymentSpec) -> DeploymentRow:
        """Asks for exactly this. Another spec is rolled out beside the old one, which serves until it is ready."""
        if body.model != model:
            raise InvalidValue(f"The body names {body.model!r}, the address {model!r}.", param="model")
        entry, stored_in = control.catalog.get(model), partial(control.versions.stored_in, body)
        wish = with_catalogs_defaults(body, entry, control.machines, stored_in)
        asked = None if "max_num_seqs" in body.engine.model_fields_set else 1
        check_runnable(wish, control.catalog, control.machines, sequences=asked)
        spec = control.versions.resolve(wish)  # asks object storage: before the session
        with database.write() as session:
            return deployment_row(put_deployment(session, spec, control.applications, now=clock.now()))

    @router.get("/deployments")
    def get_all() -> Rows[DeploymentRow]:
        with database.read() as session:
            return Rows(data=[deployment_row(loaded) for loaded in load_all(session)])

    @router.get("/deployments/{model}")
    def get(model: str) -> DeploymentDetail:
        with database.read() as session:
            row = deployment_row(get_deployment(session, model))
            events = [
                EventRow(
                    at=event.at,
                    revision=event.revision,
                    from_state=event.from_state,
                    to_state=event.to_state,
                    message=event.message,
                )
                for event in events_of(session, model, EVENTS_SHOWN)
            ]
        return DeploymentDetail(**row.model_dump(), events=events)

    @router.delete("/deployments/{model}")
    def delete(model: str) -> DeploymentRow:
        """Withdraws the route at once; replicas finish what they have begun, then stop."""
        with database.write() as session:
            return deployment_row(stop_deployment(session, model, now=clock.now()))

    @router.get("/models")
    def get_models() -> Rows[ModelRow]:
        with database.read() as session:
            deployed = {row.view.model for row in load_all(session) if row.view.state is not DeploymentState.STOPPED}
        return Rows(
            data=[
                ModelRow(
                    name=entry.name,
                    summary=entry.summary,
                    parameters_total=entry.parameters.total,
                    parameters_active=entry.parameters.active,
                    context_tokens=entry.context_tokens,
                    modalities=list(entry.modalities),
                    input_usd_per_1k=str(entry.price.input_usd_per_1k),
                    output_usd_per_1k=str(entry.price.output_usd_per_1k),
                    deployed=entry.name in deployed,
                )
                for entry in control.catalog
            ]
        )

    @router.get("/models/{model}/versions")
    def get_versions(model: str) -> Rows[VersionRow]:
        control.catalog.get(model)
        return Rows(
            data=[
                VersionRow(
                    model=manifest.ref.model,
                    version=manifest.ref.version,
                    format=manifest.ref.format,
                    files=len(manifest.files),
                    size_bytes=manifest.size_bytes,
                    created_at=manifest.created_at,
                    source=manifest.parents.source,
                )
                for manifest in list_versions(control.store, model)
            ]
        )

    return router


def deployment_row(loaded: Loaded) -> DeploymentRow:
    view = loaded.view
    wanted = next(revision for revision in view.revisions if revision.name == view.wanted)
    serving = view.serving()
    route, endpoints = route_urls(loaded.published)
    return DeploymentRow(
        model=view.model,
        state=view.state,
        message=view.message,
        revision=serving.name if serving else None,
        wanted_revision=view.wanted,
        wanted_phase=wanted.phase,
        version=(serving or wanted).spec.version,
        format=(serving or wanted).spec.format,
        replicas=len(endpoints),
        endpoints=endpoints,
        route=route,
        created_at=loaded.created_at,
        updated_at=loaded.updated_at,
    )
