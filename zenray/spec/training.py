"""Training jobs: how a published version becomes a better one, with or without teachers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from zenray.spec.documents import Document
from zenray.spec.errors import InvalidValue, suggest
from zenray.spec.lineage import BaseVersion, NewVersion
from zenray.spec.parallelism import Axes, check_axes, check_sequence
from zenray.spec.versions import check_name

BuiltinCorpus = Literal["code", "prose", "mathematics"]
Recompute = Literal["none", "selective", "full"]
Positive = Annotated[float, Field(gt=0)]


class DataSource(Document):
    """Text of one domain: files, or one of the small real corpora that every machine has (`zenray data`)."""

    domain: str = Field(min_length=1)
    path: str | None = Field(
        None,
        description="A .jsonl or .parquet file (column `text`), a text file, or a folder of those: on every worker's "
        "machine, or s3://BUCKET/PREFIX with credentials from the environment.",
    )
    endpoint_url: str | None = Field(None, description="Of an S3 server other than Amazon's.")
    builtin: BuiltinCorpus | None = Field(
        None, description="code: Python's library; prose: Python's manual; mathematics: sympy's documentation."
    )
    weight: Positive = Field(1.0, description="The domain's share of the sequences, relative to the other weights.")

    @model_validator(mode="after")
    def _one_origin(self) -> DataSource:
        if (self.path is None) == (self.builtin is None):
            raise ValueError(f"domain {self.domain!r} needs either path or builtin")
        return self


class TrainingData(Document):
    """What is read. Sequences are packed from whole documents that do not see one another."""

    sources: tuple[DataSource, ...] = Field(min_length=1)
    sequence_tokens: int = Field(512, ge=8)
    validation_share: float = Field(0.02, ge=0, le=0.5, description="Documents kept from training, to measure on.")
    tokenised_by: Literal["workers", "cluster"] = Field(
        "workers",
        description="workers: each machine turns all text into tokens for itself. cluster: Ray Data does it once, file "
        "by file over all machines, and keeps the tokens in the store.",
    )

    @model_validator(mode="after")
    def _domains_differ(self) -> TrainingData:
        names = [source.domain for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"domains repeat: {', '.join(names)}")
        return self


class Optimisation(Document):
    """AdamW with a warm-up and a cosine, and gradients clipped by expert, then as a whole."""

    optimizer: Literal["adamw", "adamw-8bit"] = Field(
        "adamw",
        description="adamw: moments in float32. adamw-8bit: in 8 bits with a scale for every 256 (arXiv 2110.02861, "
        "by bitsandbytes), 2 bytes a weight for 8; weights whose rows are not a multiple of 256 long keep float32.",
    )
    learning_rate: Positive = 1e-4
    final_share: float = Field(0.1, ge=0, le=1, description="The last step's learning rate, as a share of the highest.")
    warmup_steps: int = Field(10, ge=0)
    router_scale: Positive = Field(1.0, description="Routers learn at this multiple of the learning rate.")
    balance_coefficient: float | None = Field(
        None,
        ge=0,
        description="Of the routers' balance loss in this job; None: the network's own. Few steps need a large one: "
        "the loss has no gradient where experts are evenly loaded.",
    )
    weight_decay: float = Field(0.1, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    epsilon: Positive = 1e-8
    clip_norm: Positive = Field(1.0, description="The norm of all gradients together is kept at or below this.")
    expert_clip_norm: Positive | None = Field(
        None, description="First, the norm of each single expert's gradient is kept at or below this."
    )


class Workers(Document):
    """How many processes train, and how experts lie on them.

    A run may go on with others. Its results are then the same up to rounding, and up to this: a pass is as large as
    all workers compute at once, and the balance loss of each pass takes the loads of the step's passes so far; networks
    with a capacity factor or with expert choice, which look at one worker's pass alone, are trained a little otherwise.
    """

    count: int = Field(1, ge=1)
    expert_parallel: int = Field(1, ge=1, description="Workers that share one set of experts; divides count.")
    fully_sharded: bool = Field(
        False,
        description="Cut every weight, gradient and moment over the workers (FSDP, ZeRO-3): less memory, more traffic.",
    )
    pipeline_parallel: int = Field(
        1, ge=1, description="Stages that share the layers; divides count, and the other axes what is left."
    )
    context_parallel: int = Field(
        1,
        ge=1,
        description="Workers of a stage that share each sequence; sequence_tokens is a multiple of twice as many.",
    )
    compiled: bool = Field(
        False, description="torch.compile over every layer: a slow first step, then faster ones on most GPUs."
    )
    gpu: bool = Field(False, description="One GPU for each worker, and NCCL; otherwise CPUs and gloo.")
    cpus: float = Field(1, gt=0, description="CPUs that Ray sets aside for each worker.")
    max_failures: int = Field(3, ge=-1, description="Restarts from the last checkpoint; -1: without limit.")
    replacement_patience_s: float | None = Field(
        None,
        ge=0,
        description="After a failure, how long to wait for as many workers as before, looked at every minute. Then as "
        "many go on as have room and share out the steps as they are; if none can, the run ends. None: it waits.",
    )

    @property
    def axes(self) -> Axes:
        return Axes(self.pipeline_parallel, self.context_parallel, self.expert_parallel)

    @model_validator(mode="after")
    def _whole_groups(self) -> Workers:
        try:
            check_axes(self.count, self.axes)
        except InvalidValue as error:  # pydantic says where in the file
            raise ValueError(f"{error.message} {error.hint}") from None
        return self


class Checkpoints(Document):
    """Written in the background while training goes on. A run that is started again goes on from the last one."""

    every_steps: int = Field(100, ge=1)
    keep: int = Field(2, ge=1, description="Of the newest; older ones are deleted, and all once the version is there.")
    upload_patience_s: float = Field(
        600, ge=0, description="A store that is away is tried again for so long, then the run fails."
    )
    most_waiting: int = Field(2, ge=1, description="Unsent checkpoints on a worker's disk before training waits.")


class Faults(Document):
    """What a run does about steps that would spoil it.

    A step is not finite when its loss or gradient norm is infinite or no number. It diverges when its loss is above
    the median of the last `window_steps` steps by more than `deviations` robust standard deviations (1.4826 times the
    median distance from the median) and by more than `least_rise`; the first `window_steps` steps are not judged so.

    skip: nothing is learnt from the step. roll_back: the last checkpoint is taken up again, and goes on with the data
    after the step's. stop: the run ends; its last checkpoint is from before the step.
    """

    not_finite: Literal["skip", "roll_back", "stop"] = "skip"
    diverging: Literal["ignore", "skip", "roll_back", "stop"] = "ignore"
    window_steps: int = Field(32, ge=4)
    deviations: Positive = 8.0
    least_rise: Positive = 1.0
    most_in_a_row: int = Field(
        10, ge=1, description="After so many steps skipped, or rollbacks without a new checkpoint, the run stops."
    )


class Evaluation(Document):
    every_steps: int = Field(100, ge=1)
    sequences: int = Field(8, ge=0, description="Of each domain's held-out part, at most; 0: no evaluation.")


class MlflowTracking(Document):
    """Needs the optional package `mlflow`. Credentials come from the workers' environment."""

    uri: str = Field(description="A tracking server, or file:/PATH.")
    experiment: str = Field("zenray", min_length=1)


