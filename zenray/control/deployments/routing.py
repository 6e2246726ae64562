"""The route that gateways are told for a deployment: a pure function of the decision, Ray's status and the catalog."""

from __future__ import annotations

from zenray.catalog.catalog import Catalog
from zenray.control.deployments.applications import engine_key_of
from zenray.control.deployments.rollout import DeploymentView, RevisionView
from zenray.spec.deployments import DeploymentState
from zenray.spec.edge import CanaryRoute, Endpoint, RouteEntry, RouteState
from zenray.spec.serving import ApplicationStatus, ServeApplication, ServeStatus

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
    entry = catalog.get(view.model)
    context_tokens = revision.spec.engine.max_model_len or entry.context_tokens
    canary = _canary_of(view, applications, status)
    overhead_tokens = max(entry.template_overhead_tokens, revision.spec.template_overhead_tokens or 0)
    trial = view.in_canary()
    if canary is not None and trial is not None:  # a request must fit wherever it may go
        context_tokens = min(context_tokens, trial.spec.engine.max_model_len or entry.context_tokens)
        overhead_tokens = max(overhead_tokens, trial.spec.template_overhead_tokens or 0)
    return RouteEntry(
        model=view.model,
        created_at=created_at,
        state=state,
        message=view.message if state in (RouteState.LOADING, RouteState.FAILED) else None,
        revision=revision.name,
        upstream_model=view.model,
        endpoints=_endpoints(app) if state is RouteState.READY else (),
        wake_url=f"{status.proxy_url.rstrip('/')}{application.route_prefix}" if status.proxy_url else None,
        engine_key=engine_key_of(application),
        price=entry.price,
        context_tokens=context_tokens,
        default_max_tokens=min(entry.default_max_tokens, context_tokens),
        template_overhead_tokens=overhead_tokens,
        quantization=_quantization(revision),
        modalities=tuple(entry.modalities),
        canary=canary,
    )


def _canary_of(
    view: DeploymentView, applications: dict[str, ServeApplication], status: ServeStatus
) -> CanaryRoute | None:
    revision = view.in_canary()
    if revision is None or view.canary is None:
        return None
    endpoints = _endpoints(status.applications.get(revision.name))
    if not endpoints:
        return None
    return CanaryRoute(
        revision=revision.name,
        weight=view.canary.weight,
        endpoints=endpoints,
        engine_key=engine_key_of(applications[revision.name]),
        quantization=_quantization(revision),
        since=revision.since,
    )


def _endpoints(app: ApplicationStatus | None) -> tuple[Endpoint, ...]:
    urls = app.replica_urls if app else {}
    return tuple(Endpoint(replica_id=id_, url=url.rstrip("/")) for id_, url in sorted(urls.items()))


def _quantization(revision: RevisionView) -> str | None:
    return None if revision.spec.format == "safetensors" else revision.spec.format
