"""Bodies of the admin API: what is sent is read strictly, what is answered is typed."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from zenray.spec.documents import Document
from zenray.spec.edge import RouteEntry
from zenray.spec.job_life import JobState

T = TypeVar("T")

# No control characters: PostgreSQL cannot store NUL, and the rest has no place in a label.
LABEL = r"^[^\x00-\x1f\x7f]*$"


class Rows(BaseModel, Generic[T]):
    data: list[T]


class NewOrg(Document):
    name: str


class OrgRow(BaseModel):
    name: str
    balance_nano_usd: int
    created_at: float


class NewCredit(Document):
    amount_usd: str = Field(pattern=r"^\d{1,12}(\.\d{1,9})?$", description="US dollars, as a string: '12.50'.")
    note: str | None = Field(None, max_length=500, pattern=LABEL)
    idempotency_key: str | None = Field(
        None, min_length=1, max_length=200, pattern=LABEL, description="The same key twice credits once."
    )


class CreditRow(BaseModel):
    org: str
    amount_nano_usd: int
    new: bool
    idempotency_key: str
    balance_nano_usd: int


class Balance(BaseModel):
    """`available` is the balance less what gateways hold to spend."""

    org: str
    balance_nano_usd: int
    held_nano_usd: int
    available_nano_usd: int
    balance_usd: str


class NewKeyBody(Document):
    org: str
    name: str | None = Field(None, max_length=100, pattern=LABEL)
    user_id: str | None = Field(None, max_length=200, pattern=LABEL)
    scopes: tuple[str, ...] = ("*",)
    expires_at: float | None = Field(None, description="Seconds since the epoch.")


class KeyRow(BaseModel):
    id: str
    shown: str
    org: str
    name: str | None
    user_id: str | None
    scopes: list[str]
    expires_at: float | None
    revoked_at: float | None
    created_at: float


class CreatedKey(KeyRow):
    key: str = Field(description="The key itself, this one time.")


class DeploymentRow(BaseModel):
    """`revision` takes the traffic; `wanted_revision` is to take it. `wanted_phase` "failed": it never will."""

    model_config = ConfigDict(protected_namespaces=())

    model: str
    state: str
    message: str | None
    revision: str | None
    wanted_revision: str
    wanted_phase: str
    version: str | None
    format: str
    replicas: int
    endpoints: list[str]
    route: str | None = Field(description="What gateways were told: ready, asleep, loading, failed; null: nothing.")
    created_at: float
    updated_at: float


class EventRow(BaseModel):
    at: float
    revision: str | None
    from_state: str | None
    to_state: str
    message: str | None


class DeploymentDetail(DeploymentRow):
    events: list[EventRow]


class ModelRow(BaseModel):
    name: str
    summary: str
    parameters_total: int
    parameters_active: int
    context_tokens: int
    modalities: list[str]
    input_usd_per_1k: str
    output_usd_per_1k: str
    deployed: bool


class VersionRow(BaseModel):
    model_config = ConfigDict(protected_namespaces=())

    model: str
    version: str
    format: str
    files: int
    size_bytes: int
    created_at: float
    source: str | None


class GatewayRow(BaseModel):
    gateway_id: str
    boot_id: str | None
    last_seen_at: float
    seen_s_ago: float
    lost_at: float | None
    held_nano_usd: int


class LostGateway(BaseModel):
    gateway_id: str
    released_nano_usd: int


class LedgerCheck(BaseModel):
    """Whether every balance is the sum of its entries."""

    ok: bool
    checked_s_ago: float
    differences: list[str]


class JobSummary(BaseModel):
    """One job. `progress`: its newest step or piece of work (spec.job_events); `into`: the version that it makes."""

    id: str
    name: str
    kind: str
    state: JobState
    message: str | None
    attempt: int
    into: str | None
    progress: dict[str, Any] | None
    created_at: float
    updated_at: float
    started_at: float | None
    ended_at: float | None


class JobDetail(JobSummary):
    """`events`: the newest, without steps; `result`: what an evaluation found (spec.evaluation)."""

    document: dict[str, Any]
    events: list[dict[str, Any]]
    result: dict[str, Any] | None


class JobEvents(BaseModel):
    """Events in their order (spec.job_events). Ask again with `after` = `last`."""

    job: JobSummary
    data: list[dict[str, Any]]
    last: int


class JobLogs(BaseModel):
    id: str
    attempt: int
    logs: str


class Status(BaseModel):
    """Everything that `zenray status` shows of control."""

    version: str
    now: float
    database: str
    snapshot_version: int
    reconciled_s_ago: float | None
    deployments: list[DeploymentRow]
    gateways: list[GatewayRow]
    ledger: LedgerCheck


def route_urls(payload: str | None) -> tuple[str | None, list[str]]:
    """State and replica URLs of a published route."""
    if payload is None:
        return None, []
    route = RouteEntry.model_validate_json(payload)
    return route.state.value, [endpoint.url for endpoint in route.endpoints]
