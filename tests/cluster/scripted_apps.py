"""Serve applications with the scripted engine, as control would write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson

from zenray.spec.deployments import Autoscaling, DeploymentSpec, EngineSettings
from zenray.spec.platform import StorageSettings
from zenray.spec.serving import ReplicaLaunch, ServeApplication
from zenray.storage.opening import open_store
from zenray.storage.versions import publish

ENGINE_KEY = "replica-key-of-the-tests"
AUTHORIZED = {"authorization": f"Bearer {ENGINE_KEY}"}


class Publisher:
    """Publishes scripted versions into a store below `root`, and names the applications that serve them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.storage = StorageSettings(uri=f"file:{root / 'store'}")

    def application(
        self, model: str, *, autoscaling: Autoscaling | None = None, drain_s: float = 20, **script: Any
    ) -> ServeApplication:
        """A version of `model` with this script in the store, and the application that serves it."""
        spec = DeploymentSpec(
            model=model,
            version="v1",
            engine=EngineSettings(kind="scripted"),
            autoscaling=autoscaling or Autoscaling(),
            cpus_per_replica=0.1,
            graceful_shutdown_timeout_s=drain_s,
        )
        files = self.root / "files" / model
        files.mkdir(parents=True)
        (files / "script.json").write_bytes(orjson.dumps(script))
        publish(open_store(self.storage), spec.ref(), files)
        return self.serving(spec)

    def serving(self, spec: DeploymentSpec) -> ServeApplication:
        """The application of a spec whose version is in the store."""
        launch = ReplicaLaunch(deployment=spec, storage=self.storage, cache_dir=str(self.root / "cache"))
        return ServeApplication(
            name=spec.revision(),
            route_prefix=f"/{spec.revision()}",
            args=launch.model_dump(mode="json"),
            runtime_env={"env_vars": {"VLLM_API_KEY": ENGINE_KEY}},
        )
