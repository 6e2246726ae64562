"""What can never run is refused before anything starts, with what to change."""

from __future__ import annotations

import pytest

from zenray.catalog.catalog import Catalog
from zenray.control.deployments.feasibility import check_runnable
from zenray.spec.deployments import DeploymentSpec
from zenray.spec.errors import InvalidValue

SMALL = "smollm2-135m"  # 9 query heads, 3 key heads, context of 8,192
LARGE = "zen-72b"


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return Catalog.load()


def check(catalog: Catalog, model: str, *, engine: dict[str, object] | None = None, **fields: object) -> None:
    spec = DeploymentSpec.model_validate({"model": model, "version": "1", "engine": engine or {}, **fields})
    check_runnable(spec, catalog.get(model))


def refusal(catalog: Catalog, model: str, *, engine: dict[str, object] | None = None, **fields: object) -> str:
    with pytest.raises(InvalidValue) as refused:
        check(catalog, model, engine=engine, **fields)
    return str(refused.value)


def test_what_runs_today_runs_on(catalog: Catalog) -> None:
    check(catalog, SMALL)
    check(catalog, SMALL, format="awq-int4")
    check(catalog, SMALL, format="mixtral")
    check(catalog, SMALL, gpus_per_replica=0.5)


def test_a_format_that_the_device_cannot_run_is_refused(catalog: Catalog) -> None:
    assert "does not load gguf" in refusal(catalog, SMALL, format="gguf", gpus_per_replica=1)
    assert "GPUs only" in refusal(catalog, SMALL, format="gptq-int8")
    check(catalog, SMALL, format="gptq-int8", gpus_per_replica=1)
    check(catalog, SMALL, format="gguf", engine={"kind": "scripted"})


def test_the_layout_takes_exactly_the_gpus_of_the_replica(catalog: Catalog) -> None:
    check(catalog, SMALL, engine={"tensor_parallel": 3}, gpus_per_replica=3)
    assert "takes 6 GPUs" in refusal(
        catalog, SMALL, engine={"tensor_parallel": 3, "pipeline_parallel": 2}, gpus_per_replica=3
    )
    assert "takes 3 GPUs" in refusal(catalog, SMALL, engine={"tensor_parallel": 3})
    assert "would use one of them" in refusal(catalog, SMALL, gpus_per_replica=2)
    assert "which is 1" in refusal(catalog, SMALL, engine={"expert_parallel": True}, gpus_per_replica=1)


def test_a_layout_that_does_not_divide_the_network_names_those_that_do(catalog: Catalog) -> None:
    said = refusal(catalog, SMALL, engine={"tensor_parallel": 4}, gpus_per_replica=4)
    assert "9 query heads" in said
    assert "pipeline_parallel" in refusal(catalog, SMALL, engine={"pipeline_parallel": 31}, gpus_per_replica=31)


def test_weights_and_one_whole_context_must_fit(catalog: Catalog) -> None:
    gpu = {"gpu_memory_bytes": 80 << 30, "max_model_len": 8192}
    assert "does not even hold the weights" in refusal(catalog, LARGE, engine=gpu, gpus_per_replica=1)
    check(catalog, LARGE, engine=gpu | {"tensor_parallel": 4}, gpus_per_replica=4)
    check(catalog, LARGE, engine=gpu, format="awq-int4", gpus_per_replica=1)
    tight = gpu | {"gpu_memory_bytes": 40 << 30, "max_model_len": 32_000_000, "tensor_parallel": 8}
    assert "32,000,000" in refusal(catalog, LARGE, engine=tight, gpus_per_replica=8)
