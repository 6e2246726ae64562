"""vLLM as the engine of a replica: its asynchronous engine and its own HTTP application, in the replica's process.

Why not Ray's `LLMServer` around it: that starts a task to "download" weights which lie here already, and that imports
vLLM once more (27 s of a cold start on two cores), and it puts a loader of adapters in front of every request.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import math
import multiprocessing
import os
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from zenray.serving.engine.base import EngineLaunch
from zenray.serving.engine.load import EngineLoad, FirstTokens
from zenray.serving.guard import ALLOWED_ROUTES, AsgiApp
from zenray.spec.deployments import ContextScaling, Draft

# The fork server imports these while the replica does the same; the engine's processes are then forked from it.
_PRELOADED = ("vllm.v1.engine.async_llm", "vllm.v1.engine.core", "vllm.v1.executor.multiproc_executor")


NGRAM_TOKENS = (4, 2)  # the longest and the shortest ending of the text that is searched for in it


class VllmEngine:
    """An Engine. The model runs in child processes; HTTP, templates and tokenizer run in the replica itself."""

    routes = ALLOWED_ROUTES

    def __init__(self, launch: EngineLaunch) -> None:
        self._launch = launch
        self._client: Any = None
        self._observed = Observed(launch.ttft_target_s)

    def prepare(self) -> None:
        """See Engine. The environment comes first: vLLM and OpenMP read it as they are imported."""
        os.environ.update(environment(self._launch.cpus, self._launch.gpus))
        multiprocessing.set_forkserver_preload(list(_PRELOADED))
        forkserver.ensure_running()
        import vllm.entrypoints.launchers.app
        import vllm.v1.engine.async_llm  # noqa: F401

    async def start(self, folder: Path, draft: Path | None = None) -> AsgiApp:
        """See Engine."""
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app
        from vllm.entrypoints.launchers.cli_args import FrontendArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.metrics.loggers import PrometheusStatLogger

        engine_args = AsyncEngineArgs(**engine_arguments(self._launch, folder, draft))
        frontend_args = FrontendArgs(enable_prompt_tokens_details=True, disable_fastapi_docs=True)
        config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
        with _forked_by_the_fork_server():
            self._client = AsyncLLM.from_vllm_config(
                vllm_config=config,
                usage_context=UsageContext.OPENAI_API_SERVER,
                disable_log_stats=engine_args.disable_log_stats,
                # Among Ray's metrics for whoever watches the cluster, and on the replica's own /metrics. In this order:
                # each takes away what is registered for the latter.
                stat_loggers=[self._observed.stat_logger, ray_stat_logger(), PrometheusStatLogger],
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

    def load(self) -> EngineLoad:
        """See Engine."""
        # An engine with nothing to do says nothing: after an abort its last word may still be of the aborted request.
        idle = self._client is None or not self._client.output_processor.has_unfinished_requests()
        return self._observed.load(time.monotonic(), idle=idle)

    async def stop(self) -> None:
        """See Engine."""
        client, self._client = self._client, None
        if client is not None:
            await asyncio.to_thread(client.shutdown)


class Observed:
    """The newest statistics of a replica's engines, one for each data parallel rank, and its first tokens."""

    def __init__(self, ttft_target_s: float | None) -> None:
        self._newest: dict[int, tuple[int, int, float]] = {}  # rank → computing, waiting, use of the KV cache
        self._first_tokens = FirstTokens(ttft_target_s)

    def stat_logger(self, config: Any, rank: int = 0) -> Any:
        """A factory as vLLM wants it: a logger that is told after every step of the engine `rank`."""
        from vllm.v1.metrics.loggers import StatLoggerBase

        observed = self

        class Observer(StatLoggerBase):
            def __init__(self) -> None:
                pass

            def record(
                self,
                scheduler_stats: Any,
                iteration_stats: Any,
                mm_cache_stats: Any = None,
                engine_idx: int = 0,
            ) -> None:
                observed.record(rank, scheduler_stats, iteration_stats, time.monotonic())

            def log_engine_initialized(self) -> None:
                pass

        return Observer()

    def record(self, rank: int, scheduler_stats: Any, iteration_stats: Any, now_s: float) -> None:
        """Quick: called for every step of the engine."""
        if scheduler_stats is not None:
            waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
            self._newest[rank] = (scheduler_stats.num_running_reqs, waiting, scheduler_stats.kv_cache_usage)
        if iteration_stats is not None:
            for ttft_s in iteration_stats.time_to_first_tokens_iter:
                self._first_tokens.add(ttft_s, now_s)

    def load(self, now_s: float, *, idle: bool) -> EngineLoad:
        count, late = self._first_tokens.counts(now_s)
        if idle or not self._newest:
            return EngineLoad(first_tokens=count, late_first_tokens=late)
        computing, waiting, cache_uses = zip(*self._newest.values(), strict=True)
        return EngineLoad(
            computing=sum(computing),
            waiting=sum(waiting),
            kv_cache_use=sum(cache_uses) / len(cache_uses),
            first_tokens=count,
            late_first_tokens=late,
        )


