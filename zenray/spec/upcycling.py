"""Upcycling jobs: how a dense version becomes a mixture of experts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from zenray.spec.documents import Document
from zenray.spec.lineage import BaseVersion, NewVersion
from zenray.spec.versions import check_name

Share = Annotated[float, Field(ge=0, le=1)]
UpcyclingMode = Literal["joint", "independent", "rows", "copy", "kmeans", "random"]
PAPERS_RATE = 0.5
BLOGS_RATES = {"code": 0.15}  # "8-12% for general language models, 15% for code-specialized models"
BLOGS_RATE = 0.1


class UpcycledGroup(Document):
    """Experts of one domain, made alike except for how much of each is drawn anew."""

    name: str = Field(min_length=1)
    experts: int = Field(ge=1)
    drop_rate: Share | tuple[Share, ...] | None = Field(
        None,
        description="The share of each expert that is drawn anew; a list gives one for each expert. None: what the "
        "mode's source found best: 0.5; in mode `rows` 0.1, and 0.15 for a group named `code`.",
    )
    width: int | None = Field(
        None,
        ge=1,
        description="Of each expert's FFN, if wider than the dense one (ZIP-0414: code experts are); new neurons say "
        "nothing at first. None: as wide as what it is made of.",
    )

    def drop_rates(self, mode: UpcyclingMode) -> tuple[float, ...]:
        """One for each expert."""
        if isinstance(self.drop_rate, tuple):
            return self.drop_rate
        rate = self.drop_rate
        if rate is None and mode == "rows":
            rate = BLOGS_RATES.get(self.name, BLOGS_RATE)
        elif rate is None:
            rate = PAPERS_RATE if mode in ("joint", "independent") else 0.0
        return (rate,) * self.experts

    @model_validator(mode="after")
    def _one_rate_an_expert(self) -> UpcycledGroup:
        if isinstance(self.drop_rate, tuple) and len(self.drop_rate) != self.experts:
            raise ValueError(f"group {self.name!r} has {self.experts} experts and {len(self.drop_rate)} drop rates")
        return self


class UpcycledRouter(Document):
    """How tokens find experts, and how the load is kept even: the fields of zenray.model.config.RouterConfig."""

    renormalize: bool = Field(True, description="Gate weights sum to 1; without it they are plain probabilities.")
    temperature: float = Field(1.0, gt=0, description="The router's logits are divided by it.")
    balance_loss: Literal["switch", "cv2", "none"] = Field(
        "switch", description="Of each layer's loads: Switch's, the blog's variance (squared coefficient), or none."
    )
    balance_coefficient: float = Field(0.01, ge=0)
    z_coefficient: float = Field(0.0, ge=0, description="Of the loss that keeps logits small (ST-MoE).")
    selection_bias: bool = Field(False, description="Balance without a loss (DeepSeek): a bias that moves the choice.")
    capacity_factor: float | None = Field(
        None,
        gt=0,
        description="In training an expert takes at most ceil(factor · tokens · k / experts); the shared expert stands "
        "in for those without room. Inference has no such limit.",
    )
    expert_choice_training: Literal["threshold", "expert_choice"] = Field(
        "threshold",
        description="In layers where experts choose: causal thresholds after the warm-up, or choosing to the end.",
    )
    expert_choice_renormalize: bool | None = Field(
        None, description="Gate weights in those layers sum to 1 (their paper: not). None: as `renormalize`."
    )
    threshold_warmup_steps: int = Field(100, ge=1)
    threshold_decay: float = Field(0.99, ge=0, lt=1)


class UpcycleJob(Document):
    """Make a MoDE out of a dense version (Drop-Upcycling, arXiv 2502.19261), and publish it."""

    kind: Literal["upcycle"]
    name: str
    base: BaseVersion
    into: NewVersion
    groups: tuple[UpcycledGroup, ...] = Field(min_length=1, description="The experts of each sparse layer, in order.")
    experts_per_token: int = Field(2, ge=1)
    layers: str | tuple[int, ...] = Field(
        "all", description='Layers that become sparse: "all", "last 6", "first 4", "every 2", or a list (from 0).'
    )
    expert_choice_layers: str | tuple[int, ...] = Field(
        (), description='Of those, where experts choose tokens: "first 2" of them (the blog\'s), or a list of layers.'
    )
    router: UpcycledRouter = UpcycledRouter()
    shared_expert_width: int = Field(
        0,
        ge=0,
        description="Of an expert that every token passes: some neurons of the dense FFN, silent at first.",
    )
    shared_expert_gate: bool = Field(False, description="The shared expert is scaled by a sigmoid (Qwen2-MoE).")
    mode: UpcyclingMode = Field(
        "joint",
        description="What is drawn anew: the paper's, the released code's, the blog's, nothing; or the FFN is divided "
        "among the experts, by balanced k-means over its neurons or at random.",
    )
    granularity: int = Field(1, ge=1, description="Cut each expert into so many; a token takes so many times more.")
    router_init: Literal["normal", "uniform", "centroid", "zero"] | None = Field(
        None, description="The router's first weights. None: from the clusters' centroids by k-means, else normal."
    )
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
    def _fits_together(self) -> UpcycleJob:
        experts = sum(group.experts for group in self.groups)
        if self.experts_per_token > experts:
            raise ValueError(f"each token takes {self.experts_per_token} experts, but a layer has only {experts}")
        if self.router.capacity_factor is not None and not self.shared_expert_width:
            raise ValueError(
                f"router.capacity_factor is {self.router.capacity_factor}, but shared_expert_width is 0: tokens that "
                "an expert has no room for use the shared expert"
            )
        if self.shared_expert_gate and not self.shared_expert_width:
            raise ValueError("shared_expert_gate is on, but shared_expert_width is 0: there is nothing to gate")
        return self
