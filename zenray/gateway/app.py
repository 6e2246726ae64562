"""The gateway as an ASGI application: routes, keys, and the parts that run as long as it does."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine

from zenray.gateway import admission, document, leftovers
from zenray.gateway.admission import Endpoint
from zenray.gateway.canaries import Canaries
from zenray.gateway.config import GatewayConfig
from zenray.gateway.credit import Credit
from zenray.gateway.edge import EdgeClient, follow_snapshot
from zenray.gateway.homes import Homes
from zenray.gateway.http_client import Client
from zenray.gateway.logs import RequestLog
from zenray.gateway.metering import LeaseBook, Meter, Shipper
from zenray.gateway.metrics import CONTENT_TYPE, FOLD_INTERVAL_S, Metrics
from zenray.gateway.proxy import Proxy
from zenray.gateway.reply import WRITE, ClientGone, Disconnect, Receive, Reply, Scope, Send, read_body
from zenray.gateway.snapshot import Directory, Key, Route
from zenray.gateway.tracing import Tracing, open_tracing
from zenray.gateway.upstream import Upstream, Waker, new_session
from zenray.spec.clock import Clock, SystemClock
from zenray.spec.errors import InvalidRequest, ModelNotFound, NotFound, UpstreamFailed, ZenrayError, suggest

log = logging.getLogger(__name__)

_MODELS = "/v1/models"
_LAST_SHIPMENT_S = 5.0
_QUESTIONS = {endpoint.value: endpoint for endpoint in Endpoint}
_METHODS = {
    **dict.fromkeys(_QUESTIONS, "POST"),
    **dict.fromkeys((_MODELS, "/healthz", "/readyz", "/metrics", "/openapi.json", "/docs"), "GET"),
}


class Gateway:
    """One process's gateway. `start` and `stop` in the event loop that serves it."""

    def __init__(
        self, config: GatewayConfig, index: int = 0, clock: Clock | None = None, homes: Homes | None = None
    ) -> None:
        """`homes`: shared by the processes of one gateway."""
        self.config = config
        self._index = index
        self._homes = homes or Homes()
        self.gateway_id = config.process_id(index)
        self._clock = clock or SystemClock()
        self._folder = config.process_dir(index)
        self.directory = Directory(self._folder / "snapshot.jsonl", self._clock, max_age_s=config.max_snapshot_age_s)
        self._metrics = Metrics()
        self._request_log = RequestLog(self.gateway_id)
        self._tasks: list[asyncio.Task[None]] = []
        self.replaced = False
        self._tracing: Tracing | None = None
        self._get: dict[str, Callable[[Scope, Reply], Awaitable[None]]] = {
            "/healthz": self._healthz,
            "/readyz": self._readyz,
            "/metrics": self._metrics_page,
            "/openapi.json": self._openapi,
            "/docs": self._docs,
            _MODELS: self._models,
        }

    async def start(self) -> None:
        """Take over the folder and its log, load the last snapshot, begin to talk with control."""
        config = self.config
        token = config.edge_token()
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self.directory.load():
            log.info("snapshot_loaded", extra={"version": self.directory.version})
        self.meter = Meter(
            self._folder / "usage",
            self.gateway_id,
            max_streams=config.max_streams,
            max_wal_bytes=config.max_wal_bytes,
            clock=self._clock,
        )
        self._tracing = open_tracing(config.otlp_endpoint, share=config.trace_share, gateway_id=self.gateway_id)
        self._session = new_session()
        self._replicas = Client(silence_s=config.upstream_silence_s)
        edge = EdgeClient(self._session, config.control_url, token, self.gateway_id)
        self._shipper = Shipper(self.meter, edge.ship, interval_s=config.ship_interval_s)
        credit = Credit(
            LeaseBook(self._clock),
            edge,
            gateway_id=self.gateway_id,
            boot_id=self.meter.boot_id,
            wait_s=config.lease_wait_s,
            ship_first=self._shipper.drain,
            on_replaced=self._restart,
        )
        self._upstream = Upstream(self._replicas, self.directory, self._clock, self._metrics, self._homes)
        canaries = Canaries(self.directory)
        self._proxy = Proxy(
            directory=self.directory,
            credit=credit,
            meter=self.meter,
            upstream=self._upstream,
            waker=Waker(self._session, self.directory, timeout_s=config.wake_timeout_s),
            metrics=self._metrics,
            request_log=self._request_log,
            ping_interval_s=config.ping_interval_s,
            canaries=canaries,
        )
        self._run("snapshot", follow_snapshot(edge, self.directory))
        self._run("shipper", self._shipper.run())
        self._run("credit", credit.run())
        self._run("metrics", self._fold_metrics())
        told = canaries.run(edge.tell_canaries, gateway_id=self.gateway_id, boot_id=self.meter.boot_id)
        self._run("canaries", told)
        if self._index == 0:
            others = leftovers.take_over(config, edge, self.directory, self._clock)
            self._tasks.append(asyncio.get_running_loop().create_task(others, name="leftovers"))
        log.info("started", extra={"boot_id": self.meter.boot_id, "pid": os.getpid()})

    async def stop(self) -> None:
        """Ship what is left if control takes it soon, and close the log. What is not shipped waits on the disk."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            async with asyncio.timeout(_LAST_SHIPMENT_S):
                await self._shipper.drain()
        except TimeoutError:
            log.warning("usage_left_on_disk", extra={"events": self.meter.unshipped_events})
        self.meter.close()
        await self._replicas.close()
        await self._session.close()
        self._request_log.flush()
        self._metrics.fold()
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)
        log.info("stopped")

    def _run(self, name: str, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work, name=name)
        task.add_done_callback(self._ended)
        self._tasks.append(task)

    async def _fold_metrics(self) -> None:
        while True:
            await asyncio.sleep(FOLD_INTERVAL_S)
            self._metrics.fold()
            self._tell_state()

    def _tell_state(self) -> None:
        self._metrics.state(
            open_streams=self.meter.open_streams,
            wal_bytes=self.meter.wal_bytes,
            unshipped_events=self.meter.unshipped_events,
            suspects=self._upstream.suspects(),
            outstanding=self._upstream.outstanding_by_model(),
        )

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A part that must not end has ended: without it keys or money go wrong, so the process ends too."""
        if not task.cancelled():
            log.critical("part_failed", extra={"part": task.get_name()}, exc_info=task.exception())
            os._exit(70)

    def _restart(self) -> None:
        """Control lends to this boot no more: drain and end, so that whoever started this process starts it anew."""
        if not self.replaced:
            self.replaced = True
            log.critical("replaced", extra={"boot_id": self.meter.boot_id})
            os.kill(os.getpid(), signal.SIGTERM)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            await self.start()
        except Exception as error:
            log.critical("start_failed", extra={"reason": str(error)}, exc_info=not isinstance(error, ZenrayError))
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.stop()
        await send({"type": "lifespan.shutdown.complete"})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = Reply(send, "req_" + os.urandom(16).hex(), scope.get(WRITE))
        try:
            endpoint = _QUESTIONS.get(scope["path"])
            if endpoint is not None and scope["method"] == "POST":
                if self._tracing is not None:
                    reply.trace = self._tracing.begin(scope["path"], scope["headers"])
                await self._question(endpoint, scope, receive, reply)
            else:
                await self._other(scope, reply)
        except ZenrayError as error:
            await reply.fail(error, close=error.status == 413)
        except ClientGone:
            pass
        except asyncio.CancelledError:
            # The server stops, and has waited as long as it may.
            await reply.fail(UpstreamFailed("The gateway is being stopped.", hint="Retry the request."))
            raise
        except Exception:
            log.exception("internal_error", extra={"request_id": reply.request_id})
            await reply.fail(ZenrayError("The gateway failed.", hint=f"Report the id {reply.request_id}."))
        if reply.trace is not None:
            reply.trace.end(reply.model, reply.status, reply.request_id)
        if scope["path"].startswith("/v1/"):
            self._metrics.request(reply.model, reply.status or 499, time.perf_counter() - reply.started_s)

    async def _question(self, endpoint: Endpoint, scope: Scope, receive: Receive, reply: Reply) -> None:
        headers = dict(scope["headers"])
        key = self._authenticate(headers.get(b"authorization"))
        if headers.get(b"content-encoding", b"identity") != b"identity":
            raise InvalidRequest("Compressed request bodies are not taken.", hint="Send the body uncompressed.")
        declared = headers.get(b"content-length")
        raw = await read_body(
            receive, int(declared) if declared and declared.isdigit() else None, self.config.max_body_bytes
        )
        disconnect = Disconnect(scope, receive)
        try:
            await self._proxy.answer(endpoint, key, raw, reply, disconnect)
        finally:
            disconnect.stop()

    def _authenticate(self, authorization: bytes | None) -> Key:
        self.directory.check_usable()
        return admission.authenticate(authorization, self.directory, self._clock.now(), self.config.key_prefix)

    async def _other(self, scope: Scope, reply: Reply) -> None:
        path, method = scope["path"], scope["method"]
        allowed = _METHODS.get(path) or ("GET" if path.startswith(_MODELS + "/") else None)
        if allowed is None:
            raise NotFound(f"Invalid URL ({method} {path[:200]}).", hint=suggest(path[:200], _METHODS))
        if method != allowed and not (method == "HEAD" and allowed == "GET"):
            raise _MethodNotAllowed(f"{path[:200]} takes {allowed}, not {method}.")
        if path in self._get:
            await self._get[path](scope, reply)
        else:
            await self._model(scope, reply)

    async def _models(self, scope: Scope, reply: Reply) -> None:
        key = self._authenticate(dict(scope["headers"]).get(b"authorization"))
        data = [_card(route) for route in self.directory.visible_to(key)]
        await reply.json({"object": "list", "data": data})

    async def _model(self, scope: Scope, reply: Reply) -> None:
        key = self._authenticate(dict(scope["headers"]).get(b"authorization"))
        name = scope["path"].removeprefix(_MODELS + "/")
        route = self.directory.routes.get(name)
        if route is None or not key.allows(name):
            visible = [one.entry.model for one in self.directory.visible_to(key)]
            raise ModelNotFound(
                f"The model '{name[:128]}' does not exist.", hint=suggest(name[:128], visible), param="model"
            )
        await reply.json(_card(route))

    async def _healthz(self, scope: Scope, reply: Reply) -> None:
        await reply.json({"status": "ok"})

    async def _readyz(self, scope: Scope, reply: Reply) -> None:
        """200 when questions are answered; 503 with the reasons otherwise."""
        reasons = [reason for reason in (self.directory.why_unusable(),) if reason]
        if self.replaced:
            reasons.append("Control lends nothing to this start of the gateway; it is being restarted.")
        if self.meter.wal_bytes >= self.config.max_wal_bytes:
            reasons.append(f"The usage log holds {self.meter.wal_bytes} bytes, its bound: control takes no usage.")
        status = {
            "status": "unready" if reasons else "ready",
            "reasons": reasons,
            "gateway_id": self.gateway_id,
            "snapshot_version": self.directory.version,
            "unshipped_events": self.meter.unshipped_events,
        }
        await reply.json(status, 503 if reasons else 200)

    async def _metrics_page(self, scope: Scope, reply: Reply) -> None:
        self._tell_state()
        await reply.whole(200, self._metrics.render(), [(b"content-type", CONTENT_TYPE)])

    async def _openapi(self, scope: Scope, reply: Reply) -> None:
        await reply.json(document.openapi())

    async def _docs(self, scope: Scope, reply: Reply) -> None:
        await reply.whole(200, document.page(), [(b"content-type", b"text/html; charset=utf-8")])


class _MethodNotAllowed(InvalidRequest):
    code, status = "method_not_allowed", 405


def _card(route: Route) -> dict[str, object]:
    entry = route.entry
    return {"id": entry.model, "object": "model", "created": int(entry.created_at), "owned_by": "zenray"}
