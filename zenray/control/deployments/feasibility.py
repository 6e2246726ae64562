"""Whether a deployment can run at all, by what is known before anything starts: its format, layout, context, memory.

What vLLM 0.32 loads: no GGUF on any device (it has no loader for it), and on a CPU weight-only quantization in 4 bits
alone (its CPU kernels for packed weights take `uint4` and `uint4b8`).
"""

from __future__ import annotations

from zenray.catalog.catalog import Catalog
from zenray.catalog.entries import ModelEntry
from zenray.catalog.memory import GpuMemory, Layout, check_layout, memory_per_gpu
from zenray.control.deployments.machines import Machines
from zenray.spec.deployments import DeploymentSpec
from zenray.spec.errors import InvalidValue

_ON_NO_DEVICE = frozenset({"gguf"})
_ON_GPUS_ONLY = frozenset({"gptq-int8"})
_BYTES_PER_VALUE = {"auto": 2.0, "bfloat16": 2.0, "float16": 2.0, "float32": 4.0}


def check_runnable(
    spec: DeploymentSpec, catalog: Catalog, machines: Machines = Machines(), *, sequences: int | None = None
) -> None:
    """InvalidValue when this deployment could never start, saying what to change. A scripted engine runs anything.

    `sequences`: for so many of the whole context there must be memory; None: for the spec's `max_num_seqs`. (What
    nobody asked for is only a bound: vLLM takes in fewer while the cache is full.)
    ModelNotFound for a model, or a draft's, that the catalog does not have.
    """
    entry = catalog.get(spec.model)
    if spec.engine.kind == "scripted":
        return
    _check_experts(entry)
    _check_format(spec.format, spec.gpus_per_replica)
    _check_gpus(spec)
    _check_machines(spec, entry, machines)
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
        _check_memory(spec, entry, catalog, machines, sequences or spec.engine.max_num_seqs)


def _check_experts(entry: ModelEntry) -> None:
    """vLLM's layer of experts has no place for those that are no FFN (zenray.serving.mode_vllm.limits)."""
    moe = entry.dimensions.moe if entry.dimensions else None
    if moe and moe.blocks:
        found = ", ".join(f"{block.experts} {block.kind}" for block in moe.blocks)
        raise InvalidValue(
            f"The engine (vLLM) cannot serve {entry.name}: of its {moe.experts} experts some are no FFN ({found}).",
            hint="Use it through transformers, or deploy a model that has FFN experts only.",
            param="model",
        )


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
    if 0 < spec.gpus_per_replica < 1 and engine.gpu_memory_utilization > spec.gpus_per_replica:
        raise InvalidValue(
            f"A replica has {spec.gpus_per_replica:g} of a GPU and would take {engine.gpu_memory_utilization:g} of its "
            "memory: the next replica there finds none.",
            hint=f"Set engine.gpu_memory_utilization to {0.92 * spec.gpus_per_replica:.2g}.",
            param="engine.gpu_memory_utilization",
        )
    if engine.expert_offload_bytes and not spec.gpus_per_replica:
        raise InvalidValue(
            "expert_offload_bytes moves experts from a GPU to the machine's memory, and gpus_per_replica is 0.",
            hint="Leave it out: on a CPU all of the model is there.",
            param="engine.expert_offload_bytes",
        )


