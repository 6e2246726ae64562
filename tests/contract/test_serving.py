"""What zenray's serving assumes of Ray Serve and vLLM, without starting either."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from pydantic import ValidationError

from tests.cluster.scripted_apps import Publisher
from tests.serving.tiny_model import make_tiny_model
from zenray.serving.autoscaling import _RUNNING_REQUESTS, POLICY_PATH, autoscaling_options, signals_of
from zenray.serving.engine.base import EngineLaunch, EngineLoad
from zenray.serving.engine.wire import FINGERPRINT, Wire
from zenray.spec.deployments import Autoscaling, EngineSettings
from zenray.spec.serving import Start

pytestmark = [
    pytest.mark.contract,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of Ray's and vLLM's own making
]


SETTINGS = Autoscaling(max_replicas=9, target_ongoing_requests=2, target_kv_cache_use=0.5, downscale_delay_s=0)


def context(running: int, mean: float, newest: list[float], queued: float = 0, load: EngineLoad | None = None) -> Any:
    from ray.serve._private.common import RUNNING_REQUESTS_KEY
    from ray.serve.config import AutoscalingConfig, AutoscalingContext

    def series(values: list[float]) -> dict[str, Any]:
        return {f"replica-{i}": [SimpleNamespace(value=99.0), SimpleNamespace(value=v)] for i, v in enumerate(values)}

    reported = {name: series([value] * running) for name, value in (load or EngineLoad()).as_metrics().items()}
    return AutoscalingContext(
        deployment_id=None,
        deployment_name="m",
        app_name="a",
        current_num_replicas=running,
        target_num_replicas=running,
        running_replicas=[],
        total_num_requests=mean,
        total_queued_requests=queued,
        aggregated_metrics=None,
        raw_metrics={RUNNING_REQUESTS_KEY: series(newest)} | reported,
        capacity_adjusted_min_replicas=0,
        capacity_adjusted_max_replicas=9,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=0.0,
        config=AutoscalingConfig(**autoscaling_options(SETTINGS)),
    )


def test_rays_context_is_read_as_it_is() -> None:
    from ray.serve._private.common import RUNNING_REQUESTS_KEY

    assert RUNNING_REQUESTS_KEY == _RUNNING_REQUESTS
    signals = signals_of(context(2, 12, [5, 3], queued=1, load=EngineLoad(3, 1, 0.5, 100, 2)))
    assert (signals.running, signals.target, signals.most) == (2, 2, 9)
    assert (signals.mean_requests, signals.newest_requests) == (12, 9)
    assert (signals.computing, signals.waiting, signals.kv_cache_use) == (6, 2, 1.0)
    assert (signals.first_tokens, signals.late_first_tokens) == (200, 4)


def test_ray_asks_the_policy_with_the_deployments_own_targets() -> None:
    """As Ray's controller does: the class by its path, made with its arguments, wrapped with Ray's delays."""
    from ray.serve._private.autoscaling_state import _resolve_policy_callable
    from ray.serve.autoscaling_policy import _apply_autoscaling_config
    from ray.serve.config import AutoscalingConfig

    options = autoscaling_options(SETTINGS.model_copy(update={"upscale_delay_s": 0.0}))
    config = AutoscalingConfig(**options)
    policy = _apply_autoscaling_config(_resolve_policy_callable(config.policy))

    def ask(ctx: Any, state: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        ctx.config, ctx.policy_state = config, state or {}
        return policy(ctx)

    assert ask(context(2, 12, [5, 3]))[0] == 4
    assert ask(context(2, 12, [0, 0]))[0] == 2
    assert ask(context(2, 12, [0, 0], queued=10))[0] == 5
    assert ask(context(2, 2, [1, 1], load=EngineLoad(computing=1, kv_cache_use=0.75)))[0] == 3
    count, state = ask(context(3, 2, [1, 1, 0]))
    assert count == 1 and "zenray" in state
    assert ask(context(3, 2, [1, 1, 0]), state)[0] == 1
    asleep, state = ask(context(0, 0, []), state)
    assert asleep == 0 and "zenray" not in state
    assert ask(context(0, 1, []), state)[0] == 1, "one that sleeps is woken at once"


def test_a_sleeping_deployment_proves_its_version_first() -> None:
    from ray.serve.config import AutoscalingConfig

    options = autoscaling_options(Autoscaling(min_replicas=0, max_replicas=4, downscale_delay_s=30))
    assert (options["min_replicas"], options["initial_replicas"]) == (0, 1)
    config = AutoscalingConfig(**options)
    assert (config.downscale_delay_s, config.policy.policy_kwargs["downscale_delay_s"]) == (0, 30)


def test_a_revision_that_takes_over_begins_with_as_many_replicas_as_it_is_told() -> None:
    from ray.serve.config import AutoscalingConfig

    settings = Autoscaling(max_replicas=9, downscale_delay_s=30)
    config = AutoscalingConfig(**autoscaling_options(settings, Start(replicas=8, hold_s=420)))
    assert (config.min_replicas, config.initial_replicas, config.max_replicas) == (1, 8, 9)
    kwargs = config.policy.policy_kwargs
    assert (kwargs["start_replicas"], kwargs["start_hold_s"]) == (8, 420)


def test_vllm_has_a_kernel_on_the_cpu_for_what_control_lets_run_there() -> None:
    import torch
    from vllm.model_executor.kernels.linear import MPLinearLayerConfig, choose_mp_linear_kernel
    from vllm.scalar_type import scalar_types

    shape = (256, 512)
    awq = MPLinearLayerConfig(shape, shape, scalar_types.uint4, torch.bfloat16, 64, zero_points=True)
    assert choose_mp_linear_kernel(awq).__name__ == "CPUWNA16LinearKernel"
    gptq = MPLinearLayerConfig(shape, shape, scalar_types.uint8b128, torch.bfloat16, 64, zero_points=False)
    with pytest.raises(ValueError, match="Failed to find a kernel"):  # else: take gptq-int8 out of _ON_GPUS_ONLY
        choose_mp_linear_kernel(gptq)


def test_ray_serve_takes_the_application_as_it_is_built(tmp_path: Any) -> None:
    from zenray.serving.app import build

    app = Publisher(tmp_path).application("model-name", autoscaling=Autoscaling(max_replicas=3), drain_s=77)
    deployment = build(app.args)._bound_deployment
    assert deployment.name == "model-name"
    assert deployment._deployment_config.graceful_shutdown_timeout_s == 77
    assert deployment._deployment_config.max_constructor_retry_count == 2
    scaling = deployment._deployment_config.autoscaling_config
    assert (scaling.max_replicas, scaling.policy.policy_function) == (3, POLICY_PATH)
    assert deployment.ray_actor_options["num_cpus"] == 0.1
    with pytest.raises(ValidationError, match="deploymant"):
        build({**app.args, "deploymant": {}})


class TestTheWireIsVllms:
    """The scripted engine's bytes against those of vLLM's own response models, filled as vLLM's serving fills them."""

    wire = Wire(chat=True, id="chatcmpl-1", model="m", created=int(time.time()))
    older = Wire(chat=False, id="cmpl-1", model="m", created=int(time.time()))

    @staticmethod
    def sse(chunk: Any, **options: Any) -> bytes:
        return f"data: {chunk.model_dump_json(exclude_unset=True, **options)}\n\n".encode()

    def chat_chunk(self, choices: list[Any], **fields: Any) -> Any:
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionStreamResponse

        return ChatCompletionStreamResponse(
            id=self.wire.id,
            object="chat.completion.chunk",
            created=self.wire.created,
            choices=choices,
            model="m",
            **fields,
        )

    @pytest.mark.parametrize("continuous", [False, True])
    def test_role(self, continuous: bool) -> None:
        from vllm.entrypoints.openai.chat_completion import serving as s
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponseStreamChoice as Choice

        delta = s.DeltaMessage(role="assistant", content="")
        choice = Choice(index=0, delta=delta, logprobs=None, finish_reason=None)
        chunk = self.chat_chunk([choice], prompt_token_ids=None, prompt_text=None)
        if continuous:
            chunk.usage = s.UsageInfo(
                prompt_tokens=5, completion_tokens=0, total_tokens=5, completion_tokens_details=None
            )
        assert self.wire.role_chunk(0, 5 if continuous else None) == self.sse(chunk)

    @pytest.mark.parametrize("finish", [None, "length"])
    def test_token(self, finish: str | None) -> None:
        from vllm.entrypoints.openai.chat_completion import serving as s
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponseStreamChoice as Choice

        ending = {} if finish is None else {"stop_reason": None}
        delta = s.DeltaMessage(content=" t0")
        choice = Choice(index=1, delta=delta, logprobs=None, finish_reason=finish, token_ids=None, **ending)
        chunk = self.chat_chunk([choice])
        made = self.wire.token_chunk(1, " t0", finish, running=None, usage_follows=True)
        assert made == self.sse(chunk)
        chunk.usage = s.UsageInfo(prompt_tokens=5, completion_tokens=3, total_tokens=8, completion_tokens_details=None)
        assert self.wire.token_chunk(1, " t0", finish, running=(5, 3), usage_follows=True) == self.sse(chunk)

    def test_final_usage(self) -> None:
        from vllm.entrypoints.openai.chat_completion import serving as s

        usage = s.UsageInfo(prompt_tokens=5, completion_tokens=3, total_tokens=8, completion_tokens_details=None)
        usage.prompt_tokens_details = s._make_prompt_tokens_details(True, 2, 0, None)
        chunk = self.chat_chunk([], usage=usage, system_fingerprint=FINGERPRINT, metrics=None)
        assert self.wire.usage_chunk(5, 3, 2) == self.sse(chunk, exclude_none=True)

    @pytest.mark.parametrize("finish", [None, "stop"])
    def test_older_completions(self, finish: str | None) -> None:
        from vllm.entrypoints.openai.completion import serving as s

        choice = s.CompletionResponseStreamChoice(
            index=0,
            text="x",
            logprobs=None,
            finish_reason=finish,
            stop_reason=None,
            prompt_token_ids=None,
            token_ids=None,
        )
        chunk = s.CompletionStreamResponse(
            id=self.older.id, object="text_completion", created=self.older.created, model="m", choices=[choice]
        )
        chunk.usage = s.UsageInfo(prompt_tokens=2, completion_tokens=1, total_tokens=3)
        assert self.older.token_chunk(0, "x", finish, running=(2, 1), usage_follows=True) == self.sse(chunk)
        usage = s.UsageInfo(prompt_tokens=2, completion_tokens=1, total_tokens=3)
        usage.prompt_tokens_details = s.PromptTokenUsageInfo(cached_tokens=1)
        last = s.CompletionStreamResponse(
            id=self.older.id,
            created=self.older.created,
            model="m",
            choices=[],
            usage=usage,
            system_fingerprint=FINGERPRINT,
            metrics=None,
        )
        expected = f"data: {last.model_dump_json(exclude_unset=False, exclude_none=True)}\n\n".encode()
        assert self.older.usage_chunk(2, 1, 1) == expected

    def test_whole(self) -> None:
        from vllm.entrypoints.openai.chat_completion import protocol as p
        from vllm.entrypoints.openai.chat_completion import serving as s

        usage = s.UsageInfo(prompt_tokens=5, completion_tokens=1, total_tokens=6)
        usage.prompt_tokens_details = s._make_prompt_tokens_details(True, 2, 0, None)
        message = p.ChatMessage(role="assistant", content="hi")
        choice = p.ChatCompletionResponseChoice(index=0, message=message, finish_reason="stop")
        whole = p.ChatCompletionResponse(
            id=self.wire.id,
            created=self.wire.created,
            model="m",
            choices=[choice],
            usage=usage,
            system_fingerprint=FINGERPRINT,
        )
        assert orjson.loads(self.wire.whole([("hi", "stop")], 5, 1, 2)) == orjson.loads(whole.model_dump_json())


