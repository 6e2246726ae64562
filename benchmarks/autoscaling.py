"""A day of bursty traffic, simulated: replica-seconds and waits with our autoscaling, and with Ray Serve's own policy.

    python -m benchmarks.autoscaling [--quick] [--seed N]

Both sides are the real functions, called once a second of simulated time with Ray's own AutoscalingContext, through
Ray's own wrapper for delays and factors: `ray.serve.autoscaling_policy` and `zenray.serving.autoscaling`. What is
simulated are clients, replicas and the clock.

Traffic: Poisson arrivals. The rate follows the day (0.2 a second at night, 2 at noon), times a wave of minutes (±30 %),
times bursts: one an hour in the mean, 3 to 8 times the rate for 0.5 to 5 minutes, there at once. One request in ten is
long: it takes 8 % of a replica's KV cache for 16 s in the median, the others 2 % for 6 s; from 14 to 16 o'clock four in
ten are. A replica has 16 places, and as many sequences as its cache holds; who finds no place waits there, in turn. The
gateway asks the replica with the fewest requests. A replica answers 23.1 s after it was asked for
(`benchmarks.cold_start`), is paid from then on, and until it has drained. 1 to 40 replicas, 12 requests each.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import math
import random
import statistics
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from ray.serve import autoscaling_policy as rays
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from benchmarks.report import print_report
from zenray.serving.autoscaling import autoscaling_options
from zenray.serving.engine.load import EngineLoad, FirstTokens
from zenray.spec.deployments import Autoscaling

START_S = 23.1
PREFILL_S = 0.2
PLACES = 16
DAY_S = 24 * 3600
QUICK_S = (13 * 3600, 15 * 3600)
OURS = Autoscaling(
    min_replicas=1,
    max_replicas=40,
    target_ongoing_requests=12,
    target_waiting_requests=None,
    target_kv_cache_use=None,
)
QUEUE_AND_CACHE = OURS.model_copy(update={"target_waiting_requests": 1.0, "target_kv_cache_use": 0.8})
SIGNALS = QUEUE_AND_CACHE.model_copy(update={"target_ttft_p99_s": 2.0})
FEWER_EACH = 5.0  # requests a replica with which Ray's policy costs about what all our signals cost
RAYS, RAYS_ALIKE = "Ray's policy, Ray's delays", "Ray's policy, our delays"
RAYS_FEWER = "Ray's policy, our delays, 5 requests each"
OURS_QUEUE, OURS_FEWER = "ours, queue and cache too", "ours, queue and cache, 5 requests each"
OURS_ALL = "ours, queue, cache, first tokens"


@dataclass(frozen=True)
class Request:
    at_s: float
    takes_s: float
    cache: float  # share of a replica's KV cache


def traffic(seed: int, begin_s: float, end_s: float) -> Iterator[Request]:
    """The day's requests in order, by thinning a Poisson process of the highest rate."""
    rng = random.Random(seed)
    bursts = []
    at_s = rng.expovariate(1 / 3600)
    while at_s < DAY_S:
        bursts.append((at_s, at_s + rng.uniform(30, 300), rng.uniform(3, 8)))
        at_s += rng.expovariate(1 / 3600)
    phases = [rng.uniform(0, 2 * math.pi) for _ in range(3)]

    def rate(now_s: float) -> float:
        day = 1.1 - 0.9 * math.cos(2 * math.pi * now_s / DAY_S)
        wave = statistics.fmean(
            math.sin(now_s / period_s + p) for period_s, p in zip((97, 241, 613), phases, strict=True)
        )
        burst = max((times for begin, end, times in bursts if begin <= now_s < end), default=1.0)
        return day * (1 + 0.3 * wave) * burst

    most, now_s = 2 * 1.3 * 8, begin_s
    while (now_s := now_s + rng.expovariate(most)) < end_s:
        if rng.random() * most >= rate(now_s):
            continue
        long = rng.random() < (0.4 if 14 * 3600 <= now_s < 16 * 3600 else 0.1)
        takes_s = rng.lognormvariate(math.log(16 if long else 6), 0.6)
        yield Request(now_s, takes_s, 0.08 if long else 0.02)


@dataclass(eq=False)
class SimulatedReplica:
    """Places and a cache; who does not fit waits in turn."""

    asked_at_s: float
    first_tokens: FirstTokens
    ready: bool = False
    leaving: bool = False
    computing: int = 0
    cache: float = 0.0
    queue: deque[Request] = field(default_factory=deque)

    @property
    def requests(self) -> int:
        return self.computing + len(self.queue)

    def begin(self) -> Iterator[Request]:
        """Those who find a place now."""
        while self.queue and self.computing < PLACES and (not self.computing or self.cache + self.queue[0].cache <= 1):
            request = self.queue.popleft()
            self.computing += 1
            self.cache += request.cache
            yield request


