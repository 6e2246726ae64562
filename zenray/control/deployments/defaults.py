"""What a deployment leaves out, as the catalog has it: YaRN, and on machines with GPUs the model's layout there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zenray.catalog.entries import ModelEntry
from zenray.control.deployments.machines import Machines
from zenray.spec.deployments import ContextScaling, DeploymentSpec

_LAYOUT = frozenset({"tensor_parallel", "pipeline_parallel", "data_parallel", "expert_parallel"})


def with_catalogs_defaults(
    spec: DeploymentSpec,
    entry: ModelEntry,
    machines: Machines = Machines(),
    stored_in: Callable[[str], bool] = lambda format: False,
) -> DeploymentSpec:
    """The spec with what it leaves out filled in; a field that was written, if with its default, stays as it is.

    Without GPUs in the platform file nothing of the layout is filled in: a replica then runs on CPUs. The catalog's
    format is taken where the version is `stored_in` it; what `pull` publishes is in safetensors.
    """
    if spec.engine.kind == "vllm" and machines.nodes is not None:
        spec = _with_layout(spec, entry, stored_in)
    return _with_yarn(spec, entry)


def _with_layout(spec: DeploymentSpec, entry: ModelEntry, stored_in: Callable[[str], bool]) -> DeploymentSpec:
    """The catalog's `serving`: its layout where none is given, and as many GPUs as the layout takes."""
    engine, serving = spec.engine, entry.serving
    gpus_given = "gpus_per_replica" in spec.model_fields_set
    if gpus_given and not spec.gpus_per_replica:
        return spec  # on CPUs, as it says
    settings: dict[str, Any] = {}
    if not _LAYOUT & engine.model_fields_set and (not gpus_given or spec.gpus_per_replica == serving.gpus):
        settings |= {"tensor_parallel": serving.tensor_parallel, "pipeline_parallel": serving.pipeline_parallel}
    if "max_num_seqs" not in engine.model_fields_set:
        settings["max_num_seqs"] = serving.max_batch_size
    engine = engine.model_copy(update=settings)
    filled: dict[str, Any] = {"engine": engine}
    if not gpus_given:
        filled["gpus_per_replica"] = engine.gpus
    preferred = entry.quantization(serving.quantization).storage_format
    if "format" not in spec.model_fields_set and preferred != spec.format and stored_in(preferred):
        filled["format"] = preferred
    return spec.model_copy(update=filled)


def _with_yarn(spec: DeploymentSpec, entry: ModelEntry) -> DeploymentSpec:
    """YaRN as the catalog has it, where it is needed to reach the asked context and is not given."""
    engine = spec.engine
    asked_tokens = engine.max_model_len or entry.context_tokens
    if entry.yarn is None or engine.context_scaling is not None or asked_tokens <= entry.yarn.original_tokens:
        return spec
    scaling = ContextScaling(factor=entry.yarn.factor, original_tokens=entry.yarn.original_tokens)
    return spec.model_copy(update={"engine": engine.model_copy(update={"context_scaling": scaling})})
