"""One HTTP answer to a client, whole or as a stream: headers, errors in OpenAI's shape, pings, and who hung up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import orjson

from zenray.gateway.stream import DONE
from zenray.gateway.tracing import RequestTrace
from zenray.spec.errors import RequestTooLarge, ZenrayError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

DISCONNECTS = "zenray.disconnects"
"""Key of the ASGI scope: a set of functions that the server calls when the client's connection is lost."""
WRITE = "zenray.write"
"""Key of the ASGI scope: writes a piece of a begun, chunked answer at once; True: the client is slow, wait for it."""

_JSON = (b"content-type", b"application/json")
_SSE = (b"content-type", b"text/event-stream; charset=utf-8")
_VERSION = (b"openai-version", b"2020-10-01")


class ClientGone(Exception):
    """The client hung up; there is nobody to answer."""


class Reply:
    """The answer to one request. Every send may wait for a slow client."""

    __slots__ = (
        "_org", "_send", "_unsent", "_write", "finished", "model", "request_id", "started_s", "status", "streaming",
        "trace",
    )  # fmt: skip

    def __init__(self, send: Send, request_id: str, write: Callable[[bytes], bool] | None = None) -> None:
        """`write`: the server's `WRITE`, if it has one."""
        self.request_id = request_id
        self.started_s = time.perf_counter()
        self.status = 0  # until headers are sent
        self.streaming = False
        self.finished = False
        self.model = ""  # once it is known to exist
        self.trace: RequestTrace | None = None
        self._org: str | None = None
        self._send = send
        self._write = write
        self._unsent = b""

    def belongs_to(self, org: str) -> None:
        self._org = org

    async def whole(self, status: int, body: bytes, headers: list[tuple[bytes, bytes]] | None = None) -> None:
        """Send everything at once. `headers` replaces the content type of JSON."""
        await self._start(status, [*(headers or [_JSON]), (b"content-length", b"%d" % len(body))])
        self.finished = True
        await self._send({"type": "http.response.body", "body": body})

    async def json(self, value: object, status: int = 200) -> None:
        await self.whole(status, orjson.dumps(value))

    async def start_stream(self) -> None:
        """Send status 200 and the headers of an event stream, once."""
        if not self.streaming:
            self.streaming = True
            await self._start(200, [_SSE, (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")])

    async def more(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    def write(self, data: bytes) -> bool:
        """`more` without waiting, for use outside of a task. True: call `drain` before the next."""
        if self._write is not None:
            return self._write(data)
        self._unsent = data
        return True

    async def drain(self) -> None:
        """Wait until the client has taken enough of what was written."""
        data, self._unsent = self._unsent, b""
        await self.more(data)

    async def ping(self) -> None:
        """A comment, which clients skip, so that nobody between takes a waiting stream for dead."""
        await self.start_stream()
        await self.more(b": ping\n\n")

    async def end_stream(self, data: bytes = b"") -> None:
        self.finished = True
        await self._send({"type": "http.response.body", "body": data})

    async def fail(self, error: ZenrayError, *, close: bool = False) -> None:
        """Tell the client of an error: as the whole answer, or as an event once the stream has begun."""
        body = orjson.dumps(error.to_openai())
        if self.finished:
            return
        if self.streaming:
            await self.end_stream(b"data: " + body + b"\n\n" + DONE)
            return
        headers = [(name.encode(), value.encode()) for name, value in error.headers().items()]
        if close:
            headers.append((b"connection", b"close"))
        await self.whole(error.status, body, [_JSON, *headers])

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.status = status
        elapsed_ms = round((time.perf_counter() - self.started_s) * 1e3)
        headers += [
            (b"x-request-id", self.request_id.encode()),
            (b"openai-processing-ms", b"%d" % elapsed_ms),
            _VERSION,
        ]
        if self._org is not None:
            headers.append((b"openai-organization", self._org.encode()))
        await self._send({"type": "http.response.start", "status": status, "headers": headers})


async def read_body(receive: Receive, declared_bytes: int | None, max_bytes: int) -> bytes:
    """The whole body. Raises RequestTooLarge (413), or ClientGone; the server hangs up when it stops coming."""
    if declared_bytes is not None and declared_bytes > max_bytes:
        raise _too_large(declared_bytes, max_bytes)
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body", False):
        body: bytes = message.get("body", b"")
        if len(body) > max_bytes:
            raise _too_large(len(body), max_bytes)
        return body
    parts: list[bytes] = []
    size_bytes = 0
    while True:
        if message["type"] != "http.request":
            raise ClientGone
        parts.append(message.get("body", b""))
        size_bytes += len(parts[-1])
        if size_bytes > max_bytes:
            raise _too_large(size_bytes, max_bytes)
        if not message.get("more_body", False):
            return b"".join(parts)
        message = await receive()


def _too_large(size_bytes: int, max_bytes: int) -> RequestTooLarge:
    return RequestTooLarge(
        f"The body has {size_bytes} bytes or more; at most {max_bytes} are taken.", hint="Shorten the request."
    )


class Disconnect:
    """Cancels the task that it is made in when the client hangs up, and says afterwards that this was the reason."""

    __slots__ = ("_listeners", "_task", "_watch", "gone")

    def __init__(self, scope: Scope, receive: Receive) -> None:
        """Call when the body has been read. `stop` must be called in the end."""
        self.gone = False
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._watch: asyncio.Task[None] | None = None
        self._listeners: set[Callable[[], None]] | None = scope.get(DISCONNECTS)
        if self._listeners is not None:
            self._listeners.add(self._lost)
        else:
            self._watch = asyncio.get_running_loop().create_task(self._wait(receive))

    def stop(self) -> None:
        if self._listeners is not None:
            self._listeners.discard(self._lost)
        if self._watch is not None:
            self._watch.cancel()

    def _lost(self) -> None:
        self.gone = True
        self._task.cancel()

    async def _wait(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._lost()
