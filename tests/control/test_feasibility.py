"""What can never run is refused before anything starts, with what to change."""

from __future__ import annotations

from pathlib import Path

import pytest

from zenray.catalog.catalog import Catalog
from zenray.control.deployments.defaults import with_catalogs_defaults
from zenray.control.deployments.feasibility import check_runnable
from zenray.control.deployments.machines import Machines, memory_here_bytes
from zenray.spec.deployments import DeploymentSpec
from zenray.spec.errors import InvalidValue, ModelNotFound
from zenray.spec.platform import Nodes

SMALL = "smollm2-135m"  # 9 query heads, 3 key heads, context of 8,192
LARGE = "zen-72b"
LAPTOP = Machines(memory_bytes=16 << 30)
A100 = Machines(Nodes(gpu="A100 80GB", gpus=8))
H200 = Machines(Nodes(gpu="H200 141GB", gpus=8))
B200 = Machines(Nodes(gpu="B200 180GB", gpus=8))


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return Catalog.load()


def check(
    catalog: Catalog,
    model: str,
    *,
    engine: dict[str, object] | None = None,
    on: Machines = Machines(),
    sequences: int | None = None,
    **fields: object,
) -> None:
    spec = DeploymentSpec.model_validate({"model": model, "version": "1", "engine": engine or {}, **fields})
    check_runnable(spec, catalog, on, sequences=sequences)


def refusal(catalog: Catalog, model: str, **what: object) -> str:
    with pytest.raises(InvalidValue) as refused:
        check(catalog, model, **what)  # type: ignore[arg-type]
    return str(refused.value)


def test_what_runs_today_runs_on(catalog: Catalog) -> None:
    check(catalog, SMALL)
    check(catalog, SMALL, format="awq-int4")
    check(catalog, SMALL, format="mixtral")
    check(catalog, SMALL, on=LAPTOP)


def test_experts_that_are_no_ffn_are_served_by_no_layout(catalog: Catalog) -> None:
    said = refusal(catalog, "zen-base-mode", gpus_per_replica=1, on=A100)
    assert "of its 16 experts some are no FFN (2 deep, 1 vocabulary, 1 spatial)" in said


def test_replicas_that_share_a_gpu_share_its_memory(catalog: Catalog) -> None:
    said = refusal(catalog, SMALL, gpus_per_replica=0.5)
    assert "would take 0.92 of its memory" in said and "gpu_memory_utilization to 0.46" in said
    check(catalog, SMALL, gpus_per_replica=0.5, engine={"gpu_memory_utilization": 0.46}, sequences=1)


def test_a_format_that_the_device_cannot_run_is_refused(catalog: Catalog) -> None:
    assert "does not load gguf" in refusal(catalog, SMALL, format="gguf", gpus_per_replica=1)
    assert "GPUs only" in refusal(catalog, SMALL, format="gptq-int8")
    check(catalog, SMALL, format="gptq-int8", gpus_per_replica=1)
    check(catalog, SMALL, format="gguf", engine={"kind": "scripted"})


