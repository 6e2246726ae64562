"""The gateway's own HTTP/1.1 client for replicas: one POST after another on kept connections, and little else.

It exists because the data path is what a gateway costs: aiohttp's client takes about as long for one request as all
the rest of the gateway. Left out: redirects, cookies, proxies, compression, and answers whose end is only told by the
closing of the connection, since those cannot be told from truncated ones.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple, cast
from urllib.parse import urlsplit

import httptools

_CONNECT_TIMEOUT_S = 3.0
_KEEP_ALIVE_S = 4.0  # shorter than the 5 s of uvicorn, on which engines run: a kept connection is not one being closed
_SWEEP_INTERVAL_S = 0.5
_BUFFER_BYTES = 256 << 10  # of an answer that its reader does not take; then the replica has to wait


class Unreachable(OSError):
    """No connection could be made; the request was not sent."""


class Lost(OSError):
    """The connection broke before the answer's end, or what came is no HTTP. The request may have had its effect."""


class Target(NamedTuple):
    """A base URL, taken apart."""

    host: str
    port: int
    tls: bool
    host_header: str
    prefix: str


@lru_cache(maxsize=1024)
def parse_target(url: str) -> Target:
    """Raises ValueError for what is no http or https URL with a host."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(f"{url!r} is no base URL")
    tls = parts.scheme == "https"
    return Target(parts.hostname, parts.port or (443 if tls else 80), tls, parts.netloc, parts.path.rstrip("/"))


@lru_cache(maxsize=4096)
def _head(target: Target, path: str, bearer: str) -> bytes:
    """The request line and the headers that are the same each time. ValueError for what would break them."""
    head = (
        f"POST {target.prefix}{path} HTTP/1.1\r\nhost: {target.host_header}\r\nauthorization: Bearer {bearer}\r\n"
        "content-type: application/json\r\n"
    )
    if head.count("\n") != 4 or head.count("\r") != 4:
        raise ValueError("a line break in an address or key of a replica")
    return head.encode("latin-1")


class Connection(asyncio.Protocol):
    """One connection, for one request at a time; at the same time the answer to that request.

    `send`, then `begun`, then `read`, or `pour` until it is false, then `release`; `release` may come at any time.
    """

    def __init__(self, client: Client, target: Target) -> None:
        self.target = target
        self.status = 0  # once the answer has begun
        self.moved_s = 0.0  # when it was last used, by the loop's clock
        self.busy = True
        self._client = client
        self._loop = client.loop
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._chunks: deque[bytes] = deque()
        self._buffered_bytes = 0
        self._paused = False  # the replica waits for our client
        self._complete = False
        self._error: OSError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._sink: Callable[[bytes], bool] | None = None
        self._thrown: Exception | None = None  # by the sink

    @property
    def usable(self) -> bool:
        return self._error is None

    @property
    def _pouring(self) -> bool:
        return self._sink is not None

    def silent_s(self, now_s: float) -> float:
        """How long the replica has kept us waiting."""
        return 0.0 if self._paused else now_s - self.moved_s

    def send(self, data: bytes) -> None:
        assert self._transport is not None
        self.busy = True
        self.status = 0
        self._complete = False
        self.moved_s = self._loop.time()
        self._transport.write(data)

    async def begun(self) -> None:
        """Wait for the status. Raises Lost, or TimeoutError after the client's `silence_s`."""
        while not self.status:
            await self._more()

    async def read(self, limit_bytes: int | None = None) -> bytes:
        """The rest of the body. Raises Lost or TimeoutError, and Lost when there are more than `limit_bytes`."""
        while not self._complete:
            if limit_bytes is not None and self._buffered_bytes > limit_bytes:
                raise Lost(f"an answer of more than {limit_bytes} bytes")
            if self._paused:
                self._resume()
            await self._more()
        if self._paused:  # for the next answer
            self._resume()
        return self._take()

    async def pour(self, sink: Callable[[bytes], bool]) -> bool:
        """Give `sink` what comes, in the moment that it comes, until it answers True. False: that was the end.

        A chunk then costs no turn of a task. What comes between two calls is kept, up to a bound; after that the
        replica has to wait. Raises what the sink raises, Lost or TimeoutError.
        """
        self._sink = sink
        try:
            while self._pouring:
                if self._chunks:
                    self._give()
                    continue
                if self._complete:
                    return False
                await self._more()
            if self._thrown is not None:
                raise self._thrown
            return True
        finally:
            self._sink = self._thrown = None

    def release(self) -> None:
        """Give the connection back. An answer that has not been read to its end closes it, which stops the engine."""
        if not self.busy:
            return
        self.busy = False
        self._client.given_back(self, reusable=self._complete and not self._chunks and self._error is None)

    def abort(self, error: OSError | None = None) -> None:
        """Close at once; whoever waits is told `error`."""
        self._fail(error or Lost("closed"))
        if self._transport is not None:
            self._transport.abort()

    def _take(self) -> bytes:
        chunks = self._chunks
        data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        chunks.clear()
        self._buffered_bytes = 0
        return data

    def _give(self) -> bool:
        """What is there, to the sink. True: it wants no more, and is forgotten."""
        assert self._sink is not None
        try:
            data = self._take()
            if self._paused:
                self._resume()
            enough = self._sink(data)
        except Exception as error:
            enough, self._thrown = True, error
        if enough:
            self._sink = None
        return enough

    async def _more(self) -> None:
        if self._error is not None:
            raise self._error
        waiter = self._waiter = self._loop.create_future()
        try:
            await waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _resume(self) -> None:
        self._paused = False
        self.moved_s = self._loop.time()
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def _fail(self, error: OSError) -> None:
        if self._error is None:
            self._error = error
            if self._transport is not None:
                self._transport.abort()
            self._wake()

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if not self.busy or self._complete:
            # Nothing was asked: a server's farewell, or an answer that is longer than it said.
            self._fail(Lost("bytes that nobody asked for"))
            return
        self.moved_s = self._loop.time()
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            # When it is more than the answer that came, the answer is whole; only the connection is spoilt.
            self._fail(Lost(f"not HTTP: {error}"))
        if not self._pouring or self._complete or (self._chunks and self._give()):
            self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(Lost(str(exc) or type(exc).__name__ if exc else "the replica closed the connection"))
        if not self.busy:
            self._client.forget(self)

    # the parser's side

    def on_message_begin(self) -> None:
        if self._complete:
            raise ValueError("a second answer")

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status >= 200:  # 100 Continue and its like only announce the answer
            self.status = status

    def on_body(self, body: bytes) -> None:
        self._chunks.append(body)
        self._buffered_bytes += len(body)
        if self._buffered_bytes > _BUFFER_BYTES and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        if self.status:
            self._complete = True
            if not self._parser.should_keep_alive():
                self._error = Lost("the replica closes the connection after its answer")


