"""The guard: a replica answers only on known routes, and only to its key."""

from __future__ import annotations

import httpx
import pytest

from zenray.serving.engine.scripted import ScriptedEngine, scripted_app
from zenray.serving.guard import Guard

KEY = "replica-key"


def replica(root_path: str = "") -> httpx.AsyncClient:
    app = scripted_app(ScriptedEngine("m"), KEY)
    transport = httpx.ASGITransport(app=app, root_path=root_path)
    return httpx.AsyncClient(transport=transport, base_url="http://replica" + root_path)


@pytest.mark.parametrize("path", ["/metrics", "/v1/models", "/scripted/emitted"])
@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401),
        ("Bearer wrong", 401),
        (KEY, 401),
        (f"Basic {KEY}", 401),
        (f"Bearer {KEY}", 200),
        (f"bearer {KEY}", 200),
    ],
)
async def test_every_route_but_health_needs_the_key(path: str, header: str | None, status: int) -> None:
    headers = {"authorization": header} if header else {}
    async with replica() as client:
        assert (await client.get(path, headers=headers)).status_code == status


@pytest.mark.parametrize("root_path", ["", "/zen4-mini--v1--0badcafe"])
async def test_health_is_free_also_below_a_route_prefix(root_path: str) -> None:
    async with replica(root_path) as client:
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/metrics")).status_code == 401


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/sleep", "/docs", "/", "/v1/models/../load_lora_adapter"])
async def test_routes_that_nobody_needs_are_not_there(path: str) -> None:
    async with replica() as client:
        assert (await client.get(path, headers={"authorization": f"Bearer {KEY}"})).status_code == 404


def test_a_replica_without_a_key_does_not_start() -> None:
    with pytest.raises(ValueError, match="key"):
        Guard(ScriptedEngine("m"), key="")
