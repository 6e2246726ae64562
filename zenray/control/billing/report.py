"""Usage added up by day, model or key."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from zenray.control.billing.tables import UsageRecord

GroupBy = Literal["day", "model", "key"]
_COLUMNS = {"day": UsageRecord.day, "model": UsageRecord.model_answered, "key": UsageRecord.key_id}


class UsageLine(BaseModel):
    """The requests of one group. `group`: a UTC day (YYYY-MM-DD), a model that answered, or a key's id."""

    group: str
    requests: int
    input_tokens: int
    cached_input_tokens: int
    output_tokens: int
    cost_nano_usd: int


def usage_report(
    session: Session,
    *,
    group_by: GroupBy,
    org: str | None = None,
    since: float | None = None,
    until: float | None = None,
) -> list[UsageLine]:
    """Requests opened in [since, until), in the order of `group`. The costs are what the ledger was charged."""
    column = _COLUMNS[group_by]
    query = select(
        column,
        func.count(),
        func.sum(UsageRecord.input_tokens),
        func.sum(UsageRecord.cached_input_tokens),
        func.sum(UsageRecord.output_tokens),
        func.sum(UsageRecord.cost_nano_usd),
    )
    if org is not None:
        query = query.where(UsageRecord.org == org)
    if since is not None:
        query = query.where(UsageRecord.at >= since)
    if until is not None:
        query = query.where(UsageRecord.at < until)
    return [
        UsageLine(
            group=group,
            requests=requests,
            input_tokens=int(input_tokens),
            cached_input_tokens=int(cached),
            output_tokens=int(output_tokens),
            cost_nano_usd=int(cost),
        )
        for group, requests, input_tokens, cached, output_tokens, cost in session.execute(
            query.group_by(column).order_by(column)
        )
    ]
