"""Lends gateways parts of a balance. The sum of what is lent and what is spent never passes what was credited.

A gateway's hold on a balance falls when the usage that it spent is shipped, in the transaction that charges it, and
when it gives back. It is released whole when a younger start of the gateway asks for its first lease (by then that
start has shipped what the older one had logged), or when an operator declares the gateway lost.

Everybody locks in one order: the gateway's row, then accounts by name. Each balance has its lock in its account row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from zenray.control.auth.service import get_org
from zenray.control.billing.repository import insert_ignoring_conflicts, lock_accounts
from zenray.control.edge.grants import grant_nano_usd
from zenray.control.edge.tables import Gateway, GatewayBoot, LeaseHold
from zenray.spec.edge import Lease, LeaseRequest
from zenray.spec.errors import Conflict, NotFound, suggest
from zenray.spec.usage import UsageEvent

ACTIVE_WITHIN_S = 60.0


def see_gateway(session: Session, gateway_id: str, *, now: float) -> Gateway:
    """Notes that the gateway was heard of, and locks its row until the commit."""
    row = {"gateway_id": gateway_id, "first_seen_at": now, "last_seen_at": now}
    session.execute(insert_ignoring_conflicts(session, Gateway.__table__).values(**row))  # type: ignore[arg-type]
    gateway = session.get_one(Gateway, gateway_id, with_for_update=True, populate_existing=True)
    gateway.last_seen_at = max(now, gateway.last_seen_at)
    return gateway


def lease(session: Session, request: LeaseRequest, *, now: float) -> Lease:
    """Takes back, then grants. Conflict for a start of a gateway that was replaced or declared lost."""
    get_org(session, request.org)
    gateway = see_gateway(session, request.gateway_id, now=now)
    _admit_boot(session, gateway, request.boot_id, now=now)
    account = lock_accounts(session, [request.org])[request.org]
    hold = _hold(session, request)
    if request.sequence is not None and hold.last_sequence is not None and request.sequence <= hold.last_sequence:
        if request.sequence < hold.last_sequence:
            raise Conflict(
                f"Lease request {request.sequence} came after request {hold.last_sequence}.",
                hint="Number lease requests upwards, and wait for the answer to one before sending the next.",
            )
        return _answer(request.org, hold.last_granted_nano_usd, account.balance_nano_usd)
    hold.held_nano_usd -= min(request.give_back_nano_usd, hold.held_nano_usd)
    session.flush()
    free = account.balance_nano_usd - held_nano_usd(session, request.org)
    granted = grant_nano_usd(free, request.wanted_nano_usd, _active_gateways(session, now))
    hold.held_nano_usd += granted
    hold.last_sequence, hold.last_granted_nano_usd = request.sequence, granted
    session.flush()
    return _answer(request.org, granted, account.balance_nano_usd)


def settle(session: Session, gateway_id: str, spent: Iterable[tuple[UsageEvent, int]]) -> int:
    """Lowers the holds that paid for usage just charged; returns the nano-USD that no hold covered.

    An event belongs to the start whose boot id is in its billing key. Usage of a start whose hold was released (it was
    lost or replaced) lowers nobody else's hold: its own charge has lowered the balance already.
    """
    holds = {
        (hold.org, hold.boot_id): hold
        for hold in session.scalars(
            select(LeaseHold).where(LeaseHold.gateway_id == gateway_id), execution_options={"populate_existing": True}
        )
    }
    boots = sorted({boot_id for _, boot_id in holds}, key=len, reverse=True)
    costs: defaultdict[tuple[str, str], int] = defaultdict(int)
    for event, cost in spent:
        boot_id = next((boot for boot in boots if boot in event.billing_key), "")
        costs[event.org, boot_id] += cost
    uncovered = 0
    for key, cost in costs.items():
        hold = holds.get(key)
        covered = min(cost, hold.held_nano_usd) if hold else 0
        if hold:
            hold.held_nano_usd -= covered
        uncovered += cost - covered
    session.flush()
    return uncovered


def declare_lost(session: Session, gateway_id: str, *, now: float) -> int:
    """Releases all that the gateway holds (returned, nano-USD). It must be started anew before it leases again.

    Usage that it ships later is still charged, and may take a balance below zero: that is the price of the decision.
    """
    gateway = session.get(Gateway, gateway_id, with_for_update=True)
    if gateway is None:
        known = session.scalars(select(Gateway.gateway_id))
        raise NotFound(f"There is no gateway {gateway_id!r}.", hint=suggest(gateway_id, known), param="gateway_id")
    released = _release(session, gateway_id)
    gateway.boot_id = None
    gateway.lost_at = now
    session.flush()
    return released


def held_nano_usd(session: Session, org: str) -> int:
    """What all gateways together hold of the organisation's balance."""
    total = session.scalars(select(func.sum(LeaseHold.held_nano_usd)).where(LeaseHold.org == org)).one()
    return int(total or 0)


def list_gateways(session: Session) -> list[tuple[Gateway, int]]:
    """Every gateway that was ever heard of, with what it holds in all (nano-USD)."""
    total = func.sum(LeaseHold.held_nano_usd)
    held = {
        name: int(amount)
        for name, amount in session.execute(select(LeaseHold.gateway_id, total).group_by(LeaseHold.gateway_id))
    }
    rows = session.scalars(select(Gateway).order_by(Gateway.gateway_id))
    return [(row, held.get(row.gateway_id, 0)) for row in rows]


def _admit_boot(session: Session, gateway: Gateway, boot_id: str, *, now: float) -> None:
    if gateway.boot_id == boot_id:
        return
    if session.get(GatewayBoot, (gateway.gateway_id, boot_id)):
        why = "was declared lost" if gateway.boot_id is None else "has been started anew since"
        raise Conflict(
            f"The gateway {gateway.gateway_id!r} {why}: this start of it can lease no more.",
            hint="Restart this gateway; if another process uses its id, give each an id of its own.",
        )
    _release(session, gateway.gateway_id)
    session.add(GatewayBoot(gateway_id=gateway.gateway_id, boot_id=boot_id, since=now))
    gateway.boot_id = boot_id
    gateway.lost_at = None
    session.flush()


def _release(session: Session, gateway_id: str) -> int:
    released = session.scalars(
        delete(LeaseHold).where(LeaseHold.gateway_id == gateway_id).returning(LeaseHold.held_nano_usd)
    )
    return sum(released)


def _hold(session: Session, request: LeaseRequest) -> LeaseHold:
    key = (request.gateway_id, request.boot_id, request.org)
    hold = session.get(LeaseHold, key, populate_existing=True)
    if hold is None:
        hold = LeaseHold(
            gateway_id=request.gateway_id,
            boot_id=request.boot_id,
            org=request.org,
            held_nano_usd=0,
            last_granted_nano_usd=0,
        )
        session.add(hold)
    return hold


def _active_gateways(session: Session, now: float) -> int:
    query = select(func.count()).where(Gateway.last_seen_at > now - ACTIVE_WITHIN_S, Gateway.lost_at.is_(None))
    return session.scalars(query.select_from(Gateway)).one()


def _answer(org: str, granted: int, balance: int) -> Lease:
    return Lease(org=org, granted_nano_usd=granted, balance_nano_usd=balance)