class WandbTracking(Document):
    """Needs the optional package `wandb`. The key comes from the workers' environment (WANDB_API_KEY)."""

    project: str = Field(min_length=1)
    entity: str | None = None
    mode: Literal["online", "offline"] = "online"


class Tracking(Document):
    """Where metrics go besides zenray's own events. It changes nothing of the result."""

    mlflow: MlflowTracking | None = None
    wandb: WandbTracking | None = None


class _TrainingJob(Document):
    name: str
    base: BaseVersion = Field(description="Gives the network, the tokenizer and, unless they are fresh, the weights.")
    into: NewVersion
    weights: Literal["base", "fresh"] = "base"
    data: TrainingData
    steps: int = Field(ge=1)
    sequences_per_step: int = Field(8, ge=1, description="Over all workers.")
    sequences_per_pass: int = Field(4, ge=1, description="That one worker computes at once; the rest accumulates.")
    train: tuple[str, ...] = Field(
        ("dense", "routers", "experts"),
        min_length=1,
        description="What learns: dense (all but the next two), routers, experts, or experts/GROUP for one group.",
    )
    optimisation: Optimisation = Optimisation()
    workers: Workers = Workers()
    checkpoints: Checkpoints = Checkpoints()
    evaluation: Evaluation = Evaluation()
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Of the arithmetic; bfloat16 keeps float32 master weights."
    )
    activation_checkpointing: Recompute = Field(
        "full",
        description="Less memory for more computing: the backward pass recomputes whole layers (full; true), or only "
        "what is cheap, keeping products and attention (selective), or nothing (none; false).",
    )
    faults: Faults = Faults()
    tracking: Tracking = Tracking()
    seed: int = 0
    stock_format: Literal["none", "exact", "replicate"] = Field(
        "none",
        description="Also publish a format that stock Qwen3-MoE or Mixtral classes load, under their name: where that "
        "is exact, or also with dense layers said as equal experts. Refused where no class says the model.",
    )

    @field_validator("activation_checkpointing", mode="before")
    @classmethod
    def _yes_or_no(cls, value: object) -> object:
        return {True: "full", False: "none"}[value] if isinstance(value, bool) else value

    @field_validator("name")
    @classmethod
    def _legal(cls, value: str) -> str:
        return check_name("job", value)

    @field_validator("train")
    @classmethod
    def _known_parts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for part in value:
            if part not in ("dense", "routers", "experts") and not part.startswith("experts/"):
                raise ValueError(f"{part!r} cannot be trained: write dense, routers, experts or experts/GROUP")
        return value

    @model_validator(mode="after")
    def _equal_parts(self) -> _TrainingJob:
        try:
            check_sequence(self.data.sequence_tokens, self.workers.context_parallel)
        except InvalidValue as error:
            raise ValueError(f"{error.message} {error.hint}") from None
        return self

    @model_validator(mode="after")
    def _whole_passes(self) -> _TrainingJob:
        readers = self.workers.axes.data(self.workers.count)
        at_once = readers * self.sequences_per_pass
        if self.sequences_per_step % at_once:
            raise ValueError(
                f"sequences_per_step is {self.sequences_per_step}, but {readers} workers with "
                f"sequences_per_pass {self.sequences_per_pass} compute {at_once} at once: use a multiple of {at_once}"
            )
        return self


