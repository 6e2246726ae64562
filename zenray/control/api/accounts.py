"""Admin routes for organisations, credits, keys and usage."""

from __future__ import annotations

import secrets
from typing import Annotated

from fastapi import APIRouter, Depends, Query

from zenray.control.api.context import ControlContext
from zenray.control.api.schemas import (
    Balance,
    CreatedKey,
    CreditRow,
    KeyRow,
    NewCredit,
    NewKeyBody,
    NewOrg,
    OrgRow,
    Rows,
)
from zenray.control.auth.service import create_key, create_org, get_org, list_keys, list_orgs, revoke_key
from zenray.control.auth.tables import ApiKey
from zenray.control.billing.report import GroupBy, UsageLine, usage_report
from zenray.control.billing.service import add_credit, balance_nano_usd, balances
from zenray.control.edge.leases import held_nano_usd
from zenray.spec.money import format_usd, usd_to_nano_usd


def accounts_router(control: ControlContext) -> APIRouter:
    router = APIRouter(prefix="/admin", dependencies=[Depends(control.admin_door.dependency())], tags=["accounts"])
    database, clock = control.database, control.clock

    @router.post("/orgs", status_code=201)
    def post_org(body: NewOrg) -> OrgRow:
        with database.write() as session:
            org = create_org(session, body.name, now=clock.now())
            return OrgRow(name=org.name, balance_nano_usd=0, created_at=org.created_at)

    @router.get("/orgs")
    def get_orgs() -> Rows[OrgRow]:
        with database.read() as session:
            amounts = balances(session)
            return Rows(
                data=[
                    OrgRow(name=org.name, balance_nano_usd=amounts.get(org.name, 0), created_at=org.created_at)
                    for org in list_orgs(session)
                ]
            )

    @router.post("/orgs/{org}/credits")
    def post_credit(org: str, body: NewCredit) -> CreditRow:
        key = body.idempotency_key or secrets.token_hex(16)
        amount = usd_to_nano_usd(body.amount_usd)
        with database.write() as session:
            get_org(session, org)
            entry, new = add_credit(session, org, amount, idempotency_key=key, note=body.note, now=clock.now())
            return CreditRow(
                org=org,
                amount_nano_usd=entry.amount_nano_usd,
                new=new,
                idempotency_key=key,
                balance_nano_usd=balance_nano_usd(session, org),
            )

    @router.get("/orgs/{org}/balance")
    def get_balance(org: str) -> Balance:
        with database.read() as session:
            get_org(session, org)
            balance, held = balance_nano_usd(session, org), held_nano_usd(session, org)
        return Balance(
            org=org,
            balance_nano_usd=balance,
            held_nano_usd=held,
            available_nano_usd=balance - held,
            balance_usd=format_usd(balance),
        )

    @router.post("/keys", status_code=201)
    def post_key(body: NewKeyBody) -> CreatedKey:
        """The answer holds the key: it is shown this one time, only its SHA-256 is kept."""
        with database.write() as session:
            made = create_key(session, prefix=control.key_prefix, now=clock.now(), **body.model_dump())
            return CreatedKey(**_key_row(made.row).model_dump(), key=made.secret)

    @router.get("/keys")
    def get_keys(org: str | None = None) -> Rows[KeyRow]:
        with database.read() as session:
            return Rows(data=[_key_row(row) for row in list_keys(session, org)])

    @router.delete("/keys/{key_id}")
    def delete_key(key_id: str) -> KeyRow:
        """Revokes: gateways that are connected refuse the key within two seconds."""
        with database.write() as session:
            return _key_row(revoke_key(session, key_id, now=clock.now()))

    @router.get("/usage")
    def get_usage(
        org: str | None = None,
        since: Annotated[float | None, Query(description="Seconds since the epoch, inclusive.")] = None,
        until: Annotated[float | None, Query(description="Seconds since the epoch, exclusive.")] = None,
        group_by: GroupBy = "day",
    ) -> Rows[UsageLine]:
        with database.read() as session:
            if org is not None:
                get_org(session, org)
            return Rows(data=usage_report(session, group_by=group_by, org=org, since=since, until=until))

    return router


def _key_row(row: ApiKey) -> KeyRow:
    return KeyRow(
        id=row.key_id,
        shown=row.shown,
        org=row.org,
        name=row.name,
        user_id=row.user_id,
        scopes=list(row.scopes),
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        created_at=row.created_at,
    )
