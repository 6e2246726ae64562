"""vLLM as the engine of a replica, through Ray's public `LLMServer`: the same on a CPU and on GPUs."""

from __future__ import annotations

import math
import os
from typing import Any

from zenray.serving.engine.base import EngineLaunch
from zenray.serving.guard import ALLOWED_ROUTES, AsgiApp


class VllmEngine:
    """An Engine. vLLM runs its model in a child process of the replica; its HTTP side runs in the replica itself."""

    routes = ALLOWED_ROUTES

    def __init__(self, launch: EngineLaunch) -> None:
        self._launch = launch
        self._server: Any = None

    async def start(self) -> AsgiApp:
        """See Engine. Sets this process's environment first: vLLM reads it when it is imported."""
        os.environ.update(environment(self._launch))
        from ray.serve.llm import LLMConfig
        from ray.serve.llm.deployment import LLMServer

        config = LLMConfig(
            model_loading_config={"model_id": self._launch.model, "model_source": str(self._launch.folder)},
            accelerator_type=None,
            placement_group_config={"bundles": [bundle(self._launch.cpus, self._launch.gpus)]},
            engine_kwargs=engine_arguments(self._launch),
            log_engine_metrics=False,  # vLLM's own /metrics then has them
        )
        self._server = LLMServer.sync_init(config)
        await self._server.start()
        # The engine's own application: LLMServer would add a loader of adapters from any cloud path.
        app: AsgiApp = await self._server.engine.build_asgi_app()
        return app

    async def check_health(self) -> None:
        """See Engine."""
        await self._server.check_health()

    async def stop(self) -> None:
        """See Engine."""
        server, self._server = self._server, None
        if server is not None and server.engine is not None:
            await server.engine.shutdown()


def bundle(cpus: float, gpus: float) -> dict[str, float]:
    """The Ray resources of one replica."""
    return {"CPU": cpus} | ({"GPU": gpus} if gpus else {})


def engine_arguments(launch: EngineLaunch) -> dict[str, Any]:
    """vLLM's engine and front-end arguments."""
    settings = launch.settings
    arguments: dict[str, Any] = {
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "enforce_eager": settings.enforce_eager,
        "enable_prefix_caching": settings.prefix_caching,
        "enable_prompt_tokens_details": True,
        "disable_log_stats": False,
    }
    if launch.gpus:
        arguments["gpu_memory_utilization"] = settings.gpu_memory_utilization
    else:
        arguments["kv_cache_memory_bytes"] = settings.kv_cache_bytes
    return arguments


def environment(launch: EngineLaunch) -> dict[str, str]:
    """The environment variables that steer vLLM and OpenMP in the replica and its engine process."""
    threads = max(1, math.floor(launch.cpus))
    fixed = {"VLLM_NO_USAGE_STATS": "1", "VLLM_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if launch.gpus:
        return fixed
    return fixed | {
        "OMP_NUM_THREADS": str(threads),
        # Replicas share the cores of a machine: binding each to fixed cores would put all of them on the first ones.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
