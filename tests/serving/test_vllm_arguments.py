"""What vLLM is told, on a CPU and on a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from zenray.serving.engine.base import EngineLaunch
from zenray.serving.engine.vllm import engine_arguments, environment, scaled_context
from zenray.spec.deployments import ContextScaling, EngineSettings


def arguments(gpus: float, **settings: object) -> dict[str, object]:
    launch = EngineLaunch(model="m", settings=EngineSettings.model_validate(settings), cpus=2, gpus=gpus)
    return engine_arguments(launch, Path("/weights"))


def test_the_model_answers_to_its_own_name_from_the_folder() -> None:
    given = arguments(0, dtype="float32", max_model_len=512, max_num_seqs=7, prefix_caching=False)
    assert (given["model"], given["served_model_name"]) == ("/weights", ["m"])
    assert (given["dtype"], given["max_model_len"], given["max_num_seqs"]) == ("float32", 512, 7)
    assert given["enable_prefix_caching"] is False


def test_the_cache_is_bytes_on_a_cpu_and_a_share_on_a_gpu() -> None:
    on_cpu, on_gpu = arguments(0, kv_cache_bytes=1 << 28), arguments(1, gpu_memory_utilization=0.5)
    assert on_cpu["kv_cache_memory_bytes"] == 1 << 28
    assert "gpu_memory_utilization" not in on_cpu
    assert on_gpu["gpu_memory_utilization"] == 0.5
    assert "kv_cache_memory_bytes" not in on_gpu


def test_a_layout_over_gpus_reaches_vllm_in_its_own_words() -> None:
    given = arguments(8, tensor_parallel=4, pipeline_parallel=2, expert_parallel=True)
    assert (given["tensor_parallel_size"], given["pipeline_parallel_size"]) == (4, 2)
    assert given["enable_expert_parallel"] is True
    assert given["distributed_executor_backend"] == "mp"
    assert "tensor_parallel_size" not in arguments(1)


def test_threads_follow_the_cpus_of_a_replica() -> None:
    assert environment(0.5, 0)["OMP_NUM_THREADS"] == "1"
    assert environment(2.9, 0)["OMP_NUM_THREADS"] == "2"
    assert "OMP_NUM_THREADS" not in environment(2, 1)


def test_an_engine_never_goes_to_the_network_for_a_model() -> None:
    for gpus in (0, 1):
        assert environment(1, gpus)["HF_HUB_OFFLINE"] == "1"


def test_all_sequences_of_a_replica_are_shared_by_its_data_parallel_ranks() -> None:
    given = arguments(6, data_parallel=3, tensor_parallel=2, max_num_seqs=64)
    assert (given["data_parallel_size"], given["max_num_seqs"]) == (3, 22)


def test_a_draft_is_a_folder_or_the_text_itself() -> None:
    launch = EngineLaunch(
        model="m", settings=EngineSettings.model_validate({"draft": {"model": "d", "tokens": 5}}), cpus=1, gpus=0
    )
    given = engine_arguments(launch, Path("/weights"), Path("/draft"))
    assert given["speculative_config"] == {"method": "draft_model", "model": "/draft", "num_speculative_tokens": 5}
    looked_up = arguments(0, draft={"tokens": 4})["speculative_config"]
    assert looked_up == {
        "method": "ngram",
        "prompt_lookup_max": 4,
        "prompt_lookup_min": 2,
        "num_speculative_tokens": 4,
    }
    assert "speculative_config" not in arguments(0)


@pytest.mark.parametrize(
    ("config", "theta"),
    [
        ({"rope_theta": 5e5}, {"rope_theta": 5e5}),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "rope_theta": 1.0}, {"rope_theta": 1e6}),
        ({}, {}),
    ],
)
def test_a_stretched_context_keeps_the_checkpoints_base(
    tmp_path: Path, config: dict[str, object], theta: dict[str, float]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    given = scaled_context(ContextScaling(factor=4, original_tokens=1000), tmp_path)
    assert given["max_position_embeddings"] == 4000
    yarn = {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 1000}
    assert given["rope_parameters"] == yarn | theta


def test_only_experts_are_moved_to_the_machines_memory() -> None:
    given = arguments(1, expert_offload_bytes=3 << 30)
    assert (given["cpu_offload_gb"], given["cpu_offload_params"]) == (3.0, {"experts"})
    assert "cpu_offload_gb" not in arguments(1)
