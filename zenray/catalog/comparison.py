"""Claimed against computed: what the documents say of a model beside what its dimensions come to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from zenray.catalog.accounting import count_parameters, lora_parameters
from zenray.catalog.entries import ModelEntry
from zenray.catalog.memory import Layout, cache_tokens
from zenray.spec.dimensions import ModelDimensions

_HOURS_PER_MONTH = 30 * 24
_BYTES_PER_PARAMETER = {"fp32": 4.0}  # claimed by a document, but not a format of the family


@dataclass(frozen=True)
class Comparison:
    """One number of a document and ours."""

    what: str
    claimed: float
    computed: float
    unit: str = ""

    @property
    def deviation(self) -> float:
        """Computed over claimed, less 1: 0.02 is 2 % above."""
        return self.computed / self.claimed - 1


def compare(entry: ModelEntry) -> tuple[Comparison, ...]:
    """Every claim that arithmetic can be held against, empty for an entry without dimensions."""
    if entry.dimensions is None:
        return ()
    return (
        *_parameters(entry, entry.dimensions),
        *_shape(entry, entry.dimensions),
        *_memory(entry, entry.dimensions),
        *_training(entry, entry.dimensions),
    )


def _parameters(entry: ModelEntry, dimensions: ModelDimensions) -> Iterator[Comparison]:
    count = count_parameters(dimensions)
    yield Comparison("total parameters", entry.parameters.total, count.total + _encoders(entry))
    yield Comparison("active parameters", entry.parameters.active, count.active)
    if entry.claims.flops_vs_dense is not None:
        dense = entry.claims.dense_parameters or entry.parameters.total
        # The documents reckon 2 FLOPs for each active parameter on both sides, so the 2 goes out.
        share = count.active / dense
        yield Comparison(f"FLOPs a token, of a dense {dense / 1e9:g}B", entry.claims.flops_vs_dense, share)


def _encoders(entry: ModelEntry) -> int:
    """Parameters of the encoders, where the claimed total contains them."""
    return sum(e.parameters or 0 for e in entry.encoders) if entry.encoders_in_total else 0


def _shape(entry: ModelEntry, dimensions: ModelDimensions) -> Iterator[Comparison]:
    moe = dimensions.moe
    computed: dict[str, float | None] = {
        "experts": moe.experts if moe else 1,
        "top_k": moe.top_k if moe else None,
        "layers": dimensions.layers,
        "hidden_size": dimensions.hidden_size,
        "heads": dimensions.heads,
        "kv_heads": dimensions.kv_heads,
        "ffn_width": dimensions.ffn_width,
        "expert_width": sum(moe.widths) / len(moe.widths) if moe else None,
        "shared_width": moe.shared_width if moe else None,
        "vocab_size": dimensions.vocab_size,
    }
    for name, claimed in entry.claims.shape.model_dump().items():
        ours = computed[name]
        if claimed is not None and ours is not None:
            yield Comparison(name, claimed, ours)


def _memory(entry: ModelEntry, dimensions: ModelDimensions) -> Iterator[Comparison]:
    each = _BYTES_PER_PARAMETER | {q.name: q.bytes_per_parameter for q in entry.quantizations}
    count = count_parameters(dimensions)
    for claim in entry.claims.memory:
        name, size = claim.quantization, each[claim.quantization]
        yield Comparison(f"weights in {name}", claim.total_gb, (count.total + _encoders(entry)) * size / 1e9, "GB")
        if claim.active_gb is not None:
            yield Comparison(f"active weights in {name}", claim.active_gb, count.active * size / 1e9, "GB")
    serving = entry.serving
    if not serving.derived:
        fits = cache_tokens(
            dimensions,
            Layout(serving.tensor_parallel, serving.pipeline_parallel),
            bytes_per_parameter=each[serving.quantization],
            gpu_memory_bytes=serving.gpu_memory_bytes // serving.gpus,
            gpu_memory_utilization=1,
        )
        yield Comparison(f"context beside the weights in {serving.quantization}", entry.context_tokens, fits, "tokens")


def _training(entry: ModelEntry, dimensions: ModelDimensions) -> Iterator[Comparison]:
    lora, power = entry.claims.lora, entry.claims.power
    if lora is not None:
        trainable = lora_parameters(dimensions, lora.rank, lora.target_modules, lora.target_parameters)
        percent = 100 * trainable / count_parameters(dimensions).total
        yield Comparison(f"trainable by LoRA of rank {lora.rank}", lora.trainable_percent, percent, "%")
    if power is not None:
        computed = power.power_w * _HOURS_PER_MONTH / 1000
        yield Comparison("energy a month", power.energy_kwh_per_month, computed, "kWh")
