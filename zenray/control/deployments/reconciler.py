"""Makes Ray Serve match what was asked: loads, asks Ray outside any session, writes if nothing has changed since."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace

from sqlalchemy.exc import SQLAlchemyError

from zenray.catalog.catalog import Catalog
from zenray.cluster.base import ClusterBackend
from zenray.control.db.engine import Database
from zenray.control.db.published import Kind, publish
from zenray.control.deployments.canaries import CanaryWatch, Seen
from zenray.control.deployments.repository import Loaded, load_all, write
from zenray.control.deployments.rollout import DeploymentView, decide, unreachable
from zenray.control.deployments.routing import route_of
from zenray.control.deployments.tables import Deployment
from zenray.spec.clock import Clock
from zenray.spec.errors import ClusterUnavailable, ModelNotFound, ZenrayError
from zenray.spec.serving import ApplicationState, ServeApplication, ServeStatus

logger = logging.getLogger(__name__)


class Reconciler:
    """One round is `step`; `run` repeats it in a thread of its own. Rounds are level-triggered: each looks at the whole
    wish and the whole status, so a lost answer, a killed control or a restarted Ray needs no special care."""

    def __init__(
        self,
        database: Database,
        backend: ClusterBackend,
        catalog_now: Callable[[], Catalog],
        clock: Clock,
        canaries: CanaryWatch | None = None,
    ) -> None:
        self._database = database
        self._backend = backend
        self._catalog_now = catalog_now
        self._clock = clock
        self._canaries = canaries or CanaryWatch()
        self._refusal: str | None = None  # why Ray Serve did not take the wish, until it takes one
        self.last_round_at: float | None = None

    def step(self) -> None:
        """One round. Expected trouble (Ray away, a refused document) ends up in the deployments' messages."""
        with self._database.read() as session:
            loaded = load_all(session)
        try:
            status = self._backend.serve_status()
        except ClusterUnavailable as error:
            for deployment in loaded:
                self._write(deployment, unreachable(deployment.view, str(error)), status=None)
            return
        now = self._clock.now()
        for deployment in loaded:
            trial = deployment.view.in_canary()
            seen = self._canaries.seen(trial.name, trial.since) if trial is not None else Seen()
            self._write(deployment, self._explained(decide(deployment.view, status, now, seen), status), status)
        self._apply(status)
        self.last_round_at = now

    def run(self, stop: threading.Event, interval_s: float) -> None:
        """Rounds until `stop` is set. A failure nobody expected is logged, and the next round starts from what is."""
        while not stop.is_set():
            try:
                self.step()
            except SQLAlchemyError as error:
                logger.warning("the reconciler waits for the database: %s", error)
            except Exception:
                logger.exception("a round of the deployment reconciler failed")
            stop.wait(interval_s)

    def _write(self, loaded: Loaded, after: DeploymentView, status: ServeStatus | None) -> None:
        """Step three: what was decided is written only if the row is still the one that was read."""
        route = None
        if status is not None:
            try:
                route = route_of(after, loaded.applications, status, self._catalog_now(), created_at=loaded.created_at)
            except ModelNotFound as error:  # its entry was taken out of the catalog: without a price, no traffic
                after = replace(after, message=str(error))
        route_changes = status is not None and (route.model_dump_json() if route else None) != loaded.published
        if after == loaded.view and not route_changes:
            return
        with self._database.write() as session:
            row = session.get_one(Deployment, after.model, with_for_update=True)
            if row.row_version != loaded.row_version:
                return
            if after != loaded.view:
                write(session, loaded.view, after, now=self._clock.now())
            if route_changes:
                publish(session, Kind.ROUTE, after.model, route)
        if after.state is not loaded.view.state:
            logger.info("%s: %s → %s %s", after.model, loaded.view.state, after.state, after.message or "")

    def _apply(self, status: ServeStatus) -> None:
        """Sends the wish, as it is written down now, when Ray Serve has other applications than it names."""
        with self._database.read() as session:
            wish = wished_applications(load_all(session))
        present = {name for name, app in status.applications.items() if app.state is not ApplicationState.DELETING}
        if {application.name for application in wish} == present:
            self._refusal = None
            return
        try:
            self._backend.apply(wish)
            self._refusal = None
        except ZenrayError as error:
            self._refusal = f"Ray Serve did not take the applications: {error}"
            logger.warning("%s", self._refusal)

    def _explained(self, view: DeploymentView, status: ServeStatus) -> DeploymentView:
        """A deployment that waits for Ray Serve to take it says why Ray Serve did not."""
        if self._refusal is None or view.message is not None or view.wanted in status.applications or view.stop:
            return view
        return replace(view, message=self._refusal)


def wished_applications(loaded: list[Loaded]) -> list[ServeApplication]:
    """The applications that Ray Serve is to have: of each deployment the revisions in a phase that runs."""
    return [
        deployment.applications[revision.name]
        for deployment in loaded
        for revision in deployment.view.revisions
        if revision.phase.in_serve
    ]
