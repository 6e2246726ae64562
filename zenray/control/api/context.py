"""What the admin routes work with, handed to them when control is put together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from zenray.catalog.catalog import Catalog
from zenray.cluster.base import ClusterBackend
from zenray.control.auth.tokens import TokenDoor
from zenray.control.db.engine import Database
from zenray.control.deployments.applications import ApplicationFactory
from zenray.control.deployments.machines import Machines
from zenray.control.deployments.reconciler import Reconciler
from zenray.control.deployments.service import VersionSource
from zenray.spec.clock import Clock
from zenray.storage.base import ObjectStore


@dataclass(frozen=True)
class ControlContext:
    database: Database
    clock: Clock
    admin_door: TokenDoor
    catalog_now: Callable[[], Catalog]
    store: ObjectStore
    versions: VersionSource
    applications: ApplicationFactory
    backend: ClusterBackend
    reconciler: Reconciler
    key_prefix: str
    machines: Machines

    @property
    def catalog(self) -> Catalog:
        return self.catalog_now()
