"""What a person asks to be served, and the states a deployment goes through."""

from __future__ import annotations

import hashlib
from enum import StrEnum
from typing import Literal

from pydantic import Field, model_validator

from zenray.spec.documents import Document
from zenray.spec.versions import VersionRef


class Autoscaling(Document):
    """How many replicas, and when that changes. `min_replicas: 0` lets a model sleep until it is asked."""

    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(1, ge=1)
    target_ongoing_requests: float = Field(16, gt=0, description="Requests in flight that one replica should have.")
    target_waiting_requests: float | None = Field(
        1, ge=0, description="Requests that may wait in one replica's engine for a place. null: any number."
    )
    target_kv_cache_use: float | None = Field(
        0.9, gt=0, le=1, description="Share of its KV cache that one replica should use. null: not looked at."
    )
    target_ttft_p99_s: float | None = Field(
        None, gt=0, description="99 of 100 first tokens should come within so long. null: not looked at."
    )
    upscale_delay_s: float = Field(
        10, ge=0, description="More must be needed for so long, or requests must wait, before one starts."
    )
    downscale_delay_s: float = Field(
        120, ge=0, description="As many replicas stay as were needed at any moment of the last so many seconds."
    )

    @model_validator(mode="after")
    def _ordered(self) -> Autoscaling:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}")
        return self


class Draft(Document):
    """Speculative decoding: tokens are guessed cheaply, and the model then checks several of them at once."""

    model: str | None = Field(
        None, description="A smaller model with the same tokens. None: guesses are looked up in the text so far."
    )
    version: str | None = Field(None, description="None: the newest published one.")
    format: str = "safetensors"
    tokens: int = Field(3, ge=1, le=16, description="Guesses that are checked at once.")

    @model_validator(mode="after")
    def _a_version_of_something(self) -> Draft:
        if self.model is None and self.version is not None:
            raise ValueError("draft.version is given without draft.model")
        return self

    def ref(self) -> VersionRef | None:
        """The exact version of the drafting model; None when there is none. ValueError until control has chosen it."""
        if self.model is None:
            return None
        if self.version is None:
            raise ValueError(f"{self.model}: no version chosen yet")
        return VersionRef(model=self.model, version=self.version, format=self.format)


class ContextScaling(Document):
    """YaRN (arXiv 2309.00071): the context is `original_tokens` x `factor`."""

    factor: float = Field(gt=1)
    original_tokens: int = Field(ge=16, description="The context with which the model was trained.")

    @property
    def context_tokens(self) -> int:
        return round(self.factor * self.original_tokens)


