"""What can never run is refused before anything starts, with what to change."""

from __future__ import annotations

import pytest

from zenray.catalog.catalog import Catalog
from zenray.control.deployments.feasibility import check_runnable, with_catalogs_defaults
from zenray.spec.deployments import DeploymentSpec
from zenray.spec.errors import InvalidValue, ModelNotFound

SMALL = "smollm2-135m"  # 9 query heads, 3 key heads, context of 8,192
LARGE = "zen-72b"


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return Catalog.load()


def check(catalog: Catalog, model: str, *, engine: dict[str, object] | None = None, **fields: object) -> None:
    spec = DeploymentSpec.model_validate({"model": model, "version": "1", "engine": engine or {}, **fields})
    check_runnable(spec, catalog)


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


def test_weights_and_the_asked_sequences_must_fit_and_the_sum_is_said(catalog: Catalog) -> None:
    gpu = {"gpu_memory_bytes": 80 << 30, "max_model_len": 8192, "max_num_seqs": 16}
    assert "Not one such sequence fits" in refusal(catalog, LARGE, engine=gpu, gpus_per_replica=1)
    check(catalog, LARGE, engine=gpu | {"tensor_parallel": 4}, gpus_per_replica=4)
    check(catalog, LARGE, engine=gpu, format="awq-int4", gpus_per_replica=1)
    said = refusal(
        catalog,
        LARGE,
        engine=gpu | {"tensor_parallel": 4, "max_num_seqs": 1000, "max_model_len": 16384},
        gpus_per_replica=4,
    )
    dimensions = catalog.get(LARGE).dimensions
    assert dimensions is not None
    cache_gib = 1000 * 16384 * 2 * (dimensions.kv_heads // 4) * dimensions.head_dim * dimensions.layers * 2 / 2**30
    assert f"{cache_gib:.1f} GiB KV cache" in said
    assert "1000 sequences of 16,384 tokens" in said and "73.6 GiB of it may be used" in said
    fitting = int(said.split(" such sequences fit")[0].rsplit(maxsplit=1)[-1])
    exactly = gpu | {"tensor_parallel": 4, "max_num_seqs": fitting, "max_model_len": 16384}
    check(catalog, LARGE, engine=exactly, gpus_per_replica=4)
    refusal(catalog, LARGE, engine=exactly | {"max_num_seqs": fitting + 1}, gpus_per_replica=4)


def test_the_context_is_what_the_catalog_says_or_what_scaling_reaches(catalog: Catalog) -> None:
    assert "max_model_len 8,193 is beyond the context" in refusal(catalog, SMALL, engine={"max_model_len": 8193})
    stretched = {"max_model_len": 16384, "context_scaling": {"factor": 2, "original_tokens": 8192}}
    check(catalog, SMALL, engine=stretched)
    assert "16,384 tokens" in refusal(catalog, SMALL, engine=stretched | {"max_model_len": 16385})


@pytest.mark.parametrize(
    ("max_model_len", "stretched"), [(None, True), (131_073, True), (131_072, False), (4096, False)]
)
def test_a_long_variant_is_stretched_as_the_catalog_says(
    catalog: Catalog, max_model_len: int | None, stretched: bool
) -> None:
    spec = DeploymentSpec.model_validate({"model": "zen-72b-long", "engine": {"max_model_len": max_model_len}})
    scaling = with_catalogs_defaults(spec, catalog.get("zen-72b-long")).engine.context_scaling
    assert (scaling is not None) == stretched
    if scaling is not None:
        assert scaling.context_tokens == catalog.get("zen-72b-long").context_tokens
        own = spec.model_copy(update={"engine": spec.engine.model_copy(update={"context_scaling": scaling})})
        assert with_catalogs_defaults(own, catalog.get("zen-72b-long")) == own
    plain = DeploymentSpec(model=SMALL)
    assert with_catalogs_defaults(plain, catalog.get(SMALL)) is plain


def test_a_draft_is_smaller_and_speaks_in_the_same_tokens(catalog: Catalog) -> None:
    check(catalog, SMALL, engine={"draft": {"tokens": 3}})
    check(catalog, SMALL, engine={"draft": {"model": SMALL}})
    check(catalog, LARGE, engine={"draft": {"model": "zen-7b"}, "max_model_len": 8192})
    assert "must be cheaper" in refusal(catalog, "zen-7b", engine={"draft": {"model": LARGE}})
    assert "the same tokens" in refusal(catalog, LARGE, engine={"draft": {"model": SMALL}})
    assert "does not load gguf" in refusal(catalog, SMALL, engine={"draft": {"model": SMALL, "format": "gguf"}})
    with pytest.raises(ModelNotFound, match="zen-7"):
        check(catalog, LARGE, engine={"draft": {"model": "zen-7"}})


def test_a_draft_counts_in_the_sum(catalog: Catalog) -> None:
    gpu = {"gpu_memory_bytes": 80 << 30, "max_model_len": 8192, "max_num_seqs": 400, "tensor_parallel": 4}
    said = refusal(catalog, LARGE, engine=gpu | {"draft": {"model": "zen-7b"}}, gpus_per_replica=4)
    assert "GiB draft" in said


class TestMixtures:
    """A mixture over several GPUs: the experts of zen-480b."""

    model = "zen-480b"

    def test_data_parallel_and_offload_are_for_mixtures(self, catalog: Catalog) -> None:
        assert "has no experts" in refusal(catalog, SMALL, engine={"data_parallel": 2}, gpus_per_replica=2)
        assert "has no experts" in refusal(catalog, SMALL, engine={"expert_offload_bytes": 1 << 30}, gpus_per_replica=1)
        assert "gpus_per_replica is 0" in refusal(catalog, self.model, engine={"expert_offload_bytes": 1 << 30})

    def test_data_parallel_takes_gpus_and_spreads_experts(self, catalog: Catalog) -> None:
        layout = {"tensor_parallel": 2, "data_parallel": 4, "expert_parallel": True, "max_model_len": 8192}
        check(catalog, self.model, engine=layout, gpus_per_replica=8)
        assert "data_parallel 4 takes 8 GPUs" in refusal(catalog, self.model, engine=layout, gpus_per_replica=2)
        assert "data_parallel 7" in refusal(
            catalog, self.model, engine=layout | {"data_parallel": 7}, gpus_per_replica=14
        )
        check(
            catalog,
            self.model,
            engine=layout | {"tensor_parallel": 1, "data_parallel": 8},
            gpus_per_replica=8,
        )

    def test_experts_in_the_machines_memory_leave_room_on_the_gpu(self, catalog: Catalog) -> None:
        tight = {
            "tensor_parallel": 8,
            "expert_parallel": True,
            "gpu_memory_bytes": 80 << 30,
            "max_model_len": 8192,
            "max_num_seqs": 4,
        }
        said = refusal(catalog, self.model, engine=tight, gpus_per_replica=8)
        assert "or expert_offload_bytes" in said
        check(catalog, self.model, engine=tight | {"expert_offload_bytes": 70 << 30}, gpus_per_replica=8)
