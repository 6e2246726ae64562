"""Closed events that control has not acknowledged yet: the newest and oldest in memory, the rest only in the log."""

from __future__ import annotations

from collections.abc import Iterable
from threading import Lock

from zenray.gateway.metering.wal import Segment, Wal
from zenray.spec.usage import UsageEvent

MAX_EVENTS_IN_MEMORY = 20_000


class Outbox:
    """What is to be shipped, by segment. `add` is called with the meter's mutex held; the rest take it themselves."""

    def __init__(self, wal: Wal, mutex: Lock, own_key_prefix: str, max_in_memory: int = MAX_EVENTS_IN_MEMORY) -> None:
        self._wal = wal
        self._mutex = mutex
        self._own_key_prefix = own_key_prefix
        self._max_in_memory = max_in_memory
        self._in_memory = 0
        self._nano_usd_by_org: dict[str, int] = {}
        self.inherited_events = 0  # of earlier boots

    def inherit(self, segment: Segment, event: UsageEvent) -> None:
        """An event that an earlier boot left in the log; it stays there until it is its segment's turn."""
        segment.unshipped_events += 1
        self.inherited_events += 1
        self._add_cost(event.org, event.cost_nano_usd())

    def add(self, segment: Segment, event: UsageEvent, cost_nano_usd: int) -> None:
        """An event that was just written to `segment`. Its cost is added by `owe`, when the request ends."""
        segment.unshipped_events += 1
        segment.closed_events += 1
        if not event.billing_key.startswith(self._own_key_prefix):
            self.inherited_events += 1
        if segment.events is None:
            return
        segment.events[event.billing_key] = (event, cost_nano_usd)
        self._in_memory += 1
        if self._in_memory > self._max_in_memory and len(segment.events) == 1:
            self._leave_to_disk()

    def owe(self, org: str, cost_nano_usd: int) -> None:
        self._add_cost(org, cost_nano_usd)

    def pending(self, limit: int) -> list[UsageEvent]:
        """The oldest events, at most `limit`. Reads a segment when it is its turn; one caller at a time."""
        found: list[UsageEvent] = []
        for segment in list(self._wal.segments):
            if len(found) == limit:
                break
            if segment.events is None and segment.unshipped_events:
                loaded = segment.read_events()
                with self._mutex:
                    segment.events = loaded
                    segment.unshipped_events = len(loaded)
                    self._in_memory += len(loaded)
            with self._mutex:
                for event, _ in (segment.events or {}).values():
                    if len(found) == limit:
                        break
                    found.append(event)
        return found

    def acknowledge(self, billing_keys: Iterable[str]) -> None:
        """Forget these. Keys that are unknown, or were acknowledged before, change nothing."""
        left = set(billing_keys)
        with self._mutex:
            for segment in self._wal.segments:
                if not left:
                    return
                if not segment.events:
                    continue
                for key in left & segment.events.keys():
                    event, cost_nano_usd = segment.events.pop(key)
                    segment.unshipped_events -= 1
                    self._in_memory -= 1
                    self.inherited_events -= not key.startswith(self._own_key_prefix)
                    self._add_cost(event.org, -cost_nano_usd)
                    left.discard(key)

    def unshipped_nano_usd(self, org: str) -> int:
        return self._nano_usd_by_org.get(org, 0)

    @property
    def unshipped_events(self) -> int:
        return sum(segment.unshipped_events for segment in self._wal.segments)

    def _leave_to_disk(self) -> None:
        """Forget what finished segments hold, but for the oldest's, which is being shipped, and half-shipped ones'."""
        for segment in self._wal.segments[1:-1]:
            if segment.events and len(segment.events) == segment.closed_events:
                self._in_memory -= len(segment.events)
                segment.events = None

    def _add_cost(self, org: str, nano_usd: int) -> None:
        owed = self._nano_usd_by_org.get(org, 0) + nano_usd
        if owed:
            self._nano_usd_by_org[org] = owed
        else:
            self._nano_usd_by_org.pop(org, None)
