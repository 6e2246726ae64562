"""The client of replicas against servers that send what they like, in whatever pieces, or stop in the middle."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from zenray.gateway.http_client import Client, Connection, Lost, Unreachable, parse_target

pytestmark = [pytest.mark.contract, pytest.mark.asyncio]

WHOLE = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nhel\r\n2;x=y\r\nlo\r\n0\r\ntrailer: 1\r\n\r\n"
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Replica:
    """A server on loopback that treats each request as `serve` says, and counts connections and requests."""

    def __init__(self, serve: Serve) -> None:
        self.connections = 0
        self.requests: list[bytes] = []
        self.url = ""
        self._serve = serve

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                self.requests.append(head + await reader.readexactly(length))
                await self._serve(reader, writer)
                if writer.is_closing():
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def replica(serve: Serve, **options: float) -> AsyncIterator[tuple[Replica, Client]]:
    made = Replica(serve)
    server = await asyncio.start_server(made.handle, "127.0.0.1", 0)
    made.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/app"
    client = Client(silence_s=options.pop("silence_s", 30), **options)
    try:
        yield made, client
    finally:
        await client.close()
        server.close()


def sends(*pieces: bytes, close: bool = False, pause_s: float = 0.002) -> Serve:
    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            if len(pieces) > 1:
                await asyncio.sleep(pause_s)
        if close:
            writer.close()

    return serve


async def ask(made: Replica, client: Client, body: bytes = b"{}") -> Connection:
    return await client.post(made.url, "/v1/x", bearer="key", request_id="req_1", body=body)


async def answer(made: Replica, client: Client) -> tuple[int, bytes]:
    connection = await ask(made, client)
    try:
        return connection.status, await connection.read()
    finally:
        connection.release()


async def chunk(connection: Connection) -> bytes:
    """What has come, waited for; empty at the end."""
    taken: list[bytes] = []

    def take(data: bytes) -> bool:
        taken.append(data)
        return True

    assert await connection.pour(take) is bool(taken)
    return b"".join(taken)


async def test_what_is_sent_and_that_the_connection_is_kept() -> None:
    async with replica(sends(WHOLE)) as (made, client):
        for _ in range(3):
            assert await answer(made, client) == (200, b"hello")
        assert made.connections == 1
        lines = made.requests[0].split(b"\r\n")
        assert lines[0] == b"POST /app/v1/x HTTP/1.1" and lines[-1] == b"{}"
        assert set(lines[1:-2]) == {
            b"host: " + made.url.split("/")[2].encode(),
            b"authorization: Bearer key",
            b"content-type: application/json",
            b"x-request-id: req_1",
            b"content-length: 2",
        }


@pytest.mark.parametrize("raw", [WHOLE, CHUNKED, b"HTTP/1.1 100 Continue\r\n\r\n" + WHOLE])
async def test_an_answer_cut_anywhere_is_the_same(raw: bytes) -> None:
    for cut in range(1, len(raw)):
        async with replica(sends(raw[:cut], raw[cut:], pause_s=0.001)) as (made, client):
            assert await answer(made, client) == (200, b"hello")
            assert await answer(made, client) == (200, b"hello")
            assert made.connections == 1
    async with replica(sends(*(raw[n : n + 1] for n in range(len(raw))), pause_s=0)) as (made, client):
        assert await answer(made, client) == (200, b"hello")


async def test_chunks_come_as_they_are_sent() -> None:
    go = asyncio.Event()

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED[: CHUNKED.index(b"2;x")])
        await go.wait()
        writer.write(CHUNKED[CHUNKED.index(b"2;x") :])

    async with replica(serve) as (made, client):
        connection = await ask(made, client)
        assert await chunk(connection) == b"hel"
        go.set()
        assert await chunk(connection) == b"lo"
        assert await chunk(connection) == b""
        connection.release()
        await answer(made, client)
        assert made.connections == 1


async def test_a_sink_is_given_all_in_order_however_much_comes_at_once() -> None:
    body = bytes(range(256)) * (16 << 10)  # 4 MiB, more than is kept for a reader that does not take it
    async with replica(sends(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)) as (made, client):
        for _ in range(3):
            connection = await ask(made, client)
            taken: list[bytes] = []
            assert await connection.pour(lambda data, taken=taken: taken.append(data)) is False  # type: ignore[misc]
            connection.release()
            assert b"".join(taken) == body
        assert made.connections == 1


async def test_what_a_sink_raises_reaches_whoever_pours() -> None:
    def break_off(data: bytes) -> bool:
        raise KeyError(data)

    async with replica(sends(CHUNKED[:60], CHUNKED[60:])) as (made, client):
        connection = await ask(made, client)
        with pytest.raises(KeyError, match="hel"):
            await connection.pour(break_off)
        connection.release()
        assert await answer(made, client) == (200, b"hello")
        assert made.connections == 2


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"HTTP/1.1 200 OK\r\ncontent-le",
        b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhello",
        CHUNKED[:-2],
        CHUNKED[: CHUNKED.index(b"0\r\n")],
        b"HTTP/1.1 200 OK\r\n\r\nits end is told by closing",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01",
    ],
)
async def test_what_ends_early_or_is_no_http_is_lost(raw: bytes) -> None:
    async with replica(sends(raw, close=True)) as (made, client):
        with pytest.raises(Lost):
            await answer(made, client)


async def test_what_came_before_the_loss_can_be_read() -> None:
    async with replica(sends(CHUNKED[: CHUNKED.index(b"2;x")], close=True)) as (made, client):
        connection = await ask(made, client)
        assert await chunk(connection) == b"hel"
        with pytest.raises(Lost):
            await chunk(connection)
        connection.release()


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 5\r\n\r\nhello",
        b"HTTP/1.0 200 OK\r\ncontent-length: 5\r\n\r\nhello",
        WHOLE + b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil",
        WHOLE + b"more than was said",
    ],
)
async def test_a_connection_that_ends_or_says_too_much_is_not_used_again(raw: bytes) -> None:
    async with replica(sends(raw)) as (made, client):
        for number in (1, 2):
            assert await answer(made, client) == (200, b"hello")
            assert made.connections == number


async def test_bytes_on_a_kept_connection_close_it() -> None:
    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(WHOLE)
        await asyncio.sleep(0.02)
        writer.write(b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\n\r\n")

    async with replica(serve) as (made, client):
        assert await answer(made, client) == (200, b"hello")
        await asyncio.sleep(0.05)
        assert await answer(made, client) == (200, b"hello")
        assert made.connections == 2


async def test_a_kept_connection_that_the_replica_closed_is_not_used() -> None:
    async with replica(sends(WHOLE, close=True)) as (made, client):
        for _ in range(3):
            assert await answer(made, client) == (200, b"hello")
            await asyncio.sleep(0.02)
        assert made.connections == 3


async def test_connections_are_not_kept_for_long() -> None:
    async with replica(sends(WHOLE), keep_alive_s=0.02) as (made, client):
        await answer(made, client)
        await asyncio.sleep(0.03)
        await answer(made, client)
        assert made.connections == 2


async def test_silence_fails() -> None:
    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhe")
        await asyncio.sleep(10)

    async with replica(serve, silence_s=0.1) as (made, client):
        connection = await ask(made, client)
        assert await chunk(connection) == b"he"
        with pytest.raises(TimeoutError):
            await chunk(connection)
        connection.release()


async def test_giving_up_closes_the_connection() -> None:
    closed = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhe")
        try:
            assert await reader.read() == b""
        except ConnectionError:
            pass
        closed.set()

    async with replica(serve) as (made, client):
        connection = await ask(made, client)
        connection.release()
        await asyncio.wait_for(closed.wait(), 5)
        closed.clear()
        waiting = asyncio.create_task(answer(made, client))
        await asyncio.sleep(0.05)
        waiting.cancel()
        await asyncio.wait_for(closed.wait(), 5)


async def test_a_slow_reader_makes_the_replica_wait_and_is_not_taken_for_silence() -> None:
    size_bytes = 32 << 20
    written = 0

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size_bytes)
        for _ in range(size_bytes >> 16):
            writer.write(b"x" * (1 << 16))
            await writer.drain()
            written += 1 << 16

    async with replica(serve, silence_s=0.6) as (made, client):
        connection = await ask(made, client)
        await chunk(connection)
        await asyncio.sleep(1.3)
        assert written < size_bytes  # the sockets' buffers are full, and ours is bounded
        read_bytes = 0
        while data := await chunk(connection):
            read_bytes += len(data)
        connection.release()
        assert size_bytes - (8 << 20) < read_bytes < size_bytes
        for _ in range(3):
            assert len((await answer(made, client))[1]) == size_bytes
        assert made.connections == 1


async def test_an_answer_over_the_limit_is_refused() -> None:
    async with replica(sends(b"HTTP/1.1 500 X\r\ncontent-length: 100000\r\n\r\n", b"x" * 60_000, b"")) as (
        made,
        client,
    ):
        connection = await ask(made, client)
        with pytest.raises(Lost, match="50000"):
            await connection.read(50_000)
        connection.release()


async def test_nobody_listens() -> None:
    async with replica(sends(WHOLE)) as (made, client):
        pass
    client = Client(silence_s=1)
    with pytest.raises(Unreachable):
        await ask(made, client)
    await client.close()


async def test_an_address_or_key_cannot_add_headers() -> None:
    client = Client(silence_s=1)
    for url, bearer in (("http://127.0.0.1:1", "key\r\nx: y"), ("ftp://127.0.0.1", "key"), ("http:///x", "key")):
        with pytest.raises(ValueError):
            await client.post(url, "/x", bearer=bearer, request_id="r", body=b"")
    await client.close()


async def test_targets() -> None:
    assert parse_target("http://[::1]:80/app/")[:3] == ("::1", 80, False)
    assert parse_target("https://replica/app").port == 443
    assert parse_target("http://replica:8000/app").prefix == "/app"
