"""How many replicas a deployment needs: pure functions of (signals, targets, memory, now).

Each signal gives a number of its own, and the largest counts:

- ongoing requests ÷ what one replica should have. To grow, the mean over Ray's window and the newest counts must both
  ask for it: the mean still shows load that has ended.
- the queue: everyone who waits in an engine should have a place, where a replica has as many places as it fills now.
- the KV cache: what is in use, and what those who wait will use, ÷ the share that one replica should use.
- first tokens: when more than one in a hundred is late, a replica is given fewer requests than so far. What was learnt
  is given back slowly, so that the count does not swing (additive increase, multiplicative decrease).

Fewer replicas are wanted only when fewer were wanted during the whole downscale delay, and then no fewer than its peak,
as Kubernetes' autoscaler stabilizes; Ray's own rule takes the wish of the last moment, which may be a lull. More are
wanted when more were wanted during the whole upscale delay; at once when requests wait in a queue already.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

FIRST_TOKENS_WINDOW_S = 30.0
LATE_SHARE = 0.01  # "p99 is late": more than one in a hundred
LEAST_LATE = 2  # one alone may be a hiccup
CUT = 0.8  # of the requests per replica at which first tokens were late
RECOVERY_S = 3600.0  # after so long a replica is given as many again


@dataclass(frozen=True)
class Targets:
    """What one replica should have; None: that signal is not looked at."""

    ongoing_requests: float
    waiting_requests: float | None = None
    kv_cache_use: float | None = None
    ttft_p99_s: float | None = None
    upscale_delay_s: float = 0.0
    downscale_delay_s: float = 0.0
    start_replicas: int = 0  # so many are wanted at least, before the traffic of an older revision comes …
    start_hold_s: float = 0.0  # … for so long


@dataclass(frozen=True)
class Signals:
    """The load of a deployment at one moment, summed over its running replicas."""

    running: int  # at least 1
    target: int  # running and starting
    mean_requests: float  # over Ray's window
    newest_requests: float
    computing: float = 0  # sequences in the engines' batches
    waiting: float = 0  # sequences that engines hold back
    kv_cache_use: float = 0  # 1.0 for each replica whose cache is full
    first_tokens: float = 0  # of the last FIRST_TOKENS_WINDOW_S
    late_first_tokens: float = 0
    most: int | None = None  # replicas that there may be


@dataclass(frozen=True)
class Limit:
    """Requests per replica with which first tokens should be in time, learnt when they were not."""

    requests: float
    at_s: float

    def now(self, now_s: float, target: float) -> float:
        """Grown back to where tokens were late after RECOVERY_S, and on to `target`."""
        grown = self.requests * (1 + (1 / CUT - 1) * (now_s - self.at_s) / RECOVERY_S)
        return min(target, grown)


@dataclass(frozen=True)
class Memory:
    """What is kept from one decision to the next."""

    begun_at_s: float  # anew after each sleep
    starts: bool = False  # it was seen first with as many replicas as it was started with
    short_since_s: float | None = None  # more replicas have been wanted than there are to be, all the time since
    short_at_s: float | None = None  # when fewer ran than were wanted, last
    peaks: tuple[tuple[float, int], ...] = ()  # (when, replicas wanted): each later one is lower
    limit: Limit | None = None


class Decision(NamedTuple):
    replicas: int  # to have, before Ray's bounds
    memory: Memory
    wished: dict[str, float]  # see `wishes`


def decide(signals: Signals, targets: Targets, memory: Memory | None, now_s: float) -> Decision:
    """`memory`: of the last decision; None: the first one, or the first after a sleep."""
    memory = memory or Memory(begun_at_s=now_s, starts=0 < targets.start_replicas <= signals.target)
    wished = wishes(signals, targets, memory, now_s)
    wanted = replicas_wanted(wished)
    short_since_s: float | None = None
    if wanted > signals.target:
        short_since_s = now_s if memory.short_since_s is None else memory.short_since_s
    memory = replace(
        memory,
        short_since_s=short_since_s,
        short_at_s=now_s if wanted > signals.running else memory.short_at_s,
        peaks=with_peak(memory.peaks, now_s, wanted, targets.downscale_delay_s),
    )
    memory = replace(memory, limit=learnt(signals, targets, memory, now_s))
    if short_since_s is not None:
        # Whoever waits in a queue already needs no proof that the load lasts.
        grows = now_s - short_since_s >= targets.upscale_delay_s or by_queue(signals, targets.waiting_requests) > 0
        return Decision(wanted if grows else signals.target, memory, wished)
    seen_whole_delay = now_s - memory.begun_at_s >= targets.downscale_delay_s
    held = memory.peaks[0][1] if seen_whole_delay else signals.target
    return Decision(min(signals.target, held), memory, wished)


def wishes(signals: Signals, targets: Targets, memory: Memory, now_s: float) -> dict[str, float]:
    """The replicas that each signal asks for, for this very load; 0: it has no opinion.

    "first_tokens": by the requests that a replica can have, as was learnt. "start": what a revision that takes over
    keeps until its load has come. Who wakes, or is looked at anew after Serve's controller was restarted, does not grow
    to it.
    """
    limit = memory.limit.now(now_s, targets.ongoing_requests) if memory.limit else None
    starts = memory.starts and now_s - memory.begun_at_s < targets.start_hold_s
    return {
        "requests": by_requests(signals, targets.ongoing_requests),
        "queue": by_queue(signals, targets.waiting_requests),
        "kv_cache": by_kv_cache(signals, targets.kv_cache_use),
        "first_tokens": by_requests(signals, limit) if limit is not None else 0.0,
        "start": float(targets.start_replicas) if starts else 0.0,
    }


def replicas_wanted(wished: Mapping[str, float]) -> int:
    """The largest of `wishes`, in whole replicas."""
    return math.ceil(max(wished.values()) - 1e-9)


def by_requests(signals: Signals, requests_per_replica: float) -> float:
    """To have fewer than now, the mean must fall; to have more, both mean and newest counts must ask for more."""
    now = max(signals.running, signals.target)
    by_mean = signals.mean_requests / requests_per_replica
    if by_mean <= now:
        return by_mean
    return max(float(now), min(by_mean, signals.newest_requests / requests_per_replica))


def by_queue(signals: Signals, target: float | None) -> float:
    """0, no opinion, while no more wait than may."""
    if target is None or signals.waiting <= target * signals.running:
        return 0.0
    places = max(1.0, signals.computing / signals.running)
    return signals.running + (signals.waiting - target * signals.running) / places


def by_kv_cache(signals: Signals, target: float | None) -> float:
    """Those who wait will need as much of the cache as those who are computed."""
    if target is None:
        return 0.0
    return signals.kv_cache_use * (1 + signals.waiting / max(1.0, signals.computing)) / target


def learnt(signals: Signals, targets: Targets, memory: Memory, now_s: float) -> Limit | None:
    """The limit after this moment: cut when first tokens are late though there are replicas enough, else as it was.

    While there are too few, and until all first tokens that are counted are younger than that, being late says nothing
    about how many requests one replica can have. Nor does it help to cut where no more replicas may be, or where each
    request has a replica to itself.
    """
    if targets.ttft_p99_s is None:
        return None
    limit = memory.limit
    too_late = signals.late_first_tokens > max(LATE_SHARE * signals.first_tokens, LEAST_LATE - 1)
    short_at_s = -math.inf if memory.short_at_s is None else memory.short_at_s
    changed_at_s = max(short_at_s, limit.at_s) if limit else short_at_s
    at_most = signals.most is not None and signals.target >= signals.most
    each = max(signals.mean_requests, signals.newest_requests) / signals.running
    if not too_late or now_s - changed_at_s < FIRST_TOKENS_WINDOW_S or at_most or each <= 1:
        return limit
    before = limit.now(now_s, targets.ongoing_requests) if limit else targets.ongoing_requests
    return Limit(max(1.0, CUT * min(before, each)), now_s)


def with_peak(
    peaks: tuple[tuple[float, int], ...], now_s: float, wanted: int, window_s: float
) -> tuple[tuple[float, int], ...]:
    """The running maximum: the first entry is the largest wish of the window, the last one this moment's."""
    kept = tuple(peak for peak in peaks if peak[1] > wanted and now_s - peak[0] <= window_s)
    return (*kept, (now_s, wanted))
