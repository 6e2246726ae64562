"""What Prometheus is told. Several processes add to files of one shared folder, and any of them answers for all."""

from __future__ import annotations

import os

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from zenray.gateway.shared_metrics import FOLDER_VARIABLE

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
_MODEL = ("model",)
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The counters of one process."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        registry = self._registry
        self._requests = Counter(
            "zenray_gateway_requests_total",
            "Requests, by model and HTTP status.",
            ("model", "status"),
            registry=registry,
        )
        self._latency = Histogram(
            "zenray_gateway_latency_seconds",
            "From request to end of answer.",
            _MODEL,
            registry=registry,
            buckets=_SECONDS,
        )
        self._ttft = Histogram(
            "zenray_gateway_ttft_seconds",
            "From request to first token of a stream.",
            _MODEL,
            registry=registry,
            buckets=_SECONDS,
        )
        self._input = Counter("zenray_gateway_input_tokens_total", "Input tokens billed.", _MODEL, registry=registry)
        self._output = Counter("zenray_gateway_output_tokens_total", "Output tokens billed.", _MODEL, registry=registry)
        self._open = self._gauge("zenray_gateway_open_streams", "Choices being answered now.")
        self._wal = self._gauge("zenray_gateway_wal_bytes", "Usage log on disk.")
        self._unshipped = self._gauge("zenray_gateway_unshipped_events", "Usage events that control has not taken.")
        self._by_status: dict[tuple[str, int], Counter] = {}
        self._by_model: dict[str, tuple[Histogram, Histogram, Counter, Counter]] = {}

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, registry=self._registry, multiprocess_mode="livesum")

    def request(self, model: str, status: int, latency_s: float) -> None:
        """One answered request. `model` is a model that exists, or empty: clients must not invent label values."""
        counter = self._by_status.get((model, status))
        if counter is None:
            counter = self._by_status[model, status] = self._requests.labels(model, str(status))
        counter.inc()
        if model:
            self._of(model)[0].observe(latency_s)

    def usage(self, model: str, input_tokens: int, output_tokens: int, ttft_s: float | None) -> None:
        _, ttft, input_counter, output_counter = self._of(model)
        input_counter.inc(input_tokens)
        output_counter.inc(output_tokens)
        if ttft_s is not None:
            ttft.observe(ttft_s)

    def state(self, *, open_streams: int, wal_bytes: int, unshipped_events: int) -> None:
        self._open.set(open_streams)
        self._wal.set(wal_bytes)
        self._unshipped.set(unshipped_events)

    def render(self) -> bytes:
        """All processes' numbers in Prometheus' text format."""
        if FOLDER_VARIABLE not in os.environ:
            return generate_latest(self._registry)
        together = CollectorRegistry()
        MultiProcessCollector(together)  # type: ignore[no-untyped-call]
        return generate_latest(together)

    def _of(self, model: str) -> tuple[Histogram, Histogram, Counter, Counter]:
        known = self._by_model.get(model)
        if known is None:
            known = self._by_model[model] = (
                self._latency.labels(model),
                self._ttft.labels(model),
                self._input.labels(model),
                self._output.labels(model),
            )
        return known
