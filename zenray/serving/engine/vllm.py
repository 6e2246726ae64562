"""vLLM as the engine of a replica: its asynchronous engine and its own HTTP application, in the replica's process.

Why not Ray's `LLMServer` around it: that starts a task to "download" weights which lie here already, and that imports
vLLM once more (27 s of a cold start on two cores), and it puts a loader of adapters in front of every request.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import multiprocessing
import os
import types
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from zenray.serving.engine.base import EngineLaunch
from zenray.serving.guard import ALLOWED_ROUTES, AsgiApp

# The fork server imports these while the replica does the same; the engine's processes are then forked from it.
_PRELOADED = ("vllm.v1.engine.async_llm", "vllm.v1.engine.core", "vllm.v1.executor.multiproc_executor")


class VllmEngine:
    """An Engine. The model runs in child processes; HTTP, templates and tokenizer run in the replica itself."""

    routes = ALLOWED_ROUTES

    def __init__(self, launch: EngineLaunch) -> None:
        self._launch = launch
        self._client: Any = None

    def prepare(self) -> None:
        """See Engine. The environment comes first: vLLM and OpenMP read it as they are imported."""
        os.environ.update(environment(self._launch.cpus, self._launch.gpus))
        multiprocessing.set_forkserver_preload(list(_PRELOADED))
        forkserver.ensure_running()
        import vllm.entrypoints.launchers.app
        import vllm.v1.engine.async_llm  # noqa: F401

    async def start(self, folder: Path) -> AsgiApp:
        """See Engine."""
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app
        from vllm.entrypoints.launchers.cli_args import FrontendArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        engine_args = AsyncEngineArgs(**engine_arguments(self._launch, folder))
        frontend_args = FrontendArgs(enable_prompt_tokens_details=True, disable_fastapi_docs=True)
        config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
        with _forked_by_the_fork_server():
            self._client = AsyncLLM.from_vllm_config(
                vllm_config=config,
                usage_context=UsageContext.OPENAI_API_SERVER,
                disable_log_stats=engine_args.disable_log_stats,
            )
        # vLLM's own command line makes one namespace of both, too.
        args = argparse.Namespace(**(vars(frontend_args) | vars(engine_args)))
        tasks = await self._client.get_supported_tasks()
        app = build_app(args, tasks, config.model_config)
        await init_app_state(self._client, app.state, args, tasks)
        # After an engine's death vLLM tells its own server to exit; here Ray Serve replaces the replica instead.
        app.state.server = types.SimpleNamespace()
        built: AsgiApp = app
        return built

    async def check_health(self) -> None:
        """See Engine."""
        if self._client is not None:
            await self._client.check_health()

    async def stop(self) -> None:
        """See Engine."""
        client, self._client = self._client, None
        if client is not None:
            await asyncio.to_thread(client.shutdown)


@contextmanager
def _forked_by_the_fork_server() -> Iterator[None]:
    """While it is entered, vLLM starts its engine's process through our fork server.

    Inside a Ray actor vLLM insists on `spawn`, because a fork would copy the actor's threads; then each of the engine's
    two processes imports all of vLLM again, one after the other. Our fork server is a process of its own, begun by
    exec, and has no threads.
    """
    from vllm.v1.engine import utils

    original = utils.get_mp_context
    utils.get_mp_context = lambda: multiprocessing.get_context("forkserver")
    try:
        yield
    finally:
        utils.get_mp_context = original


def engine_arguments(launch: EngineLaunch, folder: Path) -> dict[str, Any]:
    """vLLM's engine arguments."""
    settings = launch.settings
    arguments: dict[str, Any] = {
        "model": str(folder),
        "served_model_name": [launch.model],
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "enforce_eager": settings.enforce_eager,
        "enable_prefix_caching": settings.prefix_caching,
        "disable_log_stats": False,
    }
    if settings.gpus > 1:
        arguments |= {
            "tensor_parallel_size": settings.tensor_parallel,
            "pipeline_parallel_size": settings.pipeline_parallel,
            "enable_expert_parallel": settings.expert_parallel,
            # The replica holds all the GPUs itself; inside Ray vLLM might else ask Ray for more of them.
            "distributed_executor_backend": "mp",
        }
    if launch.gpus:
        return arguments | {"gpu_memory_utilization": settings.gpu_memory_utilization}
    return arguments | {"kv_cache_memory_bytes": settings.kv_cache_bytes}


def environment(cpus: float, gpus: float) -> dict[str, str]:
    """The environment variables that steer vLLM and OpenMP in the replica and its engine's processes."""
    fixed = {"VLLM_NO_USAGE_STATS": "1", "VLLM_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if gpus:
        return fixed
    return fixed | {
        "OMP_NUM_THREADS": str(max(1, math.floor(cpus))),
        # Replicas share the cores of a machine: binding each to fixed cores would put all of them on the first ones.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
