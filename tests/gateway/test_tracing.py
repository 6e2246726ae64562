"""Traces of requests: their spans, whose children they are, what a replica is told, and that none is made unasked."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from tests.gateway.running import KEY, Engine, FakeControl, RunningGateway, route, until
from zenray.gateway.tracing import Tracing, open_tracing

CALLER = "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"


class Kept(SpanExporter):
    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []

    def export(self, spans: object) -> SpanExportResult:
        self.spans += spans  # type: ignore[operator]
        return SpanExportResult.SUCCESS


def traced(share: float = 1.0, headers: tuple[tuple[bytes, bytes], ...] = ()) -> tuple[Kept, str]:
    kept = Kept()
    tracing = Tracing(kept, share=share, gateway_id="g")
    trace = tracing.begin("/v1/completions", headers)
    trace.admitted()
    trace.chosen("r1")
    trace.chosen("r2")
    trace.begun()
    trace.end("m", 200, "req_1")
    tracing.close()
    return kept, trace.traceparent


def test_spans_are_the_request_s_children_and_follow_each_other() -> None:
    kept, traceparent = traced(headers=((b"x", b"y"), (b"traceparent", CALLER.encode())))
    *parts, request = kept.spans
    assert [part.name for part in parts] == ["admission", "replica", "replica", "answer"]
    assert request.context is not None and request.parent is not None
    assert traceparent == f"00-{'ab' * 16}-{request.context.span_id:016x}-01"
    assert f"{request.parent.span_id:016x}" == "cd" * 8
    for part in parts:
        assert part.parent is not None and part.parent.span_id == request.context.span_id
        assert request.start_time <= part.start_time <= part.end_time <= request.end_time  # type: ignore[operator]
    assert [part.end_time for part in parts[1:3]] == [parts[2].start_time, parts[3].start_time]


@pytest.mark.parametrize(("flag", "share", "spans"), [("00", 1.0, 0), ("01", 0.0, 5)])
def test_the_caller_decides_whether_its_requests_are_traced(flag: str, share: float, spans: int) -> None:
    kept, traceparent = traced(share, ((b"traceparent", (CALLER[:-2] + flag).encode()),))
    assert len(kept.spans) == spans and traceparent.endswith(flag)


@pytest.mark.parametrize("sent", [b"", b"nonsense", b"00-" + b"0" * 32 + b"-" + b"0" * 16 + b"-01", b"\xff\xfe"])
def test_a_malformed_parent_is_as_none(sent: bytes) -> None:
    kept, traceparent = traced(headers=((b"traceparent", sent),))
    assert kept.spans[-1].parent is None and len(traceparent) == 55


def test_nothing_is_imported_where_nothing_is_asked() -> None:
    assert open_tracing(None, share=1, gateway_id="g") is None
    program = "import sys, zenray.gateway.app; sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


class Collector:
    """An OTLP collector that keeps spans as (name, trace id, span id, parent's, attributes)."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, str, str, str, dict[str, object]]] = []
        self.url = ""

    async def start(self) -> None:
        app = web.Application()
        app.router.add_post("/v1/traces", self._take)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _take(self, request: web.Request) -> web.Response:
        batch = ExportTraceServiceRequest.FromString(await request.read())
        for resource in batch.resource_spans:
            for scope in resource.scope_spans:
                for span in scope.spans:
                    values = {one.key: one.value.string_value or one.value.int_value for one in span.attributes}
                    ids = (span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex())
                    self.spans.append((span.name, *ids, values))
        return web.Response()


@pytest_asyncio.fixture
async def collector() -> AsyncIterator[Collector]:
    running = Collector()
    await running.start()
    yield running
    await running.stop()


@pytest.mark.contract
@pytest.mark.asyncio
async def test_a_collector_is_told_of_a_stream(collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> None:
    engine, control = await Engine.start(), FakeControl()
    control.add_key(KEY)
    control.routes["tiny"] = route("tiny", [engine.url])
    await control.start()
    control.publish()
    gateway = await RunningGateway(
        tmp_path_factory.mktemp("gateway"), control, otlp_endpoint=collector.url, lease_wait_s=30
    ).start()
    try:
        async with gateway.client() as client:
            stream = await client.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": "[[tokens=3]]"}],
                stream=True,
                extra_headers={"traceparent": CALLER},
            )
            async for _ in stream:
                pass
        assert await gateway.stop() == 0  # what is left is sent
        await until(lambda: len(collector.spans) >= 5)
        by_name = {name: rest for name, *rest in collector.spans}
        assert set(by_name) == {"POST /v1/chat/completions", "admission", "replica", "first token", "answer"}
        trace_id, span_id, parent, values = by_name.pop("POST /v1/chat/completions")
        assert (trace_id, parent) == ("ab" * 16, "cd" * 8)
        assert values["gen_ai.usage.output_tokens"] == 3 and values["gen_ai.request.model"] == "tiny"
        assert {(rest[0], rest[2]) for rest in by_name.values()} == {(trace_id, span_id)}
    finally:
        await gateway.stop()
        await control.stop()
        await engine.stop()
