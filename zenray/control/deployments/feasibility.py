"""Whether a deployment can run at all, by what is known before anything starts: its format, layout, context, memory.

What vLLM 0.32 loads: no GGUF on any device (it has no loader for it), and on a CPU weight-only quantization in 4 bits
alone (its CPU kernels for packed weights take `uint4` and `uint4b8`).
"""

from __future__ import annotations

from zenray.catalog.catalog import Catalog
from zenray.catalog.entries import ModelEntry
from zenray.catalog.memory import GpuMemory, Layout, check_layout, memory_per_gpu
from zenray.spec.deployments import ContextScaling, DeploymentSpec
from zenray.spec.errors import InvalidValue

_ON_NO_DEVICE = frozenset({"gguf"})
_ON_GPUS_ONLY = frozenset({"gptq-int8"})
_BYTES_PER_VALUE = {"auto": 2.0, "bfloat16": 2.0, "float16": 2.0, "float32": 4.0}


def with_catalogs_defaults(spec: DeploymentSpec, entry: ModelEntry) -> DeploymentSpec:
    """The spec with YaRN as the catalog has it, where it is needed to reach the asked context and is not given."""
    engine = spec.engine
    asked_tokens = engine.max_model_len or entry.context_tokens
    if entry.yarn is None or engine.context_scaling is not None or asked_tokens <= entry.yarn.original_tokens:
        return spec
    scaling = ContextScaling(factor=entry.yarn.factor, original_tokens=entry.yarn.original_tokens)
    return spec.model_copy(update={"engine": engine.model_copy(update={"context_scaling": scaling})})


def check_runnable(spec: DeploymentSpec, catalog: Catalog) -> None:
    """InvalidValue when this deployment could never start, saying what to change. A scripted engine runs anything.

    ModelNotFound for a model, or a draft's, that the catalog does not have.
    """
    entry = catalog.get(spec.model)
    if spec.engine.kind == "scripted":
        return
    _check_format(spec.format, spec.gpus_per_replica)
    _check_gpus(spec)
    _check_context(spec, entry)
    if spec.engine.draft is not None and spec.engine.draft.model is not None:
        _check_draft(spec, entry, catalog.get(spec.engine.draft.model))
    if entry.dimensions is not None:
        if (spec.engine.data_parallel > 1 or spec.engine.expert_offload_bytes) and entry.dimensions.moe is None:
            raise InvalidValue(
                f"{spec.model} has no experts, which data_parallel spreads and expert_offload_bytes moves.",
                hint="For more requests at once raise autoscaling.max_replicas; for less memory use tensor_parallel.",
                param="engine",
            )
        if spec.engine.gpus > 1:
            check_layout(entry.dimensions, _layout(spec))
        _check_memory(spec, entry, catalog)


def _check_format(format: str, gpus: float, param: str = "format") -> None:
    if format in _ON_NO_DEVICE:
        raise InvalidValue(
            f"The engine (vLLM) does not load {format}.",
            hint="`zenray models pull` makes a safetensors version of a GGUF file; deploy that.",
            param=param,
        )
    if format in _ON_GPUS_ONLY and not gpus:
        raise InvalidValue(
            f"{format} runs on GPUs only, and gpus_per_replica is 0.",
            hint="On a CPU: safetensors or awq-int4. With GPUs: set gpus_per_replica.",
            param=param,
        )


def _check_gpus(spec: DeploymentSpec) -> None:
    """The layout takes whole GPUs, exactly those of the replica; one GPU may also be shared by several replicas."""
    engine = spec.engine
    if engine.expert_parallel and engine.tensor_parallel * engine.data_parallel == 1:
        raise InvalidValue(
            "expert_parallel spreads the experts over the GPUs of tensor_parallel x data_parallel, which is 1.",
            hint="Set tensor_parallel or data_parallel, or leave expert_parallel out.",
            param="engine.expert_parallel",
        )
    if engine.gpus > 1 and spec.gpus_per_replica != engine.gpus:
        data = f" x data_parallel {engine.data_parallel}" if engine.data_parallel > 1 else ""
        raise InvalidValue(
            f"tensor_parallel {engine.tensor_parallel} x pipeline_parallel {engine.pipeline_parallel}{data} takes "
            f"{engine.gpus} GPUs, and gpus_per_replica is {spec.gpus_per_replica:g}.",
            hint=f"Set gpus_per_replica to {engine.gpus}.",
            param="gpus_per_replica",
        )
    if engine.gpus == 1 and spec.gpus_per_replica > 1:
        raise InvalidValue(
            f"gpus_per_replica is {spec.gpus_per_replica:g}, and the engine would use one of them.",
            hint="Set engine.tensor_parallel (or pipeline_parallel, data_parallel), or gpus_per_replica to 1.",
            param="gpus_per_replica",
        )
    if engine.expert_offload_bytes and not spec.gpus_per_replica:
        raise InvalidValue(
            "expert_offload_bytes moves experts from a GPU to the machine's memory, and gpus_per_replica is 0.",
            hint="Leave it out: on a CPU all of the model is there.",
            param="engine.expert_offload_bytes",
        )


