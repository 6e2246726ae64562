"""A control in memory: hands out a snapshot by long poll, lends credit, and keeps every usage event it is sent."""

from __future__ import annotations

import asyncio
import hashlib
import socket
import time
from decimal import Decimal

from aiohttp import web

from zenray.spec.edge import (
    CanaryReport,
    Endpoint,
    KeyEntry,
    Lease,
    LeaseRequest,
    OrgEntry,
    RouteEntry,
    RouteState,
    Snapshot,
    UsageAck,
    UsageBatch,
)
from zenray.spec.money import Price
from zenray.spec.usage import UsageEvent

TOKEN = "edge-token-of-the-tests"
PRICE = Price(
    version="1",
    input_usd_per_1k=Decimal("0.001"),
    cached_input_usd_per_1k=Decimal("0.0005"),
    output_usd_per_1k=Decimal("0.002"),
)


def route(model: str, urls: list[str] | None = None, **changes: object) -> RouteEntry:
    """A ready route to `urls`; `changes` replace fields."""
    fields: dict[str, object] = {
        "model": model,
        "created_at": 1_700_000_000,
        "state": RouteState.READY,
        "revision": f"{model}--1--abc",
        "upstream_model": "scripted",
        "endpoints": tuple(Endpoint(replica_id=f"{model}#{n}", url=url) for n, url in enumerate(urls or [])),
        "engine_key": "engine-key",
        "price": PRICE,
        "context_tokens": 8192,
        "default_max_tokens": 256,
    }
    return RouteEntry.model_validate(fields | changes)


class FakeControl:
    """Start with `start`; change with `publish`. `balance_nano_usd` is one organisation's after another's leases."""

    def __init__(self) -> None:
        self.version = 0
        self.keys: dict[str, KeyEntry | None] = {}
        self.orgs: dict[str, OrgEntry | None] = {}
        self.routes: dict[str, RouteEntry | None] = {}
        self.free_nano_usd: dict[str, int] = {}
        self.events: dict[str, UsageEvent] = {}
        self.leases: list[LeaseRequest] = []
        self.deltas: dict[int, Snapshot] = {}
        self.leases_fail = False
        self.usage_fails = False
        self.replaced_boots: set[str] = set()  # get 409 for leases
        self.canaries: dict[tuple[str, float], tuple[int, int]] = {}  # (requests, failed), as told last
        self._changed = asyncio.Event()
        self._runner: web.AppRunner | None = None
        self.url = ""

    def add_key(self, secret: str, org: str = "acme", *, balance_nano_usd: int = 10**12, **fields: object) -> None:
        digest = hashlib.sha256(secret.encode()).hexdigest()
        entry = {"key_id": f"key_{len(self.keys) + 1}", "org": org} | fields
        self.keys[digest] = KeyEntry.model_validate(entry)
        self.orgs.setdefault(org, OrgEntry(org=org, cache_salt=f"salt-of-{org}-" + "x" * 32))
        self.free_nano_usd.setdefault(org, balance_nano_usd)

    def revoke(self, secret: str) -> None:
        digest = hashlib.sha256(secret.encode()).hexdigest()
        entry = self.keys[digest]
        assert entry is not None
        revoked = entry.model_copy(update={"revoked": True})
        self.keys[digest] = revoked
        self.publish(keys={digest: revoked})

    def set_route(self, entry: RouteEntry) -> None:
        self.routes[entry.model] = entry
        self.publish(routes={entry.model: entry})

    def publish(self, **delta: object) -> None:
        """A new version, told to everybody who waits. Without arguments: everything anew."""
        self.version += 1
        if delta:
            self.deltas[self.version] = Snapshot(version=self.version, full=False, issued_at=time.time(), **delta)
        else:
            self.deltas.clear()
        self._changed.set()
        self._changed = asyncio.Event()

    async def start(self, port: int = 0) -> None:
        app = web.Application(client_max_size=64 << 20)
        app.router.add_get("/edge/snapshot", self._snapshot)
        app.router.add_post("/edge/leases", self._lease)
        app.router.add_post("/edge/usage", self._usage)
        app.router.add_post("/edge/canaries", self._canaries)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        listener = socket.create_server(("127.0.0.1", port))
        await web.SockSite(self._runner, listener).start()
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"

    async def stop(self) -> None:
        if self._runner:
            self._changed.set()
            await self._runner.cleanup()
            self._runner = None

    def _check(self, request: web.Request) -> None:
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            raise web.HTTPUnauthorized

    async def _snapshot(self, request: web.Request) -> web.Response:
        self._check(request)
        since = int(request.query["since"])
        if since == self.version:
            try:
                async with asyncio.timeout(10):
                    await self._changed.wait()
            except TimeoutError:
                return web.Response(status=204)
        if since > 0 and since + 1 in self.deltas:
            answer = self.deltas[since + 1]
        else:
            answer = Snapshot(
                version=self.version,
                full=True,
                issued_at=time.time(),
                keys=self.keys,
                orgs=self.orgs,
                routes=self.routes,
            )
        return web.Response(body=answer.model_dump_json().encode(), content_type="application/json")

    async def _lease(self, request: web.Request) -> web.Response:
        self._check(request)
        if self.leases_fail:
            raise web.HTTPInternalServerError
        wish = LeaseRequest.model_validate_json(await request.read())
        if wish.boot_id in self.replaced_boots:
            raise web.HTTPConflict(text="declared lost")
        self.leases.append(wish)
        free = self.free_nano_usd.get(wish.org, 0) + wish.give_back_nano_usd
        granted = min(free, wish.wanted_nano_usd)
        self.free_nano_usd[wish.org] = free - granted
        lease = Lease(org=wish.org, granted_nano_usd=granted, balance_nano_usd=free)
        return web.Response(body=lease.model_dump_json().encode(), content_type="application/json")

    async def _usage(self, request: web.Request) -> web.Response:
        self._check(request)
        if self.usage_fails:
            raise web.HTTPInternalServerError
        batch = UsageBatch.model_validate_json(await request.read())
        new = [event for event in batch.events if event.billing_key not in self.events]
        self.events.update({event.billing_key: event for event in new})
        ack = UsageAck(received=len(batch.events), new=len(new))
        return web.Response(body=ack.model_dump_json().encode(), content_type="application/json")

    async def _canaries(self, request: web.Request) -> web.Response:
        self._check(request)
        report = CanaryReport.model_validate_json(await request.read())
        self.canaries.update({(one.revision, one.since): (one.requests, one.failed) for one in report.canaries})
        return web.Response(status=204)
