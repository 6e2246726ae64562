"""What the documents say about a model, kept apart from what is computed: shapes, scores, speed, power, training.

A claim is data to compare with, never an input of a calculation that zenray relies on.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from zenray.spec.documents import Document

SourceDocument = Literal["hip-39", "reference-2025-09", "mode-blog", "drop-upcycling-blog", "zip-0414"]


class ClaimedShape(Document):
    """A document's architecture numbers. None: the document is silent."""

    experts: int | None = Field(None, ge=1)
    top_k: int | None = Field(None, ge=1)
    layers: int | None = Field(None, ge=1)
    hidden_size: int | None = Field(None, ge=1)
    heads: int | None = Field(None, ge=1)
    kv_heads: int | None = Field(None, ge=1)
    ffn_width: int | None = Field(None, ge=1)
    expert_width: int | None = Field(None, ge=1)
    shared_width: int | None = Field(None, ge=1)
    vocab_size: int | None = Field(None, ge=1)


class ClaimedScore(Document):
    """A benchmark score: percent, except MT-Bench (0 to 10)."""

    benchmark: str
    setting: str | None = None
    score: float = Field(ge=0, le=100)
    source: SourceDocument


class ClaimedThroughput(Document):
    """Tokens per second on some hardware; a range where the document gives one, no maximum where it says "300+"."""

    hardware: str
    quantization: str | None = None
    batch: int = Field(1, ge=1)
    ttft_ms: float | None = Field(None, gt=0)
    tokens_per_s_min: float = Field(gt=0)
    tokens_per_s_max: float | None = Field(None, gt=0)
    source: SourceDocument


class ClaimedPower(Document):
    """Continuous operation."""

    power_w: float = Field(gt=0)
    energy_kwh_per_month: float = Field(gt=0)
    co2_kg_per_month: float = Field(gt=0)
    source: SourceDocument


class ClaimedTraining(Document):
    """Training hyperparameters."""

    tokens: int | None = Field(None, ge=1)
    batch_size: int | None = Field(None, ge=1)
    learning_rate: float | None = Field(None, gt=0)
    epochs_min: int | None = Field(None, ge=1)
    epochs_max: int | None = Field(None, ge=1)
    gpu_hours: float | None = Field(None, gt=0)
    drop_rate: float | None = Field(None, ge=0, le=1, description="Drop-Upcycling: share of rows made anew.")
    upcycled_from_parameters: int | None = Field(None, ge=1, description="Total parameters of the dense parent.")
    source: SourceDocument


class ClaimedLora(Document):
    """LoRA settings of one model: the document's names of the targets, and what they mean in the network."""

    rank: int = Field(ge=1)
    alpha: int = Field(ge=1)
    targets: str = Field(description="As the document writes them.")
    target_modules: tuple[str, ...] = Field((), description="The same, as ends of the network's modules' names.")
    target_parameters: tuple[str, ...] = Field((), description="Those of them that are parameters: experts, routers.")
    trainable_percent: float = Field(gt=0, le=100)
    source: SourceDocument


class ClaimedMemory(Document):
    """Memory of the weights in one format, in decimal gigabytes."""

    quantization: str
    total_gb: float = Field(gt=0)
    active_gb: float | None = Field(None, gt=0)
    hardware: str | None = None
    source: SourceDocument


class Claims(Document):
    """All that the documents claim about one model."""

    shape: ClaimedShape = ClaimedShape()
    scores: tuple[ClaimedScore, ...] = ()
    throughput: tuple[ClaimedThroughput, ...] = ()
    memory: tuple[ClaimedMemory, ...] = ()
    power: ClaimedPower | None = None
    training: ClaimedTraining | None = None
    lora: ClaimedLora | None = None
    quality_vs_dense_percent: float | None = Field(None, gt=0)
    flops_vs_dense: float | None = Field(None, gt=0)
    dense_parameters: int | None = Field(None, ge=1, description="Of that dense model; None: as many as this one's.")
