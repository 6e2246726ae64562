"""A local Ray head starts cleanly, ends wholly, and cleans up after a supervisor that was killed."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.ray_session import ANY_PORTS, new_home
from zenray.cluster.head import LocalRay
from zenray.cluster.local import LocalCluster
from zenray.cluster.session import SessionRecord
from zenray.spec.errors import ClusterUnavailable

pytestmark = pytest.mark.contract

SUPERVISOR = """
import sys
from pathlib import Path
from tests.cluster.ray_session import ANY_PORTS
from zenray.cluster.head import LocalRay

LocalRay(Path(sys.argv[1]), ANY_PORTS).start()
"""


@pytest.fixture
def home() -> Iterator[Path]:
    home = new_home()
    yield home
    LocalRay(home, ANY_PORTS).stop()
    shutil.rmtree(home, ignore_errors=True)


def record_of(home: Path) -> SessionRecord:
    deadline = time.monotonic() + 60
    while (record := SessionRecord.read(home / "ray.json")) is None or len(record.processes()) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return record


def test_a_killed_supervisor_leaves_nothing_to_the_next_start(home: Path) -> None:
    supervisor = subprocess.Popen([sys.executable, "-c", SUPERVISOR, str(home)], cwd=Path(__file__).parents[2])
    first = record_of(home)
    os.kill(supervisor.pid, signal.SIGKILL)
    supervisor.wait()
    assert first.leader_lives(), "Ray is not the supervisor's to take along; that is what the next start is for"

    ray = LocalRay(home, ANY_PORTS)
    addresses = ray.start()
    assert first.processes() == []
    second = record_of(home)
    ray.check()
    cluster = LocalCluster(addresses.dashboard_url, token=addresses.token, serve_port=addresses.serve_port)
    assert cluster.serve_status().applications == {}
    assert (home / "ray.token").stat().st_mode & 0o077 == 0

    os.kill(second.sid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while second.leader_lives() and time.monotonic() < deadline:
        time.sleep(0.1)
    with pytest.raises(ClusterUnavailable, match="Ray is not running"):
        ray.check()
    with pytest.raises(ClusterUnavailable, match="cannot be reached"):
        cluster.serve_status()
    ray.stop()
    assert second.processes() == []
    ray.stop()


def test_a_port_in_use_is_named(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ray = LocalRay(home, ANY_PORTS.model_copy(update={"dashboard_port": port}))
        with pytest.raises(ClusterUnavailable, match=rf"Port {port} \(ray.dashboard_port\)"):
            ray.start()
    assert not (home / "ray.json").exists()
