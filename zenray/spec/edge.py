"""What crosses between control and gateways: the snapshot down, leases both ways, usage up.

A gateway asks `GET /edge/snapshot?gateway_id=…&since=VERSION` and is answered when something changed (long poll);
`since=0`, or a version that control no longer knows, gets everything. `POST /edge/leases` asks for credit,
`POST /edge/usage` ships events, `POST /edge/canaries` tells how canaries do. All carry
`Authorization: Bearer <edge token>`.
"""

from __future__ import annotations

from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field

from zenray.spec.money import Price
from zenray.spec.usage import UsageEvent


class _Wire(BaseModel):
    """Read with unknown keys ignored, so that a newer peer does not break an older one."""

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())


class KeyEntry(_Wire):
    """An API key, without the key: entries are found by the SHA-256 of the whole key."""

    key_id: str
    org: str
    user_id: str | None = None
    scopes: tuple[str, ...] = Field(("*",), description="Shell-style patterns of model names.")
    expires_at: float | None = None
    revoked: bool = False


class OrgEntry(_Wire):
    """An organisation, with the secret that separates its prefix cache from everybody else's."""

    org: str
    cache_salt: str


class RouteState(StrEnum):
    READY = "ready"
    ASLEEP = "asleep"
    LOADING = "loading"
    FAILED = "failed"


class Endpoint(_Wire):
    """One replica: where it listens, without a trailing slash."""

    replica_id: str
    url: str  # "http://127.0.0.1:30001/app-prefix"


class CanaryRoute(_Wire):
    """A new revision that gets a share of a route's requests. Whom it cannot answer, the route's own replicas do."""

    revision: str
    weight: float = Field(gt=0, lt=1)
    endpoints: tuple[Endpoint, ...]
    engine_key: str
    quantization: str | None = None
    since: float = Field(0, description="When this trial began: a revision may be tried again.")


class RouteEntry(_Wire):
    """A model that clients may name, and where it is answered."""

    model: str
    created_at: float
    state: RouteState
    message: str | None = None
    revision: str
    upstream_model: str = Field(description="The name that the engine knows the model by.")
    endpoints: tuple[Endpoint, ...] = ()
    wake_url: str | None = Field(None, description="The Serve proxy's address of this application.")
    engine_key: str = Field("", description="Bearer key of the replicas; only gateways know it.")
    price: Price
    context_tokens: int
    default_max_tokens: int
    template_overhead_tokens: int = Field(64, description="Bound on what the chat template adds to a request.")
    quantization: str | None = None
    modalities: tuple[str, ...] = ("text",)
    canary: CanaryRoute | None = None


class Snapshot(_Wire):
    """All that a gateway needs to answer without asking anybody. In an update, None means removed."""

    version: int
    full: bool
    issued_at: float
    keys: dict[str, KeyEntry | None] = Field(default_factory=dict)  # by SHA-256 hex of the key
    orgs: dict[str, OrgEntry | None] = Field(default_factory=dict)
    routes: dict[str, RouteEntry | None] = Field(default_factory=dict)  # by model name


class LeaseRequest(_Wire):
    """A gateway's wish for credit of one organisation: `wanted` more on top of what it was granted before."""

    gateway_id: str
    boot_id: str
    org: str
    wanted_nano_usd: int = Field(ge=0)
    give_back_nano_usd: int = Field(0, ge=0, description="Granted earlier, neither spent nor reserved.")
    sequence: int | None = Field(
        None, ge=0, description="Rising for each boot and org. A request sent again under its number counts once."
    )


class Lease(_Wire):
    """`granted` more may be spent. 0: the organisation has nothing left that is not lent out already."""

    org: str
    granted_nano_usd: int
    balance_nano_usd: int


class UsageBatch(_Wire):
    """Closed events. Sending a batch twice bills it once."""

    gateway_id: str
    boot_id: str
    events: tuple[UsageEvent, ...]


class UsageAck(_Wire):
    """All events of the batch are in the ledger; `new` of them were not there before."""

    received: int
    new: int


class CanaryCount(_Wire):
    """What one start of a gateway saw of a canary since the trial began."""

    revision: str
    since: float = Field(description="The trial, as CanaryRoute has it.")
    requests: int = Field(ge=0, description="Drawn for it, and answered or failed.")
    failed: int = Field(ge=0, description="Those it answered with 5xx, or not, or broke off.")


class CanaryReport(_Wire):
    """Counts are totals, so one that is lost or sent twice does no harm."""

    gateway_id: str
    boot_id: str
    canaries: tuple[CanaryCount, ...]
