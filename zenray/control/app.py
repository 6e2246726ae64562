"""Puts control together: database, tokens, catalog, cluster, routes, and the reconciler's thread."""

from __future__ import annotations

import logging
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from zenray import __version__
from zenray.catalog.catalog import Catalog
from zenray.catalog.live import LiveCatalog
from zenray.cluster.base import ClusterBackend
from zenray.control.api.accounts import accounts_router
from zenray.control.api.context import ControlContext
from zenray.control.api.deployments import deployments_router
from zenray.control.api.errors import install_error_handlers
from zenray.control.api.gauges import DatabaseGauges
from zenray.control.api.jobs import jobs_router
from zenray.control.api.limits import BodyLimit
from zenray.control.api.operations import operations_router
from zenray.control.auth.tokens import TokenDoor, load_token
from zenray.control.config import ControlConfig
from zenray.control.db.engine import Database, open_database
from zenray.control.db.migrate import migrate
from zenray.control.db.published import raise_floor
from zenray.control.deployments.applications import ApplicationFactory
from zenray.control.deployments.canaries import CanaryWatch
from zenray.control.deployments.machines import Machines, memory_here_bytes
from zenray.control.deployments.reconciler import Reconciler
from zenray.control.edge.routes import edge_router
from zenray.control.edge.snapshot import SnapshotFeed
from zenray.control.jobs.gauges import JobGauges
from zenray.control.jobs.reconciler import JobReconciler
from zenray.spec.clock import Clock, SystemClock
from zenray.spec.deployments import DeploymentSpec
from zenray.spec.versions import TEMPLATE_OVERHEAD, Manifest, VersionRef
from zenray.storage.base import ObjectStore
from zenray.storage.opening import absolute, open_store
from zenray.storage.versions import find_manifest, list_versions, newest, read_manifest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredVersions:
    """`deployments.VersionSource` over an object store."""

    store: ObjectStore

    def resolve(self, spec: DeploymentSpec) -> DeploymentSpec:
        draft = spec.engine.draft
        if draft is not None and draft.model is not None:
            of_draft = self._manifest(draft.model, draft.version, draft.format)
            exact = draft.model_copy(update={"version": of_draft.ref.version})
            spec = spec.model_copy(update={"engine": spec.engine.model_copy(update={"draft": exact})})
        manifest = self._manifest(spec.model, spec.version, spec.format)
        chosen: dict[str, object] = {"version": manifest.ref.version}
        measured = manifest.metadata.get(TEMPLATE_OVERHEAD)
        if spec.template_overhead_tokens is None and measured is not None:
            chosen["template_overhead_tokens"] = int(measured)
        return spec.model_copy(update=chosen)

    def stored_in(self, spec: DeploymentSpec, format: str) -> bool:
        version = spec.version
        if version is None:
            published = list_versions(self.store, spec.model)
            if not published:
                return False
            version = published[-1].ref.version
        return find_manifest(self.store, VersionRef(model=spec.model, version=version, format=format)) is not None

    def _manifest(self, model: str, version: str | None, format: str) -> Manifest:
        if version is None:
            return newest(self.store, model, format)
        return read_manifest(self.store, VersionRef(model=model, version=version, format=format))


@dataclass(frozen=True)
class Control:
    """Control, put together but not started. `app` is the ASGI application; its lifespan runs the reconcilers."""

    app: FastAPI
    database: Database
    reconciler: Reconciler
    jobs: JobReconciler
    feed: SnapshotFeed


def build_control(
    config: ControlConfig,
    *,
    backend: ClusterBackend | None = None,
    store: ObjectStore | None = None,
    catalog: Catalog | None = None,
    clock: Clock | None = None,
    reconcile: bool = True,
) -> Control:
    """Opens and migrates the database, makes the tokens if there are none. What is given replaces what config names."""
    clock = clock or SystemClock()
    config.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    storage = absolute(config.storage, config.state_dir.absolute())
    database = open_database(config.sqlalchemy_url())
    migrate(database)
    with database.write() as session:
        raise_floor(session)
    catalog_now = LiveCatalog(config.catalog_dirs, clock).now if catalog is None else lambda: catalog
    store = store or open_store(storage)
    backend = backend or _backend(config)
    canaries = CanaryWatch()
    reconciler = Reconciler(database, backend, catalog_now, clock, canaries)
    work_dir = str(config.path(config.jobs_dir, "jobs"))
    jobs = JobReconciler(database, backend, store, clock, storage=storage, work_dir=work_dir)
    context = ControlContext(
        database=database,
        clock=clock,
        admin_door=TokenDoor(load_token(config.path(config.admin_token_file, "admin.token")), what="admin token"),
        catalog_now=catalog_now,
        store=store,
        versions=StoredVersions(store),
        applications=ApplicationFactory(storage, str(config.path(config.cache_dir, "cache"))),
        backend=backend,
        reconciler=reconciler,
        key_prefix=config.key_prefix,
        machines=Machines(config.nodes, memory_here_bytes() if config.backend == "local" else None),
    )
    feed = SnapshotFeed(database)
    edge_door = TokenDoor(load_token(config.path(config.edge_token_file, "edge.token")), what="edge token")
    app = FastAPI(
        title="zenray control",
        version=__version__,
        lifespan=_lifespan(reconciler, jobs, feed, config.reconcile_interval_s if reconcile else None),
    )
    registry = CollectorRegistry()
    registry.register(DatabaseGauges(database, clock))
    registry.register(JobGauges(database))
    install_error_handlers(app)
    app.add_middleware(BodyLimit)
    app.include_router(operations_router(context, registry))
    app.include_router(accounts_router(context))
    app.include_router(deployments_router(context))
    app.include_router(jobs_router(context))
    take = canaries.take
    app.include_router(
        edge_router(database, door=edge_door, clock=clock, feed=feed, registry=registry, take_canaries=take)
    )
    return Control(app, database, reconciler, jobs, feed)


def _lifespan(
    reconciler: Reconciler, jobs: JobReconciler, feed: SnapshotFeed, interval_s: float | None
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        stop = threading.Event()
        if interval_s is not None:
            # A daemon: a call to Ray may take 30 s, and control is to end within 5. A round that is cut off is only
            # a round that did not happen.
            for run, every_s in ((reconciler.run, interval_s), (jobs.run, 2 * interval_s)):
                threading.Thread(target=run, args=(stop, every_s), name=run.__qualname__, daemon=True).start()
        try:
            yield
        finally:
            stop.set()
            feed.close()

    return lifespan


def _backend(config: ControlConfig) -> ClusterBackend:
    if config.backend == "fake":
        from zenray.cluster.fake import FakeCluster

        return FakeCluster()
    from zenray.cluster.local import LocalCluster

    token_file = config.path(config.ray_token_file, "ray.token")
    return LocalCluster(config.ray_dashboard_url, token=lambda: _read_token(token_file), serve_port=config.serve_port)


def _read_token(path: Path) -> str:
    return path.read_text(encoding="ascii").strip()
