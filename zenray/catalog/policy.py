"""What holds for the whole family (`catalog/family.yaml`): formats, derived prices and limits, routing, failover."""

from __future__ import annotations

import re
from decimal import Decimal

from pydantic import Field, field_validator, model_validator

from zenray.spec.documents import Document


class QuantizationFormat(Document):
    """A way to keep weights."""

    name: str
    storage_format: str
    bytes_per_parameter: float = Field(gt=0)
    quality_percent_min: float | None = Field(None, description="Claimed, of FP16.")
    quality_percent_max: float | None = None
    derived: bool = Field(False, description="The bytes are not HIP-39's.")


class PricePolicy(Document):
    """How a price that no document gives comes about; see `catalog.pricing`."""

    significant_digits: int = Field(ge=1, le=6)
    cached_input_share: Decimal = Field(ge=0, le=1, description="Cached input costs this share of input.")


class LimitPolicy(Document):
    """A burst of `burst_factor` × the sustained rate for `burst_s` (HIP-39)."""

    significant_digits: int = Field(ge=1, le=6, description="Of a rate that no document gives.")
    burst_factor: float = Field(ge=1)
    burst_s: float = Field(gt=0)


class ServingPolicy(Document):
    """The GPU that derived layouts count in, and how much of it weights may take."""

    gpu: str
    gpu_memory_bytes: int = Field(ge=1)
    weights_bytes_per_gpu: int = Field(ge=1)
    quantization: str
    max_tensor_parallel: int = Field(ge=1)


class LoraSettings(Document):
    """LoRA defaults (HIP-39 "Fine-Tuning Pipeline")."""

    rank_min: int = Field(ge=1)
    rank_max: int = Field(ge=1)
    rank: int = Field(ge=1)
    alpha_per_rank: float = Field(gt=0)
    target_modules: tuple[str, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _ordered(self) -> LoraSettings:
        if not self.rank_min <= self.rank <= self.rank_max:
            raise ValueError(f"rank {self.rank} is outside {self.rank_min}…{self.rank_max}")
        return self


class AutoRule(Document):
    """A request whose text matches `pattern` goes to `model`."""

    pattern: str
    model: str

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return value


class AutoRouting(Document):
    """`name` stands for the model that the first matching rule names, else for `fallback`."""

    name: str
    strategy: str
    rules: tuple[AutoRule, ...]
    fallback: str


class Failover(Document):
    """A model of `cascade` that cannot answer is replaced by the next one in it."""

    enabled: bool
    cascade: tuple[str, ...]
    quality_warning: bool


class PrefixCache(Document):
    """Shared prefixes of the KV cache."""

    shared_prefixes: bool
    max_prefix_tokens: int = Field(ge=1)
    eviction: str


class FamilyPolicy(Document):
    """The family file."""

    tokenizer_entries: int = Field(ge=1)
    embedding_rows: int = Field(ge=1)
    default_max_tokens: int = Field(ge=1)
    template_overhead_tokens: int = Field(ge=0)
    price: PricePolicy
    limits: LimitPolicy
    serving: ServingPolicy
    lora: LoraSettings
    formats: tuple[QuantizationFormat, ...] = Field(min_length=1)
    auto: AutoRouting
    failover: Failover
    prefix_cache: PrefixCache
    notes: tuple[str, ...] = ()

    def named_models(self) -> tuple[str, ...]:
        """All models that the routing tables name."""
        return (*(rule.model for rule in self.auto.rules), self.auto.fallback, *self.failover.cascade)