def _check_context(spec: DeploymentSpec, entry: ModelEntry) -> None:
    """No more than the catalog says of the model, or than the asked scaling reaches."""
    scaling, asked_tokens = spec.engine.context_scaling, spec.engine.max_model_len
    reach_tokens = scaling.context_tokens if scaling else entry.context_tokens
    if asked_tokens is not None and asked_tokens > reach_tokens:
        raise InvalidValue(
            f"max_model_len {asked_tokens:,} is beyond the context of {spec.model}, {reach_tokens:,} tokens.",
            hint=(
                "Set engine.context_scaling to stretch it (YaRN), or deploy a model with a longer context."
                if scaling is None
                else "Raise context_scaling.factor, or lower max_model_len."
            ),
            param="engine.max_model_len",
        )


def _check_draft(spec: DeploymentSpec, entry: ModelEntry, draft: ModelEntry) -> None:
    assert spec.engine.draft is not None
    _check_format(spec.engine.draft.format, spec.gpus_per_replica, "engine.draft.format")
    if draft.parameters.active > entry.parameters.active:
        raise InvalidValue(
            f"{draft.name} computes {draft.parameters.active:,} parameters for a token, {entry.name} "
            f"{entry.parameters.active:,}: a draft must be cheaper than the model that it drafts for.",
            param="engine.draft.model",
        )
    vocabularies = [e.dimensions.vocab_size if e.dimensions else None for e in (entry, draft)]
    if None not in vocabularies and vocabularies[0] != vocabularies[1]:
        raise InvalidValue(
            f"{draft.name} has {vocabularies[1]:,} tokens and {entry.name} {vocabularies[0]:,}: a draft must speak in "
            "the same tokens.",
            hint="Choose a draft with the same tokenizer, or leave draft.model out to look guesses up in the text.",
            param="engine.draft.model",
        )
    if draft.dimensions is not None:
        check_layout(draft.dimensions, Layout(spec.engine.tensor_parallel))  # vLLM spreads it as the model
    context_tokens = spec.engine.max_model_len or entry.context_tokens
    if draft.context_tokens < context_tokens:
        raise InvalidValue(
            f"{draft.name} has a context of {draft.context_tokens:,} tokens, and {context_tokens:,} are asked for.",
            hint="Set engine.max_model_len to what both have.",
            param="engine.draft.model",
        )


def _check_memory(spec: DeploymentSpec, entry: ModelEntry, catalog: Catalog) -> None:
    """Weights and the KV cache of `max_num_seqs` sequences of the whole context, of the model and of its draft."""
    engine = spec.engine
    if not spec.gpus_per_replica or engine.gpu_memory_bytes is None:
        return
    stages = _memory(spec, entry, spec.format, _layout(spec))
    draft_bytes = _draft_bytes(spec, catalog)  # the last stage has it
    fullest = max(stages, key=lambda gpu: gpu.total_bytes + (draft_bytes if gpu is stages[-1] else 0))
    parts = {"weights": fullest.weights_bytes - fullest.offloaded_bytes, "KV cache": fullest.kv_cache_bytes}
    if draft_bytes and fullest is stages[-1]:
        parts["draft"] = draft_bytes
    usable_bytes = engine.gpu_memory_bytes * engine.gpu_memory_utilization
    if sum(parts.values()) <= usable_bytes:
        return
    each_bytes = fullest.kv_cache_bytes / spec.engine.sequences_per_rank
    fitting = int((usable_bytes - sum(parts.values()) + parts["KV cache"]) // each_bytes) if each_bytes else 0
    context_tokens = engine.max_model_len or entry.context_tokens
    added_up = " + ".join(f"{size / 2**30:.1f} GiB {name}" for name, size in parts.items())
    raise InvalidValue(
        f"{spec.model} does not fit: each GPU needs {added_up} = {sum(parts.values()) / 2**30:.1f} GiB for "
        f"{engine.sequences_per_rank} sequences of {context_tokens:,} tokens, and {usable_bytes / 2**30:.1f} GiB of it "
        "may be used.",
        hint=(
            f"{fitting} such sequences fit: lower max_num_seqs or max_model_len, or use more GPUs."
            if fitting > 0
            else "Not one such sequence fits: use more GPUs (tensor_parallel), a smaller max_model_len, a quantized "
            "format, or expert_offload_bytes."
        ),
        param="engine",
    )


def _draft_bytes(spec: DeploymentSpec, catalog: Catalog) -> int:
    draft = spec.engine.draft
    entry = catalog.get(draft.model) if draft is not None and draft.model is not None else None
    if draft is None or entry is None or entry.dimensions is None:
        return 0
    return _memory(spec, entry, draft.format, Layout(spec.engine.tensor_parallel))[0].total_bytes


def _memory(spec: DeploymentSpec, entry: ModelEntry, format: str, layout: Layout) -> tuple[GpuMemory, ...]:
    assert entry.dimensions is not None
    value_bytes = _BYTES_PER_VALUE[spec.engine.dtype]
    stored = {q.storage_format: q.bytes_per_parameter for q in entry.quantizations if q.storage_format != "safetensors"}
    return memory_per_gpu(
        entry.dimensions,
        layout,
        bytes_per_parameter=stored.get(format, value_bytes),
        sequences=spec.engine.sequences_per_rank,
        context_tokens=spec.engine.max_model_len or entry.context_tokens,
        bytes_per_cached_value=value_bytes,
        expert_offload_bytes=spec.engine.expert_offload_bytes if entry.name == spec.model else 0,
    )


def _layout(spec: DeploymentSpec) -> Layout:
    engine = spec.engine
    return Layout(engine.tensor_parallel, engine.pipeline_parallel, engine.expert_parallel, engine.data_parallel)
