"""Whether a deployment can run at all, by what is known before anything starts: its format, its layout, its memory.

What vLLM 0.32 loads: no GGUF on any device (it has no loader for it), and on a CPU weight-only quantization in 4 bits
alone (its CPU kernels for packed weights take `uint4` and `uint4b8`).
"""

from __future__ import annotations

from zenray.catalog.entries import ModelEntry
from zenray.catalog.memory import Layout, cache_tokens, check_layout
from zenray.spec.deployments import DeploymentSpec
from zenray.spec.errors import InvalidValue

_ON_NO_DEVICE = frozenset({"gguf"})
_ON_GPUS_ONLY = frozenset({"gptq-int8"})
_BYTES_PER_VALUE = {"auto": 2.0, "bfloat16": 2.0, "float16": 2.0, "float32": 4.0}


def check_runnable(spec: DeploymentSpec, entry: ModelEntry) -> None:
    """InvalidValue when this deployment could never start, saying what to change. A scripted engine runs anything."""
    if spec.engine.kind == "scripted":
        return
    _check_format(spec)
    _check_gpus(spec)
    if entry.dimensions is not None and spec.engine.gpus > 1:
        check_layout(entry.dimensions, _layout(spec))
    _check_memory(spec, entry)


def _check_format(spec: DeploymentSpec) -> None:
    if spec.format in _ON_NO_DEVICE:
        raise InvalidValue(
            f"The engine (vLLM) does not load {spec.format}.",
            hint="`zenray models pull` makes a safetensors version of a GGUF file; deploy that.",
            param="format",
        )
    if spec.format in _ON_GPUS_ONLY and not spec.gpus_per_replica:
        raise InvalidValue(
            f"{spec.format} runs on GPUs only, and gpus_per_replica is 0.",
            hint="On a CPU: safetensors or awq-int4. With GPUs: set gpus_per_replica.",
            param="format",
        )


def _check_gpus(spec: DeploymentSpec) -> None:
    """The layout takes whole GPUs, exactly those of the replica; one GPU may also be shared by several replicas."""
    engine = spec.engine
    if engine.expert_parallel and engine.tensor_parallel == 1:
        raise InvalidValue(
            "expert_parallel spreads the experts over the GPUs of tensor_parallel, which is 1.",
            hint="Set tensor_parallel, or leave expert_parallel out.",
            param="engine.expert_parallel",
        )
    if engine.gpus > 1 and spec.gpus_per_replica != engine.gpus:
        raise InvalidValue(
            f"tensor_parallel {engine.tensor_parallel} x pipeline_parallel {engine.pipeline_parallel} takes "
            f"{engine.gpus} GPUs, and gpus_per_replica is {spec.gpus_per_replica:g}.",
            hint=f"Set gpus_per_replica to {engine.gpus}.",
            param="gpus_per_replica",
        )
    if engine.gpus == 1 and spec.gpus_per_replica > 1:
        raise InvalidValue(
            f"gpus_per_replica is {spec.gpus_per_replica:g}, and the engine would use one of them.",
            hint="Set engine.tensor_parallel (or pipeline_parallel), or gpus_per_replica to 1.",
            param="gpus_per_replica",
        )


def _check_memory(spec: DeploymentSpec, entry: ModelEntry) -> None:
    """Weights and the cache of one sequence of the whole context, as vLLM itself asks when it starts."""
    engine = spec.engine
    if not spec.gpus_per_replica or engine.gpu_memory_bytes is None or entry.dimensions is None:
        return
    value_bytes = _BYTES_PER_VALUE[engine.dtype]
    stored = {q.storage_format: q.bytes_per_parameter for q in entry.quantizations if q.storage_format != "safetensors"}
    fits_tokens = cache_tokens(
        entry.dimensions,
        _layout(spec),
        bytes_per_parameter=stored.get(spec.format, value_bytes),
        gpu_memory_bytes=engine.gpu_memory_bytes,
        gpu_memory_utilization=engine.gpu_memory_utilization,
        bytes_per_cached_value=value_bytes,
    )
    context_tokens = engine.max_model_len or entry.context_tokens
    if fits_tokens < context_tokens:
        usable_gib = engine.gpu_memory_bytes * engine.gpu_memory_utilization / 2**30
        fitting = f"leaves room for {fits_tokens:,} tokens" if fits_tokens else "does not even hold the weights"
        raise InvalidValue(
            f"{spec.model} does not fit: of each GPU {usable_gib:.1f} GiB may be used, which {fitting}; one "
            f"sequence of the whole context needs {context_tokens:,}.",
            hint="Use more GPUs (tensor_parallel), a smaller max_model_len, or a quantized format.",
            param="engine",
        )


def _layout(spec: DeploymentSpec) -> Layout:
    engine = spec.engine
    return Layout(engine.tensor_parallel, engine.pipeline_parallel, engine.expert_parallel)
