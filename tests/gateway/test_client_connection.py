"""How long a client may keep the gateway waiting for a request."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
import uvicorn
from uvicorn.server import ServerState

from zenray.gateway.server import ClientConnection

pytestmark = pytest.mark.asyncio
HEAD = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\n"


class Wire:
    """A transport to nobody."""

    def __init__(self) -> None:
        self.aborted = False
        self.written = b""

    def get_extra_info(self, name: str) -> None:
        return None

    def write(self, data: bytes) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self.aborted

    def abort(self) -> None:
        self.aborted = True

    def pause_reading(self) -> None:
        pass

    resume_reading = pause_reading


class Client:
    """A connection to an application that reads a body and answers when it is let."""

    def __init__(self) -> None:
        self.may_answer = asyncio.Event()
        config = uvicorn.Config(cast(Any, self._app), http=ClientConnection, interface="asgi3", log_config=None)
        config.load()
        self.connection = ClientConnection(config, ServerState(), {})
        self.wire = Wire()
        self.connection.connection_made(self.wire)
        self._now_s = 0.0

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        await self.may_answer.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    async def send(self, data: bytes) -> None:
        self.connection.data_received(data)
        for _ in range(5):
            await asyncio.sleep(0)

    def cut_within(self, time_s: int) -> bool:
        for _ in range(time_s):
            self._now_s += 1
            self.connection.end_if_stalled(self._now_s)
        return self.wire.aborted


@pytest.mark.parametrize(
    "sent",
    [
        [],
        [b"POST / HT"],
        [HEAD],
        [HEAD + b"\r\n"],
        [HEAD + b"\r\n", b"12"],
    ],
)
async def test_who_stops_in_a_request_is_cut_off_after_half_a_minute(sent: list[bytes]) -> None:
    client = Client()
    for data in sent:
        await client.send(data)
    assert not client.cut_within(30)
    assert client.cut_within(2)


async def test_headers_in_small_pieces_do_not_win_time_but_a_body_does() -> None:
    client = Client()
    await client.send(HEAD)
    for _ in range(3):
        await client.send(b"a: b\r\n")
        client.cut_within(9)
    assert not client.wire.aborted
    await client.send(b"\r\n")
    for piece in (b"1", b"2", b"3"):
        assert not client.cut_within(29)
        await client.send(piece)
    assert client.cut_within(32)

    slow = Client()
    for _ in range(4):
        await slow.send(b"POST / HTTP/1.1\r\n" if not slow._now_s else b"a: b\r\n")
        slow.cut_within(9)
    assert slow.wire.aborted


async def test_who_waits_for_an_answer_or_rests_between_requests_is_not() -> None:
    client = Client()
    for _ in range(2):
        client.may_answer.clear()
        await client.send(HEAD + b"\r\n1234")
        assert not client.cut_within(1000)
        client.may_answer.set()
        await client.send(b"")
        assert not client.cut_within(1000)
    assert client.wire.written.count(b"200 OK") == 2
    await client.send(b"\r\n")  # no request yet, but it stopped uvicorn's own timer
    assert client.cut_within(32)
