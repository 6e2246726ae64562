"""What Prometheus is told. Several processes add to files of one shared folder, and any of them answers for all.

A request only leaves its numbers in a plain tally of its model; they are added to Prometheus' own objects once a
second. With many models those objects lie all over memory, and touching them for each
request took twice as long with a hundred models as with one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from zenray.gateway.shared_metrics import FOLDER_VARIABLE
from zenray.spec.usage import Usage

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
_MODEL = ("model",)
FOLD_INTERVAL_S = 1.0
_FOLD_AFTER = 4096  # requests
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


def forget_process(pid: int) -> None:
    """A process that shared the folder has ended: what it was doing is done no more. Its counts stay."""
    mark_process_dead(pid)  # type: ignore[no-untyped-call]


class _Tally:
    """One model's numbers since the last fold."""

    __slots__ = ("cached", "canary", "choices", "failures", "input", "latencies_s", "output", "statuses", "ttfts_s")

    def __init__(self) -> None:
        self.statuses: dict[int, int] = {}
        self.choices: dict[str, int] = {}
        self.failures: dict[str, int] = {}
        self.canary: dict[tuple[str, str], int] = {}
        self.latencies_s: list[float] = []
        self.ttfts_s: list[float] = []
        self.input = 0  # tokens
        self.cached = 0
        self.output = 0


class Metrics:
    """The counters of one process."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = self._counter("requests", "Requests, by model and HTTP status.", "status")
        self._latency = self._histogram("latency", "From request to end of answer.")
        self._ttft = self._histogram("ttft", "From request to first token of a stream.")
        self._input = self._counter("input_tokens", "Input tokens billed.")
        self._cached = self._counter(
            "cached_input_tokens", "Those of the input tokens that an engine found in its cache."
        )
        self._output = self._counter("output_tokens", "Output tokens billed.")
        self._choices = self._counter(
            "replica_choices",
            "Replicas chosen: known (has the prompt's beginning), moved (another has it, and is too busy), new "
            "(none has it), short (too short a prompt to matter), only (there was no choice), proxy (Ray Serve's: none "
            "of those that are known is left, and control is away).",
            "why",
        )
        self._failures = self._counter(
            "replica_failures",
            "Replicas that did not answer, or not to the end: unreachable, lost, silent, busy.",
            "how",
        )
        self._canary = self._counter(
            "canary_requests", "Requests that were drawn for a canary, by how they ended.", "revision", "outcome"
        )
        self._outstanding = self._gauge("outstanding", "Choices asked of a model's replicas and not answered.", _MODEL)
        self._suspects = self._gauge("suspects", "Replicas that failed lately: others are preferred.")
        self._open = self._gauge("open_streams", "Choices being answered now.")
        self._wal = self._gauge("wal_bytes", "Usage log on disk.")
        self._unshipped = self._gauge("unshipped_events", "Usage events that control has not taken.")
        self._tallies: dict[str, _Tally] = {}
        self._unfolded = 0
        self._shown: set[str] = set()  # models whose outstanding requests were once told

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"zenray_gateway_{name}_total", text, (*_MODEL, *labels), registry=self._registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"zenray_gateway_{name}_seconds", text, _MODEL, registry=self._registry, buckets=_SECONDS)

    def _gauge(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
        return Gauge(f"zenray_gateway_{name}", text, labels, registry=self._registry, multiprocess_mode="livesum")

    def request(self, model: str, status: int, latency_s: float) -> None:
        """One answered request. `model` is a model that exists, or empty: clients must not invent label values."""
        tally = self._of(model)
        tally.statuses[status] = tally.statuses.get(status, 0) + 1
        if model:
            tally.latencies_s.append(latency_s)
        self._unfolded += 1
        if self._unfolded >= _FOLD_AFTER:
            self.fold()

    def usage(self, model: str, usage: Usage, ttft_s: float | None) -> None:
        tally = self._of(model)
        tally.input += usage.input_tokens
        tally.cached += usage.cached_input_tokens
        tally.output += usage.output_tokens
        if ttft_s is not None:
            tally.ttfts_s.append(ttft_s)

    def choice(self, model: str, why: str) -> None:
        """A replica was chosen. `why`: see the counter."""
        choices = self._of(model).choices
        choices[why] = choices.get(why, 0) + 1

    def failure(self, model: str, how: str) -> None:
        """A replica did not answer. `how`: see the counter."""
        failures = self._of(model).failures
        failures[how] = failures.get(how, 0) + 1

    def canary(self, model: str, revision: str, outcome: str) -> None:
        """A request that was drawn for a canary has ended."""
        drawn = self._of(model).canary
        drawn[revision, outcome] = drawn.get((revision, outcome), 0) + 1

    def fold(self) -> None:
        """Add what was left in the tallies to what is shown. Call it every FOLD_INTERVAL_S, and at the end."""
        tallies, self._tallies, self._unfolded = self._tallies, {}, 0
        for model, tally in tallies.items():
            for status, count in tally.statuses.items():
                self._requests.labels(model, str(status)).inc(count)
            if not model:
                continue
            for histogram, values_s in ((self._latency, tally.latencies_s), (self._ttft, tally.ttfts_s)):
                child = histogram.labels(model)
                for value_s in values_s:
                    child.observe(value_s)
            self._input.labels(model).inc(tally.input)
            self._cached.labels(model).inc(tally.cached)
            self._output.labels(model).inc(tally.output)
            for why, count in tally.choices.items():
                self._choices.labels(model, why).inc(count)
            for how, count in tally.failures.items():
                self._failures.labels(model, how).inc(count)
            for (revision, outcome), count in tally.canary.items():
                self._canary.labels(model, revision, outcome).inc(count)

    def state(
        self, *, open_streams: int, wal_bytes: int, unshipped_events: int, suspects: int, outstanding: Mapping[str, int]
    ) -> None:
        """What is so at this moment. `outstanding`: by model."""
        self._suspects.set(suspects)
        for model in self._shown | outstanding.keys():
            self._outstanding.labels(model).set(outstanding.get(model, 0))
        self._shown |= outstanding.keys()
        self._open.set(open_streams)
        self._wal.set(wal_bytes)
        self._unshipped.set(unshipped_events)

    def render(self) -> bytes:
        """All processes' numbers in Prometheus' text format; those of the others may be a second old."""
        self.fold()
        if FOLDER_VARIABLE not in os.environ:
            return generate_latest(self._registry)
        together = CollectorRegistry()
        MultiProcessCollector(together)  # type: ignore[no-untyped-call]
        return generate_latest(together)

    def _of(self, model: str) -> _Tally:
        tally = self._tallies.get(model)
        if tally is None:
            tally = self._tallies[model] = _Tally()
        return tally
