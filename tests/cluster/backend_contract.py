"""What every ClusterBackend promises. Inherit, and give a `harness` fixture."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.cluster.scripted_apps import Publisher
from zenray.cluster.base import ClusterBackend
from zenray.spec.serving import ApplicationState, ApplicationStatus, ServeStatus


@dataclass
class Harness:
    """A backend under test, and the way its time passes."""

    cluster: ClusterBackend
    publisher: Publisher
    pause: Callable[[float], None]

    def until(self, holds: Callable[[ServeStatus], bool], *, within_s: float = 40) -> ServeStatus:
        deadline = time.monotonic() + within_s
        while not holds(status := self.cluster.serve_status()):
            assert time.monotonic() < deadline, f"not within {within_s} s; last: {status}"
            self.pause(0.2)
        return status

    def application(
        self, name: str, holds: Callable[[ApplicationStatus], bool], *, within_s: float = 40
    ) -> ApplicationStatus:
        def there(status: ServeStatus) -> bool:
            return name in status.applications and holds(status.applications[name])

        return self.until(there, within_s=within_s).applications[name]


class ClusterBackendContract:
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
