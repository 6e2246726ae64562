"""How canaries do: counted here request by request, told to control once a second while there is a canary."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from zenray.gateway.snapshot import Directory
from zenray.spec.edge import CanaryCount, CanaryReport, CanaryRoute
from zenray.spec.errors import Unavailable

log = logging.getLogger(__name__)

REPORT_INTERVAL_S = 1.0

Trial = tuple[str, float]  # revision, and when its trial began


class Canaries:
    """The counts of one gateway process, for trials that are under way."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._counts: dict[Trial, list[int]] = {}  # [requests, failed]

    def note(self, canary: CanaryRoute, *, failed: bool) -> None:
        """A request that was drawn for `canary` has ended."""
        counts = self._counts.setdefault((canary.revision, canary.since), [0, 0])
        counts[0] += 1
        counts[1] += failed

    def totals(self) -> tuple[CanaryCount, ...]:
        """Of each trial under way that got a request; those that are over are forgotten."""
        routes = self._directory.routes.values()
        under_way = {(one.revision, one.since) for route in routes if (one := route.entry.canary) is not None}
        self._counts = {trial: counts for trial, counts in self._counts.items() if trial in under_way}
        return tuple(
            CanaryCount(revision=revision, since=since, requests=requests, failed=failed)
            for (revision, since), (requests, failed) in self._counts.items()
        )

    async def run(self, send: Callable[[CanaryReport], Awaitable[None]], *, gateway_id: str, boot_id: str) -> None:
        """Report until cancelled. Totals are sent again every second: control keeps them in memory only."""
        reached = True
        while True:
            await asyncio.sleep(REPORT_INTERVAL_S)
            totals = self.totals() if self._counts else ()
            if not totals:
                continue
            try:
                await send(CanaryReport(gateway_id=gateway_id, boot_id=boot_id, canaries=totals))
                reached = True
            except Unavailable as error:
                if reached:
                    log.warning("canaries_not_reported", extra={"reason": str(error)})
                reached = False
