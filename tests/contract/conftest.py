"""Servers that contract tests share, and which tests run beside each other."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.cluster.ray_session import ray_session as ray_session
from tests.gateway.running import Engine, FakeControl, RunningGateway

TRAINS = ("test_evaluate_task", "test_jobs", "test_training", "test_training_data", "test_training_store")


@pytest.hookimpl(tryfirst=True)  # xdist's own hook reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `-n 2`: tests of one file stay together, and so do those that share a Ray: one for serving, one for jobs.

    These two take longest, so they come first, one on each worker.
    """
    for item in items:
        if "contract" in item.path.parts:
            item.add_marker(pytest.mark.xdist_group(_group(item)))
    items.sort(key=lambda item: "contract" in item.path.parts and not _group(item).startswith("ray"))


def _group(item: pytest.Item) -> str:
    if "ray_session" not in getattr(item, "fixturenames", ()):
        return item.path.stem
    return "ray: jobs" if item.path.stem in TRAINS else "ray: serving"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[Engine]:
    running = await Engine.start()
    yield running
    await running.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(
    request: pytest.FixtureRequest, control: FakeControl, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningGateway]:
    """A gateway at the module's own `control`, with what the module's GATEWAY sets."""
    settings = getattr(request.module, "GATEWAY", {})
    running = await RunningGateway(tmp_path_factory.mktemp("gateway"), control, **settings).start()
    yield running
    assert await running.stop() == 0
