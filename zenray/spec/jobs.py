"""Runs that a person submits with `zenray run FILE`: one YAML document each, told apart by `kind`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from zenray.spec.documents import Document, load_document
from zenray.spec.errors import InvalidDocument, suggest
from zenray.spec.lineage import BaseVersion, NewVersion
from zenray.spec.training import DistillJob, PretrainJob
from zenray.spec.versions import check_name

Share = Annotated[float, Field(ge=0, le=1)]


class UpcycledGroup(Document):
    """Experts of one domain, made alike except for how much of each is drawn anew."""

    name: str = Field(min_length=1)
    experts: int = Field(ge=1)
    drop_rate: Share | tuple[Share, ...] = Field(
        0.5, description="The share of each expert that is drawn anew; a list gives one for each expert."
    )

    @property
    def drop_rates(self) -> tuple[float, ...]:
        """One for each expert."""
        return self.drop_rate if isinstance(self.drop_rate, tuple) else (self.drop_rate,) * self.experts

    @model_validator(mode="after")
    def _one_rate_an_expert(self) -> UpcycledGroup:
        if len(self.drop_rates) != self.experts:
            raise ValueError(f"group {self.name!r} has {self.experts} experts and {len(self.drop_rates)} drop rates")
        return self


class UpcycleJob(Document):
    """Make a MoDE out of a dense version (Drop-Upcycling, arXiv 2502.19261), and publish it."""

    kind: Literal["upcycle"]
    name: str
    base: BaseVersion
    into: NewVersion
    groups: tuple[UpcycledGroup, ...] = Field(min_length=1, description="The experts of each sparse layer, in order.")
    experts_per_token: int = Field(2, ge=1)
    renormalize: bool = Field(True, description="Gate weights sum to 1; without it they are plain probabilities.")
    layers: str | tuple[int, ...] = Field(
        "all", description='Layers that become sparse: "all", "last 6", "first 4", "every 2", or a list (from 0).'
    )
    mode: Literal["joint", "independent", "rows", "copy", "kmeans", "random"] = Field(
        "joint",
        description="What is drawn anew: the paper's, the released code's, the blog's, nothing; or the FFN is divided "
        "among the experts, by balanced k-means over its neurons or at random.",
    )
    granularity: int = Field(1, ge=1, description="Cut each expert into so many; a token takes so many times more.")
    router_init: Literal["normal", "uniform", "centroid", "zero"] = "normal"
    router_std: float = Field(0.02, gt=0)
    seed: int = 0
    stock_format: Literal["none", "exact", "replicate"] = Field(
        "exact",
        description="Also publish a format that stock Qwen3-MoE or Mixtral classes load, under their name: where that "
        "is exact and costs nothing; or also where dense layers must be said as equal experts; or never.",
    )

    @field_validator("name")
    @classmethod
    def _legal(cls, value: str) -> str:
        return check_name("job", value)

    @model_validator(mode="after")
    def _enough_experts(self) -> UpcycleJob:
        experts = sum(group.experts for group in self.groups)
        if self.experts_per_token > experts:
            raise ValueError(f"each token takes {self.experts_per_token} experts, but a layer has only {experts}")
        return self


class _Kind(BaseModel):
    """The first look at a job file; all else in it is read by its kind's schema."""

    kind: str


SCHEMAS: dict[str, type[Document]] = {"upcycle": UpcycleJob, "pretrain": PretrainJob, "distill": DistillJob}


def load_job(path: Path) -> Document:
    """The job in a file, in the schema of its kind. InvalidDocument with file, line, and what to write instead."""
    kind = load_document(path, _Kind).kind
    if kind not in SCHEMAS:
        raise InvalidDocument(f"{path}: there is no kind of job {kind!r}.", hint=suggest(kind, SCHEMAS))
    return load_document(path, SCHEMAS[kind])
