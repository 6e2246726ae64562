"""The gateway as a process, against clients that behave badly: raw sockets, where `openai` is too polite."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator

import httpx
import pytest
import pytest_asyncio

from tests.gateway.running import KEY, Engine, FakeControl, RunningGateway, route, until
from zenray.spec.usage import Outcome

pytestmark = [pytest.mark.contract, pytest.mark.asyncio(loop_scope="module")]
GATEWAY = {"drain_timeout_s": 2, "lease_wait_s": 30}

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def control(engine: Engine) -> AsyncIterator[FakeControl]:
    fake = FakeControl()
    fake.add_key(KEY, balance_nano_usd=10**15)
    fake.routes["tiny"] = route("tiny", [engine.url])
    await fake.start()
    fake.publish()
    yield fake
    await fake.stop()


async def connect(gateway: RunningGateway) -> Connection:
    host, _, port = gateway.url.removeprefix("http://").partition(":")
    return await asyncio.open_connection(host, int(port))


def question(words: str, *, stream: bool = True, max_tokens: int = 4000) -> bytes:
    body = {"model": "tiny", "messages": [{"role": "user", "content": f"[[{words}]]"}], "max_tokens": max_tokens}
    raw = json.dumps(body | {"stream": stream}).encode()
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer "
        + KEY.encode()
        + b"\r\ncontent-length: %d\r\n\r\n" % len(raw)
        + raw
    )


async def status_of(gateway: RunningGateway, request: bytes) -> int:
    reader, writer = await connect(gateway)
    writer.write(request)
    line = await asyncio.wait_for(reader.readline(), 60)
    writer.close()
    return int(line.split()[1])


async def alive(gateway: RunningGateway) -> bool:
    return await status_of(gateway, b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n") == 200


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GARBAGE\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 200, 400),
        (b"GET /healthz HTTP/1.1\r\nhost: x\r\nbig: " + b"x" * 200_000 + b"\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 50_000 + b"\r\n", 400),
        (b"GET /" + b"x" * 200_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n", 400),
        (b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n\r\n", 401),
        (b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n", 401),
        (b"GET /v1/chat/completions HTTP/1.1\r\nhost: x\r\n\r\n", 405),
        (b"DELETE /v1/models/tiny HTTP/1.1\r\nhost: x\r\n\r\n", 405),
        (b"GET /v1/embeddings HTTP/1.1\r\nhost: x\r\n\r\n", 404),
        (b"GET /v1/models/%ff%fe%00 HTTP/1.1\r\nhost: x\r\nauthorization: Bearer " + KEY.encode() + b"\r\n\r\n", 404),
        (b"GET /readyz HTTP/1.1\r\nhost: x\r\n\r\n", 200),
        (b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n", 200),
        (b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n", 200),
        (b"GET /docs HTTP/1.1\r\nhost: x\r\n\r\n", 200),
        (b"HEAD /healthz HTTP/1.1\r\nhost: x\r\n\r\n", 200),
        (question("tokens=1", stream=False).replace(b"host: x", b"content-encoding: gzip\r\nhost: x"), 400),
    ],
)
async def test_odd_requests(gateway: RunningGateway, request_: bytes, status: int) -> None:
    assert await status_of(gateway, request_) == status
    assert await alive(gateway)


async def test_a_body_of_unknown_length_is_bounded_too(gateway: RunningGateway) -> None:
    reader, writer = await connect(gateway)
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer "
        + KEY.encode()
        + b"\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    chunk = b"%x\r\n" % (1 << 20) + b" " * (1 << 20) + b"\r\n"
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        for _ in range(64):
            writer.write(chunk)
            await writer.drain()
            if reader.at_eof():
                raise ConnectionResetError
    assert await alive(gateway)


async def test_pipelined_requests_are_answered_in_order_and_garbage_ends_them(gateway: RunningGateway) -> None:
    reader, writer = await connect(gateway)
    writer.write(question("tokens=1", stream=False) * 3 + b"GARBAGE\r\n\r\n")
    data = await asyncio.wait_for(reader.read(), 60)
    assert data.count(b"HTTP/1.1 200 OK") <= 3
    assert await alive(gateway)


async def test_hanging_up_with_pipelined_requests_stops_the_running_one(
    gateway: RunningGateway, control: FakeControl
) -> None:
    before = len(control.events)
    reader, writer = await connect(gateway)
    writer.write(question("tokens=1000 delay_ms=20") + question("tokens=1", stream=False))
    await reader.readuntil(b" t1")
    writer.close()
    await until(lambda: len(control.events) > before)
    event = list(control.events.values())[-1]
    assert event.outcome is Outcome.CLIENT_GONE and 2 <= event.usage.output_tokens < 50


async def test_hanging_up_during_a_whole_answer_stops_the_engine(gateway: RunningGateway, control: FakeControl) -> None:
    before = len(control.events)
    _, writer = await connect(gateway)
    writer.write(question("tokens=1000 delay_ms=20", stream=False))
    await asyncio.sleep(0.2)
    writer.close()
    await until(lambda: len(control.events) > before, timeout_s=5)
    assert list(control.events.values())[-1].outcome is Outcome.CLIENT_GONE


async def test_two_thousand_open_streams(gateway: RunningGateway, control: FakeControl) -> None:
    before = len(control.events)

    async def one() -> int:
        reader, writer = await connect(gateway)
        writer.write(
            question("tokens=3 delay_ms=1500 first_ms=500").replace(b"host: x", b"host: x\r\nconnection: close")
        )
        data = await asyncio.wait_for(reader.read(), 200)
        writer.close()
        assert data.startswith(b"HTTP/1.1 200 OK") and b"data: [DONE]" in data, data[:1000]
        return data.count(b'"content":" t')

    tasks = []
    for number in range(2000):
        tasks.append(asyncio.create_task(one()))
        if number % 100 == 99:
            await asyncio.sleep(0.2)  # the listener's backlog is not what is tested
    answers = await asyncio.gather(*tasks)
    assert answers == [3] * 2000
    await until(lambda: len(control.events) == before + 2000, timeout_s=120)
    assert all(event.usage.output_tokens == 3 for event in list(control.events.values())[before:])


async def test_stopping_lets_streams_end_and_cuts_the_rest(
    engine: Engine, tmp_path_factory: pytest.TempPathFactory
) -> None:
    control = FakeControl()
    control.add_key(KEY)
    control.routes["tiny"] = route("tiny", [engine.url])
    await control.start()
    control.publish()
    gateway = await RunningGateway(tmp_path_factory.mktemp("stop"), control, drain_timeout_s=1).start()
    short, long = await connect(gateway), await connect(gateway)
    short[1].write(question("tokens=10 delay_ms=50"))
    long[1].write(question("tokens=1000 delay_ms=50"))
    await short[0].readuntil(b" t1")
    await long[0].readuntil(b" t1")
    stopping = asyncio.create_task(gateway.stop())
    assert b"[DONE]" in await short[0].read()
    assert b"being stopped" in await long[0].read()
    assert await stopping == 0
    outcomes = {event.outcome: event.usage.output_tokens for event in control.events.values()}
    assert outcomes[Outcome.COMPLETED] == 10 and 2 <= outcomes[Outcome.INTERRUPTED] < 100
    await control.stop()


async def becomes(open_streams: int, monitor: httpx.AsyncClient) -> None:
    shown = f"zenray_gateway_open_streams {open_streams}.0"
    async with asyncio.timeout(60):
        while shown not in (await monitor.get("/metrics")).text:  # noqa: ASYNC110 - a fact of other processes
            await asyncio.sleep(0.1)


async def test_killed_in_the_middle_nothing_is_lost_and_nothing_billed_twice(
    engine: Engine, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("killed")
    control = FakeControl()
    control.add_key(KEY)
    control.routes["tiny"] = route("tiny", [engine.url])
    await control.start()
    control.publish()
    gateway = await RunningGateway(folder, control, processes=2).start()
    connections = [await connect(gateway) for _ in range(10)]
    for reader, writer in connections:
        writer.write(question("tokens=1000 delay_ms=20"))
        await reader.readuntil(b" t3")
    async with httpx.AsyncClient(base_url=gateway.url) as monitor:
        await becomes(10, monitor)
    for number in (0, 1):
        started = await gateway.logged("started", gateway_id=f"gateway-{number}")
        os.kill(started["pid"], signal.SIGKILL)  # the parent starts each anew, and each bills what it had open
    for _, writer in connections:
        writer.close()
    await until(lambda: len(control.events) >= 10)
    seen = [event.usage.output_tokens for event in control.events.values()]
    assert len(seen) == 10 and all(count >= 4 for count in seen)
    async with httpx.AsyncClient(base_url=gateway.url) as monitor:
        await becomes(0, monitor)  # nobody counts what the killed ones were doing
    assert await gateway.stop() == 0
    await control.stop()


async def test_a_gateway_of_fewer_processes_ships_what_the_others_logged(
    engine: Engine, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("fewer")
    control = FakeControl()
    control.add_key(KEY)
    control.routes["tiny"] = route("tiny", [engine.url])
    await control.start()
    control.publish()
    gateway = await RunningGateway(folder, control, processes=3).start()
    control.usage_fails = True
    for _ in range(12):  # the kernel deals connections out
        assert await status_of(gateway, question("tokens=1", stream=False)) == 200
    assert await gateway.stop() == 0 and control.events == {}
    control.usage_fails = False
    gateway = await RunningGateway(folder, control, processes=1).start(wait_for_snapshot=False)
    await until(lambda: len(control.events) == 12)
    await until(lambda: sorted(path.name for path in (folder / "state").glob("gateway-*")) == ["gateway-0"])
    assert {event.billing_key.split(":")[0] for event in control.events.values()} > {"gateway-0"}
    assert await gateway.stop() == 0
    await control.stop()