def test_the_layout_takes_exactly_the_gpus_of_the_replica(catalog: Catalog) -> None:
    check(catalog, SMALL, engine={"tensor_parallel": 3}, gpus_per_replica=3, on=A100)
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
        check(catalog, self.model, engine=layout, gpus_per_replica=8, on=B200, sequences=8)
        assert "data_parallel 4 takes 8 GPUs" in refusal(catalog, self.model, engine=layout, gpus_per_replica=2)
        assert "data_parallel 7" in refusal(
            catalog, self.model, engine=layout | {"data_parallel": 7}, gpus_per_replica=14
        )
        check(
            catalog,
            self.model,
            engine=layout | {"tensor_parallel": 1, "data_parallel": 8, "gpu_memory_bytes": 192 << 30},
            gpus_per_replica=8,
            sequences=8,
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


class TestMachines:
    """What the platform file says of the machines, or what this machine has."""

    def test_a_replica_is_not_larger_than_a_machine(self, catalog: Catalog) -> None:
        layout = {"tensor_parallel": 8, "pipeline_parallel": 2, "max_model_len": 8192}
        said = refusal(catalog, "zen-480b", engine=layout, gpus_per_replica=16, on=A100)
        assert "16 GPUs is larger than a machine, which has 8" in said
        check(catalog, "zen-480b", engine=layout, gpus_per_replica=16, sequences=1)  # who knows what there is
        check(catalog, "zen-480b", engine=layout, gpus_per_replica=16, on=Machines(Nodes(gpu="A100 80GB", gpus=16)))

    def test_the_gpu_is_the_platforms_or_else_the_familys(self, catalog: Catalog) -> None:
        short = {"tensor_parallel": 2, "max_model_len": 8192, "max_num_seqs": 16}
        assert "2 such sequences fit" in refusal(catalog, LARGE, engine=short, gpus_per_replica=2, on=A100)
        check(catalog, LARGE, engine=short, gpus_per_replica=2, on=H200)
        unknown = refusal(catalog, LARGE, engine=short, gpus_per_replica=2)
        assert "It is taken for a A100 80GB: name yours in `nodes`" in unknown
        check(catalog, LARGE, engine=short | {"gpu_memory_bytes": 141_000_000_000}, gpus_per_replica=2)

    def test_for_what_nobody_asked_there_need_not_be_memory(self, catalog: Catalog) -> None:
        layout = {"tensor_parallel": 4, "max_num_seqs": 16}
        assert "for 16 sequences of 131,072 tokens" in refusal(catalog, LARGE, engine=layout, gpus_per_replica=4)
        check(catalog, LARGE, engine=layout, gpus_per_replica=4, sequences=1)

    def test_without_gpus_the_machines_memory_must_hold_it(self, catalog: Catalog) -> None:
        said = refusal(catalog, LARGE, on=LAPTOP)
        assert "without GPUs it needs 135.1 GiB" in said and "the machine has 16.0 GiB" in said
        assert "gpus_per_replica 4, engine.tensor_parallel 4" in said
        check(catalog, "zen-3b", on=LAPTOP)
        assert "needs" in refusal(catalog, "zen-3b", on=LAPTOP, engine={"kv_cache_bytes": 15 << 30})
        check(catalog, LARGE, on=LAPTOP, engine={"kind": "scripted"})

    def test_a_container_has_what_it_is_given(self, tmp_path: Path) -> None:
        limit = tmp_path / "memory.max"
        limit.write_text("1048576\n")
        assert memory_here_bytes(limit) == 1 << 20
        limit.write_text("max\n")
        assert memory_here_bytes(limit) == memory_here_bytes(tmp_path / "none") > 1 << 28


class TestCatalogsLayout:
    """A deployment that says nothing of it runs on GPUs as the catalog has it."""

    def filled(self, catalog: Catalog, on: Machines, **document: object) -> DeploymentSpec:
        spec = DeploymentSpec.model_validate({"model": LARGE, "version": "1"} | document)
        filled = with_catalogs_defaults(spec, catalog.get(spec.model), on, lambda format: format == "gptq-int8")
        check_runnable(filled, catalog, on, sequences=1)
        return filled

    def test_layout_gpus_batch_and_format(self, catalog: Catalog) -> None:
        spec = self.filled(catalog, A100)
        assert (spec.engine.tensor_parallel, spec.engine.pipeline_parallel, spec.gpus_per_replica) == (4, 1, 4)
        assert (spec.engine.max_num_seqs, spec.format) == (16, "safetensors")
        assert self.filled(catalog, A100, model="zen-7b").format == "gptq-int8"

    def test_what_is_written_stays_even_if_it_is_the_default(self, catalog: Catalog) -> None:
        spec = self.filled(
            catalog, H200, format="safetensors", engine={"tensor_parallel": 8, "max_num_seqs": 64, "kind": "vllm"}
        )
        assert (spec.engine.tensor_parallel, spec.gpus_per_replica, spec.engine.max_num_seqs) == (8, 8, 64)
        own = self.filled(catalog, A100, gpus_per_replica=8, engine={"tensor_parallel": 8})
        assert (own.engine.tensor_parallel, own.gpus_per_replica) == (8, 8)
        assert self.filled(catalog, A100, model=SMALL, gpus_per_replica=0).engine.tensor_parallel == 1

    @pytest.mark.parametrize("machines", [Machines(), LAPTOP])
    def test_without_gpus_nothing_is_filled_in(self, catalog: Catalog, machines: Machines) -> None:
        spec = DeploymentSpec(model=SMALL, version="1")
        assert with_catalogs_defaults(spec, catalog.get(SMALL), machines) is spec

    def test_every_layout_of_the_catalog_that_a_machine_holds_can_run(self, catalog: Catalog) -> None:
        refused = set()
        others = {e.name for e in catalog if e.dimensions and e.dimensions.moe and e.dimensions.moe.blocks}
        for entry in catalog:
            try:
                self.filled(catalog, A100, model=entry.name)
            except InvalidValue as error:
                assert ("some are no FFN" if entry.name in others else "larger than a machine") in str(error)
                refused.add(entry.name)
        assert refused - others == {e.name for e in catalog if e.serving.gpus > 8} - others != set()
        assert refused >= others
