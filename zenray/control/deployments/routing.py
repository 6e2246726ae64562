"""The route that gateways are told for a deployment: a pure function of the decision, Ray's status and the catalog."""

from __future__ import annotations

from zenray.catalog.catalog import Catalog
from zenray.control.deployments.applications import engine_key_of
from zenray.control.deployments.rollout import DeploymentView
from zenray.spec.deployments import DeploymentState
from zenray.spec.edge import Endpoint, RouteEntry, RouteState
from zenray.spec.serving import ServeApplication, ServeStatus

_ROUTE_STATES = {
    DeploymentState.PENDING: RouteState.LOADING,
    DeploymentState.STARTING: RouteState.LOADING,
    DeploymentState.READY: RouteState.READY,
    DeploymentState.ASLEEP: RouteState.ASLEEP,
    DeploymentState.FAILED: RouteState.FAILED,
}


def route_of(
    view: DeploymentView,
    applications: dict[str, ServeApplication],
    status: ServeStatus,
    catalog: Catalog,
    *,
    created_at: float,
) -> RouteEntry | None:
    """None when the model is being taken down. The message is for the model's own trouble, not for a rollout's."""
    state = _ROUTE_STATES.get(view.state)
    if state is None:
        return None
    revision = view.serving() or next(r for r in view.revisions if r.name == view.wanted)
    application = applications[revision.name]
    app = status.applications.get(revision.name)
    urls = app.replica_urls if app and state is RouteState.READY else {}
    entry = catalog.get(view.model)
    context_tokens = revision.spec.engine.max_model_len or entry.context_tokens
    return RouteEntry(
        model=view.model,
        created_at=created_at,
        state=state,
        message=view.message if state in (RouteState.LOADING, RouteState.FAILED) else None,
        revision=revision.name,
        upstream_model=view.model,
        endpoints=tuple(Endpoint(replica_id=id_, url=url.rstrip("/")) for id_, url in sorted(urls.items())),
        wake_url=f"{status.proxy_url.rstrip('/')}{application.route_prefix}" if status.proxy_url else None,
        engine_key=engine_key_of(application),
        price=entry.price,
        context_tokens=context_tokens,
        default_max_tokens=min(entry.default_max_tokens, context_tokens),
        template_overhead_tokens=entry.template_overhead_tokens,
        quantization=None if revision.spec.format == "safetensors" else revision.spec.format,
        modalities=tuple(entry.modalities),
    )
