"""What gateways saw of canaries: their newest totals, kept in memory, since they are told again every second."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from zenray.spec.edge import CanaryReport

_KEPT_S = 3600.0  # longer than a gateway is silent while its canary is under way, unless it has no requests for it


@dataclass(frozen=True)
class Seen:
    """Requests that a canary was given since its trial began, by all gateways together."""

    requests: int = 0
    failed: int = 0


class CanaryWatch:
    """Written by the edge's requests, read by the reconciler's thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._told: dict[tuple[str, float], dict[tuple[str, str], tuple[float, Seen]]] = {}

    def take(self, report: CanaryReport, now: float) -> None:
        """The totals of one start of a gateway. One that has ended keeps its last ones."""
        with self._lock:
            for one in report.canaries:
                told = self._told.setdefault((one.revision, one.since), {})
                told[report.gateway_id, report.boot_id] = now, Seen(one.requests, one.failed)
            for trial in [t for t, told in self._told.items() if all(now - at > _KEPT_S for at, _ in told.values())]:
                del self._told[trial]

    def seen(self, revision: str, since: float) -> Seen:
        with self._lock:
            told = [seen for _, seen in self._told.get((revision, since), {}).values()]
        return Seen(sum(one.requests for one in told), sum(one.failed for one in told))
