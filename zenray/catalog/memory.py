"""What one GPU of a replica must hold: its share of the weights, and the KV cache of the sequences it computes.

The shares are vLLM's: tensor parallel splits attention by heads and FFNs by width (or, expert parallel, by experts),
pipeline parallel splits the layers, data parallel copies all but routed experts, which lie cut or whole over the ranks
of both tensor and data parallel. Activations and CUDA graphs come on top; they are what `gpu_memory_utilization`
leaves room for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from zenray.catalog.accounting import count_layer
from zenray.spec.dimensions import ModelDimensions
from zenray.spec.errors import InvalidValue


@dataclass(frozen=True)
class Layout:
    """How a replica is spread over GPUs: tensor_parallel × pipeline_parallel × data_parallel of them."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    expert_parallel: bool = False  # experts are spread whole over their ranks, not cut
    data_parallel: int = 1

    @property
    def gpus(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel * self.data_parallel

    @property
    def expert_ranks(self) -> int:
        """GPUs over which the routed experts of a layer lie."""
        return self.tensor_parallel * self.data_parallel


@dataclass(frozen=True)
class GpuMemory:
    """One GPU of one pipeline stage; all GPUs of a stage hold the same amount."""

    stage: int
    layers: int
    weights_bytes: int
    kv_cache_bytes: int
    offloaded_bytes: int = 0  # of weights_bytes, in the machine's memory instead

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_cache_bytes - self.offloaded_bytes


def memory_per_gpu(
    dimensions: ModelDimensions,
    layout: Layout,
    *,
    bytes_per_parameter: float,
    sequences: int = 0,
    context_tokens: int = 0,
    bytes_per_cached_value: float = 2,
    expert_offload_bytes: int = 0,
) -> tuple[GpuMemory, ...]:
    """Memory of a GPU of each pipeline stage, with the KV cache of `sequences` × `context_tokens`.

    `sequences` are those of one data parallel rank. `expert_offload_bytes`: so much of each GPU's routed experts, at
    most, stays in the machine's memory.

    InvalidValue when the layout does not divide the network, with the sizes that do.
    """
    check_layout(dimensions, layout)
    stages, first_layer = [], 0
    for stage, layers in enumerate(stage_layers(dimensions.layers, layout.pipeline_parallel)):
        in_stage = range(first_layer, first_layer + layers)
        first_layer += layers
        weights = _stage_weights(dimensions, layout, in_stage)
        experts = sum(_routed_experts(dimensions, layer) for layer in in_stage) // layout.expert_ranks
        kept_tokens = sum(_kept_tokens(dimensions, layer, context_tokens) for layer in in_stage)
        heads = max(1, dimensions.kv_heads // layout.tensor_parallel)
        values = 2 * heads * dimensions.head_dim * kept_tokens * sequences
        stages.append(
            GpuMemory(
                stage=stage,
                layers=layers,
                weights_bytes=math.ceil(weights * bytes_per_parameter),
                kv_cache_bytes=math.ceil(values * bytes_per_cached_value),
                offloaded_bytes=min(expert_offload_bytes, math.floor(experts * bytes_per_parameter)),
            )
        )
    return tuple(stages)


def cache_tokens(
    dimensions: ModelDimensions,
    layout: Layout,
    *,
    bytes_per_parameter: float,
    gpu_memory_bytes: int,
    gpu_memory_utilization: float,
    bytes_per_cached_value: float = 2,
) -> int:
    """Tokens whose keys and values fit beside the weights, all sequences together; 0 when the weights alone do not fit.

    The fullest pipeline stage decides. Local layers are counted whole: short sequences use them so.
    """
    fits = []
    for gpu in memory_per_gpu(dimensions, layout, bytes_per_parameter=bytes_per_parameter):
        free_bytes = gpu_memory_bytes * gpu_memory_utilization - gpu.weights_bytes
        heads = max(1, dimensions.kv_heads // layout.tensor_parallel)
        token_bytes = 2 * heads * dimensions.head_dim * gpu.layers * bytes_per_cached_value
        fits.append(max(0, math.floor(free_bytes / token_bytes)))
    return min(fits)


def check_layout(dimensions: ModelDimensions, layout: Layout) -> None:
    """InvalidValue when the network cannot be spread like this: heads, widths or experts that do not divide."""
    legal = legal_tensor_parallel(
        dimensions, expert_parallel=layout.expert_parallel, data_parallel=layout.data_parallel
    )
    if layout.tensor_parallel not in legal:
        beside = f" (with data_parallel {layout.data_parallel})" if layout.data_parallel > 1 else ""
        raise InvalidValue(
            f"tensor_parallel {layout.tensor_parallel}{beside} does not divide the network: {dimensions.heads} query "
            f"heads, {dimensions.kv_heads} key heads, {_widths_in_words(dimensions)}.",
            hint=f"It can be {', '.join(map(str, legal))}." if legal else "Choose another data_parallel.",
            param="tensor_parallel",
        )
    if not 1 <= layout.pipeline_parallel <= dimensions.layers:
        raise InvalidValue(
            f"pipeline_parallel {layout.pipeline_parallel} is not within 1…{dimensions.layers}, the number of layers.",
            param="pipeline_parallel",
        )


def legal_tensor_parallel(
    dimensions: ModelDimensions, *, expert_parallel: bool = False, data_parallel: int = 1, most: int = 64
) -> tuple[int, ...]:
    """The tensor parallel sizes, up to `most`, that divide query heads, key heads (or are divided by them) and FFNs."""
    widths, over_all_ranks = {dimensions.ffn_width}, set[int]()
    if dimensions.moe:
        widths |= {dimensions.moe.shared_width}
        over_all_ranks = {dimensions.moe.experts} if expert_parallel else set(dimensions.moe.widths)
    return tuple(
        size
        for size in range(1, most + 1)
        if dimensions.heads % size == 0
        and (dimensions.kv_heads % size == 0 or size % dimensions.kv_heads == 0)
        and all(width % size == 0 for width in widths)
        and all(width % (size * data_parallel) == 0 for width in over_all_ranks)
    )


def stage_layers(layers: int, pipeline_parallel: int) -> tuple[int, ...]:
    """Layers of each pipeline stage; what does not divide goes to the stages before the last, as vLLM does it."""
    each, left_over = divmod(layers, pipeline_parallel)
    stages = [each] * pipeline_parallel
    for stage in range(2, left_over + 2):
        stages[-stage] += 1
    return tuple(stages)


def _stage_weights(dimensions: ModelDimensions, layout: Layout, in_stage: range) -> int:
    """Weights on one GPU: cut by tensor parallel; norms and router whole; key heads at least one."""
    ranks, hidden = layout.tensor_parallel, dimensions.hidden_size
    sparse = set(dimensions.sparse_layers)
    weights = 0
    for layer in in_stage:
        count = count_layer(dimensions, sparse=layer in sparse)
        kv_heads = max(1, dimensions.kv_heads // ranks)
        kv_width, q_width = kv_heads * dimensions.head_dim, dimensions.q_width // ranks
        weights += 2 * hidden * (q_width + kv_width) + count.norms + count.router
        weights += (q_width + 2 * kv_width if dimensions.qkv_bias else 0) + (hidden if dimensions.o_bias else 0)
        gates = hidden if dimensions.moe and layer in sparse and dimensions.moe.shared_gate else 0
        weights += gates + (count.dense_ffn + count.shared_experts - gates) // ranks
        weights += count.routed_experts // layout.expert_ranks + count.blocks // ranks
    vocabulary = dimensions.vocab_size * hidden // ranks
    first, last = in_stage.start == 0, in_stage.stop == dimensions.layers
    if first:
        weights += vocabulary
    if last:
        # A tied head is the embedding when both are in one stage, else a copy of it.
        weights += hidden + (0 if dimensions.tied_embeddings and first else vocabulary)
    return weights


def _routed_experts(dimensions: ModelDimensions, layer: int) -> int:
    return count_layer(dimensions, sparse=layer in set(dimensions.sparse_layers)).routed_experts


def _kept_tokens(dimensions: ModelDimensions, layer: int, context_tokens: int) -> int:
    if dimensions.local_window_tokens is not None and layer in dimensions.local_layers:
        return min(context_tokens, dimensions.local_window_tokens)
    return context_tokens


def _widths_in_words(dimensions: ModelDimensions) -> str:
    parts = [f"FFN width {dimensions.ffn_width}"] if dimensions.ffn_width else []
    if dimensions.moe:
        widths = sorted(set(dimensions.moe.widths))
        parts.append(f"{len(dimensions.moe.widths)} experts of width {' and '.join(map(str, widths))}")
        if dimensions.moe.shared_width:
            parts.append(f"a shared expert of width {dimensions.moe.shared_width}")
    return ", ".join(parts)