class EngineSettings(Document):
    """How one replica runs the model."""

    kind: Literal["vllm", "scripted"] = "vllm"  # "scripted" answers by a script, for tests: no model is loaded
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    max_model_len: int | None = Field(None, ge=16, description="Context in tokens; None: what the model has.")
    max_num_seqs: int = Field(64, ge=1, description="Sequences that one replica computes at once.")
    kv_cache_bytes: int = Field(
        1 << 30, ge=1 << 26, description="KV cache on a CPU; on a GPU it is a share of its memory."
    )
    gpu_memory_utilization: float = Field(0.92, gt=0, le=1)
    enforce_eager: bool = True
    prefix_caching: bool = True
    tensor_parallel: int = Field(1, ge=1, description="GPUs that share every layer.")
    pipeline_parallel: int = Field(1, ge=1, description="Groups of such GPUs, each with some of the layers.")
    expert_parallel: bool = Field(False, description="Experts lie whole on the GPUs that share a layer, not cut.")
    data_parallel: int = Field(
        1, ge=1, description="Copies of all but the experts of a mixture, which are spread over all of them."
    )
    expert_offload_bytes: int = Field(
        0, ge=0, description="Of the experts of each GPU, so much stays in the machine's memory."
    )
    draft: Draft | None = Field(None, description="Speculative decoding.")
    context_scaling: ContextScaling | None = Field(
        None, description="None: the catalog's, where max_model_len goes beyond what the model was trained with."
    )
    gpu_memory_bytes: int | None = Field(
        None,
        ge=1 << 30,
        description="Of one GPU, for whether it fits; None: of those in the platform's `nodes`, else of those that the "
        "catalog's layouts are made for.",
    )

    @property
    def sequences_per_rank(self) -> int:
        """Sequences that each data parallel rank computes at once, so that all together compute `max_num_seqs`."""
        return -(-self.max_num_seqs // self.data_parallel)

    @property
    def gpus(self) -> int:
        """GPUs that the layout takes, all of one machine."""
        return self.tensor_parallel * self.pipeline_parallel * self.data_parallel


class Canary(Document):
    """A new revision gets a share of the requests first. If it fails meanwhile, the old one goes on with all.

    It fails by what Ray Serve says of it, or by what gateways saw: requests that it answered with an error of its own
    (5xx), or not at all, or whose streams it broke off.
    """

    weight: float = Field(0.05, gt=0, lt=1, description="Share of the requests.")
    for_s: float = Field(600, gt=0, description="Then the new revision gets all.")
    max_failed_share: float = Field(0.05, ge=0, lt=1, description="Of its requests, so many may fail.")
    min_requests: int = Field(
        20, ge=1, description="While it had fewer, as many may fail as if it had had so many: one is no proof."
    )


class DeploymentSpec(Document):
    """One model, in one version and format, served under its own name."""

    model: str = Field(description="A catalog name: what clients write in `model`.")
    version: str | None = Field(None, description="A version of the model; None: the newest published one.")
    format: str = "safetensors"
    engine: EngineSettings = EngineSettings()
    autoscaling: Autoscaling = Autoscaling()
    cpus_per_replica: float = Field(1, gt=0)
    gpus_per_replica: float = Field(0, ge=0)
    graceful_shutdown_timeout_s: float = Field(
        600,
        ge=0,
        description="A replica that leaves goes on with its streams for so long. Longer ones break off with an error, "
        "and are billed up to there.",
    )

    template_overhead_tokens: int | None = Field(
        None,
        ge=0,
        description="Most that the chat template adds to a request; None: as the pull measured it. Never below the "
        "catalog's.",
    )
    canary: Canary | None = Field(
        None, description="How this spec takes over from an older revision; None: at once, when it is ready."
    )

    @model_validator(mode="after")
    def _canary_runs(self) -> DeploymentSpec:
        if self.canary is not None and self.autoscaling.min_replicas == 0:
            raise ValueError("a canary must be awake: set autoscaling.min_replicas to 1 or more, or leave canary out")
        return self

    def ref(self) -> VersionRef:
        """The exact version. ValueError while `version` is None: control resolves it first."""
        if self.version is None:
            raise ValueError(f"{self.model}: no version chosen yet")
        return VersionRef(model=self.model, version=self.version, format=self.format)

    def revision(self) -> str:
        """The name of the immutable Serve application that runs exactly this spec, however it takes over.

        Defaults are left out of the digest: a field that a later zenray adds does not start every model anew.
        """
        document = self.model_dump_json(exclude={"canary"}, exclude_defaults=True)
        digest = hashlib.sha256(document.encode()).hexdigest()[:8]
        return f"{self.model}--{self.version}--{digest}"


class DeploymentState(StrEnum):
    """pending → starting → ready ⇄ asleep; any → failed; any → stopping → stopped."""

    PENDING = "pending"  # asked for; Ray Serve does not know it yet
    STARTING = "starting"  # Ray Serve has it; no replica is ready
    READY = "ready"
    ASLEEP = "asleep"  # scaled to zero; the next request wakes it
    FAILED = "failed"  # the reason stands in the deployment's `message`
    STOPPING = "stopping"
    STOPPED = "stopped"

    @property
    def takes_traffic(self) -> bool:
        return self in (DeploymentState.READY, DeploymentState.ASLEEP)
