"""Credit at hand: reserves from the local leases, and gets more from control when they run short.

A request waits for control only when its organisation's local credit does not cover it, and then all requests of that
organisation wait for one question. Otherwise credit is topped up behind the requests, and idle credit is given back.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable

from zenray.gateway.edge import EdgeClient
from zenray.gateway.metering import LeaseBook
from zenray.spec.edge import LeaseRequest
from zenray.spec.errors import Unavailable

log = logging.getLogger(__name__)

_TOP_UP_INTERVAL_S = 0.25


class Credit:
    """The lease book, and the questions to control that fill it. For one event loop."""

    def __init__(
        self,
        book: LeaseBook,
        edge: EdgeClient,
        *,
        gateway_id: str,
        boot_id: str,
        wait_s: float,
        ship_first: Callable[[], Awaitable[object]],
    ) -> None:
        """`ship_first` ships what earlier boots left; no credit is asked for before it has returned."""
        self.book = book
        self._edge = edge
        self._gateway_id = gateway_id
        self._boot_id = boot_id
        self._wait_s = wait_s
        self._ship_first = ship_first
        self._shipped = asyncio.Event()
        self._questions: dict[str, asyncio.Task[int]] = {}
        self._sequence: dict[str, int] = defaultdict(int)
        self._active: set[str] = set()

    def reserve(self, org: str, nano_usd: int) -> bool:
        """Set the worst case of a request aside, if local credit covers it."""
        self._active.add(org)
        return self.book.reserve(org, nano_usd)

    async def reserve_or_ask(self, org: str, nano_usd: int) -> bool:
        """As `reserve`, asking control while it grants more. False: control has no more for this organisation.

        Raises Unavailable (503) when control does not answer in time: nobody can say then whether there is credit.
        """
        deadline_s = asyncio.get_running_loop().time() + self._wait_s
        while not self.reserve(org, nano_usd):
            left_s = deadline_s - asyncio.get_running_loop().time()
            try:
                async with asyncio.timeout(max(0, left_s)):
                    granted = await asyncio.shield(self._question(org))
            except (TimeoutError, Unavailable):
                raise Unavailable(
                    "The credit of your organisation cannot be checked at the moment.", hint="Retry.", retry_after_s=2
                ) from None
            if granted == 0:
                return self.reserve(org, nano_usd)
        return True

    def settle(self, org: str, reserved_nano_usd: int, spent_nano_usd: int) -> None:
        self.book.settle(org, reserved_nano_usd, spent_nano_usd)

    async def run(self) -> None:
        """Ship what is left from before, then keep the credit of busy organisations up and give idle credit back."""
        await self._ship_first()
        self._shipped.set()
        while True:
            await asyncio.sleep(_TOP_UP_INTERVAL_S)
            active, self._active = self._active, set()
            for org in self.book.orgs():
                if org in self._questions:
                    continue
                if org in active:
                    if self.book.wanted(org) > 0:
                        self._question(org)
                else:
                    idle = self.book.give_back(org)
                    if idle > 0:
                        self._ask(org, give_back_nano_usd=idle)

    def _question(self, org: str) -> asyncio.Task[int]:
        return self._questions.get(org) or self._ask(org)

    def _ask(self, org: str, *, give_back_nano_usd: int = 0) -> asyncio.Task[int]:
        task = asyncio.get_running_loop().create_task(self._exchange(org, give_back_nano_usd))
        self._questions[org] = task
        task.add_done_callback(lambda done: self._answered(org, done))
        return task

    def _answered(self, org: str, done: asyncio.Task[int]) -> None:
        del self._questions[org]
        if not done.cancelled() and (error := done.exception()):
            log.warning("lease_failed", extra={"org": org, "reason": str(error)})

    async def _exchange(self, org: str, give_back_nano_usd: int) -> int:
        await self._shipped.wait()
        wanted_nano_usd = 0 if give_back_nano_usd else self.book.wanted(org)
        if wanted_nano_usd == 0 and give_back_nano_usd == 0:
            return 0
        self._sequence[org] += 1
        request = LeaseRequest(
            gateway_id=self._gateway_id,
            boot_id=self._boot_id,
            org=org,
            wanted_nano_usd=wanted_nano_usd,
            give_back_nano_usd=give_back_nano_usd,
            sequence=self._sequence[org],
        )
        # Sent again under its number when the answer is lost: control answers the same, and counts it once.
        for attempt in (1, 2, 3):
            try:
                lease = await self._edge.lease(request, timeout_s=5)
                break
            except Unavailable:
                if attempt == 3:
                    raise
                await asyncio.sleep(0.1 * attempt)
        self.book.granted(org, lease.granted_nano_usd, lease.balance_nano_usd)
        return lease.granted_nano_usd
