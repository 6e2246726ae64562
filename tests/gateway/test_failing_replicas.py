"""Replicas that fail are avoided for longer and longer; with none left and control away, Serve's proxy is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from tests.gateway.fake_control import route
from zenray.gateway.http_client import Lost, Unreachable
from zenray.gateway.metrics import Metrics
from zenray.gateway.snapshot import Directory
from zenray.gateway.upstream import Upstream
from zenray.spec.clock import FakeClock
from zenray.spec.edge import RouteEntry, Snapshot
from zenray.spec.errors import Unavailable, UpstreamFailed

pytestmark = pytest.mark.asyncio


class Answered:
    status = 200

    def release(self) -> None:
        pass


class World:
    """Replicas by name behind one route; those in `away` cannot be reached, those in `dying` break off."""

    def __init__(self, folder: Path, *names: str, **fields: object) -> None:
        self.away: set[str] = set()
        self.dying: set[str] = set()
        self.asked: list[str] = []
        self.clock = FakeClock()
        self.directory = Directory(folder / "snapshot.jsonl", self.clock, max_age_s=10**9)
        self.publish(route("tiny", [f"http://{name}" for name in names], **fields))
        self.upstream = Upstream(cast(Any, self), self.directory, self.clock, Metrics())

    def publish(self, entry: RouteEntry) -> None:
        update = Snapshot(version=self.directory.version + 1, full=True, issued_at=0, routes={"tiny": entry})
        self.directory.apply(update.model_dump_json().encode())

    async def post(self, url: str, path: str, *, bearer: str, **_: object) -> Answered:
        assert bearer == "engine-key"
        name = url.removeprefix("http://")
        self.asked.append(name)
        if name in self.away:
            raise Unreachable(name)
        if name in self.dying:
            raise Lost(name)
        return Answered()

    async def ask(self) -> list[str]:
        """Who was asked for one request, in order."""
        before = len(self.asked)
        (await self.upstream.ask("tiny", "/x", b"{}", "req")).release()
        return self.asked[before:]

    async def asked_first_after(self, name: str, wait_s: float) -> bool:
        """Whether `name` is asked first by one of two requests, who take turns."""
        self.clock.advance(wait_s)
        return name in [(await self.ask())[0], (await self.ask())[0]]


async def test_a_replica_that_stays_away_is_tried_ever_more_rarely(tmp_path: Path) -> None:
    world = World(tmp_path, "a", "b")
    world.away = {"a"}
    assert await world.asked_first_after("a", 0)
    for suspect_for_s in (2, 4, 8, 16, 30, 30):
        assert not await world.asked_first_after("a", suspect_for_s - 0.5)
        assert await world.asked_first_after("a", 0.5)
    world.away.clear()
    assert await world.asked_first_after("a", 31)  # it answers: all is forgotten
    world.away = {"a"}
    assert await world.asked_first_after("a", 0)
    assert await world.asked_first_after("a", 2)


async def test_requests_that_fail_together_count_once(tmp_path: Path) -> None:
    world = World(tmp_path, "a", "b")
    for _ in range(5):
        world.upstream.suspect("tiny#0", "tiny", "req", "lost", Lost("x"))
    assert world.upstream.suspects() == 1
    assert not await world.asked_first_after("a", 1.5)
    assert await world.asked_first_after("a", 0.5)


async def test_one_that_breaks_off_in_its_answer_is_suspect_too(tmp_path: Path) -> None:
    world = World(tmp_path, "a", "b")
    answer = await world.upstream.ask("tiny", "/x", b"{}", "req")
    name = world.asked[-1]
    answer.failed("tiny", "req", Lost("the replica closed the connection"))
    answer.release()
    assert not await world.asked_first_after(name, 0)


async def test_those_that_left_the_route_are_forgotten(tmp_path: Path) -> None:
    world = World(tmp_path, "a", "b")
    for replica_id in ("tiny#0", "tiny#1"):
        world.upstream.suspect(replica_id, "tiny", "req", "lost", Lost("x"))
    world.publish(route("tiny", ["http://a"]))
    world.clock.advance(3)
    world.upstream.suspect("tiny#0", "tiny", "req", "lost", Lost("x"))
    assert world.upstream._suspect_for_s == {"tiny#0": 4}


async def test_serve_s_proxy_is_asked_when_none_is_left_and_control_is_away(tmp_path: Path) -> None:
    world = World(tmp_path, "a", wake_url="http://proxy")
    world.away = {"a"}
    with pytest.raises(Unavailable):
        await world.ask()  # control will say in a moment what is
    world.directory.lose_touch()
    assert await world.ask() == ["a", "proxy"]
    world.away.clear()
    assert await world.ask() == ["a"]
    world.away = {"a", "proxy"}
    with pytest.raises(Unavailable):
        await world.ask()
    world.away, world.dying = {"proxy"}, {"a"}
    with pytest.raises(UpstreamFailed):
        await world.ask()
    assert world.upstream.outstanding == {}
