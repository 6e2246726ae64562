"""The fake cluster keeps the backends' contract, and does what it is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.backend_contract import BROKEN, GOOD, ClusterBackendContract, Harness
from tests.cluster.scripted_apps import Publisher
from zenray.cluster.fake import FakeCluster
from zenray.spec.clock import FakeClock
from zenray.spec.errors import ClusterUnavailable
from zenray.spec.serving import ApplicationState


class TestFakeKeepsTheContract(ClusterBackendContract):
    @pytest.fixture
    def harness(self, tmp_path: Path) -> Harness:
        clock = FakeClock()
        cluster = FakeCluster(clock)

        def end_jobs() -> None:
            cluster.end_job(GOOD.id, logs="Beautiful is better than ugly.")
            cluster.end_job(BROKEN.id, failure="No module named 'zenray.no_such_module'")

        return Harness(cluster, Publisher(tmp_path), pause=clock.advance, end_jobs=end_jobs)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def cluster(clock: FakeClock) -> FakeCluster:
    return FakeCluster(clock, start_s=5)


def test_replicas_appear_when_they_have_started(cluster: FakeCluster, clock: FakeClock, tmp_path: Path) -> None:
    app = Publisher(tmp_path).application("m")
    cluster.apply([app])
    clock.advance(4.9)
    assert cluster.serve_status().applications[app.name].starting_replicas == 1
    clock.advance(0.1)
    before = cluster.serve_status().applications[app.name].replica_urls
    cluster.scale(app.name, 3)
    after = cluster.serve_status().applications[app.name].replica_urls
    assert len(after) == 3
    assert before.items() <= after.items(), "replicas that stay keep their address"
    cluster.scale(app.name, 0)
    asleep = cluster.serve_status().applications[app.name]
    assert (asleep.state, asleep.replica_urls) == (ApplicationState.RUNNING, {})


def test_failures_as_told(cluster: FakeCluster, clock: FakeClock, tmp_path: Path) -> None:
    app = Publisher(tmp_path).application("m")
    cluster.fail(app.name, "shard 3 is corrupt")
    cluster.apply([app])
    clock.advance(10)
    status = cluster.serve_status().applications[app.name]
    assert (status.state, status.message) == (ApplicationState.DEPLOY_FAILED, "shard 3 is corrupt")
    cluster.unreachable = True
    with pytest.raises(ClusterUnavailable):
        cluster.serve_status()
    with pytest.raises(ClusterUnavailable):
        cluster.apply([])