def test_vllm_knows_every_argument_that_it_is_given(tmp_path: Any) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import FrontendArgs
    from vllm.v1.engine import utils
    from vllm.v1.engine.output_processor import OutputProcessor

    from zenray.serving.engine.vllm import engine_arguments

    large = EngineSettings.model_validate(
        {
            "tensor_parallel": 2,
            "data_parallel": 2,
            "expert_parallel": True,
            "expert_offload_bytes": 1 << 30,
            "draft": {"tokens": 2},
        }
    )
    for gpus, settings in ((0, EngineSettings()), (1, EngineSettings()), (4, large)):
        launch = EngineLaunch(model="m", settings=settings, cpus=1, gpus=gpus)
        assert AsyncEngineArgs(**engine_arguments(launch, tmp_path)).served_model_name == ["m"]
    assert FrontendArgs(enable_prompt_tokens_details=True, disable_fastapi_docs=True).enable_prompt_tokens_details
    assert callable(utils.get_mp_context), "the fork server is put in its place"
    assert callable(OutputProcessor.has_unfinished_requests)


def test_vllm_takes_drafts_and_stretched_contexts_and_refuses_more(tmp_path: Any) -> None:
    """The whole engine configuration, as vLLM makes and checks it before it starts a process."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    from zenray.serving.engine.vllm import engine_arguments

    make_tiny_model(tmp_path)
    settings = {
        "max_model_len": 2048,
        "kv_cache_bytes": 1 << 27,
        "context_scaling": {"factor": 4, "original_tokens": 512},
        "draft": {"model": "d", "tokens": 2},
    }

    def configured(**changes: Any) -> Any:
        launch = EngineLaunch(model="m", settings=EngineSettings.model_validate(settings | changes), cpus=1, gpus=0)
        return AsyncEngineArgs(**engine_arguments(launch, tmp_path, tmp_path)).create_engine_config()

    config = configured()
    assert config.model_config.max_model_len == 2048
    assert config.model_config.hf_config.rope_parameters["rope_type"] == "yarn"
    assert config.speculative_config.method == "draft_model"
    assert config.speculative_config.num_speculative_tokens == 2
    assert configured(draft={"tokens": 3}).speculative_config.method == "ngram"
    with pytest.raises(ValidationError, match="max_model_len"):
        configured(max_model_len=4096)


def test_vllm_reports_its_load_under_the_names_that_are_read() -> None:
    from vllm.v1.metrics.loggers import PerEngineStatLoggerAdapter
    from vllm.v1.metrics.stats import IterationStats, SchedulerStats

    from zenray.serving.engine.vllm import Observed

    observed = Observed(0.5)
    loggers = PerEngineStatLoggerAdapter(None, [0, 1], observed.stat_logger)  # type: ignore[arg-type]
    iteration = IterationStats()
    iteration.time_to_first_tokens_iter.append(0.7)
    loggers.record(SchedulerStats(3, 2, 1, kv_cache_usage=0.5), iteration, engine_idx=0)
    loggers.record(SchedulerStats(1, 0, 0, kv_cache_usage=0.1), None, engine_idx=1)
    assert observed.load(time.monotonic(), idle=False) == EngineLoad(4, 3, 0.3, 1, 1)
