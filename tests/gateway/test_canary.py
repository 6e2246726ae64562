"""A share of the requests goes to a route's canary, with the canary's own key, and nobody is lost with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.gateway.fake_control import route
from zenray.gateway.canaries import Canaries
from zenray.gateway.http_client import Unreachable
from zenray.gateway.metrics import Metrics
from zenray.gateway.snapshot import Directory
from zenray.gateway.upstream import Upstream
from zenray.spec.clock import FakeClock
from zenray.spec.edge import CanaryCount, CanaryRoute, Endpoint, Snapshot
from zenray.spec.errors import Unavailable

pytestmark = pytest.mark.asyncio
CANARY = CanaryRoute(
    revision="new",
    weight=0.25,
    endpoints=(Endpoint(replica_id="new#0", url="http://new"),),
    engine_key="new-key",
)


class Answer:
    def __init__(self, status: int) -> None:
        self.status = status

    def release(self) -> None:
        pass


class Replicas:
    """A client whose replicas answer, are busy (503), or cannot be reached; it notes who was asked with which key."""

    def __init__(self, **state: str) -> None:
        self.state = state
        self.asked: list[tuple[str, str]] = []

    async def post(self, url: str, path: str, *, bearer: str, **_: object) -> Answer:
        name = url.removeprefix("http://")
        self.asked.append((name, bearer))
        if self.state.get(name) == "away":
            raise Unreachable(name)
        return Answer(503 if self.state.get(name) == "busy" else 200)


def upstream(folder: Path, replicas: Replicas, draws: list[float], canary: CanaryRoute | None = CANARY) -> Upstream:
    clock = FakeClock()
    directory = Directory(folder / "snapshot.jsonl", clock, max_age_s=60)
    entry = route("tiny", ["http://old"]).model_copy(update={"canary": canary, "engine_key": "old-key"})
    snapshot = Snapshot(version=directory.version + 1, full=True, issued_at=0, routes={"tiny": entry})
    directory.apply(snapshot.model_dump_json().encode())
    left = iter(draws)
    return Upstream(cast(Any, replicas), directory, clock, Metrics(), draw=lambda: next(left))


async def ask(asking: Upstream) -> str:
    """The replica that answered; with a "!" when it did so in the canary's place."""
    drawn = asking.draw_canary(asking._directory.routes["tiny"])
    answer = await asking.ask("tiny", "/x", b"{}", "req", canary=drawn.revision if drawn else None)
    answer.release()
    return answer.replica_id + "!" * answer.fell_back


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=40))
async def test_the_share_is_what_is_drawn_below_the_weight(tmp_path: Path, draws: list[float]) -> None:
    replicas = Replicas()
    asking = upstream(tmp_path, replicas, draws)
    for drawn in draws:
        assert (await ask(asking) == "new#0") is (drawn < CANARY.weight)
    assert set(replicas.asked) <= {("new", "new-key"), ("old", "old-key")}
    assert asking.outstanding == {}


@pytest.mark.parametrize("state", ["away", "busy"])
async def test_whom_the_canary_cannot_answer_the_old_revision_does(tmp_path: Path, state: str) -> None:
    replicas = Replicas(new=state)
    asking = upstream(tmp_path, replicas, [0.0])
    assert await ask(asking) == "tiny#0!"
    assert replicas.asked == [("new", "new-key"), ("old", "old-key")]


async def test_the_old_revision_s_share_is_not_moved_to_the_canary(tmp_path: Path) -> None:
    replicas = Replicas(old="away")
    with pytest.raises(Unavailable):
        await ask(upstream(tmp_path, replicas, [0.9]))
    assert replicas.asked == [("old", "old-key")]


async def test_a_route_without_a_canary_draws_nothing(tmp_path: Path) -> None:
    replicas = Replicas()
    assert await ask(upstream(tmp_path, replicas, [], canary=None)) == "tiny#0"


async def test_totals_are_of_the_trials_under_way(tmp_path: Path) -> None:
    asking = upstream(tmp_path, Replicas(), [])
    directory = asking._directory
    canaries = Canaries(directory)
    for failed in (False, True, False):
        canaries.note(CANARY, failed=failed)
    canaries.note(CANARY.model_copy(update={"since": -1.0}), failed=True)  # an earlier trial of the same revision
    assert canaries.totals() == (CanaryCount(revision="new", since=0, requests=3, failed=1),)
    later = CANARY.model_copy(update={"since": 9.0})
    entry = directory.routes["tiny"].entry.model_copy(update={"canary": later})
    directory.apply(Snapshot(version=99, full=False, issued_at=0, routes={"tiny": entry}).model_dump_json().encode())
    assert canaries.totals() == ()
    canaries.note(later, failed=False)
    assert canaries.totals() == (CanaryCount(revision="new", since=9, requests=1, failed=0),)
