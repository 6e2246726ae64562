"""The scripted engine as the engine of a replica: its script comes with the version, as weights would."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from zenray.serving.engine.base import EngineLaunch
from zenray.serving.engine.load import EngineLoad, FirstTokens
from zenray.serving.engine.script import Script, read_script
from zenray.serving.engine.scripted import SCRIPTED_ROUTES, ScriptedEngine
from zenray.serving.guard import AsgiApp


class ScriptedReplicaEngine:
    """An Engine; see `script.py` for `script.json`."""

    routes = SCRIPTED_ROUTES

    def __init__(self, launch: EngineLaunch) -> None:
        self._launch = launch
        self._first_tokens = FirstTokens(launch.ttft_target_s)
        self._engine: ScriptedEngine | None = None
        self._kv_cache_use = 0.0

    def prepare(self) -> None:
        """See Engine: nothing to do."""

    async def start(self, folder: Path, draft: Path | None = None) -> AsgiApp:
        """See Engine. Takes `start_s` of the script, or fails with its `start_error`."""
        file = read_script(folder)
        await asyncio.sleep(file.start_s)
        if file.start_error is not None:
            raise RuntimeError(file.start_error)
        script = Script(**file.model_dump(include=set(Script.model_fields)))
        max_model_len = self._launch.settings.max_model_len or file.max_model_len
        self._kv_cache_use = file.kv_cache_use
        self._engine = ScriptedEngine(
            self._launch.model,
            script=script,
            max_model_len=max_model_len,
            on_first_token=lambda ttft_s: self._first_tokens.add(ttft_s, time.monotonic()),
        )
        return self._engine

    async def check_health(self) -> None:
        """See Engine: it cannot break."""

    def load(self) -> EngineLoad:
        """See Engine: every request is computed at once, and takes the script's share of a cache."""
        running = self._engine.truth.running if self._engine else 0
        count, late = self._first_tokens.counts(time.monotonic())
        return EngineLoad(
            computing=running,
            kv_cache_use=min(1.0, running * self._kv_cache_use),
            first_tokens=count,
            late_first_tokens=late,
        )

    async def stop(self) -> None:
        """See Engine: it holds nothing."""
