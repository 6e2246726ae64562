"""One real Ray head for all contract tests of a run."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.scripted_apps import Publisher
from zenray.cluster.head import LocalRay, RayAddresses
from zenray.cluster.local import LocalCluster
from zenray.cluster.session import SessionRecord
from zenray.spec.platform import RaySettings

ANY_PORTS = RaySettings(
    cpus=2, object_store_bytes=80 << 20, gcs_port=0, dashboard_port=0, serve_port=0, first_replica_port=31000
)


@dataclass(frozen=True)
class RaySession:
    home: Path
    ray: LocalRay
    addresses: RayAddresses
    cluster: LocalCluster
    publisher: Publisher

    def record(self) -> SessionRecord:
        record = SessionRecord.read(self.home / "ray.json")
        assert record is not None
        return record


def new_home() -> Path:
    """A folder with a short name: Ray's socket paths are limited."""
    return Path(tempfile.mkdtemp(prefix="zr-", dir="/tmp"))


@pytest.fixture(scope="session")
def ray_session() -> Iterator[RaySession]:
    home = new_home()
    ray = LocalRay(home, ANY_PORTS)
    addresses = ray.start()
    cluster = LocalCluster(addresses.dashboard_url, token=addresses.token, serve_port=addresses.serve_port)
    try:
        yield RaySession(home, ray, addresses, cluster, Publisher(home))
    finally:
        cluster.close()
        ray.stop()
        if "ZENRAY_KEEP_LOGS" not in os.environ:
            shutil.rmtree(home, ignore_errors=True)
