"""A gateway started with fewer processes ships what the others left, and frees what they had been lent."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import pytest

from tests.gateway.metering.conftest import open_charge
from zenray.gateway import leftovers
from zenray.gateway.config import GatewayConfig
from zenray.gateway.metering import Meter
from zenray.gateway.snapshot import Directory
from zenray.spec.clock import FakeClock
from zenray.spec.edge import Lease, LeaseRequest, OrgEntry, Snapshot, UsageAck, UsageBatch
from zenray.spec.usage import Outcome, Usage, UsageEvent

pytestmark = pytest.mark.asyncio


class Edge:
    def __init__(self) -> None:
        self.events: list[UsageEvent] = []
        self.leases: list[LeaseRequest] = []
        self.asked: list[str] = []

    async def ship(self, batch: UsageBatch) -> UsageAck:
        self.asked.append(f"{batch.gateway_id} ships")
        self.events += batch.events
        return UsageAck(received=len(batch.events), new=len(batch.events))

    async def lease(self, request: LeaseRequest, timeout_s: float) -> Lease:
        self.asked.append(f"{request.gateway_id} leases")
        self.leases.append(request)
        return Lease(org=request.org, granted_nano_usd=0, balance_nano_usd=0)


def meter_of(config: GatewayConfig, index: int) -> Meter:
    folder = config.process_dir(index) / "usage"
    return Meter(folder, config.process_id(index), max_streams=4, max_wal_bytes=1 << 20, clock=FakeClock())


async def take_over(config: GatewayConfig, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> Edge:
    edge, clock = Edge(), FakeClock()
    directory = Directory(config.state_dir / "snapshot.jsonl", clock, max_age_s=60)
    known = Snapshot(version=1, full=True, issued_at=0, orgs={"acme": OrgEntry(org="acme", cache_salt="s")})
    directory.apply(known.model_dump_json().encode())
    await leftovers.take_over(config, cast(Any, edge), directory, clock, sleep)
    return edge


@pytest.fixture
def config(tmp_path: Path) -> GatewayConfig:
    return GatewayConfig(control_url="http://x", edge_token_file=tmp_path / "token", state_dir=tmp_path, processes=1)


async def test_what_the_others_left_is_shipped_and_their_leases_freed(config: GatewayConfig) -> None:
    boots = {}
    for index in range(3):
        meter = meter_of(config, index)
        open_charge(meter, request_id=f"closed-{index}").close(Outcome.COMPLETED, Usage(input_tokens=5))
        open_charge(meter, request_id=f"open-{index}").count(0, 5, index)
        boots[config.process_id(index)] = meter.boot_id
        meter.close()
    edge = await take_over(config)
    assert [event.request_id for event in edge.events] == ["closed-1", "open-1", "closed-2", "open-2"]
    assert edge.events[3].outcome is Outcome.INTERRUPTED and edge.events[3].usage.output_tokens == 2
    assert edge.asked == ["gateway-1 ships", "gateway-1 leases", "gateway-2 ships", "gateway-2 leases"]
    assert all(lease.boot_id != boots[lease.gateway_id] and lease.wanted_nano_usd == 0 for lease in edge.leases)
    assert config.folders_of_others() == [] and config.process_dir(0).is_dir()


async def test_the_log_of_one_that_still_runs_is_left_to_it_until_it_ends(
    config: GatewayConfig, caplog: pytest.LogCaptureFixture
) -> None:
    running, left = meter_of(config, 1), meter_of(config, 2)
    open_charge(left).close(Outcome.COMPLETED, Usage(input_tokens=5))
    left.close()

    async def ends(seconds: float) -> None:
        assert config.folders_of_others() == [("gateway-1", config.process_dir(1))]
        running.close()

    edge = await take_over(config, ends)
    (held,) = [record for record in caplog.records if record.message == "leftover_usage_held"]
    assert "running process" in vars(held)["reason"]
    assert len(edge.events) == 1 and config.folders_of_others() == []


async def test_what_cannot_be_taken_over_is_said_and_holds_up_no_other(
    config: GatewayConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in (1, 2):
        meter_of(config, index).close()

    async def lease(self: Edge, request: LeaseRequest, timeout_s: float) -> Lease:
        if request.gateway_id == "gateway-1":
            raise RuntimeError("nobody expected it")
        return Lease(org=request.org, granted_nano_usd=0, balance_nano_usd=0)

    monkeypatch.setattr(Edge, "lease", lease)
    await take_over(config)
    (failed,) = [record for record in caplog.records if record.message == "leftover_usage"]
    assert vars(failed)["of"] == "gateway-1" and failed.exc_info is not None
    assert config.folders_of_others() == [("gateway-1", config.process_dir(1))]
