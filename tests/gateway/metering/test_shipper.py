"""Shipping: at least once on the wire, once in the ledger, whatever control does with the batches."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field

import pytest

from tests.gateway.metering.conftest import MakeMeter, die, open_charge
from tests.gateway.metering.test_meter import FINAL
from zenray.gateway.metering import Meter, Shipper
from zenray.spec.edge import UsageAck, UsageBatch
from zenray.spec.errors import Unavailable, UpstreamFailed
from zenray.spec.usage import Outcome, UsageEvent


@dataclass
class Control:
    """A ledger that takes each billing key once, behind a wire that fails before or after control has acted."""

    failures: list[str] = field(default_factory=list)  # of the next requests: "lost", "unanswered", "half", "" …
    batches: list[UsageBatch] = field(default_factory=list)
    ledger: dict[str, UsageEvent] = field(default_factory=dict)

    async def take(self, batch: UsageBatch) -> UsageAck:
        failure = self.failures.pop(0) if self.failures else ""
        if failure == "lost":
            raise Unavailable("Control cannot be reached.")
        self.batches.append(batch)
        before = len(self.ledger)
        for event in batch.events:
            self.ledger.setdefault(event.billing_key, event)
        if failure == "unanswered":
            raise TimeoutError("no answer in 30 s")
        received = len(batch.events) - (failure == "half")
        return UsageAck(received=received, new=len(self.ledger) - before)


class Sleeps:
    """Waits that take no time, and are remembered."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.waited = asyncio.Event()

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)
        self.waited.set()
        await asyncio.sleep(0)


def close_some(meter: Meter, number: int) -> list[UsageEvent]:
    return [open_charge(meter).close(Outcome.COMPLETED, FINAL) for _ in range(number)]


async def test_everything_is_shipped_in_batches_and_in_order(make_meter: MakeMeter) -> None:
    meter, control = make_meter(), Control()
    events = close_some(meter, 25)
    shipper = Shipper(meter, control.take, batch_events=10)
    assert await shipper.drain() == 25
    assert [len(batch.events) for batch in control.batches] == [10, 10, 5]
    assert [event for batch in control.batches for event in batch.events] == events
    assert {(batch.gateway_id, batch.boot_id) for batch in control.batches} == {("gw-1", meter.boot_id)}
    assert meter.unshipped_events == 0
    assert await shipper.drain() == 0
    assert len(control.batches) == 3


async def test_failures_are_retried_with_growing_waits_until_all_is_there(make_meter: MakeMeter) -> None:
    meter, sleeps = make_meter(), Sleeps()
    events = close_some(meter, 6)
    control = Control(failures=["lost"] * 8 + ["unanswered", "half", "lost", ""])
    shipper = Shipper(meter, control.take, batch_events=4, sleep=sleeps, max_backoff_s=3)
    assert await shipper.drain() == 6
    assert list(control.ledger.values()) == events
    assert len(sleeps.seconds) == 11
    assert max(sleeps.seconds) <= 3 and max(sleeps.seconds[:2]) <= 0.2
    assert len(control.batches[0].events) == 1  # halved while control did not answer
    assert meter.unshipped_events == 0


async def test_each_failure_is_logged_with_its_reason(make_meter: MakeMeter, caplog: pytest.LogCaptureFixture) -> None:
    meter, control = make_meter(), Control(failures=["lost"] * 3)
    close_some(meter, 1)
    await Shipper(meter, control.take, sleep=Sleeps()).drain()
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"usage could not be shipped (attempt {n}): Control cannot be reached." for n in (1, 2, 3)]


async def test_an_acknowledgement_of_another_number_is_none(make_meter: MakeMeter) -> None:
    meter = make_meter()
    close_some(meter, 2)
    with pytest.raises(UpstreamFailed, match="1 of 2"):
        await Shipper(meter, Control(failures=["half"]).take).ship_once()
    assert meter.unshipped_events == 2


async def test_a_kill_between_sending_and_acknowledging_bills_once(make_meter: MakeMeter) -> None:
    control, meter = Control(failures=["unanswered"]), make_meter()
    events = close_some(meter, 3)
    with pytest.raises(TimeoutError):
        await Shipper(meter, control.take).ship_once()
    die(meter)
    again = make_meter()
    assert again.inherited_events == 3
    await Shipper(again, control.take).drain()
    assert list(control.ledger.values()) == events
    assert again.inherited_events == 0


async def test_doubled_and_reordered_batches_leave_one_ledger(make_meter: MakeMeter) -> None:
    """The wire keeps batches and delivers them late, again and in any order."""
    meter, control = make_meter(), Control()
    events = close_some(meter, 30)
    wire: list[UsageBatch] = []

    async def keep(batch: UsageBatch) -> UsageAck:
        wire.append(batch)
        return await control.take(batch)

    await Shipper(meter, keep, batch_events=7).drain()
    late = wire * 3
    random.Random(1).shuffle(late)
    for batch in late:
        assert (await control.take(batch)).new == 0
    assert list(control.ledger.values()) == events
    other_order = Control()
    for batch in late:
        await other_order.take(batch)
    assert other_order.ledger == control.ledger


async def test_two_drains_at_once_ship_each_batch_once(make_meter: MakeMeter) -> None:
    meter, control = make_meter(), Control()
    close_some(meter, 40)
    shipper = Shipper(meter, control.take, batch_events=5)
    shipped = await asyncio.gather(shipper.drain(), shipper.drain(), shipper.drain())
    assert sum(shipped) == 40
    assert len(control.batches) == 8


async def test_run_goes_on_until_it_is_cancelled(make_meter: MakeMeter) -> None:
    meter, control, sleeps = make_meter(), Control(failures=["lost", "unanswered"]), Sleeps()
    task = asyncio.create_task(Shipper(meter, control.take, sleep=sleeps, interval_s=0.5).run())
    async with asyncio.timeout(10):
        for _ in range(3):
            close_some(meter, 2)
            while meter.unshipped_events:
                sleeps.waited.clear()
                await sleeps.waited.wait()
    assert len(control.ledger) == 6
    assert 0.5 in sleeps.seconds
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
