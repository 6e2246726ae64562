"""What vLLM is told, on a CPU and on a GPU."""

from __future__ import annotations

from pathlib import Path

from zenray.serving.engine.base import EngineLaunch
from zenray.serving.engine.vllm import engine_arguments, environment
from zenray.spec.deployments import EngineSettings


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
