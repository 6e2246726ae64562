"""Traces of requests for OpenTelemetry. Only where the settings ask for them is anything of it imported or done.

A request has one span, with its caller's as parent where it sends `traceparent`, and four spans within: admission (the
key, the checks, the cover, the log's record), replica (from the choice until the answer begins), first token, answer.
They are made when the request has ended, from times that were noted on the way. The replica is told the request's
span as its parent. No text of a client or a model is in any span.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from zenray.spec.errors import InvalidDocument
from zenray.spec.usage import UsageEvent

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span, Tracer

_PARENT_HEADERS = (b"traceparent", b"tracestate")


class RequestTrace:
    """One request's span, and when its parts began."""

    __slots__ = ("_admitted_ns", "_begun_ns", "_event", "_span", "_started_ns", "_tracer", "attempts", "traceparent")

    def __init__(self, tracer: Tracer, span: Span, started_ns: int) -> None:
        context = span.get_span_context()
        self.traceparent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
        self.attempts: list[tuple[int, str]] = []  # when a replica was chosen, and which
        self._tracer = tracer
        self._span = span
        self._started_ns = started_ns
        self._admitted_ns = 0
        self._begun_ns = 0
        self._event: UsageEvent | None = None

    def admitted(self) -> None:
        """The request may be asked of an engine."""
        self._admitted_ns = time.time_ns()

    def chosen(self, replica_id: str) -> None:
        self.attempts.append((time.time_ns(), replica_id))

    def begun(self) -> None:
        """A replica has begun its answer."""
        self._begun_ns = time.time_ns()

    def closed(self, event: UsageEvent) -> None:
        self._event = event

    def end(self, model: str, status: int, request_id: str) -> None:
        """Make the spans. `status` 0: the client hung up before it was told anything."""
        ended_ns = time.time_ns()
        span, event = self._span, self._event
        if not span.is_recording():
            return
        span.set_attributes({"http.response.status_code": status or 499, "zenray.request_id": request_id})
        if model:
            span.set_attribute("gen_ai.request.model", model)
        if status >= 500 or (event is not None and event.outcome == "upstream_failed"):
            from opentelemetry.trace import StatusCode

            span.set_status(StatusCode.ERROR)
        first_ns = 0
        if event is not None:
            span.set_attributes(
                {
                    "gen_ai.usage.input_tokens": event.usage.input_tokens,
                    "gen_ai.usage.cached_input_tokens": event.usage.cached_input_tokens,
                    "gen_ai.usage.output_tokens": event.usage.output_tokens,
                    "zenray.org": event.org,
                    "zenray.key_id": event.key_id,
                    "zenray.outcome": event.outcome.value,
                }
            )
            if event.ttft_ms is not None:
                first_ns = self._admitted_ns + round(event.ttft_ms * 1e6)
        self._part("admission", self._started_ns, self._admitted_ns or ended_ns)
        for place, (chosen_ns, replica_id) in enumerate(self.attempts):
            last = place + 1 == len(self.attempts)
            until_ns = (self._begun_ns or ended_ns) if last else self.attempts[place + 1][0]
            self._part("replica", chosen_ns, until_ns, {"zenray.replica_id": replica_id, "zenray.attempt": place + 1})
        if self._begun_ns:
            if first_ns > self._begun_ns:
                self._part("first token", self._begun_ns, first_ns)
            self._part("answer", max(self._begun_ns, first_ns), ended_ns)
        span.end(ended_ns)

    def _part(self, name: str, began_ns: int, ended_ns: int, attributes: dict[str, Any] | None = None) -> None:
        from opentelemetry.trace import set_span_in_context

        context = set_span_in_context(self._span)
        part = self._tracer.start_span(name, context=context, start_time=began_ns, attributes=attributes)
        part.end(max(began_ns, ended_ns))


class Tracing:
    """Makes requests' traces and sends them off, from a thread of its own. One for each process."""

    def __init__(self, exporter: SpanExporter, *, share: float, gateway_id: str) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        names = {"service.name": "zenray-gateway", "service.instance.id": gateway_id}
        sampler = ParentBased(TraceIdRatioBased(share))
        self._provider = TracerProvider(sampler=sampler, resource=Resource.create(names), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("zenray.gateway")
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, path: str, headers: Iterable[tuple[bytes, bytes]]) -> RequestTrace:
        """A request has come. A malformed `traceparent` is as none."""
        from opentelemetry.trace import SpanKind

        told = {name.decode(): value.decode("latin-1") for name, value in headers if name in _PARENT_HEADERS}
        now_ns = time.time_ns()
        parent = self._propagator.extract(told)
        span = self._tracer.start_span(f"POST {path}", context=parent, kind=SpanKind.SERVER, start_time=now_ns)
        return RequestTrace(self._tracer, span, now_ns)

    def close(self) -> None:
        """Send what is left, for some seconds at most (blocks)."""
        self._provider.shutdown()


def open_tracing(endpoint: str | None, *, share: float, gateway_id: str) -> Tracing | None:
    """Tracing to the collector at `endpoint` (OTLP over HTTP); None without one. InvalidDocument if it cannot be."""
    if endpoint is None:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise InvalidDocument(
            f"otlp_endpoint is set, and OpenTelemetry is not installed ({error.name}).",
            hint="pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http",
        ) from None
    exporter = OTLPSpanExporter(endpoint=endpoint.rstrip("/") + "/v1/traces", timeout=5)
    return Tracing(exporter, share=share, gateway_id=gateway_id)
