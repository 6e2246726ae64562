"""What to do about one deployment, given what Ray Serve says: pure functions of (deployment, status, now).

A changed wish is rolled out by a second application beside the first: it is brought up as a candidate, takes the
traffic when it is ready, and only then does the old one drain and go. A candidate that fails takes no traffic, leaves
the wish (so that its memory is free again), and the old one goes on serving. With a canary in the wish a ready
candidate takes a share of the traffic for some time first; if it fails then, by Ray's word or by what gateways saw of
it, it is a failed candidate too. The share is given only beside an old revision that can serve: where that cannot, the
canary takes all.

**How many replicas a new revision has when it takes over.** The load comes at once, so it begins with as many as the
one that serves has at that moment (`start_of`), within its own bounds, and its autoscaler keeps them until the load is
there. It takes over when all of them run. The cluster may have no room for both: what has not started FILL_WAIT_S
after the first replica did is not waited for. The new revision then takes over with what it has, and gets the rest
when the old one's replicas have left their places.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from zenray.control.deployments.canaries import Seen
from zenray.spec.deployments import Canary, DeploymentSpec, DeploymentState
from zenray.spec.serving import ApplicationState, ApplicationStatus, ServeStatus, Start

# How long an application is kept after its route was withdrawn, for gateways to hear of it. After that it is deleted,
# and Ray Serve itself lets its replicas finish what they have begun (graceful_shutdown_timeout_s).
DRAIN_SETTLE_S = 2.0
START_TIMEOUT_S = 7200.0  # the largest models load hundreds of gigabytes
RETRY_FAILED_S = 60.0
FILL_WAIT_S = 300.0  # replicas load at the same time: who is so much later than the first has no place
LOAD_SETTLES_S = 120.0  # after it took over a revision's own load says how many it needs


class Phase(StrEnum):
    """A revision's life: queued → candidate (→ filling) (→ canary) → serving → draining → gone; any that runs → failed
    → queued."""

    QUEUED = "queued"  # waits until an older application of the same name is gone
    CANDIDATE = "candidate"  # is to run; takes no traffic yet
    FILLING = "filling"  # a candidate, and some of its replicas run, or did
    CANARY = "canary"  # takes a share of the traffic, beside the one that serves
    SERVING = "serving"  # takes the traffic
    DRAINING = "draining"  # gets no new traffic; is deleted soon
    GONE = "gone"
    FAILED = "failed"

    @property
    def in_serve(self) -> bool:
        """Whether Ray Serve is to have the application."""
        return self in (Phase.CANDIDATE, Phase.FILLING, Phase.CANARY, Phase.SERVING, Phase.DRAINING)


@dataclass(frozen=True)
class RevisionView:
    name: str
    spec: DeploymentSpec
    phase: Phase
    since: float
    was_ready: bool = False
    message: str | None = None
    start: Start | None = None  # how it was started the last time

    def to(self, phase: Phase, now: float, message: str | None = None) -> RevisionView:
        return replace(self, phase=phase, since=now, message=message)


@dataclass(frozen=True)
class DeploymentView:
    """A deployment as the database has it. `wanted` names one of `revisions`; `stop`: it was undeployed.

    `canary`: how the wanted revision takes over; None: at once.
    """

    model: str
    wanted: str
    stop: bool
    state: DeploymentState
    message: str | None
    revisions: tuple[RevisionView, ...]
    canary: Canary | None = None

    def serving(self) -> RevisionView | None:
        return self._in(Phase.SERVING)

    def in_canary(self) -> RevisionView | None:
        return self._in(Phase.CANARY)

    def _in(self, phase: Phase) -> RevisionView | None:
        return next((r for r in self.revisions if r.phase is phase), None)


def decide(view: DeploymentView, status: ServeStatus, now: float, seen: Seen = Seen()) -> DeploymentView:
    """The deployment as it should be written down now. `seen`: what gateways saw of its canary."""
    view = replace(view, revisions=tuple(_given_again(revision, status) for revision in view.revisions))
    if view.stop:
        return _wind_down(view, status, now)
    by_name = {revision.name: revision for revision in view.revisions}
    canary = view.canary if _can_serve(view.serving(), status) else None
    before = by_name.pop(view.wanted)
    wanted = _advance(before, status.applications.get(view.wanted), canary, now, seen)
    if before.phase is Phase.QUEUED and wanted.phase is Phase.CANDIDATE:
        wanted = replace(wanted, start=start_of(view, status))
    others = [_retire(revision, wanted.phase is Phase.SERVING, now) for revision in by_name.values()]
    revisions = tuple(
        wanted if r.name == wanted.name else next(o for o in others if o.name == r.name) for r in view.revisions
    )
    return _with_state(replace(view, revisions=revisions), wanted, status)


def start_of(view: DeploymentView, status: ServeStatus) -> Start | None:
    """How the wanted revision starts: beside one that serves with as many replicas; None: as its autoscaling says."""
    wanted, serving = next(r for r in view.revisions if r.name == view.wanted), view.serving()
    app = status.applications.get(serving.name) if serving is not None else None
    bounds = wanted.spec.autoscaling
    replicas = min(len(app.replica_urls) if app is not None else 0, bounds.max_replicas)
    if replicas <= max(1, bounds.min_replicas):
        return None
    trial_s = view.canary.for_s if view.canary is not None else 0.0
    return Start(replicas=replicas, hold_s=FILL_WAIT_S + trial_s + LOAD_SETTLES_S)


def _given_again(revision: RevisionView, status: ServeStatus) -> RevisionView:
    """One that serves and that Ray has lost comes back as its autoscaling says: its load needs no start to wait for."""
    lost = revision.phase is Phase.SERVING and revision.name not in status.applications
    return replace(revision, start=None) if lost else revision


def unreachable(view: DeploymentView, reason: str) -> DeploymentView:
    """Ray cannot be asked: everything stays as it is (its replicas may well be answering), and the reason is shown."""
    if view.state is DeploymentState.STOPPED:
        return view
    return replace(view, message=reason)


def _advance(
    revision: RevisionView, app: ApplicationStatus | None, canary: Canary | None, now: float, seen: Seen
) -> RevisionView:
    """The wanted revision, one step further. `canary` is None where there is no other that can serve."""
    if revision.phase is Phase.GONE:
        return revision.to(Phase.QUEUED, now)
    if revision.phase is Phase.DRAINING:  # wanted again before it was deleted
        return revision.to(Phase.CANDIDATE, now)
    if revision.phase is Phase.FAILED:
        retry = revision.was_ready and now - revision.since >= RETRY_FAILED_S
        return revision.to(Phase.QUEUED, now, revision.message) if retry else revision
    if revision.phase is Phase.QUEUED:
        return revision.to(Phase.CANDIDATE, now) if app is None else revision
    if app is not None and app.state is ApplicationState.DEPLOY_FAILED:
        return revision.to(Phase.FAILED, now, _reason(app))
    if revision.phase is Phase.SERVING:
        return revision
    if revision.phase is Phase.CANARY:
        return _advance_canary(revision, app, canary, now, seen)
    fills = app is not None and app.state is ApplicationState.DEPLOYING and bool(app.replica_urls)
    waited = fills and revision.phase is Phase.FILLING and now - revision.since >= FILL_WAIT_S
    if waited or (app is not None and _is_ready(revision.spec, app)):
        return replace(revision.to(Phase.CANARY if canary else Phase.SERVING, now), was_ready=not canary)
    if fills and revision.phase is Phase.CANDIDATE:
        return revision.to(Phase.FILLING, now)
    if app is None and revision.phase is Phase.FILLING:
        return revision.to(Phase.CANDIDATE, now)  # Ray has lost it, and is given it again
    if now - revision.since > START_TIMEOUT_S:
        said = f" Ray Serve says: {app.message}" if app and app.message else ""
        return revision.to(Phase.FAILED, now, f"No replica was ready after {START_TIMEOUT_S / 60:.0f} minutes.{said}")
    return revision


def _advance_canary(
    revision: RevisionView, app: ApplicationStatus | None, canary: Canary | None, now: float, seen: Seen
) -> RevisionView:
    if app is not None and app.state is ApplicationState.UNHEALTHY:
        return revision.to(Phase.FAILED, now, f"It became unhealthy as a canary: {_reason(app)}")
    fault = canary_fault(canary, seen) if canary is not None else None
    if fault is not None:
        return revision.to(Phase.FAILED, now, fault)
    if app is None or not _answers(revision.spec, app):
        return revision.to(Phase.CANDIDATE, now)  # Ray has lost it, and is given it again; its time starts anew
    if canary is None or now - revision.since >= canary.for_s:
        return replace(revision.to(Phase.SERVING, now), was_ready=True)
    return revision


def canary_fault(canary: Canary, seen: Seen) -> str | None:
    """Why the canary must not go on, by the requests that it was given; None: it may.

    It is not waited until it has had `min_requests`: once more have failed than those may, no success after it helps.
    """
    most = canary.max_failed_share * max(seen.requests, canary.min_requests)
    if seen.failed <= most:
        return None
    return (
        f"As a canary it failed {seen.failed} of {seen.requests} requests, "
        f"and {100 * canary.max_failed_share:g}% of at least {canary.min_requests} may fail."
    )


def _can_serve(revision: RevisionView | None, status: ServeStatus) -> bool:
    """Whether a revision has a replica, or is only asleep."""
    app = status.applications.get(revision.name) if revision is not None else None
    return revision is not None and app is not None and _answers(revision.spec, app)


def _is_ready(spec: DeploymentSpec, app: ApplicationStatus) -> bool:
    """Whether all replicas run that it was started with: only then does Ray Serve call an application RUNNING."""
    return app.state is ApplicationState.RUNNING and _answers(spec, app)


def _answers(spec: DeploymentSpec, app: ApplicationStatus) -> bool:
    """Whether it has a replica, or Ray Serve will wake one: it may also be short of some that are still to start."""
    if app.state is ApplicationState.RUNNING and spec.autoscaling.min_replicas == 0:
        return True
    return app.state in (ApplicationState.RUNNING, ApplicationState.DEPLOYING) and bool(app.replica_urls)


def _retire(revision: RevisionView, replaced: bool, now: float) -> RevisionView:
    """A revision that is not wanted any more. The one that serves does so until the wanted one has replaced it."""
    if revision.phase is Phase.SERVING:
        return revision.to(Phase.DRAINING, now) if replaced else revision
    if revision.phase is Phase.CANARY:
        return revision.to(Phase.DRAINING, now, "Replaced while it was a canary.")
    if revision.phase is Phase.DRAINING:
        return revision.to(Phase.GONE, now) if now - revision.since >= DRAIN_SETTLE_S else revision
    if revision.phase in (Phase.QUEUED, Phase.CANDIDATE, Phase.FILLING):
        return revision.to(Phase.GONE, now, "Replaced before it was ready.")
    return revision


def _wind_down(view: DeploymentView, status: ServeStatus, now: float) -> DeploymentView:
    revisions = tuple(_retire(revision, True, now) for revision in view.revisions)
    left = [r.name for r in revisions if r.phase.in_serve or r.name in status.applications]
    state = DeploymentState.STOPPING if left else DeploymentState.STOPPED
    message = f"Ray Serve drains {', '.join(left)}." if left else None
    return replace(view, revisions=revisions, state=state, message=message)


def _with_state(view: DeploymentView, wanted: RevisionView, status: ServeStatus) -> DeploymentView:
    serving = view.serving()
    if serving is None:
        state, message = _state_of_start(wanted, status.applications.get(wanted.name))
        return replace(view, state=state, message=message)
    state, message = _state_of_serving(serving, status.applications.get(serving.name))
    if serving.name != wanted.name:
        message = _rollout_note(wanted, serving, status.applications.get(wanted.name), view.canary)
    return replace(view, state=state, message=message)


def _state_of_start(wanted: RevisionView, app: ApplicationStatus | None) -> tuple[DeploymentState, str | None]:
    if wanted.phase is Phase.FAILED:
        return DeploymentState.FAILED, wanted.message
    if wanted.phase is Phase.QUEUED and app is not None:
        return DeploymentState.PENDING, f"Waits until Ray Serve has removed the earlier {wanted.name}."
    if app is None:
        return DeploymentState.PENDING, None
    return DeploymentState.STARTING, app.message or None


def _state_of_serving(serving: RevisionView, app: ApplicationStatus | None) -> tuple[DeploymentState, str | None]:
    if app is None or app.state in (ApplicationState.NOT_STARTED, ApplicationState.DELETING):
        return DeploymentState.STARTING, "Ray Serve has lost it; it is being deployed again."
    unhealthy = app.state is ApplicationState.UNHEALTHY
    if app.replica_urls:
        return DeploymentState.READY, app.message or None if unhealthy else None
    if unhealthy:
        return DeploymentState.FAILED, _reason(app)
    if serving.spec.autoscaling.min_replicas == 0:
        return DeploymentState.ASLEEP, None
    return DeploymentState.STARTING, app.message or "No replica runs; Ray Serve is starting one."


def _rollout_note(
    wanted: RevisionView, serving: RevisionView, app: ApplicationStatus | None, canary: Canary | None
) -> str:
    if wanted.phase is Phase.CANARY and canary is not None:
        share = f"{100 * canary.weight:g}% of the requests for {canary.for_s:g} s"
        return f"{wanted.name} is a canary with {share}, {serving.name} has the rest"
    if wanted.phase is Phase.FAILED:
        return f"{wanted.name} failed, {serving.name} goes on serving: {wanted.message}"
    said = f": {app.message}" if app and app.message else ""
    if wanted.phase is Phase.FILLING and app is not None:
        return (
            f"{wanted.name} has {len(app.replica_urls)} replicas and waits for the others, {FILL_WAIT_S / 60:.0f} "
            f"minutes at most; {serving.name} serves until then{said}"
        )
    return f"{wanted.name} is starting, {serving.name} serves until it is ready{said}"


def _reason(app: ApplicationStatus) -> str:
    return app.message or f"Ray Serve reports {app.state.value} without a reason."
