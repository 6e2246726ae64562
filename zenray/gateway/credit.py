"""Credit at hand: reserves from the local leases, and gets more from control when they run short.

A request waits for control only when its organisation's local credit does not cover it, and then all requests of that
organisation wait for one question. Otherwise credit is topped up behind the requests, and idle credit is given back.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable

from zenray.gateway.edge import EdgeClient, Replaced
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
        on_replaced: Callable[[], None],
    ) -> None:
        """`ship_first` ships what earlier boots left; no credit is asked for before it has returned.

        `on_replaced` is called when control lends nothing to this boot any more.
        """
        self.book = book
        self._edge = edge
        self._gateway_id = gateway_id
        self._boot_id = boot_id
        self._wait_s = wait_s
        self._ship_first = ship_first
        self._on_replaced = on_replaced
        self._shipped = asyncio.Event()
        self._questions: dict[str, asyncio.Task[int]] = {}
        self._waiting: defaultdict[str, dict[asyncio.Future[bool], int]] = defaultdict(dict)
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
        if self.reserve(org, nano_usd):
            return True
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        waiting = self._waiting[org]
        waiting[answer] = nano_usd
        if org not in self._questions:
            self._ask(org)
        try:
            async with asyncio.timeout(self._wait_s):
                return await answer
        except (TimeoutError, Unavailable):
            if _granted(answer):
                return True  # in the very moment that the wait ended
            raise Unavailable(
                "The credit of your organisation cannot be checked at the moment.", hint="Retry.", retry_after_s=2
            ) from None
        except asyncio.CancelledError:
            if _granted(answer):
                self.book.settle(org, nano_usd, 0)  # it was granted in the moment that the client hung up
            raise
        finally:
            waiting.pop(answer, None)

    def settle(self, org: str, reserved_nano_usd: int, spent_nano_usd: int) -> None:
        self.book.settle(org, reserved_nano_usd, spent_nano_usd)
        if self._waiting.get(org):
            self._serve(org)

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
                        self._ask(org)
                else:
                    idle_nano_usd = self.book.give_back(org)
                    if idle_nano_usd > 0:
                        self._ask(org, give_back_nano_usd=idle_nano_usd)

    def _serve(self, org: str) -> None:
        """Give what there is to those who wait, in their order."""
        waiting = self._waiting[org]
        for answer, nano_usd in tuple(waiting.items()):
            if not answer.done() and self.reserve(org, nano_usd):
                del waiting[answer]
                answer.set_result(True)

    def _ask(self, org: str, *, give_back_nano_usd: int = 0) -> asyncio.Task[int]:
        task = asyncio.get_running_loop().create_task(self._exchange(org, give_back_nano_usd))
        self._questions[org] = task
        task.add_done_callback(lambda done: self._answered(org, done))
        return task

    def _answered(self, org: str, done: asyncio.Task[int]) -> None:
        del self._questions[org]
        if done.cancelled():
            return
        error = done.exception()
        if error is not None:
            log.warning("lease_failed", extra={"org": org, "reason": str(error)})
            if isinstance(error, Replaced):
                self._on_replaced()
        else:
            self._serve(org)
        waiting = self._waiting[org]
        if not waiting:
            del self._waiting[org]
        elif error is None and done.result() > 0:
            self._ask(org)
        else:
            # Nothing more is to be had now: those who still wait are told, and not those who come later.
            for answer in tuple(waiting):
                del waiting[answer]
                if not answer.done():
                    answer.set_exception(error) if error is not None else answer.set_result(False)

    async def _exchange(self, org: str, give_back_nano_usd: int) -> int:
        await self._shipped.wait()
        # All that wait are asked for at once; the book alone knows only the largest.
        waiting_nano_usd = sum(self._waiting[org].values())
        lacking_nano_usd = max(0, waiting_nano_usd - self.book.available(org)) if waiting_nano_usd else 0
        wanted_nano_usd = lacking_nano_usd if give_back_nano_usd else max(self.book.wanted(org), lacking_nano_usd)
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
            except Unavailable as error:
                if attempt == 3 or isinstance(error, Replaced):
                    raise
                await asyncio.sleep(0.1 * attempt)
        self.book.granted(org, lease.granted_nano_usd, lease.balance_nano_usd)
        return lease.granted_nano_usd


def _granted(answer: asyncio.Future[bool]) -> bool:
    return answer.done() and not answer.cancelled() and answer.exception() is None and answer.result()
