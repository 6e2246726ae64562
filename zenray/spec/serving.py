"""What control hands to Ray Serve, and what Ray Serve says back, in words that need neither of them imported."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from zenray.spec.deployments import DeploymentSpec
from zenray.spec.documents import Document
from zenray.spec.platform import StorageSettings

SERVE_IMPORT_PATH = "zenray.serving.app:build"


class Start(Document):
    """With how many replicas a revision begins that takes over from another one: it has no load yet that says so."""

    replicas: int = Field(ge=1)
    hold_s: float = Field(ge=0, description="No fewer before so long after the first of them runs.")


class ReplicaLaunch(Document):
    """The `args` of a Serve application: all that `zenray.serving` needs to run one revision."""

    deployment: DeploymentSpec = Field(description="With `version` filled in.")
    storage: StorageSettings = Field(description="With an absolute `uri`.")
    cache_dir: str = Field(description="Where a node keeps verified weights; shared by its replicas.")
    start: Start | None = Field(None, description="None: as autoscaling says. No part of the revision's name.")


class ApplicationState(StrEnum):
    """Ray Serve's own states of an application."""

    NOT_STARTED = "NOT_STARTED"
    DEPLOYING = "DEPLOYING"
    RUNNING = "RUNNING"
    DEPLOY_FAILED = "DEPLOY_FAILED"
    UNHEALTHY = "UNHEALTHY"
    DELETING = "DELETING"


class ApplicationStatus(BaseModel):
    """One Serve application, as Ray reports it."""

    model_config = ConfigDict(frozen=True)

    name: str
    state: ApplicationState
    message: str = ""
    route_prefix: str
    replica_urls: dict[str, str] = Field(
        default_factory=dict, description="Running replicas: id → base URL with prefix."
    )
    starting_replicas: int = 0


class ServeStatus(BaseModel):
    """All applications, and the proxy through which a sleeping one is woken."""

    model_config = ConfigDict(frozen=True)

    applications: dict[str, ApplicationStatus] = Field(default_factory=dict)
    proxy_url: str | None = None


class ServeApplication(BaseModel):
    """One entry of the Serve config document (`serveConfigV2`)."""

    model_config = ConfigDict(frozen=True)

    name: str
    route_prefix: str
    import_path: str = SERVE_IMPORT_PATH
    args: dict[str, Any]
    runtime_env: dict[str, Any] = Field(default_factory=dict)
