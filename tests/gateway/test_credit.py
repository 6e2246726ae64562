"""Credit at hand: asked for once by many, refused when control has none, unknown when control is away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from zenray.gateway.credit import Credit
from zenray.gateway.edge import Replaced
from zenray.gateway.metering import LeaseBook
from zenray.spec.clock import FakeClock
from zenray.spec.edge import Lease, LeaseRequest
from zenray.spec.errors import Unavailable


class Lender:
    """Control's side of leases: `free` is what the organisation has left."""

    def __init__(self, free: int) -> None:
        self.free = free
        self.asked: list[LeaseRequest] = []
        self.away = False
        self.lose_next_answer = False
        self._last: dict[str, tuple[int | None, Lease]] = {}

    async def lease(self, request: LeaseRequest, timeout_s: float) -> Lease:
        await asyncio.sleep(0)
        if self.away:
            raise Unavailable("away")
        self.asked.append(request)
        last = self._last.get(request.org)
        if last is None or last[0] != request.sequence:
            self.free += request.give_back_nano_usd
            granted = min(self.free, request.wanted_nano_usd)
            self.free -= granted
            last = request.sequence, Lease(org=request.org, granted_nano_usd=granted, balance_nano_usd=self.free)
            self._last[request.org] = last
        if self.lose_next_answer:
            self.lose_next_answer = False
            raise Unavailable("the answer was lost")
        return last[1]


def credit(
    lender: Any, *, wait_s: float = 30.0, shipped: bool = True, on_replaced: Callable[[], None] = lambda: None
) -> Credit:
    async def ship() -> None:
        return None

    made = Credit(
        LeaseBook(FakeClock()),
        lender,
        gateway_id="g",
        boot_id="b",
        wait_s=wait_s,
        ship_first=ship,
        on_replaced=on_replaced,
    )
    if shipped:
        made._shipped.set()
    return made


async def test_many_requests_ask_once() -> None:
    lender = Lender(10**12)
    made = credit(lender)
    assert all(await asyncio.gather(*[made.reserve_or_ask("acme", 100) for _ in range(50)]))
    assert len(lender.asked) == 1
    assert made.reserve("acme", 100), "there is more than was asked for"


async def test_no_more_than_there_is() -> None:
    lender = Lender(1000)
    made = credit(lender)
    results = await asyncio.gather(*[made.reserve_or_ask("acme", 300) for _ in range(5)])
    assert results.count(True) == 3
    assert made.book.available("acme") == 100 and lender.free == 0


async def test_control_away_is_not_no_credit() -> None:
    lender = Lender(1000)
    lender.away = True
    made = credit(lender)
    with pytest.raises(Unavailable) as refused:
        await made.reserve_or_ask("acme", 300)
    assert refused.value.retry_after_s
    lender.away = False
    assert await made.reserve_or_ask("acme", 300)


async def test_a_lost_answer_is_counted_once() -> None:
    lender = Lender(10**9)
    lender.lose_next_answer = True
    made = credit(lender)
    assert await made.reserve_or_ask("acme", 300)
    assert [request.sequence for request in lender.asked] == [1, 1]
    assert made.book.available("acme") + 300 + lender.free == 10**9


async def test_no_credit_before_the_log_of_earlier_boots_is_shipped() -> None:
    lender = Lender(10**9)
    made = credit(lender, wait_s=0.05, shipped=False)
    with pytest.raises(Unavailable):
        await made.reserve_or_ask("acme", 300)
    assert lender.asked == []
    made._shipped.set()
    assert await made.reserve_or_ask("acme", 300)


async def test_a_crowd_is_served_with_few_questions() -> None:
    lender = Lender(10**12)
    made = credit(lender)
    each = 8_000_000
    assert all(await asyncio.gather(*[made.reserve_or_ask("acme", each) for _ in range(2000)]))
    assert len(lender.asked) <= 3


async def test_freed_reserves_serve_those_who_wait() -> None:
    lender = Lender(1000)
    made = credit(lender)
    assert await made.reserve_or_ask("acme", 1000)
    waiting = asyncio.create_task(made.reserve_or_ask("acme", 600))
    await asyncio.sleep(0)
    made.settle("acme", 1000, 100)
    assert await waiting
    assert not await made.reserve_or_ask("acme", 400)
    assert await made.reserve_or_ask("acme", 300)


async def test_a_client_that_hangs_up_while_waiting_keeps_nothing() -> None:
    lender = Lender(1000)
    made = credit(lender)
    for turns in range(8):
        waiting = asyncio.create_task(made.reserve_or_ask("acme", 1000))
        for _ in range(turns):
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        if not waiting.cancelled():
            made.settle("acme", 1000, 0)
        await asyncio.sleep(0.01)
        assert made.book.available("acme") + lender.free == 1000


@pytest.mark.parametrize("turns", range(5))
async def test_a_grant_in_the_moment_that_the_wait_ends_is_used_or_given_back(turns: int) -> None:
    made = credit(Lender(0), wait_s=0.01, shipped=False)
    made.book.granted("acme", 1000, 1000)
    assert made.reserve("acme", 1000)
    waiting = asyncio.create_task(made.reserve_or_ask("acme", 1000))
    await asyncio.sleep(0)
    time.sleep(0.02)  # noqa: ASYNC251 - the wait is over as soon as the loop looks at its timers
    for _ in range(turns):
        await asyncio.sleep(0)
    made.settle("acme", 1000, 0)
    (served,) = await asyncio.gather(waiting, return_exceptions=True)
    if served is True:
        made.settle("acme", 1000, 0)
    else:
        assert isinstance(served, Unavailable)
    assert made.book.available("acme") == 1000


async def test_a_replaced_boot_is_told_at_once_and_does_not_ask_again() -> None:
    class Refusing(Lender):
        async def lease(self, request: LeaseRequest, timeout_s: float) -> Lease:
            self.asked.append(request)
            raise Replaced("declared lost")

    lender = Refusing(10**12)
    told: list[bool] = []
    made = credit(lender, on_replaced=lambda: told.append(True))
    with pytest.raises(Unavailable):
        await made.reserve_or_ask("acme", 100)
    assert told == [True] and len(lender.asked) == 1