@dataclass
class Outcome:
    waits_s: list[float]
    replica_s: float
    starts: int
    turns: int  # times that growing followed shrinking, or the reverse


class Simulation:
    """One policy's day. Events are (time, order, what): a request comes, one ends, a replica is ready, a decision."""

    def __init__(self, config: AutoscalingConfig, ttft_target_s: float | None) -> None:
        self._config = config
        raw = config.policy.get_policy()
        made = raw(**config.policy.policy_kwargs) if isinstance(raw, type) else raw
        self._policy = rays._apply_autoscaling_config(made)
        self._ttft_target_s = ttft_target_s
        self._state: dict[str, Any] = {}
        self._events: list[tuple[float, int, str, Any]] = []
        self._order = itertools.count()
        self._replicas: list[SimulatedReplica] = []
        self._at_gateway: deque[Request] = deque()
        self._counts: deque[tuple[float, float]] = deque()
        self._outcome = Outcome([], 0.0, 0, 0)
        self._direction = 0
        self.now_s = 0.0

    def run(self, requests: Iterator[Request], begin_s: float, end_s: float) -> Outcome:
        self.now_s = begin_s
        self._replicas = [SimulatedReplica(begin_s, FirstTokens(self._ttft_target_s), ready=True)]
        self._at(begin_s, "decide")
        coming = next(requests, None)
        while self._events or coming:
            if coming is not None and (not self._events or coming.at_s <= self._events[0][0]):
                self.now_s = coming.at_s
                self._ask(coming)
                coming = next(requests, None)
                continue
            self.now_s, _, what, subject = heapq.heappop(self._events)
            if what == "decide" and self.now_s < end_s:
                self._decide()
                self._at(self.now_s + 1, "decide")
            elif what == "ready":
                self._ready(subject)
            elif what == "end":
                self._end(*subject)
        for replica in self._replicas:
            self._outcome.replica_s += max(0.0, end_s - replica.asked_at_s)
        return self._outcome

    def _at(self, at_s: float, what: str, subject: Any = None) -> None:
        heapq.heappush(self._events, (at_s, next(self._order), what, subject))

    def _ask(self, request: Request) -> None:
        running = [r for r in self._replicas if r.ready and not r.leaving]
        if not running:
            self._at_gateway.append(request)
            return
        replica = min(running, key=lambda r: r.requests)
        replica.queue.append(request)
        self._begin(replica)

    def _begin(self, replica: SimulatedReplica) -> None:
        for request in replica.begin():
            wait_s = self.now_s - request.at_s
            self._outcome.waits_s.append(wait_s)
            replica.first_tokens.add(wait_s + PREFILL_S, self.now_s)
            self._at(self.now_s + PREFILL_S + request.takes_s, "end", (replica, request))

    def _end(self, replica: SimulatedReplica, request: Request) -> None:
        replica.computing -= 1
        replica.cache -= request.cache
        self._begin(replica)
        if replica.leaving and not replica.requests:
            self._gone(replica)

    def _ready(self, replica: SimulatedReplica) -> None:
        if replica not in self._replicas:
            return  # it was not needed any more before it was there
        replica.ready = True
        while self._at_gateway:
            self._ask(self._at_gateway.popleft())

    def _gone(self, replica: SimulatedReplica) -> None:
        self._replicas.remove(replica)
        self._outcome.replica_s += self.now_s - replica.asked_at_s

    def _decide(self) -> None:
        kept = [r for r in self._replicas if not r.leaving]
        running = [r for r in kept if r.ready]
        newest = sum(r.requests for r in running) + len(self._at_gateway)
        self._counts.append((self.now_s, newest))
        while self.now_s - self._counts[0][0] > self._config.look_back_period_s:
            self._counts.popleft()
        context = self._context(running, len(kept), statistics.fmean(count for _, count in self._counts))
        wanted, self._state = self._policy(context)
        wanted = max(self._config.min_replicas, min(self._config.max_replicas, math.ceil(wanted)))
        direction = (wanted > len(kept)) - (wanted < len(kept))
        if direction:
            self._outcome.turns += direction == -self._direction
            self._direction = direction
        for _ in range(wanted - len(kept)):
            replica = SimulatedReplica(self.now_s, FirstTokens(self._ttft_target_s))
            self._replicas.append(replica)
            self._outcome.starts += 1
            self._at(self.now_s + START_S, "ready", replica)
        # Ray stops those that are starting first, then the newest.
        for replica in sorted(kept, key=lambda r: (r.ready, -r.asked_at_s))[: max(0, len(kept) - wanted)]:
            replica.leaving = True
            if not replica.requests:
                self._gone(replica)

    def _context(self, running: list[SimulatedReplica], target: int, mean: float) -> AutoscalingContext:
        series: dict[str, dict[int, Any]] = {}
        for number, replica in enumerate(running):
            first, late = replica.first_tokens.counts(self.now_s)
            load = EngineLoad(replica.computing, len(replica.queue), min(1.0, replica.cache), first, late)
            for name, value in (load.as_metrics() | {"running_requests": replica.requests}).items():
                series.setdefault(name, {})[number] = (SimpleNamespace(value=value),)
        return AutoscalingContext(
            deployment_id=None,
            deployment_name="m",
            app_name="a",
            current_num_replicas=len(running),
            target_num_replicas=target,
            running_replicas=[],
            total_num_requests=mean,
            total_queued_requests=float(len(self._at_gateway)),
            aggregated_metrics=None,
            raw_metrics=series,
            capacity_adjusted_min_replicas=self._config.min_replicas,
            capacity_adjusted_max_replicas=self._config.max_replicas,
            policy_state=dict(self._state),
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=self.now_s,
            config=self._config,
        )