def _check_machines(spec: DeploymentSpec, entry: ModelEntry, machines: Machines) -> None:
    """All GPUs of a replica are in one machine: its process holds them. On CPUs that machine's memory holds it all."""
    serving = entry.serving
    if machines.nodes is not None and max(spec.engine.gpus, spec.gpus_per_replica) > machines.nodes.gpus:
        raise InvalidValue(
            f"A replica of {max(spec.engine.gpus, spec.gpus_per_replica):g} GPUs is larger than a machine, which has "
            f"{machines.nodes.gpus}; replicas over several machines are not built.",
            hint="Use a quantized format or expert_offload_bytes, or machines with more or larger GPUs.",
            param="gpus_per_replica",
        )
    needed_bytes = entry.parameters.total * _bytes_per_parameter(spec, entry, spec.format) + spec.engine.kv_cache_bytes
    if spec.gpus_per_replica or machines.memory_bytes is None or needed_bytes <= machines.memory_bytes:
        return
    raise InvalidValue(
        f"{spec.model} does not fit: without GPUs it needs {needed_bytes / 2**30:.1f} GiB of memory for weights and KV "
        f"cache, and the machine has {machines.memory_bytes / 2**30:.1f} GiB.",
        hint=(
            f"The catalog's layout: gpus_per_replica {serving.gpus}, engine.tensor_parallel {serving.tensor_parallel}, "
            f"engine.pipeline_parallel {serving.pipeline_parallel}, {serving.quantization}. "
            "Say in `nodes` of the platform file which GPUs there are, and it is the default."
        ),
        param="gpus_per_replica",
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


def _check_memory(
    spec: DeploymentSpec, entry: ModelEntry, catalog: Catalog, machines: Machines, sequences: int
) -> None:
    """Weights and the KV cache of `sequences` of the whole context, of the model and of its draft.

    Of a GPU that nobody names: the one for which the family's layouts are made.
    """
    engine = spec.engine
    if not spec.gpus_per_replica:
        return
    known_bytes = engine.gpu_memory_bytes or machines.gpu_memory_bytes
    gpu_bytes = known_bytes or catalog.family.serving.gpu_memory_bytes
    per_rank = -(-sequences // engine.data_parallel)
    stages = _memory(spec, entry, spec.format, _layout(spec), per_rank)
    draft_bytes = _draft_bytes(spec, catalog, per_rank)  # the last stage has it
    fullest = max(stages, key=lambda gpu: gpu.total_bytes + (draft_bytes if gpu is stages[-1] else 0))
    parts = {"weights": fullest.weights_bytes - fullest.offloaded_bytes, "KV cache": fullest.kv_cache_bytes}
    if draft_bytes and fullest is stages[-1]:
        parts["draft"] = draft_bytes
    usable_bytes = gpu_bytes * engine.gpu_memory_utilization
    if sum(parts.values()) <= usable_bytes:
        return
    each_bytes = fullest.kv_cache_bytes / per_rank
    fitting = int((usable_bytes - sum(parts.values()) + parts["KV cache"]) // each_bytes) if each_bytes else 0
    context_tokens = engine.max_model_len or entry.context_tokens
    assumed = "" if known_bytes else f"It is taken for a {catalog.family.serving.gpu}: name yours in `nodes`. "
    added_up = " + ".join(f"{size / 2**30:.1f} GiB {name}" for name, size in parts.items())
    raise InvalidValue(
        f"{spec.model} does not fit: each GPU needs {added_up} = {sum(parts.values()) / 2**30:.1f} GiB for "
        f"{per_rank} sequence{'s' * (per_rank > 1)} of {context_tokens:,} tokens, and {usable_bytes / 2**30:.1f} GiB "
        "of it may be used.",
        hint=(
            assumed + f"{fitting} such sequences fit: lower max_num_seqs or max_model_len, or use more GPUs."
            if fitting > 0
            else assumed
            + "Not one such sequence fits: use more GPUs (tensor_parallel), a smaller max_model_len, a quantized "
            "format, or expert_offload_bytes."
        ),
        param="engine",
    )


def _draft_bytes(spec: DeploymentSpec, catalog: Catalog, sequences: int) -> int:
    draft = spec.engine.draft
    entry = catalog.get(draft.model) if draft is not None and draft.model is not None else None
    if draft is None or entry is None or entry.dimensions is None:
        return 0
    return _memory(spec, entry, draft.format, Layout(spec.engine.tensor_parallel), sequences)[0].total_bytes


def _bytes_per_parameter(spec: DeploymentSpec, entry: ModelEntry, format: str) -> float:
    stored = {q.storage_format: q.bytes_per_parameter for q in entry.quantizations if q.storage_format != "safetensors"}
    return stored.get(format, _BYTES_PER_VALUE[spec.engine.dtype])


def _memory(
    spec: DeploymentSpec, entry: ModelEntry, format: str, layout: Layout, sequences: int
) -> tuple[GpuMemory, ...]:
    """`sequences`: of one data parallel rank."""
    assert entry.dimensions is not None
    return memory_per_gpu(
        entry.dimensions,
        layout,
        bytes_per_parameter=_bytes_per_parameter(spec, entry, format),
        sequences=sequences,
        context_tokens=spec.engine.max_model_len or entry.context_tokens,
        bytes_per_cached_value=_BYTES_PER_VALUE[spec.engine.dtype],
        expert_offload_bytes=spec.engine.expert_offload_bytes if entry.name == spec.model else 0,
    )


def _layout(spec: DeploymentSpec) -> Layout:
    engine = spec.engine
    return Layout(engine.tensor_parallel, engine.pipeline_parallel, engine.expert_parallel, engine.data_parallel)
