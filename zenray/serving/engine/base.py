"""The seam to an engine: what a replica runs behind its guard."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from zenray.serving.engine.load import EngineLoad
from zenray.serving.guard import ALLOWED_ROUTES, AsgiApp
from zenray.spec.deployments import EngineSettings


@dataclass(frozen=True)
class EngineLaunch:
    """What an engine is to run, and what it may use of the machine."""

    model: str  # the name it answers to
    settings: EngineSettings
    cpus: float
    gpus: float
    ttft_target_s: float | None = None  # later first tokens are counted as late


class Engine(Protocol):
    """One model in one replica. `start` is called once; after `stop` no process of it is left."""

    routes: frozenset[str]

    def prepare(self) -> None:
        """What can be done before the weights are here. Blocks; called once, in a thread, before `start`."""

    async def start(self, folder: Path, draft: Path | None = None) -> AsgiApp:
        """Load the model from `folder`, whose files are verified, and give the application that answers for it.

        `draft` is the folder of the model that drafts for it, where the settings name one.

        Raises with a message for the person who deploys.
        """

    async def check_health(self) -> None:
        """Raises when the engine cannot answer any more: Ray Serve then replaces the replica. Quick."""

    def load(self) -> EngineLoad:
        """Its load now, for the autoscaler. Asked every second: never blocks."""

    async def stop(self) -> None:
        """Idempotent."""


def open_engine(launch: EngineLaunch) -> Engine:
    """The engine that the settings name. Only the chosen engine is imported."""
    if launch.settings.kind == "scripted":
        from zenray.serving.engine.scripted_replica import ScriptedReplicaEngine

        return ScriptedReplicaEngine(launch)
    from zenray.serving.engine.vllm import VllmEngine

    return VllmEngine(launch)


__all__ = ["ALLOWED_ROUTES", "Engine", "EngineLaunch", "EngineLoad", "open_engine"]
