"""Serve applications: made once for each revision, kept as they were made, read back."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass

from zenray.spec.deployments import DeploymentSpec
from zenray.spec.platform import StorageSettings
from zenray.spec.serving import ReplicaLaunch, ServeApplication, Start

ENGINE_KEY_VARIABLE = "VLLM_API_KEY"


@dataclass(frozen=True)
class ApplicationFactory:
    """Makes the application of a revision, with a key of its own that only gateways get to know."""

    storage: StorageSettings  # with an absolute uri
    cache_dir: str
    new_key: Callable[[], str] = lambda: secrets.token_urlsafe(32)

    def make(self, spec: DeploymentSpec) -> ServeApplication:
        spec = spec.model_copy(update={"canary": None})  # how it takes over is no part of what runs
        launch = ReplicaLaunch(deployment=spec, storage=self.storage, cache_dir=self.cache_dir)
        name = spec.revision()
        return ServeApplication(
            name=name,
            route_prefix=f"/{name}",
            args=launch.model_dump(mode="json"),
            runtime_env={"env_vars": {ENGINE_KEY_VARIABLE: self.new_key()}},
        )


def launch_of(application: ServeApplication) -> ReplicaLaunch:
    return ReplicaLaunch.model_validate(application.args)


def started_with(application: ServeApplication, start: Start | None) -> ServeApplication:
    """The same application, to begin so. Only while Ray Serve does not have it: other arguments are a restart."""
    launch = launch_of(application).model_copy(update={"start": start})
    return application.model_copy(update={"args": launch.model_dump(mode="json")})


def engine_key_of(application: ServeApplication) -> str:
    return str(application.runtime_env["env_vars"][ENGINE_KEY_VARIABLE])
