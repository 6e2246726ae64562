"""What every ClusterBackend promises. Inherit, and give a `harness` fixture."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.cluster.scripted_apps import Publisher
from zenray.cluster.base import ClusterBackend
from zenray.spec.job_life import ClusterJob, ClusterJobState, JobLaunch
from zenray.spec.serving import ApplicationState, ApplicationStatus, ServeStatus


@dataclass
class Harness:
    """A backend under test, and the way its time passes."""

    cluster: ClusterBackend
    publisher: Publisher
    pause: Callable[[float], None]
    end_jobs: Callable[[], None] = lambda: None  # where a job's process does not end by itself: it does now

    def until(self, holds: Callable[[ServeStatus], bool], *, within_s: float = 180) -> ServeStatus:
        deadline = time.monotonic() + within_s
        while not holds(status := self.cluster.serve_status()):
            assert time.monotonic() < deadline, f"not within {within_s} s; last: {status}"
            self.pause(0.2)
        return status

    def application(
        self, name: str, holds: Callable[[ApplicationStatus], bool], *, within_s: float = 180
    ) -> ApplicationStatus:
        def there(status: ServeStatus) -> bool:
            return name in status.applications and holds(status.applications[name])

        return self.until(there, within_s=within_s).applications[name]

    def job(self, id: str, *states: ClusterJobState, within_s: float = 180) -> ClusterJob:
        deadline = time.monotonic() + within_s
        while (job := self.cluster.jobs()[id]).state not in states:
            assert time.monotonic() < deadline, f"not within {within_s} s; last: {job}"
            self.pause(0.2)
        return job


GOOD = JobLaunch(id="contract-good-1", module="this", environment={"ZENRAY_CONTRACT": "1"})
BROKEN = JobLaunch(id="contract-broken-1", module="zenray.no_such_module")
LONG = JobLaunch(id="contract-long-1", module="timeit", arguments=("-n1", "-r1", "__import__('time').sleep(600)"))


class ClusterBackendContract:
    def test_jobs_run_fail_and_are_cancelled(self, harness: Harness) -> None:
        cluster = harness.cluster
        assert GOOD.id not in cluster.jobs()
        assert cluster.job_logs("contract-unknown") == ""
        cluster.cancel("contract-unknown")
        for launch in (GOOD, BROKEN, LONG):
            cluster.submit(launch)
            assert cluster.jobs()[launch.id].state in (ClusterJobState.PENDING, ClusterJobState.RUNNING)
        harness.job(LONG.id, ClusterJobState.RUNNING)
        harness.end_jobs()
        assert harness.job(GOOD.id, ClusterJobState.SUCCEEDED, ClusterJobState.FAILED).state == "SUCCEEDED"
        failed = harness.job(BROKEN.id, ClusterJobState.SUCCEEDED, ClusterJobState.FAILED)
        assert failed.state == "FAILED" and "no_such_module" in failed.message
        assert "beautiful" in cluster.job_logs(GOOD.id).lower()
        cluster.submit(GOOD)
        assert cluster.jobs()[GOOD.id].state == "SUCCEEDED", "submitting again what is over must not start it again"

        cluster.cancel(LONG.id)
        harness.job(LONG.id, ClusterJobState.STOPPED)
        cluster.cancel(LONG.id)
        cluster.cancel(GOOD.id)
        assert cluster.jobs()[GOOD.id].state == "SUCCEEDED"

    def test_applications_come_fail_and_go(self, harness: Harness) -> None:
        cluster = harness.cluster
        cluster.apply([])
        harness.until(lambda status: not status.applications)

        good = harness.publisher.application("contract-good")
        wrong = good.model_copy(update={"name": "wrong", "route_prefix": "/wrong", "args": {"deploymant": {}}})
        cluster.apply([good, wrong])
        first = cluster.serve_status().applications[good.name]
        assert first.state is ApplicationState.DEPLOYING
        assert first.replica_urls == {}

        running = harness.application(good.name, lambda a: a.state is ApplicationState.RUNNING)
        (url,) = running.replica_urls.values()
        assert url.startswith("http://127.0.0.1:")
        assert url.endswith(good.route_prefix)
        failed = harness.application(wrong.name, lambda a: a.state is ApplicationState.DEPLOY_FAILED)
        assert "deploymant" in failed.message
        assert "Traceback" not in failed.message
        assert failed.replica_urls == {}
        assert (proxy := cluster.serve_status().proxy_url) is not None
        assert proxy.startswith("http://127.0.0.1:")

        cluster.apply([good])
        status = harness.until(lambda status: list(status.applications) == [good.name])
        assert status.applications[good.name] == running, "applying again what runs must not touch it"

        cluster.apply([])
        harness.until(lambda status: not status.applications)