def contestants() -> dict[str, tuple[AutoscalingConfig, float | None]]:
    """Name → Ray's configuration, and the target for first tokens that replicas count against."""
    bounds = {"min_replicas": 1, "max_replicas": 40, "target_ongoing_requests": OURS.target_ongoing_requests}
    delays = {"upscale_delay_s": OURS.upscale_delay_s, "downscale_delay_s": OURS.downscale_delay_s}
    alike = delays | {name: autoscaling_options(OURS)[name] for name in ("look_back_period_s", "metrics_interval_s")}
    fewer = {"target_ongoing_requests": FEWER_EACH}

    def ours(settings: Autoscaling) -> tuple[AutoscalingConfig, float | None]:
        return AutoscalingConfig(**autoscaling_options(settings)), settings.target_ttft_p99_s

    return {
        RAYS: (AutoscalingConfig(**bounds), None),
        RAYS_ALIKE: (AutoscalingConfig(**bounds | alike), None),
        RAYS_FEWER: (AutoscalingConfig(**bounds | alike | fewer), None),
        "ours, requests alone": ours(OURS),
        OURS_QUEUE: ours(QUEUE_AND_CACHE),
        OURS_FEWER: ours(QUEUE_AND_CACHE.model_copy(update=fewer)),
        OURS_ALL: ours(SIGNALS),
    }


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.autoscaling", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="from 13 to 15 o'clock instead of the whole day")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    begin_s, end_s = QUICK_S if arguments.quick else (0, DAY_S)
    outcomes: dict[str, Outcome] = {}
    for name, (config, ttft_target_s) in contestants().items():
        simulation = Simulation(config, ttft_target_s)
        rays.time = SimpleNamespace(time=lambda clock=simulation: clock.now_s)  # type: ignore[assignment]
        outcomes[name] = simulation.run(traffic(arguments.seed, begin_s, end_s), begin_s, end_s)
    report(outcomes, (end_s - begin_s) / 3600)


def report(outcomes: dict[str, Outcome], hours: float) -> None:
    rows = []
    for name, outcome in outcomes.items():
        waits_s = outcome.waits_s
        late = sum(wait_s > SIGNALS.target_ttft_p99_s - PREFILL_S for wait_s in waits_s) / len(waits_s)  # type: ignore[operator]
        cells = [outcome.replica_s / 3600, statistics.fmean(waits_s), percentile(waits_s, 0.99), max(waits_s)]
        rows.append([name, *cells, 100 * late, outcome.starts, outcome.turns])
    result: dict[str, float] = {}
    for suffix, ours, rays_own in (
        ("", OURS_ALL, RAYS),
        ("_same_delays", OURS_QUEUE, RAYS_ALIKE),
        ("_fewer_each", OURS_FEWER, RAYS_FEWER),
    ):
        mine, other = outcomes[ours], outcomes[rays_own]
        p99_s = percentile(other.waits_s, 0.99)
        result[f"cost_ratio{suffix}"] = round(mine.replica_s / other.replica_s, 4)
        result[f"p99_wait_ratio{suffix}"] = round(percentile(mine.waits_s, 0.99) / p99_s, 4) if p99_s else math.inf
    columns = [
        "policy",
        "replica-hours",
        "mean wait s",
        "p99 wait s",
        "longest s",
        "late first tokens %",
        "starts",
        "turns",
    ]
    notes = [
        "Wait: until a place in a batch is found. Late: first tokens after more than 2 s. Turns: growing after "
        "shrinking, or the reverse.",
        f"Ratios: {OURS_ALL} ÷ {RAYS}; _same_delays: {OURS_QUEUE} ÷ {RAYS_ALIKE}; _fewer_each: {OURS_FEWER} ÷ "
        f"{RAYS_FEWER}.",
    ]
    print_report(f"{hours:g} hours, {len(outcomes[RAYS].waits_s):,} requests", columns, rows, result, notes=notes)


if __name__ == "__main__":
    main()
