"""The platform file (`clusters/*.yaml`): one cluster, and the parts of zenray that run on it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from zenray.spec.deployments import DeploymentSpec
from zenray.spec.documents import Document


class RaySettings(Document):
    """The Ray cluster. Locally it is started by `zenray up`; port 0 means any free port."""

    cpus: float | None = Field(None, description="CPUs that Ray may hand out; None: all the machine has, at least 2.")
    object_store_bytes: int = Field(256 << 20, ge=80 << 20)
    gcs_port: int = Field(6379, ge=0, le=65535)
    dashboard_port: int = Field(8265, ge=0, le=65535)
    serve_port: int = Field(8000, ge=0, le=65535)
    first_replica_port: int = Field(30000, ge=1024, le=64000, description="Replicas listen here and above.")


class ControlSettings(Document):
    host: str = "127.0.0.1"
    port: int = Field(8081, ge=0, le=65535)
    database_url: str | None = Field(None, description="SQLAlchemy URL; None: SQLite in the platform's folder.")
    reconcile_interval_s: float = Field(
        0.5, gt=0, description="Between looks at Ray Serve; at jobs control looks half as often."
    )


class GatewaySettings(Document):
    host: str = "127.0.0.1"
    port: int = Field(8080, ge=0, le=65535)
    processes: int = Field(1, ge=1, le=64)
    max_body_bytes: int = Field(8 << 20, ge=1024)
    max_streams: int = Field(4096, ge=1, description="Requests that one process has open at once.")
    max_wal_bytes: int = Field(1 << 30, ge=1 << 20, description="Unshipped usage on disk; past it, requests get 503.")
    max_snapshot_age_s: float = Field(
        3600, gt=0, description="Cut off from control for longer, a gateway refuses requests."
    )
    ship_interval_s: float = Field(0.5, gt=0)
    drain_timeout_s: float = Field(30, ge=0, description="When it is stopped, open requests may go on so long.")
    wake_timeout_s: float = Field(
        300, gt=0, description="A request waits so long for a sleeping model; more than its size takes to load."
    )
    otlp_endpoint: str | None = Field(
        None, pattern=r"^https?://", description="An OpenTelemetry collector (OTLP over HTTP). None: no traces."
    )
    trace_share: float = Field(1, ge=0, le=1, description="Of the requests whose callers do not decide it.")


class StorageSettings(Document):
    """`file:PATH` (relative to the platform's folder) or `s3://BUCKET/PREFIX`; credentials from the environment."""

    uri: str = "file:store"
    endpoint_url: str | None = Field(None, description="For S3 servers other than Amazon's.")


class Nodes(Document):
    """A cluster's machines, all alike: for what is reckoned before anything starts (`zenray plan`, whether a deployment
    fits), and for what a deployment leaves out: with GPUs here it gets the catalog's layout."""

    count: int = Field(1, ge=1)
    gpu: str = Field(description="A name of the catalog's GPUs, such as `A100 80GB`.")
    gpus: int = Field(8, ge=1, description="Of each machine.")


class Platform(Document):
    name: str
    backend: Literal["local", "kuberay"] = "local"
    key_prefix: str = Field("sk-zen-", pattern=r"^[a-z0-9-]{2,20}$")
    ray: RaySettings = RaySettings()
    control: ControlSettings = ControlSettings()
    gateway: GatewaySettings = GatewaySettings()
    storage: StorageSettings = StorageSettings()
    nodes: Nodes | None = Field(None, description="The machines, where that is said.")
    deployments: tuple[DeploymentSpec, ...] = Field((), description="Deployed when the platform comes up.")
