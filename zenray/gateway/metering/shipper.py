"""Closed events go to control in batches, at least once; control's ledger takes each billing key once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from zenray.gateway.metering.meter import Meter
from zenray.spec.edge import UsageAck, UsageBatch
from zenray.spec.errors import UpstreamFailed

log = logging.getLogger(__name__)

SendBatch = Callable[[UsageBatch], Awaitable[UsageAck]]


class Shipper:
    """Ships a meter's events until cancelled. `send` may fail as often as it likes: nothing is dropped.

    Batches halve when they fail and double again when they pass, so that a slow control is asked for less.
    """

    def __init__(
        self,
        meter: Meter,
        send: SendBatch,
        *,
        interval_s: float = 0.5,
        batch_events: int = 500,
        max_backoff_s: float = 10.0,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._meter = meter
        self._send = send
        self._interval_s = interval_s
        self._max_batch_events = batch_events
        self._batch_events = batch_events
        self._sleep = sleep
        self._max_backoff_s = max_backoff_s
        self._one_at_a_time = asyncio.Lock()

    async def run(self) -> None:
        """Ship for ever; returns only by cancellation."""
        while True:
            await self.drain()
            await self._sleep(self._interval_s)

    async def drain(self) -> int:
        """Ship until nothing is left, retrying for ever; the number of events shipped. Bound it with a timeout."""
        shipped = 0
        while True:
            retrying = AsyncRetrying(
                wait=wait_random_exponential(multiplier=0.1, max=self._max_backoff_s),
                retry=retry_if_exception_type(Exception),
                before_sleep=self._note,
                sleep=self._sleep,
            )
            count: int = await retrying(self.ship_once)
            if count == 0:
                return shipped
            shipped += count

    async def ship_once(self) -> int:
        """Send the oldest batch once; the number of events that control acknowledged. Errors are the sender's own."""
        async with self._one_at_a_time:
            if self._meter.unshipped_events == 0:
                return 0
            # In a thread: after a restart this reads a segment from the disk.
            events = await asyncio.to_thread(self._meter.pending, self._batch_events)
            if not events:
                return 0
            batch = UsageBatch(gateway_id=self._meter.gateway_id, boot_id=self._meter.boot_id, events=tuple(events))
            ack = await self._send(batch)
            if ack.received != len(events):
                raise UpstreamFailed(f"Control acknowledged {ack.received} of {len(events)} usage events.")
            self._meter.acknowledge(event.billing_key for event in events)
            self._batch_events = min(self._max_batch_events, 2 * self._batch_events)
            return len(events)

    def _note(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        self._batch_events = max(1, self._batch_events // 2)
        log.warning("usage could not be shipped (attempt %d): %s", state.attempt_number, error)