def ray_stat_logger() -> Any:
    """vLLM's logger for Ray, without the time from token to token: that is a call into Ray for each token of each
    stream, on the event loop that serves them. A request's mean is still told when it is over."""
    from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger

    class PerRequest(RayPrometheusStatLogger):
        def record(
            self,
            scheduler_stats: Any,
            iteration_stats: Any,
            mm_cache_stats: Any = None,
            engine_idx: int = 0,
        ) -> None:
            if iteration_stats is not None:
                iteration_stats = copy.copy(iteration_stats)  # the other loggers have the same one
                iteration_stats.inter_token_latencies_iter = []
            super().record(scheduler_stats, iteration_stats, mm_cache_stats, engine_idx)

    return PerRequest


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


def engine_arguments(launch: EngineLaunch, folder: Path, draft: Path | None = None) -> dict[str, Any]:
    """vLLM's engine arguments. `draft`: the folder of the drafting model, where the settings name one."""
    settings = launch.settings
    arguments: dict[str, Any] = {
        "model": str(folder),
        "served_model_name": [launch.model],
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.sequences_per_rank,
        "enforce_eager": settings.enforce_eager,
        "enable_prefix_caching": settings.prefix_caching,
        "disable_log_stats": False,
    }
    if settings.gpus > 1:
        arguments |= {
            "tensor_parallel_size": settings.tensor_parallel,
            "pipeline_parallel_size": settings.pipeline_parallel,
            "data_parallel_size": settings.data_parallel,
            "enable_expert_parallel": settings.expert_parallel,
            # The replica holds all the GPUs itself; inside Ray vLLM might else ask Ray for more of them.
            "distributed_executor_backend": "mp",
        }
    if settings.draft is not None:
        arguments["speculative_config"] = speculation(settings.draft, draft)
    if settings.context_scaling is not None:
        arguments["hf_overrides"] = scaled_context(settings.context_scaling, folder)
    if settings.expert_offload_bytes:
        arguments |= {"cpu_offload_gb": settings.expert_offload_bytes / 2**30, "cpu_offload_params": {"experts"}}
    if launch.gpus:
        return arguments | {"gpu_memory_utilization": settings.gpu_memory_utilization}
    return arguments | {"kv_cache_memory_bytes": settings.kv_cache_bytes}


def speculation(draft: Draft, folder: Path | None) -> dict[str, Any]:
    """vLLM's `speculative_config`. Without a drafting model the text so far is searched for its last few tokens."""
    if draft.model is None:
        longest, shortest = NGRAM_TOKENS
        found = {"method": "ngram", "prompt_lookup_max": longest, "prompt_lookup_min": shortest}
    else:
        found = {"method": "draft_model", "model": str(folder)}
    return found | {"num_speculative_tokens": draft.tokens}


def scaled_context(scaling: ContextScaling, folder: Path) -> dict[str, Any]:
    """vLLM's `hf_overrides` for YaRN. The base frequency stays as the checkpoint says it.

    vLLM takes `max_position_embeddings` of a YaRN model as stretched already.
    """
    config = json.loads((folder / "config.json").read_bytes())
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta", config.get("rope_theta"))
    return {
        "max_position_embeddings": scaling.context_tokens,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_tokens,
        }
        | ({"rope_theta": theta} if theta is not None else {}),
    }


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
