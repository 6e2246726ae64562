"""HTTP for gateways: `/edge/snapshot`, `/edge/leases`, `/edge/usage`, `/edge/canaries`, behind the edge token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response
from prometheus_client import CollectorRegistry, Counter
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool

from zenray.control.auth.tokens import TokenDoor
from zenray.control.db.engine import Database
from zenray.control.edge.intake import take_usage
from zenray.control.edge.leases import lease, see_gateway
from zenray.control.edge.snapshot import SnapshotFeed, render_snapshot
from zenray.spec.clock import Clock
from zenray.spec.edge import CanaryReport, Lease, LeaseRequest, Snapshot, UsageAck, UsageBatch
from zenray.spec.errors import InvalidRequest

LONG_POLL_S = 25.0


class EdgeCounters:
    """Prometheus counters of what crosses the edge."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.received = Counter("zenray_usage_events_received", "Usage events shipped by gateways.", registry=registry)
        self.charged = Counter("zenray_usage_events_charged", "Usage events new to the ledger.", registry=registry)
        self.spent = Counter("zenray_usage_nano_usd", "Nano-USD charged for usage.", registry=registry)
        self.uncovered = Counter("zenray_usage_uncovered_nano_usd", "Charged without a lease.", registry=registry)
        self.lent = Counter("zenray_leases_granted_nano_usd", "Nano-USD lent to gateways.", registry=registry)
        self.refused = Counter("zenray_leases_empty", "Lease requests that got nothing.", registry=registry)


def edge_router(
    database: Database,
    *,
    door: TokenDoor,
    clock: Clock,
    feed: SnapshotFeed,
    registry: CollectorRegistry,
    take_canaries: Callable[[CanaryReport, float], None],
    long_poll_s: float = LONG_POLL_S,
) -> APIRouter:
    router = APIRouter(prefix="/edge", dependencies=[Depends(door.dependency())], tags=["edge"])
    counters = EdgeCounters(registry)

    def read_snapshot(gateway_id: str, since: int) -> bytes:
        now = clock.now()
        with database.write() as session:
            see_gateway(session, gateway_id, now=now)
        with database.read() as session:
            return render_snapshot(session, since, now=now)

    @router.get("/snapshot", response_model=Snapshot)
    async def get_snapshot(gateway_id: Annotated[str, Query(min_length=1, max_length=128)], since: int = 0) -> Response:
        """Answers when there is something newer than `since`; after 25 s with nothing new."""
        if since > 0:
            await feed.wait(since, long_poll_s)
        body = await run_in_threadpool(read_snapshot, gateway_id, since)
        return Response(body, media_type="application/json")

    @router.post("/leases")
    def post_lease(request: LeaseRequest) -> Lease:
        with database.write() as session:
            answer = lease(session, request, now=clock.now())
        counters.lent.inc(answer.granted_nano_usd)
        if answer.granted_nano_usd == 0:
            counters.refused.inc()
        return answer

    def apply_usage(body: bytes) -> UsageAck:
        try:
            batch = UsageBatch.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise InvalidRequest(f"{where or 'body'}: {first['msg']}.", param=where or None) from None
        with database.write() as session:
            intake = take_usage(session, batch, now=clock.now())
        counters.received.inc(intake.ack.received)
        counters.charged.inc(intake.ack.new)
        counters.spent.inc(intake.charged_nano_usd)
        counters.uncovered.inc(intake.uncovered_nano_usd)
        return intake.ack

    @router.post("/usage", openapi_extra={"requestBody": {"description": "A spec.edge.UsageBatch as JSON."}})
    async def post_usage(request: Request) -> UsageAck:
        """Parsed apart from FastAPI's own way, which would read the JSON twice."""
        return await run_in_threadpool(apply_usage, await request.body())

    @router.post("/canaries", status_code=204)
    async def post_canaries(report: CanaryReport) -> None:
        """The newest totals of one gateway; the next round of the reconciler looks at them."""
        take_canaries(report, clock.now())

    return router
