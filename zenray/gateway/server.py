"""The processes of a gateway: sockets, signals, draining, and how a client's connection is watched."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from zenray.gateway.app import Gateway
from zenray.gateway.config import GatewayConfig
from zenray.gateway.homes import Homes
from zenray.gateway.logs import log_to_stderr
from zenray.gateway.metrics import forget_process
from zenray.gateway.reply import DISCONNECTS, WRITE

log = logging.getLogger(__name__)

_BACKLOG = 2048
_MAX_HEADER_BYTES = 64 << 10
_STALL_S = 30.0
_RESTART_PAUSE_S = 0.5
REPLACED_STATUS = 75
"""Exit status of a process that only a new start can help: control has replaced it, or declared it lost."""


class ClientConnection(HttpToolsProtocol):
    """uvicorn's protocol, which also tells every open request of a connection when that is lost.

    uvicorn tells only the newest request, and only when it asks; a watching task for each request would cost more
    than all of admission. It lets a stream be written without a turn of a task for each chunk. And it bounds the
    headers, which uvicorn takes at any length, and the time in which a request comes, which uvicorn does not.
    """

    def connection_made(self, transport: Any) -> None:
        self._listeners: set[Callable[[], None]] = set()
        self._header_bytes = 0
        self._stalled_since_s: float | None = None
        super().connection_made(transport)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._header_bytes = 0
        self.scope[DISCONNECTS] = self._listeners  # type: ignore[literal-required]

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        scope = self.scope
        self._stalled_since_s = None
        super().on_headers_complete()
        if self.cycle is not None and self.cycle.scope is scope:
            scope[WRITE] = partial(_write, self.cycle)  # type: ignore[literal-required]

    def on_body(self, body: bytes) -> None:
        self._stalled_since_s = None
        super().on_body(body)

    def end_if_stalled(self, now_s: float) -> None:
        """Close the connection if its client owes a request for 30 s: all of its headers, or more of its body.

        Call it about once a second. While a connection rests between requests, uvicorn's own timer runs.
        """
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            owed = self.timeout_keep_alive_task is None
        else:
            owed = cycle.more_body and not self.flow.read_paused
        if not owed:
            self._stalled_since_s = None
        elif self._stalled_since_s is None:
            self._stalled_since_s = now_s
        elif now_s - self._stalled_since_s >= _STALL_S:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for listener in tuple(self._listeners):
            listener()

    def _count(self, size_bytes: int) -> None:
        self._header_bytes += size_bytes
        if self._header_bytes > _MAX_HEADER_BYTES:
            raise ValueError("headers too large")  # the parser turns it into its own error, and that into a 400


class _Server(uvicorn.Server):
    """uvicorn's server, which also ends connections whose clients keep it waiting."""

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:  # once a second
            now_s = time.monotonic()
            for connection in tuple(self.server_state.connections):
                if isinstance(connection, ClientConnection):
                    connection.end_if_stalled(now_s)
        return await super().on_tick(counter)


def _write(cycle: RequestResponseCycle, data: bytes) -> bool:
    """As the cycle's `send` of a chunk, but at once. A connection that is lost takes everything."""
    if cycle.disconnected:
        return False
    if not cycle.chunked_encoding or cycle.response_complete:
        raise RuntimeError("no chunked answer is under way")
    if data:  # an empty chunk would end the answer
        cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
    return cycle.flow.write_paused


def bind(config: GatewayConfig, port: int) -> socket.socket:
    """A socket on the gateway's port, not listening yet; several may be bound to one port."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if config.processes > 1:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((config.host, port))
    except OSError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


def serve(config: GatewayConfig, index: int, listener: socket.socket, homes: Homes) -> None:
    """Run one gateway process until SIGTERM, SIGINT, the loss of its parent, or until control replaces it."""
    log_to_stderr(config.process_id(index))
    gateway = Gateway(config, index, homes=homes)

    def end(number: int, frame: object) -> None:
        sys.exit(REPLACED_STATUS if gateway.replaced else 0)

    # uvicorn raises the signal that stopped it once more when it has drained; then this ends the process.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    server = _Server(
        uvicorn.Config(
            gateway,
            loop="uvloop",
            http=ClientConnection,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=_BACKLOG,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=round(config.drain_timeout_s),
        )
    )
    server.run(sockets=[listener])


def run(config: GatewayConfig) -> int:
    """Run the whole gateway, as many processes as configured; returns the exit status."""
    log_to_stderr(config.gateway_id)
    config.edge_token()
    config.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        first = bind(config, config.port)
    except OSError as error:
        log.critical("cannot_listen", extra={"host": config.host, "port": config.port, "reason": error.strerror})
        return 1
    port = first.getsockname()[1]
    host = f"[{config.host}]" if ":" in config.host else config.host
    log.info("listening", extra={"url": f"http://{host}:{port}", "port": port, "processes": config.processes})
    if config.processes == 1:
        serve(config, 0, first, Homes())
        return 0
    return _Family(config, port, first).run()


class _Family:
    """The parent of several gateway processes: starts them, starts a lost one again, stops them together.

    The parent's socket only holds the port; it never listens, so the kernel deals connections to the children alone.
    """

    def __init__(self, config: GatewayConfig, port: int, holder: socket.socket) -> None:
        self._config = config
        self._port = port
        self._holder = holder
        self._homes = Homes()
        self._children: dict[int, int] = {}  # process id → index
        self._stopping = False

    def run(self) -> int:
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        self._alive_read, self._alive_write = os.pipe()
        for index in range(self._config.processes):
            self._start(index)
        while self._children:
            try:
                pid, status = os.wait()
            except ChildProcessError:
                break
            index = self._children.pop(pid)
            forget_process(pid)
            if self._stopping:
                continue
            log.error("process_lost", extra={"index": index, "status": os.waitstatus_to_exitcode(status)})
            time.sleep(_RESTART_PAUSE_S)
            if not self._stopping:
                self._start(index)
        return 0

    def _start(self, index: int) -> None:
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            self._children[pid] = index
            return
        status = 1
        try:
            self._be_child(index)
            status = 0
        except SystemExit as stopped:
            status = stopped.code if isinstance(stopped.code, int) else 1
        except KeyboardInterrupt:
            status = 0
        except BaseException:
            log.exception("process_failed")
        finally:
            os._exit(status)

    def _be_child(self, index: int) -> None:
        os.close(self._alive_write)
        threading.Thread(target=_stop_without_parent, args=(self._alive_read,), daemon=True).start()
        listener = bind(self._config, self._port)
        self._holder.close()
        serve(self._config, index, listener, self._homes)

    def _stop(self, number: int, frame: object) -> None:
        self._stopping = True
        for pid in tuple(self._children):
            try:
                os.kill(pid, signal.SIGTERM)
            except ProcessLookupError:
                pass


def _stop_without_parent(alive_read: int) -> None:
    """Wait for the parent's end, however it comes: only it holds the other end of the pipe open."""
    os.read(alive_read, 1)
    os.kill(os.getpid(), signal.SIGTERM)
