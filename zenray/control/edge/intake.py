"""Takes usage in: charges what is new, lowers the holds that paid for it."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from sqlalchemy.orm import Session

from zenray.control.billing.service import record_usage
from zenray.control.edge.leases import see_gateway, settle
from zenray.spec.edge import UsageAck, UsageBatch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Intake:
    ack: UsageAck
    charged_nano_usd: int
    uncovered_nano_usd: int


def take_usage(session: Session, batch: UsageBatch, *, now: float) -> Intake:
    """Idempotent: whatever part of the batch was charged before is not charged again."""
    see_gateway(session, batch.gateway_id, now=now)
    recorded = record_usage(session, batch.events)
    uncovered = settle(session, batch.gateway_id, recorded.charged)
    if uncovered:
        logger.warning("%s shipped usage of %d nano-USD that no lease covered", batch.gateway_id, uncovered)
    ack = UsageAck(received=recorded.received, new=len(recorded.charged))
    return Intake(ack, sum(cost for _, cost in recorded.charged), uncovered)
