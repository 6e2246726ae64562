"""Servers that contract tests share, and which tests run beside each other."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.cluster.ray_session import ray_session as ray_session
from tests.gateway.running import Engine, FakeControl, RunningGateway

LONGEST = ("test_training", "test_data_path", "test_jobs", "test_mode_vllm")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `-n 2 --dist loadfile` each worker takes one file after the other, and starts one Ray for all its files: the
    longest come first, so that both workers end together."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)) if "contract" in item.path.parts else -1)


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