class PretrainJob(_TrainingJob):
    """Train on text: from fresh weights, or on from those of a published version."""

    kind: Literal["pretrain"]


class TeacherEndpoint(Document):
    """A running vLLM server with a model of the student's tokenizer."""

    base_url: str = Field(pattern=r"^https?://", description="Such as http://teacher:8000/v1.")
    model: str = Field(min_length=1)
    key_from: str | None = Field(None, description="The environment variable of the workers that holds its API key.")
    requests_at_once: int = Field(8, ge=1)


class Teacher(Document):
    """A published version that runs beside the student, or an endpoint that is asked."""

    version: BaseVersion | None = None
    endpoint: TeacherEndpoint | None = None
    weight: Positive = Field(1.0, description="Relative to those of the other teachers of a domain.")
    domains: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="Of the data's, those whose sequences it teaches, such as an expert group's; None: all. A sequence "
        "without a teacher is learnt from its text alone.",
    )
    top_logits: int | None = Field(
        None,
        ge=1,
        description="Keep this many of each position's likeliest tokens on disk, asked for once; all others count as "
        "one. Needed for an endpoint. None: all logits, computed anew in every step.",
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Teacher:
        if (self.version is None) == (self.endpoint is None):
            raise ValueError("a teacher needs either version or endpoint")
        if self.endpoint is not None and self.top_logits is None:
            raise ValueError("a teacher behind an endpoint needs top_logits: it does not send all of its logits")
        return self


class DistillJob(_TrainingJob):
    """Train on text and toward teachers: L = L_LM + λ · KL(teacher ‖ student) (zen-mode blog, phase 3)."""

    kind: Literal["distill"]
    teachers: tuple[Teacher, ...] = Field(min_length=1)
    distillation: float = Field(1.0, ge=0, description="λ, for the mean over a token's teachers by their weights.")
    temperature: Positive = Field(1.0, description="Softens both distributions; the loss is scaled by its square.")

    @model_validator(mode="after")
    def _endpoints_do_not_soften(self) -> DistillJob:
        if self.temperature != 1 and any(teacher.endpoint for teacher in self.teachers):
            raise ValueError(
                f"temperature is {self.temperature}, but a teacher behind an endpoint tells its distribution at 1 only"
            )
        return self

    @model_validator(mode="after")
    def _known_domains(self) -> DistillJob:
        known = [source.domain for source in self.data.sources]
        for name in (name for teacher in self.teachers for name in teacher.domains or ()):
            if name not in known:
                raise ValueError(f"the data has no domain {name!r}, which a teacher names. {suggest(name, known)}")
        return self

    @property
    def shares(self) -> tuple[tuple[float, ...], ...]:
        """Of each teacher, in each of the data's domains: its weight among the domain's teachers, or 0."""
        of_domains = []
        for source in self.data.sources:
            weights = [
                teacher.weight if teacher.domains is None or source.domain in teacher.domains else 0.0
                for teacher in self.teachers
            ]
            of_domains.append([weight / (sum(weights) or 1.0) for weight in weights])
        return tuple(zip(*of_domains, strict=True))


TrainingJob = PretrainJob | DistillJob