class Client:
    """Connections to replicas, kept a few seconds. Make it in the event loop that uses it."""

    def __init__(
        self, *, silence_s: float, connect_timeout_s: float = _CONNECT_TIMEOUT_S, keep_alive_s: float = _KEEP_ALIVE_S
    ) -> None:
        """`silence_s`: an answer that does not move for so long has failed (TimeoutError)."""
        self.loop = asyncio.get_running_loop()
        self._silence_s = silence_s
        self._connect_timeout_s = connect_timeout_s
        self._keep_alive_s = keep_alive_s
        self._idle: dict[Target, list[Connection]] = {}
        self._busy: set[Connection] = set()
        self._closed = False
        self._timer = self.loop.call_later(_SWEEP_INTERVAL_S, self._sweep)

    async def post(
        self, url: str, path: str, *, bearer: str, request_id: str, body: bytes, traceparent: str | None = None
    ) -> Connection:
        """Send JSON; the answer, begun. Its `release` must be called in the end.

        Raises Unreachable when nothing was sent, Lost when the connection broke, TimeoutError after the silence.
        """
        target = parse_target(url)
        head = _head(target, path, bearer)
        if traceparent is not None:
            head += b"traceparent: %b\r\n" % traceparent.encode("ascii")
        connection = self._kept(target) or await self._connect(target)
        self._busy.add(connection)
        try:
            connection.send(b"%bx-request-id: %b\r\ncontent-length: %d\r\n\r\n%b" % (
                head, request_id.encode("ascii"), len(body), body,
            ))  # fmt: skip
            await connection.begun()
        except BaseException:
            connection.release()
            raise
        return connection

    async def close(self) -> None:
        """Close all connections, also those in use."""
        self._closed = True
        self._timer.cancel()
        for connection in [*self._busy, *(one for idle in self._idle.values() for one in idle)]:
            connection.abort()
        self._idle.clear()

    def given_back(self, connection: Connection, *, reusable: bool) -> None:
        self._busy.discard(connection)
        if reusable and not self._closed:
            connection.moved_s = self.loop.time()
            self._idle.setdefault(connection.target, []).append(connection)
        else:
            connection.abort()

    def forget(self, connection: Connection) -> None:
        """A kept connection was closed."""
        idle = self._idle.get(connection.target)
        if idle is not None and connection in idle:
            idle.remove(connection)

    def _kept(self, target: Target) -> Connection | None:
        """The connection that was used last, so that those which are not needed grow old."""
        idle = self._idle.get(target)
        while idle:
            connection = idle.pop()
            if connection.usable and self.loop.time() - connection.moved_s < self._keep_alive_s:
                return connection
            connection.abort()
        return None

    async def _connect(self, target: Target) -> Connection:
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, connection = await self.loop.create_connection(
                    lambda: Connection(self, target), target.host, target.port, ssl=target.tls or None
                )
        except TimeoutError:
            raise Unreachable(f"no connection within {self._connect_timeout_s} s") from None
        except OSError as error:
            raise Unreachable(str(error)) from None
        return connection

    def _sweep(self) -> None:
        """Twice a second: end answers that do not move, close connections kept too long."""
        now_s = self.loop.time()
        for connection in [one for one in self._busy if one.silent_s(now_s) > self._silence_s]:
            connection.abort(TimeoutError(f"nothing came for {self._silence_s} s"))
        for target, idle in list(self._idle.items()):
            young = [one for one in idle if one.usable and now_s - one.moved_s < self._keep_alive_s]
            for connection in idle:
                if connection not in young:
                    connection.abort()
            if young:
                self._idle[target] = young
            else:
                del self._idle[target]
        self._timer = self.loop.call_later(_SWEEP_INTERVAL_S, self._sweep)
