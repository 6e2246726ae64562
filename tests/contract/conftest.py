"""Servers that contract tests share, and which tests run beside each other."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.cluster.ray_session import ray_session as ray_session
from tests.gateway.running import Engine, FakeControl, RunningGateway


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `-n 2`: tests of one file stay together, and so do all that need Ray, which is started once."""
    for item in items:
        if "contract" in item.path.parts:
            group = "ray" if "ray_session" in getattr(item, "fixturenames", ()) else item.path.stem
            item.add_marker(pytest.mark.xdist_group(group))


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
