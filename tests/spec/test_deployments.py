"""What a person asks to be served; names of immutable revisions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from zenray.spec.deployments import Autoscaling, DeploymentSpec, DeploymentState, EngineSettings


def test_a_spec_needs_only_a_model() -> None:
    spec = DeploymentSpec(model="smollm2-135m")
    assert (spec.version, spec.format, spec.engine.kind) == (None, "safetensors", "vllm")
    with pytest.raises(ValueError, match="smollm2-135m: no version chosen yet"):
        spec.ref()
    assert str(spec.model_copy(update={"version": "1"}).ref()) == "smollm2-135m@1/safetensors"


def test_a_revision_names_exactly_one_spec() -> None:
    spec = DeploymentSpec(model="m", version="1")
    same = DeploymentSpec.model_validate_json(spec.model_dump_json())
    assert same.revision() == spec.revision()
    assert spec.revision().startswith("m--1--")
    others = [
        spec.model_copy(update={"version": "2"}),
        spec.model_copy(update={"format": "gguf"}),
        spec.model_copy(update={"engine": EngineSettings(max_num_seqs=65)}),
        spec.model_copy(update={"autoscaling": Autoscaling(min_replicas=0)}),
        spec.model_copy(update={"cpus_per_replica": 2}),
    ]
    assert len({each.revision() for each in (spec, *others)}) == 6


def test_a_revision_is_named_by_what_was_asked_and_not_by_defaults() -> None:
    """A new optional field must not roll out every deployment there is: this name is kept for good."""
    spelled_out = DeploymentSpec(model="m", version="1", engine=EngineSettings(max_num_seqs=64, max_model_len=None))
    assert spelled_out.revision() == DeploymentSpec(model="m", version="1").revision() == "m--1--239723cf"
    assert DeploymentSpec(model="m", version="1", autoscaling=Autoscaling(target_kv_cache_use=0.8)).revision() != (
        spelled_out.revision()
    )


@given(st.integers(0, 5), st.integers(1, 5))
def test_replicas_are_ordered(min_replicas: int, max_replicas: int) -> None:
    if min_replicas > max_replicas:
        with pytest.raises(ValidationError, match=f"min_replicas {min_replicas} is above max_replicas {max_replicas}"):
            Autoscaling(min_replicas=min_replicas, max_replicas=max_replicas)
    else:
        assert Autoscaling(min_replicas=min_replicas, max_replicas=max_replicas).min_replicas == min_replicas


@pytest.mark.parametrize(
    "bad",
    [
        {"cpus_per_replica": 0},
        {"gpus_per_replica": -1},
        {"engine": {"kind": "other"}},
        {"engine": {"gpu_memory_utilization": 1.1}},
        {"engine": {"max_model_len": 1}},
        {"autoscaling": {"max_replicas": 0}},
        {"autoscaling": {"target_ongoing_requests": 0}},
        {"autoscaling": {"target_kv_cache_use": 1.1}},
        {"autoscaling": {"target_ttft_p99_s": 0}},
        {"autoscaling": {"target_waiting_requests": -1}},
        {"replicas": 1},
    ],
)
def test_a_spec_that_cannot_be(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        DeploymentSpec.model_validate({"model": "m"} | bad)


def test_only_a_ready_or_sleeping_deployment_takes_traffic() -> None:
    assert {state for state in DeploymentState if state.takes_traffic} == {
        DeploymentState.READY,
        DeploymentState.ASLEEP,
    }
