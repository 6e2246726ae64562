"""Routes for whoever runs the platform: status, lost gateways, health, metrics."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from zenray import __version__
from zenray.control.api.context import ControlContext
from zenray.control.api.deployments import deployment_row
from zenray.control.api.schemas import GatewayRow, LedgerCheck, LostGateway, Status
from zenray.control.billing.audit import Finding, LedgerAudit
from zenray.control.db.published import current_version
from zenray.control.deployments.repository import load_all
from zenray.control.edge.leases import declare_lost, list_gateways
from zenray.spec.errors import Unavailable
from zenray.spec.money import format_usd


def operations_router(control: ControlContext, registry: CollectorRegistry) -> APIRouter:
    router = APIRouter(tags=["operations"])
    database, clock = control.database, control.clock
    audit = LedgerAudit(clock)

    @router.get("/admin/status", dependencies=[Depends(control.admin_door.dependency())])
    def status() -> Status:
        now = clock.now()
        rounds = control.reconciler.last_round_at
        with database.read() as session:
            return Status(
                version=__version__,
                now=now,
                database=database.engine.dialect.name,
                snapshot_version=current_version(session),
                reconciled_s_ago=None if rounds is None else max(0.0, now - rounds),
                deployments=[deployment_row(loaded) for loaded in load_all(session)],
                gateways=_gateways(session, now),
                ledger=_ledger(audit.newest(session), now),
            )

    @router.post("/admin/gateways/{gateway_id}/lost", dependencies=[Depends(control.admin_door.dependency())])
    def lost(gateway_id: str) -> LostGateway:
        """Releases what the gateway holds. Usage that it should still ship is charged, perhaps below zero."""
        with database.write() as session:
            return LostGateway(
                gateway_id=gateway_id, released_nano_usd=declare_lost(session, gateway_id, now=clock.now())
            )

    @router.get("/healthz")
    def healthz() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @router.get("/readyz")
    def readyz() -> dict[str, str]:
        """The database answers too."""
        try:
            database.ping()
        except SQLAlchemyError:
            raise Unavailable("The database does not answer.", retry_after_s=1) from None
        return {"status": "ready"}

    @router.get("/metrics", response_class=Response)
    def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return router


def _gateways(session: Session, now: float) -> list[GatewayRow]:
    return [
        GatewayRow(
            gateway_id=row.gateway_id,
            boot_id=row.boot_id,
            last_seen_at=row.last_seen_at,
            seen_s_ago=max(0.0, now - row.last_seen_at),
            lost_at=row.lost_at,
            held_nano_usd=held,
        )
        for row, held in list_gateways(session)
    ]


def _ledger(finding: Finding, now: float) -> LedgerCheck:
    differences = [
        f"{d.org}: entries come to {format_usd(d.entries_nano_usd)}, the account says {format_usd(d.account_nano_usd)}"
        for d in finding.differences
    ]
    return LedgerCheck(ok=not differences, checked_s_ago=max(0.0, now - finding.checked_at), differences=differences)
